//! From a plan to Kubernetes objects. Pure, as the plan is: the same plan and settings give the same objects.
//!
//! Every child carries the labels of [`labels`] and its owner, so that it is found again and removed with it. What may
//! change while it lives (Deployments, Services, policies) is applied as it is; what may not (Jobs, ConfigMaps) has the
//! attempt or a hash of its content in its name and is created once.

mod encoders;
mod job;
mod names;
mod network;
mod pod;
mod record;
mod serving;
mod store_jobs;

pub(crate) use encoders::GRAPH_LABEL;
pub use encoders::{ENCODER_LABEL, ENCODERS_ANNOTATION, Encoder, render_encoders};
pub(crate) use job::{MADE_FOR_LABEL, QUEUE_LABEL};
pub use job::{RunObjects, attempt_of, render_run};
pub use names::{
    ATTEMPT_LABEL, KIND_LABEL, MANAGED_BY, NAME_LABEL, OWNER_ANNOTATION, child_name, labels, selector, service_name,
};
pub(crate) use names::{COMPLETION_INDEX, short_digest};
pub use pod::{CONTAINER, RESULT_FILE};
pub use record::{CONFIG_ANNOTATION, MadeOf, render_record};
pub use serving::{
    ARTIFACT_ANNOTATION, REVISION_ANNOTATION, Revision, Servers, ServingObjects, Track, deployment_name,
    render_servers, render_serving, server_selector,
};
pub(crate) use store_jobs::access_of;
pub use store_jobs::{ACCESS_ANNOTATION, is_verification, render_removal, render_verification};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use sensorium_api::run::JobKey;

use crate::plan::Program;

/// Where the pods' programs come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// Image with `sensorium-trainer`.
    pub trainer: String,
    /// Image with `sensorium-server`.
    pub server: String,
    /// Image with `sensorium`.
    pub cli: String,
    /// When a node fetches them: `Always`, `IfNotPresent` or `Never`.
    pub pull_policy: String,
    /// Secrets with the registry's credentials.
    pub pull_secrets: Vec<String>,
}

impl Images {
    fn of(&self, program: Program) -> &str {
        match program {
            Program::Trainer => &self.trainer,
            Program::Server => &self.server,
        }
    }
}

/// Whose children are rendered.
#[derive(Clone, Debug)]
pub struct Owner {
    /// Kind, namespace and name.
    pub job: JobKey,
    /// The reference that every child carries.
    pub reference: OwnerReference,
}

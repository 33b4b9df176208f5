//! From a resource to what must run.

mod compression;
mod config;
mod order;
mod ranks;
mod serving;
mod spec_hash;
mod storage;
mod template;
mod training;
mod workload;

pub use order::{OrderError, order};
pub use ranks::Process;
pub use template::{Part, Resolve, Template};
pub use workload::{ArtifactVolume, HttpProbe, Lifetime, Mount, MountSource, Program, Role, RunPolicy, WorkloadPlan};

use std::collections::BTreeMap;

use sensorium_api::Resource;
use sensorium_api::manifest::unavailable;

/// Why a resource has no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A ModelArtifact is a record: there is nothing to run.
    #[error("ModelArtifact/{name} runs nothing; plan the job that makes it or serves it")]
    RunsNothing {
        /// Name of the artifact.
        name: String,
    },
    /// A spec that is not JSON, such as one with a NaN.
    #[error("the spec of {job} is not JSON")]
    Spec {
        /// The job.
        job: String,
        /// What the encoder says.
        source: serde_json::Error,
    },
    /// Something that no program of this version does; the API server takes it all the same.
    #[error("{what}")]
    NotAvailable {
        /// Which fields, what they hold, and what to write.
        what: String,
    },
    /// An encoder of a ServingJob that its artifact does not have.
    #[error("spec.encoders names graph {graph}, which artifact {artifact} does not have; its graphs are {}", .known.join(", "))]
    UnknownGraph {
        /// The graph.
        graph: String,
        /// The artifact, as the spec names it.
        artifact: String,
        /// The graphs that it has.
        known: Vec<String>,
    },
}

/// What is known at the start of a run and not when its manifest is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pins {
    /// `sha256:` digests of artifacts that the manifest names, by that name. The run reads exactly these, whatever the
    /// names point to later.
    pub artifacts: BTreeMap<String, String>,
    /// Workers to start, where they are not as many as the manifest says; only data parallelism changes.
    pub workers: Option<u32>,
    /// Graphs of the artifact that is to be served, where they are known.
    pub graphs: Option<Vec<String>>,
    /// Whether nodes fetch artifacts from buckets and give them to pods as volumes.
    pub node_cache: bool,
}

impl Pins {
    fn pin(&self, artifact: &mut String) {
        if let Some(digest) = self.artifacts.get(artifact) {
            digest.clone_into(artifact);
        }
    }
}

/// That programs of this version can do what `resource` asks for: the API server takes more.
///
/// # Errors
/// [`PlanError::NotAvailable`].
pub fn check_available(resource: &Resource) -> Result<(), PlanError> {
    let Resource::TrainingJob(job) = resource else { return Ok(()) };
    let unavailable: Vec<String> =
        unavailable(&job.spec).into_iter().map(|(field, cause)| format!("{field} {cause}")).collect();
    if unavailable.is_empty() { Ok(()) } else { Err(PlanError::NotAvailable { what: unavailable.join("; ") }) }
}

/// What `resource` needs to run.
///
/// # Errors
/// [`PlanError::RunsNothing`] for a ModelArtifact, [`PlanError::Spec`].
pub fn plan(resource: &Resource) -> Result<WorkloadPlan, PlanError> {
    plan_pinned(resource, &Pins::default())
}

/// [`plan`], for a run of which more is known. Its spec hash is that of the manifest.
///
/// # Errors
/// As [`plan`], and [`PlanError::UnknownGraph`].
pub fn plan_pinned(resource: &Resource, pins: &Pins) -> Result<WorkloadPlan, PlanError> {
    match resource {
        Resource::TrainingJob(job) => training::plan_training(job, pins),
        Resource::CompressionJob(job) => compression::plan_compression(job, pins),
        Resource::ServingJob(job) => serving::plan_serving(job, pins),
        Resource::ModelArtifact(_) => Err(PlanError::RunsNothing { name: resource.name() }),
    }
}

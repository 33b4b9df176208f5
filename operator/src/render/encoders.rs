//! Encoders that are services of their own.
//!
//! Everything about one is called after a digest of what its pods are made of. Servers name the encoders that they call,
//! so a rollout brings encoders of its own, and the old ones serve the old servers until the last of these is gone.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{PodTemplateSpec, Service, ServiceSpec};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use sensorium_api::EncoderService;
use serde::{Deserialize, Serialize};

use super::names::{labels, selector, service_name};
use super::network;
use super::pod::Place;
use super::serving::{MIN_READY_SECONDS, Revision, autoscaler, budget, matching, metadata, service_ports};
use crate::plan::Role;

/// Annotation of a server's pod: names of the encoders that it calls, joined by commas.
pub const ENCODERS_ANNOTATION: &str = "sensorium.dev/encoders";
/// Label of an encoder's pods: its name.
pub const ENCODER_LABEL: &str = "sensorium.dev/encoder";
/// Label of an encoder's pods: the graph that it runs.
pub(crate) const GRAPH_LABEL: &str = "sensorium.dev/graph";
/// Component of encoders' pods.
const ENCODER: &str = "encoder";

/// One encoder's objects. The file that its pods read is that of the servers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Encoder {
    /// The graph that it runs.
    pub graph: String,
    /// Name of all of them.
    pub name: String,
    /// Its pods.
    pub deployment: Deployment,
    /// Their addresses, for the servers. Headless: a server spreads its requests itself, since a connection stays with
    /// one pod.
    pub service: Service,
    /// Keeps node drains from taking too many pods at once.
    pub budget: PodDisruptionBudget,
    /// Lets in the job's servers, and to the metrics whoever may reach the servers.
    pub network: NetworkPolicy,
    /// Lets the load decide on the number of pods.
    pub autoscaler: Option<HorizontalPodAutoscaler>,
}

/// Renders the encoders of a revision, in the order of the spec.
pub fn render_encoders(revision: &Revision<'_>) -> Vec<Encoder> {
    let encoders = revision.spec.encoders.iter().filter_map(|encoder| {
        let role = revision.plan.roles.iter().find(|role| role.name == encoder.graph)?;
        Some(one(revision, encoder, role))
    });
    encoders.collect()
}

fn one(revision: &Revision<'_>, encoder: &EncoderService, role: &Role) -> Encoder {
    let Revision { owner, spec, plan, .. } = *revision;
    let graph = encoder.graph.replace('_', "-");
    // Pods of one graph are spread among themselves, whatever their revision; their name can't be known yet.
    let mut peers = selector(&owner.job);
    peers.insert(GRAPH_LABEL.to_owned(), encoder.graph.clone());
    let place = Place { plan, role, job: &graph, domain: None, services: &BTreeMap::new() };
    let (pod, digest) = revision.pod(&place, peers);
    let name = service_name(&owner.job.name, &format!("{graph}-{digest}"));

    let mut selected = selector(&owner.job);
    selected.insert(ENCODER_LABEL.to_owned(), name.clone());
    let mut pod_labels = labels(&owner.job, ENCODER);
    pod_labels.insert(ENCODER_LABEL.to_owned(), name.clone());
    pod_labels.insert(GRAPH_LABEL.to_owned(), encoder.graph.clone());
    let template_metadata = ObjectMeta {
        labels: Some(pod_labels),
        annotations: Some(revision.annotations(&digest)),
        ..ObjectMeta::default()
    };
    let replicas = encoder.autoscaling.is_none().then(|| i32::try_from(role.replicas).unwrap_or(i32::MAX));
    let metadata = || metadata(owner, name.clone(), ENCODER);
    Encoder {
        graph: encoder.graph.clone(),
        deployment: Deployment {
            metadata: metadata(),
            spec: DeploymentSpec {
                replicas,
                selector: matching(selected.clone()),
                min_ready_seconds: Some(MIN_READY_SECONDS),
                progress_deadline_seconds: i32::try_from(spec.rollout.progress_deadline_seconds).ok(),
                // Another revision is another Deployment.
                revision_history_limit: Some(0),
                template: PodTemplateSpec { metadata: Some(template_metadata), spec: Some(pod) },
                ..DeploymentSpec::default()
            },
            status: None,
        },
        service: Service {
            metadata: metadata(),
            spec: Some(ServiceSpec {
                cluster_ip: Some("None".to_owned()),
                selector: Some(selected.clone()),
                ports: Some(service_ports(spec, role)),
                ..ServiceSpec::default()
            }),
            status: None,
        },
        network: NetworkPolicy {
            metadata: metadata(),
            spec: Some(network::encoder(&owner.job, spec, role, selected.clone())),
        },
        autoscaler: encoder.autoscaling.as_ref().map(|scaling| autoscaler(metadata(), scaling, name.clone())),
        budget: budget(metadata(), spec, selected),
        name,
    }
}

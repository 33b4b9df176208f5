//! A ServingJob's objects: the Deployment of the servers, a second one while a canary runs, one Service over both. What its
//! encoders are made of is in [`super::encoders`].

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::autoscaling::v2::{
    CrossVersionObjectReference, HorizontalPodAutoscaler, HorizontalPodAutoscalerSpec, MetricIdentifier, MetricSpec,
    MetricTarget, PodsMetricSource, ResourceMetricSource,
};
use k8s_openapi::api::core::v1::{
    ConfigMap, HTTPGetAction, Lifecycle, LifecycleHandler, PodSpec, PodTemplateSpec, Probe, Service, ServicePort,
    ServiceSpec, SleepAction,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sensorium_api::run::JobKey;
use sensorium_api::{Autoscaling, ScaleMetric, ServiceType, ServingJobSpec};
use serde_json::{Value, json};

use super::encoders::{ENCODERS_ANNOTATION, Encoder};
use super::names::{COMPONENT_LABEL, OWNER_ANNOTATION, child_name, labels, selector, service_name, short_digest};
use super::pod::{Files, Place, PodContext, pod_spec};
use super::{Images, Owner, network};
use crate::plan::{HttpProbe, Role, WorkloadPlan};

/// Component of the servers' pods.
pub(super) const SERVER: &str = "server";
/// Label that tells stable servers from canaries; the Service does not look at it.
const TRACK_LABEL: &str = "sensorium.dev/track";
/// Annotation of a pod template: the revision that it serves.
pub const REVISION_ANNOTATION: &str = "sensorium.dev/revision";
/// Annotation of a pod template: digest of the artifact that it serves.
pub const ARTIFACT_ANNOTATION: &str = "sensorium.dev/artifact-digest";
/// A server that is to stop goes on answering for so long, because its address takes that long to leave every client's
/// list.
const DEREGISTRATION_SECONDS: i64 = 5;
/// Time for requests that were accepted to be answered, on top, where the spec says nothing: what the server takes by itself.
const DRAIN_SECONDS: i64 = 25;
/// And for what is left to do then.
const LAST_SECONDS: i64 = 5;
/// A new server counts as one after it has been ready for so long: one that answers once and dies does not.
pub(super) const MIN_READY_SECONDS: i32 = 3;
/// How long a server may take to load its model, in probes of a second each.
const STARTUP_PROBES: i32 = 600;

/// Which of the two Deployments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Track {
    /// The one that serves for good.
    Stable,
    /// The one that is tried.
    Canary,
}

impl Track {
    fn as_str(self) -> &'static str {
        match self {
            Self::Stable => "server",
            Self::Canary => "canary",
        }
    }
}

/// The objects of a ServingJob that do not depend on a revision.
#[derive(Clone, Debug)]
pub struct ServingObjects {
    /// The name by which clients reach the servers.
    pub service: Service,
    /// Keeps node drains from taking too many servers at once.
    pub budget: PodDisruptionBudget,
    /// Who may reach the servers; none where everyone may.
    pub network: Option<NetworkPolicy>,
    /// Lets the load decide on the number of stable servers.
    pub autoscaler: Option<HorizontalPodAutoscaler>,
    /// Prometheus operator's PodMonitor, for clusters that know the kind.
    pub monitor: Value,
}

pub(super) fn metadata(owner: &Owner, name: String, component: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(owner.job.namespace.clone()),
        labels: Some(labels(&owner.job, component)),
        owner_references: Some(vec![owner.reference.clone()]),
        ..ObjectMeta::default()
    }
}

/// Labels of the servers' pods, of both tracks; encoders have other ones.
pub fn server_selector(job: &JobKey) -> BTreeMap<String, String> {
    let mut labels = selector(job);
    labels.insert(COMPONENT_LABEL.to_owned(), SERVER.to_owned());
    labels
}

/// Name of a track's Deployment.
pub fn deployment_name(job: &JobKey, track: Track) -> String {
    child_name(&job.name, track.as_str())
}

/// Renders everything but the servers.
pub fn render_serving(owner: &Owner, spec: &ServingJobSpec, role: &Role) -> ServingObjects {
    let name = || child_name(&owner.job.name, SERVER);
    let mut service_metadata = metadata(owner, service_name(&owner.job.name, ""), SERVER);
    service_metadata.annotations = Some(spec.service.annotations.clone()).filter(|annotations| !annotations.is_empty());
    let service = Service {
        metadata: service_metadata,
        spec: Some(ServiceSpec {
            type_: Some(spec.service.type_.as_str().to_owned()),
            selector: Some(server_selector(&owner.job)),
            ports: Some(offered(spec, service_ports(spec, role))),
            ..ServiceSpec::default()
        }),
        status: None,
    };
    let budget = budget(metadata(owner, name(), SERVER), spec, server_selector(&owner.job));
    let network = (!spec.network_access.open).then(|| NetworkPolicy {
        metadata: metadata(owner, name(), SERVER),
        spec: Some(network::servers(&owner.job, spec, role)),
    });
    let autoscaler = spec.autoscaling.as_ref().map(|scaling| {
        let scaled = deployment_name(&owner.job, Track::Stable);
        autoscaler(metadata(owner, name(), SERVER), scaling, scaled)
    });
    let monitor = json!({
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata(owner, name(), SERVER),
        "spec": {
            // Encoders, too.
            "selector": matching(selector(&owner.job)),
            "podMetricsEndpoints": [{"port": "metrics", "path": "/metrics"}],
        },
    });
    ServingObjects { service, budget, network, autoscaler, monitor }
}

pub(super) fn matching(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector { match_labels: Some(labels), match_expressions: None }
}

/// How many of the pods with these labels drained nodes may take away at the same time.
pub(super) fn budget(
    metadata: ObjectMeta,
    spec: &ServingJobSpec,
    labels: BTreeMap<String, String>,
) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata,
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(i32::try_from(spec.disruption_max_unavailable).unwrap_or(i32::MAX))),
            selector: Some(matching(labels)),
            // A server that is not ready anyway may go.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}

/// The ports of a role by which others reach it.
pub(super) fn service_ports(spec: &ServingJobSpec, role: &Role) -> Vec<ServicePort> {
    let service_port = |(name, number): (&String, &u16)| ServicePort {
        name: Some(name.clone()),
        port: i32::from(*number),
        // By name, so that while `ports` changes each pod is called at its own number.
        target_port: Some(IntOrString::String(name.clone())),
        protocol: Some("TCP".to_owned()),
        // Lets meshes and gateways speak HTTP/2 to it without being told. Over TLS, the two sides agree on it.
        app_protocol: (name == "grpc" && spec.security.tls.is_none()).then(|| "kubernetes.io/h2c".to_owned()),
        ..ServicePort::default()
    };
    role.ports.iter().map(service_port).collect()
}

/// The ports that clients are offered: the one of the metrics, which asks for neither certificate nor token, not outside of the cluster.
fn offered(spec: &ServingJobSpec, mut ports: Vec<ServicePort>) -> Vec<ServicePort> {
    if spec.service.type_ != ServiceType::ClusterIP {
        ports.retain(|port| port.name.as_deref() != Some("metrics"));
    }
    ports
}

/// Lets the load decide on the number of a Deployment's pods.
pub(super) fn autoscaler(metadata: ObjectMeta, scaling: &Autoscaling, deployment: String) -> HorizontalPodAutoscaler {
    let target = i32::try_from(scaling.target).unwrap_or(i32::MAX);
    let metric = match scaling.metric {
        ScaleMetric::Cpu => MetricSpec {
            type_: "Resource".to_owned(),
            resource: Some(ResourceMetricSource {
                name: "cpu".to_owned(),
                target: MetricTarget {
                    type_: "Utilization".to_owned(),
                    average_utilization: Some(target),
                    ..MetricTarget::default()
                },
            }),
            ..MetricSpec::default()
        },
        ScaleMetric::QueueDepth => MetricSpec {
            type_: "Pods".to_owned(),
            pods: Some(PodsMetricSource {
                metric: MetricIdentifier { name: "sensorium_server_queue_requests".to_owned(), selector: None },
                target: MetricTarget {
                    type_: "AverageValue".to_owned(),
                    average_value: Some(Quantity(target.to_string())),
                    ..MetricTarget::default()
                },
            }),
            ..MetricSpec::default()
        },
    };
    let spec = HorizontalPodAutoscalerSpec {
        scale_target_ref: CrossVersionObjectReference {
            api_version: Some("apps/v1".to_owned()),
            kind: "Deployment".to_owned(),
            name: deployment,
        },
        min_replicas: Some(i32::try_from(scaling.min_replicas).unwrap_or(i32::MAX)),
        max_replicas: i32::try_from(scaling.max_replicas).unwrap_or(i32::MAX),
        metrics: Some(vec![metric]),
        behavior: None,
    };
    HorizontalPodAutoscaler { metadata, spec, status: None }
}

/// What one revision of a ServingJob's pods is made of.
#[derive(Clone, Copy, Debug)]
pub struct Revision<'a> {
    /// Whose pods they are.
    pub owner: &'a Owner,
    /// What they are to be.
    pub spec: &'a ServingJobSpec,
    /// The spec's plan, pinned to an artifact.
    pub plan: &'a WorkloadPlan,
    /// Digest of that artifact.
    pub digest: &'a str,
    /// Where their programs come from.
    pub images: &'a Images,
}

impl Revision<'_> {
    /// The file that all pods read; its name has a digest of its content, so that old and new servers each keep theirs.
    pub(super) fn config(&self) -> ConfigMap {
        let lines: Vec<&str> = self.plan.files.iter().flat_map(|(name, text)| [name, "\n", text, "\n"]).collect();
        let content = lines.concat();
        let name = child_name(&self.owner.job.name, &format!("server-{}", short_digest(&content)));
        ConfigMap {
            metadata: metadata(self.owner, name, SERVER),
            immutable: Some(true),
            data: Some(self.plan.files.clone()),
            binary_data: None,
        }
    }

    /// A pod that serves until it is told to stop, and a digest of all that it is made of.
    pub(super) fn pod(&self, place: &Place<'_>, peers: BTreeMap<String, String>) -> (PodSpec, String) {
        let config = self.config().metadata.name.unwrap_or_default();
        let role = place.role;
        let mut pod = pod_spec(
            &PodContext { plan: self.plan, images: self.images, files: Files::ConfigMap(&config), peers },
            place,
        );
        let drain = self.spec.drain_seconds.map_or(DRAIN_SECONDS, i64::from);
        pod.termination_grace_period_seconds = Some(DEREGISTRATION_SECONDS + drain + LAST_SECONDS);
        for container in &mut pod.containers {
            container.lifecycle = Some(Lifecycle {
                pre_stop: Some(LifecycleHandler {
                    sleep: Some(SleepAction { seconds: DEREGISTRATION_SECONDS }),
                    ..LifecycleHandler::default()
                }),
                ..Lifecycle::default()
            });
            // Where the server says that it is ready it also says that it is alive.
            container.readiness_probe = role.readiness.as_ref().map(|ready| probe(role, ready, 2, 2));
            let alive = role.readiness.as_ref().map(|ready| HttpProbe { path: "/livez".to_owned(), ..ready.clone() });
            container.startup_probe = alive.as_ref().map(|alive| probe(role, alive, 1, STARTUP_PROBES));
            container.liveness_probe = alive.as_ref().map(|alive| probe(role, alive, 10, 6));
        }
        let revision = short_digest(&json!({"digest": self.digest, "pod": pod}).to_string());
        (pod, revision)
    }

    /// Annotations of every pod.
    pub(super) fn annotations(&self, revision: &str) -> BTreeMap<String, String> {
        BTreeMap::from([
            (REVISION_ANNOTATION.to_owned(), revision.to_owned()),
            (ARTIFACT_ANNOTATION.to_owned(), self.digest.to_owned()),
            (OWNER_ANNOTATION.to_owned(), self.owner.job.name.clone()),
        ])
    }
}

/// One track's servers, with the file that they read.
#[derive(Clone, Debug)]
pub struct Servers {
    /// The file.
    pub config: ConfigMap,
    /// The servers.
    pub deployment: Deployment,
    /// Digest of all that the pods are made of.
    pub revision: String,
}

/// Renders a track's servers, which call `encoders`. `replicas` is left out where something else decides on it.
pub fn render_servers(
    revision: &Revision<'_>,
    role: &Role,
    encoders: &[Encoder],
    track: Track,
    replicas: Option<u32>,
) -> Servers {
    let Revision { owner, spec, plan, .. } = *revision;
    let name = deployment_name(&owner.job, track);
    let services: BTreeMap<String, String> =
        encoders.iter().map(|encoder| (encoder.graph.clone(), encoder.name.clone())).collect();
    let place = Place { plan, role, job: &name, domain: None, services: &services };
    let (pod, digest) = revision.pod(&place, server_selector(&owner.job));
    let mut pod_labels = labels(&owner.job, SERVER);
    pod_labels.insert(TRACK_LABEL.to_owned(), track.as_str().to_owned());
    let mut selected = selector(&owner.job);
    selected.insert(TRACK_LABEL.to_owned(), track.as_str().to_owned());
    let mut annotations = revision.annotations(&digest);
    if !encoders.is_empty() {
        annotations.insert(ENCODERS_ANNOTATION.to_owned(), services.into_values().collect::<Vec<_>>().join(","));
    }
    let template_metadata =
        ObjectMeta { labels: Some(pod_labels), annotations: Some(annotations), ..ObjectMeta::default() };
    let rolling = RollingUpdateDeployment {
        max_surge: Some(IntOrString::Int(i32::try_from(spec.rollout.max_surge).unwrap_or(i32::MAX))),
        max_unavailable: Some(IntOrString::Int(0)),
    };
    let deployment = Deployment {
        metadata: metadata(owner, name, SERVER),
        spec: DeploymentSpec {
            replicas: replicas.map(|replicas| i32::try_from(replicas).unwrap_or(i32::MAX)),
            selector: matching(selected),
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".to_owned()),
                rolling_update: Some(rolling),
            }),
            min_ready_seconds: Some(MIN_READY_SECONDS),
            progress_deadline_seconds: i32::try_from(spec.rollout.progress_deadline_seconds).ok(),
            revision_history_limit: Some(2),
            template: PodTemplateSpec { metadata: Some(template_metadata), spec: Some(pod) },
            ..DeploymentSpec::default()
        },
        status: None,
    };
    Servers { config: revision.config(), deployment, revision: digest }
}

fn probe(role: &Role, asked: &HttpProbe, period: i32, failures: i32) -> Probe {
    let port = role.ports.get(&asked.port).copied().unwrap_or_default();
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(asked.path.clone()),
            port: IntOrString::Int(i32::from(port)),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(5),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}

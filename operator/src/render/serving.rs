//! A ServingJob's objects: the Deployment of the servers, a second one while a canary runs, one Service over both.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::autoscaling::v2::{
    CrossVersionObjectReference, HorizontalPodAutoscaler, HorizontalPodAutoscalerSpec, MetricIdentifier, MetricSpec,
    MetricTarget, PodsMetricSource, ResourceMetricSource,
};
use k8s_openapi::api::core::v1::{
    ConfigMap, HTTPGetAction, Lifecycle, LifecycleHandler, PodTemplateSpec, Probe, Service, ServicePort, ServiceSpec,
    SleepAction,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sensorium_api::run::JobKey;
use sensorium_api::{Autoscaling, ScaleMetric, ServingJobSpec};
use serde_json::{Value, json};

use super::names::{OWNER_ANNOTATION, child_name, labels, selector, short_digest};
use super::pod::{Place, PodContext, pod_spec};
use super::{Images, Owner, network};
use crate::plan::{Role, WorkloadPlan};

/// Label that tells stable servers from canaries; the Service does not look at it.
const TRACK_LABEL: &str = "sensorium.dev/track";
/// Annotation of a pod template: the revision that it serves.
pub const REVISION_ANNOTATION: &str = "sensorium.dev/revision";
/// Annotation of a pod template: digest of the artifact that it serves.
pub const ARTIFACT_ANNOTATION: &str = "sensorium.dev/artifact-digest";
/// A server that is to stop goes on answering for so long, because its address takes that long to leave every client's
/// list.
const DEREGISTRATION_SECONDS: i64 = 5;
/// Time for requests that were accepted to be answered, on top.
const DRAIN_SECONDS: i64 = 30;
/// A new server counts as one after it has been ready for so long: one that answers once and dies does not.
const MIN_READY_SECONDS: i32 = 3;
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

fn metadata(owner: &Owner, name: String, component: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(owner.job.namespace.clone()),
        labels: Some(labels(&owner.job, component)),
        owner_references: Some(vec![owner.reference.clone()]),
        ..ObjectMeta::default()
    }
}

/// Name of a track's Deployment.
pub fn deployment_name(job: &JobKey, track: Track) -> String {
    child_name(&job.name, track.as_str())
}

/// Renders everything but the servers.
pub fn render_serving(owner: &Owner, spec: &ServingJobSpec, role: &Role) -> ServingObjects {
    let name = || child_name(&owner.job.name, "server");
    let matching = || LabelSelector { match_labels: Some(selector(&owner.job)), match_expressions: None };
    let mut service_metadata = metadata(owner, child_name(&owner.job.name, ""), "server");
    service_metadata.annotations = Some(spec.service.annotations.clone()).filter(|annotations| !annotations.is_empty());
    let service = Service {
        metadata: service_metadata,
        spec: Some(ServiceSpec {
            type_: Some(spec.service.type_.as_str().to_owned()),
            selector: Some(selector(&owner.job)),
            ports: Some(role.ports.iter().map(service_port).collect()),
            ..ServiceSpec::default()
        }),
        status: None,
    };
    let budget = PodDisruptionBudget {
        metadata: metadata(owner, name(), "server"),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(i32::try_from(spec.disruption_max_unavailable).unwrap_or(i32::MAX))),
            selector: Some(matching()),
            // A server that is not ready anyway may go.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    };
    let network = (!spec.network_access.open).then(|| NetworkPolicy {
        metadata: metadata(owner, name(), "server"),
        spec: Some(network::servers(&owner.job, spec, role)),
    });
    let autoscaler = spec.autoscaling.as_ref().map(|scaling| HorizontalPodAutoscaler {
        metadata: metadata(owner, name(), "server"),
        spec: autoscaler(scaling, deployment_name(&owner.job, Track::Stable)),
        status: None,
    });
    let monitor = json!({
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata(owner, name(), "server"),
        "spec": {
            "selector": matching(),
            "podMetricsEndpoints": [{"port": "metrics", "path": "/metrics"}],
        },
    });
    ServingObjects { service, budget, network, autoscaler, monitor }
}

fn service_port((name, number): (&String, &u16)) -> ServicePort {
    let port = i32::from(*number);
    ServicePort {
        name: Some(name.clone()),
        port,
        target_port: Some(IntOrString::Int(port)),
        protocol: Some("TCP".to_owned()),
        // Lets meshes and gateways speak HTTP/2 to it without being told.
        app_protocol: (name == "grpc").then(|| "kubernetes.io/h2c".to_owned()),
        ..ServicePort::default()
    }
}

fn autoscaler(scaling: &Autoscaling, deployment: String) -> HorizontalPodAutoscalerSpec {
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
    HorizontalPodAutoscalerSpec {
        scale_target_ref: CrossVersionObjectReference {
            api_version: Some("apps/v1".to_owned()),
            kind: "Deployment".to_owned(),
            name: deployment,
        },
        min_replicas: Some(i32::try_from(scaling.min_replicas).unwrap_or(i32::MAX)),
        max_replicas: i32::try_from(scaling.max_replicas).unwrap_or(i32::MAX),
        metrics: Some(vec![metric]),
        behavior: None,
    }
}

/// One track's servers, with the file that they read.
#[derive(Clone, Debug)]
pub struct Servers {
    /// The file; its name has a digest of its content, so that old and new servers each keep theirs.
    pub config: ConfigMap,
    /// The servers.
    pub deployment: Deployment,
    /// Digest of all that the pods are made of.
    pub revision: String,
}

/// Renders a track's servers. `replicas` is left out where something else decides on it; `digest` is that of the
/// artifact which `plan` is pinned to.
pub fn render_servers(
    owner: &Owner,
    spec: &ServingJobSpec,
    plan: &WorkloadPlan,
    role: &Role,
    digest: &str,
    track: Track,
    replicas: Option<u32>,
    images: &Images,
) -> Servers {
    let content: String = plan.files.iter().map(|(name, text)| format!("{name}\n{text}\n")).collect();
    let config_name = child_name(&owner.job.name, &format!("server-{}", short_digest(&content)));
    let config = ConfigMap {
        metadata: metadata(owner, config_name.clone(), "server"),
        immutable: Some(true),
        data: Some(plan.files.clone()),
        binary_data: None,
    };
    let name = deployment_name(&owner.job, track);
    let place = Place { role, job: &name, domain: &name };
    let context = PodContext { plan, images, config: &config_name, peers: selector(&owner.job) };
    let mut pod = pod_spec(&context, &place);
    pod.termination_grace_period_seconds = Some(DEREGISTRATION_SECONDS + DRAIN_SECONDS);
    for container in &mut pod.containers {
        container.lifecycle = Some(Lifecycle {
            pre_stop: Some(LifecycleHandler {
                sleep: Some(SleepAction { seconds: DEREGISTRATION_SECONDS }),
                ..LifecycleHandler::default()
            }),
            ..Lifecycle::default()
        });
        let port = role.ports.get("http").copied().unwrap_or_default();
        container.startup_probe = Some(probe("/v2/health/live", port, 1, STARTUP_PROBES));
        container.readiness_probe = role.readiness.as_ref().map(|readiness| probe(&readiness.path, port, 2, 2));
        container.liveness_probe = Some(probe("/v2/health/live", port, 10, 6));
    }
    let revision = short_digest(&json!({"digest": digest, "pod": pod}).to_string());
    let mut pod_labels = labels(&owner.job, "server");
    pod_labels.insert(TRACK_LABEL.to_owned(), track.as_str().to_owned());
    let mut matching = selector(&owner.job);
    matching.insert(TRACK_LABEL.to_owned(), track.as_str().to_owned());
    let annotations = BTreeMap::from([
        (REVISION_ANNOTATION.to_owned(), revision.clone()),
        (ARTIFACT_ANNOTATION.to_owned(), digest.to_owned()),
        (OWNER_ANNOTATION.to_owned(), owner.job.name.clone()),
    ]);
    let template_metadata =
        ObjectMeta { labels: Some(pod_labels), annotations: Some(annotations), ..ObjectMeta::default() };
    let rolling = RollingUpdateDeployment {
        max_surge: Some(IntOrString::Int(i32::try_from(spec.rollout.max_surge).unwrap_or(i32::MAX))),
        max_unavailable: Some(IntOrString::Int(0)),
    };
    let deployment = Deployment {
        metadata: metadata(owner, name, "server"),
        spec: DeploymentSpec {
            replicas: replicas.map(|replicas| i32::try_from(replicas).unwrap_or(i32::MAX)),
            selector: LabelSelector { match_labels: Some(matching), match_expressions: None },
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
    Servers { config, deployment, revision }
}

fn probe(path: &str, port: u16, period: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::Int(i32::from(port)),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(5),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}

//! `ServingJob`: serves an artifact over gRPC and HTTP until it is deleted.

#![allow(clippy::struct_field_names, reason = "a manifest shows each limit by itself, where `max` is needed")]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::core::Rule;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::status::JobState;
use crate::storage::{ArtifactSource, location_schema};
use crate::workload::{PodSettings, Resources, Scheduling};

/// Serves an artifact over the inference v2 protocol and Sensorium's multimodal API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "sensorium.dev",
    version = "v1alpha1",
    kind = "ServingJob",
    namespaced,
    status = "ServingJobStatus",
    derive = "PartialEq",
    doc = "Serves a model over gRPC and HTTP until it is deleted.",
    category = "sensorium",
    shortname = "sj",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model.artifact"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".status.replicas"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = replicas_or_autoscaling(),
    validation = cpu_is_requested()
)]
pub struct ServingJobSpec {
    /// The artifact to serve.
    pub model: ArtifactSource,
    /// What runs the graphs: `onnxruntime`.
    #[serde(default)]
    pub engine: Engine,
    /// Number of servers (pods): 1 where neither this nor `autoscaling` is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10_000))]
    pub replicas: Option<u32>,
    /// Lets the load decide how many servers there are, by a HorizontalPodAutoscaler; instead of `replicas`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// Graphs of the artifact that run in services of their own, such as an image encoder that takes most of the time; the
    /// servers call them. All others run in the servers themselves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["graph".into()]))]
    pub encoders: Vec<EncoderService>,
    /// How a new model, or a changed spec, takes the place of the old one. Requests are answered all the while.
    #[serde(default)]
    pub rollout: Rollout,
    /// How requests are put together. A batch leaves when it is full, or when its oldest request has waited long enough; with
    /// an idle engine nobody waits.
    #[serde(default)]
    pub batching: Batching,
    /// Where the server listens; the defaults are Triton's, so that its clients find it.
    #[serde(default)]
    pub ports: Ports,
    /// What a single request may ask for; more is refused before it costs memory.
    #[serde(default)]
    pub limits: Limits,
    /// Ask the server held-out questions through its public API once it is ready, and report the answers: `sensorium up` does, on one
    /// machine. On a cluster nobody asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verification: Option<Verification>,
    /// What one server (one pod) needs of the machine, in Kubernetes' words. With a GPU in `limits` (`nvidia.com/gpu: "1"` or
    /// a MIG slice) it runs its graphs there, by CUDA; one is all it uses, and its image has to have an onnxruntime that can
    /// (`pods.image`). Runs on one machine do not limit anything, and use no GPU.
    #[serde(default)]
    pub resources: Resources,
    /// The Service by which clients reach the servers; it has the name of the job.
    #[serde(default)]
    pub service: ServiceSpec,
    /// Who may talk to the servers. A NetworkPolicy holds everyone else off where the cluster's network enforces them.
    #[serde(default)]
    pub network_access: NetworkAccess,
    /// How the servers are talked to, and by whom: certificates and tokens. It holds for their calls of encoders, too. Runs on
    /// one machine, where nobody else can reach the servers, have neither.
    #[serde(default, skip_serializing_if = "Security::is_open")]
    pub security: Security,
    /// Servers that drained nodes may take away at the same time (a PodDisruptionBudget). 0 holds every drain up.
    #[serde(default = "default_max_unavailable")]
    #[schemars(range(max = 10_000))]
    pub disruption_max_unavailable: u32,
    /// How long a server, or an encoder, that is to stop may take for the requests that it has accepted, in seconds: 25 where nothing
    /// is said. Raise it where answers take longer, as long streams do.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub drain_seconds: Option<u32>,
    /// Where the pods may run: priority, kinds of nodes. All of it is passed to Kubernetes as it is.
    #[serde(default)]
    pub scheduling: Scheduling,
    /// What the pods are made of: image, environment, account, credentials.
    #[serde(default)]
    pub pods: PodSettings,
}

fn default_max_unavailable() -> u32 {
    1
}

/// A graph that runs in a service of its own, in as many pods as it needs. New servers bring new encoders along, so that
/// both always have the same model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    // It becomes part of the names of objects; `server` is in these already.
    validation = Rule::new("self.graph.matches('^[a-z]([a-z0-9]|_[a-z0-9])*$') && self.graph != 'server'")
        .field_path(".graph")
        .message("must be small letters, digits and single underscores between them, and not `server`"),
    validation = replicas_or_autoscaling(),
    validation = cpu_is_requested()
)]
pub struct EncoderService {
    /// Name of the graph in the artifact, such as `image_encoder`.
    #[schemars(length(max = 32))]
    pub graph: String,
    /// Number of pods: 1 where neither this nor `autoscaling` is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub replicas: Option<u32>,
    /// Lets the load decide how many pods there are, by a HorizontalPodAutoscaler; instead of `replicas`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// What one pod needs of the machine, in Kubernetes' words; the servers' own `resources` say nothing of it. A GPU in
    /// `limits` is used as there.
    #[serde(default)]
    pub resources: Resources,
}

/// The rule of whatever is scaled by hand or by the load.
fn replicas_or_autoscaling() -> Rule {
    Rule::new("!(has(self.replicas) && has(self.autoscaling))")
        .field_path(".replicas")
        .message("set replicas or autoscaling, not both")
}

/// The rule of whatever is scaled by its share of the CPU.
fn cpu_is_requested() -> Rule {
    Rule::new("!has(self.autoscaling) || self.autoscaling.metric != 'cpu' || 'cpu' in self.resources.requests")
        .field_path(".autoscaling")
        .message("scaling on cpu is relative to what a server requests; set resources.requests.cpu")
}

/// Bounds and measure of the number of servers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("self.minReplicas <= self.maxReplicas")
        .field_path(".maxReplicas")
        .message("must be at least minReplicas")
)]
pub struct Autoscaling {
    /// The fewest servers.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 10_000))]
    pub min_replicas: u32,
    /// The most servers.
    #[schemars(range(min = 1, max = 10_000))]
    pub max_replicas: u32,
    /// What is measured. `cpu`: as the metrics API (metrics-server) reports it; `resources.requests.cpu` must be set.
    /// `queueDepth`: the metric `sensorium_server_queue_requests`, as an adapter to the custom metrics API reports it.
    #[serde(default)]
    pub metric: ScaleMetric,
    /// The value that the number of servers is to keep: percent of the requested CPU with `cpu`, requests that wait in one
    /// server with `queueDepth`.
    #[serde(default = "default_target")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub target: u32,
}

fn one() -> u32 {
    1
}

fn default_target() -> u32 {
    70
}

/// What the number of servers follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ScaleMetric {
    /// CPU, as the metrics API (metrics-server) reports it; `resources.requests.cpu` must be set.
    #[default]
    Cpu,
    /// `sensorium_server_queue_requests`, as an adapter to the custom metrics API reports it.
    QueueDepth,
}

/// How a new model, or a changed spec, takes the place of the old one. Requests are answered all the while.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rollout {
    /// Servers above the wanted number that may exist for a while. New ones start before old ones stop.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 10_000))]
    pub max_surge: u32,
    /// Seconds within which the new servers must answer; otherwise the old ones stay and `Degraded` says why.
    #[serde(default = "default_progress_deadline_seconds")]
    #[schemars(range(min = 10, max = 1_000_000))]
    pub progress_deadline_seconds: u32,
    /// Tries the new servers on a part of the requests first, step by step. All at once when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<Canary>,
}

impl Default for Rollout {
    fn default() -> Self {
        Self { max_surge: one(), progress_deadline_seconds: default_progress_deadline_seconds(), canary: None }
    }
}

fn default_progress_deadline_seconds() -> u32 {
    600
}

/// A rollout by steps. What fails is rolled back and not tried again until the model or the spec changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Canary {
    /// The steps, in order; after the last one the new servers take over.
    #[schemars(length(min = 1, max = 32))]
    pub steps: Vec<CanaryStep>,
    /// What the new servers have to hold during each step.
    #[serde(default)]
    pub analysis: Analysis,
}

/// One step of a canary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CanaryStep {
    /// Percent of the servers (and so, about, of the requests) that are new; rounded up to whole servers.
    #[schemars(range(min = 1, max = 100))]
    pub weight: u32,
    /// Seconds that the step lasts once its servers answer.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub pause_seconds: u64,
}

/// What the new servers have to hold, measured by their own metrics over a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Analysis {
    /// The largest fraction of requests that may fail for reasons of the server's: 0.01 is one in a hundred.
    #[serde(default = "default_max_error_rate")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_error_rate: f64,
    /// How many times as long as with the old servers a request may take, on average.
    #[serde(default = "default_max_latency_ratio")]
    #[schemars(range(min = 1.0))]
    pub max_latency_ratio: f64,
    /// A step with fewer requests than this goes by time alone.
    #[serde(default = "default_min_requests")]
    #[schemars(range(max = 1_000_000_000))]
    pub min_requests: u64,
}

impl Default for Analysis {
    fn default() -> Self {
        Self {
            max_error_rate: default_max_error_rate(),
            max_latency_ratio: default_max_latency_ratio(),
            min_requests: default_min_requests(),
        }
    }
}

fn default_max_error_rate() -> f64 {
    0.01
}

fn default_max_latency_ratio() -> f64 {
    2.0
}

fn default_min_requests() -> u64 {
    20
}

/// How clients reach the servers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceSpec {
    /// `ClusterIP`: within the cluster. `NodePort`: on a port of every node too. `LoadBalancer`: behind a load balancer too. Either of
    /// these two lets everybody ask, whatever `networkAccess` says, and offers no metrics; give it `security`.
    #[serde(rename = "type", default)]
    pub type_: ServiceType,
    /// Annotations of the Service, as load balancers want them.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// Kubernetes' types of a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ServiceType {
    /// Within the cluster.
    #[default]
    ClusterIP,
    /// On a port of every node too.
    NodePort,
    /// Behind a load balancer too.
    LoadBalancer,
}

impl ServiceType {
    /// The type as Kubernetes writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClusterIP => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
        }
    }
}

/// Who may talk to the servers. A NetworkPolicy holds everyone else off where the cluster's network enforces them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkAccess {
    /// Pods of the same namespace always may; pods of namespaces with all of these labels may too.
    #[serde(default)]
    pub from_namespaces: BTreeMap<String, String>,
    /// Everyone may: no NetworkPolicy is made.
    #[serde(default)]
    pub open: bool,
}

/// Certificates and tokens. Files that change in a Secret are used without a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Security {
    /// gRPC and HTTP are encrypted; in plain text where this is not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSecret>,
    /// Requests need a token; everyone is let in where this is not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<TokensSecret>,
}

impl Security {
    /// Whether there is none.
    pub fn is_open(&self) -> bool {
        *self == Self::default()
    }
}

/// A certificate in a Secret, as cert-manager writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TlsSecret {
    /// Name of the Secret: `tls.crt` and `tls.key`. With `encoders`, which show the same certificate, it has to be for
    /// `NAME.NAMESPACE.svc`, the job's Service, and signed by an authority of `ca.crt`; where there is no `ca.crt`, by one of
    /// the certificates of `tls.crt`.
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: String,
}

/// Tokens in a Secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokensSecret {
    /// Name of the Secret. Its key `tokens` has a line `NAME TOKEN` for each client; servers show the first to encoders.
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: String,
}

/// What runs the graphs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Engine {
    /// ONNX Runtime.
    #[default]
    Onnxruntime,
}

/// How requests are put together. A batch leaves when it is full, or when its oldest request has waited for
/// `maxQueueDelayMicroseconds`; with an idle engine nobody waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("self.maxQueueSize >= self.maxBatchSize")
        .field_path(".maxQueueSize")
        .message("must be at least maxBatchSize, or no full batch could wait")
)]
pub struct Batching {
    /// Rows in the largest batch.
    #[serde(default = "default_max_batch_size")]
    #[schemars(range(min = 1, max = 65_536))]
    pub max_batch_size: u32,
    /// How long the oldest request of a batch may wait for company, in microseconds. Raise it for throughput, lower it
    /// for latency.
    #[serde(default = "default_max_queue_delay_microseconds")]
    #[schemars(range(max = 10_000_000))]
    pub max_queue_delay_microseconds: u64,
    /// Rows that may wait; more are refused at once with RESOURCE_EXHAUSTED.
    #[serde(default = "default_max_queue_size")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_queue_size: u32,
}

impl Default for Batching {
    fn default() -> Self {
        Self {
            max_batch_size: default_max_batch_size(),
            max_queue_delay_microseconds: default_max_queue_delay_microseconds(),
            max_queue_size: default_max_queue_size(),
        }
    }
}

fn default_max_batch_size() -> u32 {
    32
}

fn default_max_queue_delay_microseconds() -> u64 {
    500
}

fn default_max_queue_size() -> u32 {
    1024
}

/// Where the server listens; the defaults are Triton's, so that its clients find it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("self.grpc != self.http && self.grpc != self.metrics && self.http != self.metrics")
        .message("grpc, http and metrics must differ")
)]
pub struct Ports {
    /// Port of gRPC.
    #[serde(default = "default_grpc")]
    #[schemars(range(min = 1, max = 65_535))]
    pub grpc: u16,
    /// Port of HTTP: inference and health.
    #[serde(default = "default_http")]
    #[schemars(range(min = 1, max = 65_535))]
    pub http: u16,
    /// Port of Prometheus metrics.
    #[serde(default = "default_metrics")]
    #[schemars(range(min = 1, max = 65_535))]
    pub metrics: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self { grpc: default_grpc(), http: default_http(), metrics: default_metrics() }
    }
}

fn default_grpc() -> u16 {
    8001
}

fn default_http() -> u16 {
    8000
}

fn default_metrics() -> u16 {
    8002
}

/// What a single request may ask for; more is refused before it costs memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("self.maxRequestBytes >= self.maxImageBytes")
        .field_path(".maxImageBytes")
        .message("must be at most maxRequestBytes, which lets in no larger image")
)]
pub struct Limits {
    /// Bytes of the largest request message.
    #[serde(default = "default_max_request_bytes")]
    #[schemars(range(min = 1024, max = 2_147_483_647))]
    pub max_request_bytes: u64,
    /// Bytes of one image as it was sent (PNG, JPEG, WebP).
    #[serde(default = "default_max_image_bytes")]
    #[schemars(range(min = 1024, max = 2_147_483_647))]
    pub max_image_bytes: u64,
    /// Pixels (width x height) of one image, checked before it is decoded.
    #[serde(default = "default_max_image_pixels")]
    #[schemars(range(min = 1, max = 1_073_741_824))]
    pub max_image_pixels: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_request_bytes: default_max_request_bytes(),
            max_image_bytes: default_max_image_bytes(),
            max_image_pixels: default_max_image_pixels(),
        }
    }
}

/// 64 MiB: a batch of photographs, or every row of a large raw tensor.
fn default_max_request_bytes() -> u64 {
    64 << 20
}

/// 16 MiB: a photograph at full quality.
fn default_max_image_bytes() -> u64 {
    16 << 20
}

/// 4096 x 4096: 48 MiB once decoded to RGB.
fn default_max_image_pixels() -> u64 {
    4096 * 4096
}

/// Questions to ask once the server is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Verification {
    /// Held-out data with questions and their answers: `pvc://CLAIM/PATH` or `file:///PATH`; `s3://BUCKET/PREFIX` cannot be read
    /// yet.
    #[schemars(schema_with = "location_schema")]
    pub data: String,
    /// How many images are asked about, one question each.
    #[serde(default = "default_samples")]
    #[schemars(range(min = 1, max = 10_000))]
    pub samples: u32,
}

fn default_samples() -> u32 {
    4
}

/// What is known about a ServingJob.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServingJobStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `ArtifactsReady`, `WorkloadsReady`, `RouteReady`, `Progressing`, `Degraded` and `Ready`, all present from the
    /// first visit. `Ready` is true only while requests are answered.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// The conditions in one word, for printing only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<JobState>,
    /// One sentence on what goes on, or on what to do about a failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Servers that exist.
    #[serde(default)]
    pub replicas: u32,
    /// Servers that answer.
    #[serde(default)]
    pub ready_replicas: u32,
    /// Labels of the servers, as the scale subresource wants them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Digest of the artifact that is being served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The rollout that goes on, or the one that was rolled back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutStatus>,
}

/// Where a rollout is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStatus {
    /// What is being rolled out: a digest of the model and of the spec.
    pub revision: String,
    /// The same of what served before; the one that goes on serving if this one fails.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<String>,
    /// The canary's step, counted from 0.
    #[serde(default)]
    pub step: u32,
    /// When all servers of the step answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_ready: Option<Time>,
    /// Since when they do not all answer, after they did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unready: Option<Time>,
    /// When the step began.
    pub started: Time,
    /// Why it was rolled back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

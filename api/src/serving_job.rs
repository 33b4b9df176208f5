//! `ServingJob`: serves an artifact over gRPC and HTTP until it is deleted.

#![allow(clippy::struct_field_names, reason = "a manifest shows each limit by itself, where `max` is needed")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::status::JobState;
use crate::storage::{ArtifactSource, location_schema};
use crate::workload::Resources;

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
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".spec.replicas"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServingJobSpec {
    /// The artifact to serve.
    pub model: ArtifactSource,
    /// What runs the graphs.
    #[serde(default)]
    pub engine: Engine,
    /// Number of servers (pods).
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 1, max = 10_000))]
    pub replicas: u32,
    /// How requests are put together.
    #[serde(default)]
    pub batching: Batching,
    /// Where the server listens.
    #[serde(default)]
    pub ports: Ports,
    /// What a single request may ask for.
    #[serde(default)]
    pub limits: Limits,
    /// Ask the server held-out questions through its public API once it is ready, and report the answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verification: Option<Verification>,
    /// What one server needs of the machine.
    #[serde(default)]
    pub resources: Resources,
}

fn default_replicas() -> u32 {
    1
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
    /// gRPC.
    #[serde(default = "default_grpc")]
    #[schemars(range(min = 1, max = 65_535))]
    pub grpc: u16,
    /// HTTP: inference and health.
    #[serde(default = "default_http")]
    #[schemars(range(min = 1, max = 65_535))]
    pub http: u16,
    /// Prometheus metrics.
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
    /// Bytes of a request message.
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
    /// Held-out data with questions and their answers.
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
}

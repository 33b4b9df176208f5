//! `CompressionJob`: makes a model small and fast, and promotes it only if it stays accurate.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::status::JobStatus;
use crate::storage::{ArtifactSource, OutputSpec, location_schema};
use crate::workload::{FailurePolicy, PodSettings, Resources, Scheduling};

/// Applies `steps` to an artifact, compares the result with its parent on held-out data, and promotes it under
/// `output.artifact` if it passes. One that fails is kept for inspection and never promoted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "sensorium.dev",
    version = "v1alpha1",
    kind = "CompressionJob",
    namespaced,
    status = "JobStatus",
    derive = "PartialEq",
    doc = "Makes a model small and fast, and promotes it only if it stays accurate.",
    category = "sensorium",
    shortname = "cpj",
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Source", type_ = "string", json_path = ".spec.source.artifact"),
    printcolumn(name = "Drop", type_ = "number", json_path = ".status.gate.drop"),
    printcolumn(name = "Speedup", type_ = "number", json_path = ".status.gate.speedup"),
    printcolumn(name = "Promoted", type_ = "boolean", json_path = ".status.gate.promoted"),
    printcolumn(name = "Artifact", type_ = "string", json_path = ".spec.output.artifact", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("self.output.artifact != self.source.artifact || self.output.store != self.source.store")
        .field_path(".output.artifact")
        .message("must differ from source.artifact, so that the parent stays in place"),
    validation = Rule::new(
        "self.source == oldSelf.source && self.steps == oldSelf.steps && self.acceptance == oldSelf.acceptance && \
         self.output == oldSelf.output"
    )
    .message(
        "what is compressed (source, steps, acceptance, output) cannot change once the job is created; delete it and \
         create it anew, or give the new one another name"
    )
)]
pub struct CompressionJobSpec {
    /// The artifact to compress: the parent of the result.
    pub source: ArtifactSource,
    /// What is done to it, in this order.
    #[schemars(length(min = 1, max = 16))]
    pub steps: Vec<CompressionStep>,
    /// The gate that the result has to pass to be promoted: how much accuracy it may lose, and what it must gain.
    pub acceptance: Acceptance,
    /// What happens when the worker fails: it starts again, a limited number of times.
    #[serde(default)]
    pub failure_policy: FailurePolicy,
    /// Stop the worker and hold the job; `false` starts it again.
    #[serde(default)]
    pub suspend: bool,
    /// Seconds after which the job fails if it still runs, counted from its first start, restarts included. No limit when
    /// not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub active_deadline_seconds: Option<u64>,
    /// Seconds within which the worker must run once it is started. One that could not be placed by then is taken down and
    /// tried again later.
    #[serde(default = "crate::workload::default_pre_running_deadline_seconds")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub pre_running_deadline_seconds: u64,
    /// Seconds after its end when the job is deleted, with its pods; its artifact stays. Kept for ever when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1_000_000_000))]
    pub ttl_seconds_after_finished: Option<u64>,
    /// Where the pods may run: queue, priority, kinds of nodes. All of it is passed to Kubernetes as it is.
    #[serde(default)]
    pub scheduling: Scheduling,
    /// What the pods are made of: image, environment, account, credentials.
    #[serde(default)]
    pub pods: PodSettings,
    /// What the worker (one pod) needs of the machine, in Kubernetes' words. Runs on one machine do not limit anything.
    #[serde(default)]
    pub resources: Resources,
    /// Under which name, and where, the result is left.
    pub output: OutputSpec,
}

/// One step of a compression: exactly one of these.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum CompressionStep {
    /// Store weights and compute in fewer bits.
    Quantize(QuantizeStep),
}

/// Quantisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct QuantizeStep {
    /// Which numbers are quantised, and how. `staticInt8`, as ONNX Q/DQ: symmetric INT8 weights with a scale per output
    /// channel, INT8 activations with calibrated scales.
    #[serde(default)]
    pub scheme: QuantizationScheme,
    /// How the ranges of the activations are measured.
    pub calibration: Calibration,
    /// Nodes to leave in floating point: a graph's name (`text_encoder`) for all of its nodes, or GRAPH/NODE.
    #[serde(default)]
    #[schemars(length(max = 4096), inner(length(min = 1, max = 512)))]
    pub exclude: Vec<String>,
}

/// Which numbers are quantised, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum QuantizationScheme {
    /// ONNX Q/DQ: symmetric INT8 weights with a scale per output channel, INT8 activations with calibrated scales.
    #[default]
    StaticInt8,
}

/// How the ranges of the activations are measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Calibration {
    /// Data to run through the model. Take the training split: data that the gate measures on would flatter the result.
    #[schemars(schema_with = "location_schema")]
    pub data: String,
    /// How many samples (an image with a question) are run.
    #[serde(default = "default_samples")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub samples: u32,
    /// How a range is chosen from the values that were seen. `minmax`: from the smallest to the largest, which is right for
    /// most Transformers. `entropy`: the range that loses the least information, which clips outliers.
    #[serde(default)]
    pub method: CalibrationMethod,
}

fn default_samples() -> u32 {
    512
}

/// How an activation's range is chosen from the values that were seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum CalibrationMethod {
    /// From the smallest to the largest value. Right for most Transformers.
    #[default]
    Minmax,
    /// The range that loses the least information (smallest Kullback-Leibler divergence); clips outliers.
    Entropy,
}

/// The gate: the candidate is promoted only if all of this holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Acceptance {
    /// Held-out data that both models are measured on.
    #[schemars(schema_with = "location_schema")]
    pub data: String,
    /// What is compared. `vqa_accuracy`: the fraction of questions whose highest-scored answer is the right one.
    #[serde(default)]
    pub metric: Metric,
    /// How much of the metric may be lost against the parent, as a fraction: 0.01 is one point.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_drop: f64,
    /// How many times as fast as its parent the candidate must be on the machine that runs this job; measured but not
    /// asked for when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub min_speedup: Option<f64>,
    /// How many questions are asked of both; all of them when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub samples: Option<u32>,
}

/// What a gate can compare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Metric {
    /// The fraction of questions whose highest-scored answer is the right one.
    #[default]
    #[serde(rename = "vqa_accuracy")]
    VqaAccuracy,
}

impl Metric {
    /// The name under which results and artifacts record it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VqaAccuracy => "vqa_accuracy",
        }
    }
}

//! `ModelArtifact`: the immutable record of one model, what it takes and gives, and where it came from.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::run::JobKind;
use crate::storage::{Retention, digest_schema, location_schema};

/// One model: content-addressed, traceable to the job, the data and the parents that made it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "sensorium.dev",
    version = "v1alpha1",
    kind = "ModelArtifact",
    namespaced,
    status = "ModelArtifactStatus",
    derive = "PartialEq",
    doc = "The immutable record of one model: where it is, what it takes and gives, and where it came from.",
    category = "sensorium",
    shortname = "ma",
    printcolumn(name = "Format", type_ = "string", json_path = ".spec.format"),
    printcolumn(name = "Modalities", type_ = "string", json_path = ".spec.modalities"),
    printcolumn(name = "Job", type_ = "string", json_path = ".spec.lineage.job.name"),
    printcolumn(name = "Digest", type_ = "string", json_path = ".spec.digest", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("self == oldSelf").message("a ModelArtifact never changes; create another one"))]
pub struct ModelArtifactSpec {
    /// The folder that holds `manifest.json` and the files it lists: `objects/DIGEST` in a store, such as
    /// `pvc://artifacts/objects/4f1c…`.
    #[schemars(schema_with = "location_schema")]
    pub uri: String,
    /// SHA-256 of `manifest.json`, which holds the digest of every other file: `sha256:` and 64 hexadecimal digits.
    #[schemars(schema_with = "digest_schema")]
    pub digest: String,
    /// What the graphs are stored as: `onnx`, one ONNX file per graph.
    #[serde(default)]
    pub format: ArtifactFormat,
    /// The graphs, with what each takes and gives. Empty where the job's report had no room for it: the manifest has it all.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub signature: Vec<GraphSignature>,
    /// What the model reads, such as `text` and `image`.
    #[serde(default)]
    #[schemars(length(max = 16), inner(length(min = 1, max = 63)))]
    pub modalities: Vec<String>,
    /// What was measured when the model was made, by name, such as `vqa_accuracy: 0.9978`.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// Where the model came from: the job, the data and the parents that made it.
    #[serde(default)]
    pub lineage: Lineage,
    /// Which artifacts of the same name stay when this is the newest, and what becomes of this one's files: a copy of
    /// `spec.output.retention` of the job that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
}

impl ModelArtifactSpec {
    /// The store that it lies in, as STORE/objects/DIGEST; `None` where `uri` is no such place.
    pub fn store(&self) -> Option<&str> {
        self.uri.rsplitn(3, '/').nth(2).filter(|store| store.contains("://"))
    }
}

/// What an artifact's graphs are stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ArtifactFormat {
    /// ONNX, one file per graph.
    #[default]
    Onnx,
}

/// What one graph takes and gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GraphSignature {
    /// Name of the graph, such as `text_encoder`.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// The graph's inputs.
    #[schemars(length(max = 64))]
    pub inputs: Vec<TensorSignature>,
    /// The graph's outputs.
    #[schemars(length(max = 64))]
    pub outputs: Vec<TensorSignature>,
}

/// Name, type and shape of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TensorSignature {
    /// Name of the tensor.
    #[schemars(length(min = 1, max = 255))]
    pub name: String,
    /// Type of the tensor's elements, in the words of the inference protocol.
    pub datatype: DataType,
    /// The tensor's dimensions; -1 for one that a request chooses, as in the inference protocol.
    #[schemars(length(max = 16), inner(range(min = -1)))]
    pub shape: Vec<i64>,
}

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum DataType {
    /// Truth values.
    Bool,
    /// Unsigned 8-bit integers.
    Uint8,
    /// Signed 8-bit integers.
    Int8,
    /// Signed 32-bit integers.
    Int32,
    /// Signed 64-bit integers.
    Int64,
    /// 32-bit floating point.
    Fp32,
    /// Byte strings.
    Bytes,
}

/// Where a model came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lineage {
    /// The job that made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<LineageJob>,
    /// Digests of the artifacts that it was made from.
    #[serde(default)]
    #[schemars(length(max = 16), inner(length(min = 71, max = 71)))]
    pub parents: Vec<String>,
    /// Locations of the data that it was made with.
    #[serde(default)]
    #[schemars(length(max = 64), inner(length(min = 1, max = 1024)))]
    pub data: Vec<String>,
    /// What was done, in order, such as `train` or `quantize staticInt8`.
    #[serde(default)]
    #[schemars(length(max = 64), inner(length(min = 1, max = 255)))]
    pub steps: Vec<String>,
}

/// The job that made a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LineageJob {
    /// The job's kind.
    pub kind: JobKind,
    /// The job's namespace.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    /// The job's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Digest of the parts of the job's spec that change what comes out.
    #[schemars(schema_with = "digest_schema")]
    pub spec_hash: String,
}

/// What is known about a ModelArtifact.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelArtifactStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Verified`: whether the stored files match their digests. `FilesRemoved`, while a ModelArtifact whose files go with
    /// it is being deleted: whether they are gone.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

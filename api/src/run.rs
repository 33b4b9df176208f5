//! The contract between a planned job and the program that runs it: the file it reads, the progress it serves, the
//! result and the curves it leaves. All of it is JSON with camelCase names.

use std::collections::BTreeMap;
use std::fmt;

use kube::ResourceExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model_artifact::GraphSignature;

/// The file that a program reads with `--config`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RunConfig<S> {
    /// The job that is run.
    pub job: JobKey,
    /// `sha256:` digest of the parts of the spec that change what comes out; recorded as lineage, and compared with a
    /// checkpoint's before going on from it.
    pub spec_hash: String,
    /// The job's spec, every default filled in.
    pub spec: S,
}

/// Which job.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JobKey {
    /// Its kind.
    pub kind: JobKind,
    /// Its namespace; `default` where a manifest names none.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl JobKey {
    /// The key of `object`, which is of this kind.
    pub fn of(object: &impl ResourceExt, kind: JobKind) -> Self {
        Self { kind, namespace: object.namespace().unwrap_or_else(|| "default".to_owned()), name: object.name_any() }
    }

    /// Where the job's checkpoints are when its spec does not say.
    pub fn checkpoint_uri(&self) -> String {
        format!("pvc://checkpoints/{}/{}", self.namespace, self.name)
    }
}

/// `TrainingJob/vqa`. The namespace is left out: on one machine there is only one.
impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.name)
    }
}

/// The kinds that run something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum JobKind {
    /// Trains a model.
    TrainingJob,
    /// Compresses a model.
    CompressionJob,
    /// Serves a model.
    ServingJob,
}

impl JobKind {
    /// The kind as manifests write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TrainingJob => "TrainingJob",
            Self::CompressionJob => "CompressionJob",
            Self::ServingJob => "ServingJob",
        }
    }
}

impl fmt::Display for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a running job answers to `GET /progress`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// `starting`, `training`, `evaluating`, `calibrating`, `quantizing`, `gating`, `exporting`, `done` or `failed`.
    pub state: String,
    /// Steps finished, of whatever `state` counts: updates while it trains, samples while it calibrates.
    pub step: u64,
    /// Steps in all; 0 while not known.
    pub steps: u64,
    /// Training loss of the last step, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Accuracy at the last evaluation, from 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Samples per second, over all ranks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples_per_second: Option<f64>,
    /// Seconds to the end, as far as one can tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<f64>,
    /// One sentence for a person.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The step of the checkpoint that this run went on from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed_from: Option<u64>,
}

/// What a program writes to `--result-file` when it ends, well or badly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunResult {
    /// Whether the job did what it should. A candidate that its gate refused is a failure.
    pub state: RunState,
    /// One sentence for a person: what came out, or what to do about the failure.
    pub message: String,
    /// The artifact that was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact: Option<ArtifactResult>,
    /// What was measured at the end, such as `vqa_accuracy`.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// How a compressed candidate compared with its parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<GateResult>,
    /// Wall time of the run, in seconds.
    pub seconds: f64,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RunState {
    /// Well.
    Succeeded,
    /// Badly.
    Failed,
}

/// An artifact that a job wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactResult {
    /// Its name.
    pub name: String,
    /// `sha256:` digest of its manifest.
    pub digest: String,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Its folder.
    pub uri: String,
    /// What its record says, for a cluster that keeps one; left out where it would be too long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub record: Option<ArtifactRecord>,
}

/// What a ModelArtifact says of a model that a job has just written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactRecord {
    /// The graphs, with what each takes and gives.
    pub signature: Vec<GraphSignature>,
    /// What the model reads.
    pub modalities: Vec<String>,
    /// What was measured.
    pub metrics: BTreeMap<String, f64>,
    /// Digests of the artifacts that it was made from.
    pub parents: Vec<String>,
    /// Locations of the data that it was made with.
    pub data: Vec<String>,
    /// What was done, in order.
    pub steps: Vec<String>,
}

/// How a compressed candidate compared with its parent on held-out data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GateResult {
    /// What was compared, such as `vqa_accuracy`.
    pub metric: String,
    /// The parent's value.
    pub parent: f64,
    /// The candidate's value.
    pub candidate: f64,
    /// `parent - candidate`: below 0 when the candidate is better.
    pub drop: f64,
    /// How many times as fast as its parent the candidate ran.
    pub speedup: f64,
    /// Bytes of the candidate, as a fraction of its parent's.
    pub size_ratio: f64,
    /// Whether the candidate passed and was promoted.
    pub promoted: bool,
    /// The decision in one sentence, with the numbers it rests on.
    pub message: String,
}

/// One line of `history.jsonl` beside the checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HistoryPoint {
    /// The step, counted from 1.
    pub step: u64,
    /// Weighted loss of the global batch, in nats.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Accuracy on the evaluation data, where the step was evaluated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Seconds of training up to this step, earlier runs included.
    pub seconds: f64,
}

/// `evaluation.json` beside the checkpoints: the last evaluation in detail.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Evaluation {
    /// The answers, in the order of the rows and columns.
    pub labels: Vec<String>,
    /// How often the answer of the row was given the answer of the column.
    pub confusion: Vec<Vec<u64>>,
    /// Fraction of all questions answered right.
    pub accuracy: f64,
    /// The same by kind of question, such as `color`.
    pub by_kind: BTreeMap<String, f64>,
}

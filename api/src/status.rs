//! What the statuses of all kinds share, and the whole status of jobs that come to an end.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::run::{ArtifactResult, GateResult, Progress};

/// A job's conditions in one word, for `kubectl get` only: programs read the conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum JobState {
    /// Not yet started: waiting for an artifact, a queue or a machine.
    Pending,
    /// At work; for a ServingJob: started and not yet ready.
    Running,
    /// A ServingJob that answers requests.
    Ready,
    /// Held by `suspend`.
    Suspended,
    /// Ended well.
    Succeeded,
    /// Ended badly; `message` says what to do.
    Failed,
}

/// What is known about a job that comes to an end: a TrainingJob or a CompressionJob.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Admitted`, `ArtifactsReady`, `PodsReady`, `Suspended`, `Restarting`, `Complete` and `Failed`, all present from
    /// the first visit.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// The conditions in one word, for printing only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<JobState>,
    /// One sentence on what goes on, or on what to do about a failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// How far the run is, as rank 0 last reported it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Which start of the workers this is, counted from 1.
    #[serde(default)]
    pub attempt: u32,
    /// How often the workers were started again after a failure of their own; `failurePolicy.maxRestarts` bounds it.
    #[serde(default)]
    pub restarts: u32,
    /// How often the workers were started again because of the cluster: an eviction, a lost node, a group that could not be
    /// placed whole.
    #[serde(default)]
    pub disruptions: u32,
    /// Number of workers of this attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workers: Option<u32>,
    /// Why the last attempt that did not end well ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<AttemptFailure>,
    /// Digests of the artifacts that the job reads, by the name it gives them: fixed when it first starts.
    #[serde(default)]
    pub inputs: BTreeMap<String, String>,
    /// When the workers first started; anew when a suspended job goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the job ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// The artifact that came out; a compressed one may not have been promoted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact: Option<ArtifactResult>,
    /// How a compressed candidate compared with its parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<GateResult>,
}

/// Why an attempt ended before its time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttemptFailure {
    /// Which attempt it was, counted from 1.
    pub attempt: u32,
    /// Whether the cluster was at fault; such a failure does not count against `maxRestarts`.
    pub disruption: bool,
    /// What happened, in a person's words.
    pub message: String,
    /// When it was noticed.
    pub time: Time,
}

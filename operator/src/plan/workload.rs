//! The plan itself: a value to compare, print and run.

use std::collections::BTreeMap;

use sensorium_api::run::JobKey;
use sensorium_api::{FailurePolicy, PodSettings, Resources, Scheduling};
use serde::Serialize;

use super::template::Template;

/// Everything that one job needs to run, with addresses and paths still open ([`Template`]).
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadPlan {
    /// The job.
    pub job: JobKey,
    /// `sha256:` digest of the parts of the spec that change what comes out. The artifacts a job reads are in it by
    /// reference only: whoever reuses a result compares their digests as well.
    pub spec_hash: String,
    /// Artifacts (names or `sha256:` digests) that must exist before the job starts.
    pub requires: Vec<String>,
    /// Name of the artifact that the job leaves behind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub produces: Option<String>,
    /// Whether the job is held: planned, but not to be started.
    pub suspended: bool,
    /// Files by name, there in the mount `config` of every role.
    pub files: BTreeMap<String, String>,
    /// What runs, in the order in which it starts.
    pub roles: Vec<Role>,
    /// How long it runs.
    pub lifetime: Lifetime,
    /// Where pods may run; of no concern on one machine.
    #[serde(skip_serializing_if = "is_default")]
    pub scheduling: Scheduling,
    /// What pods are made of.
    #[serde(skip_serializing_if = "is_default")]
    pub pods: PodSettings,
}

/// What a manifest leaves out is left out of a printed plan.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Equal processes, in `replicas` pods (on one machine: groups) of `processes` each.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Role {
    /// Unique within the plan.
    pub name: String,
    /// What is run.
    pub program: Program,
    /// How many pods.
    pub replicas: u32,
    /// How many processes in each.
    pub processes: u32,
    /// Command-line arguments.
    pub args: Vec<Template>,
    /// Environment.
    pub env: BTreeMap<String, Template>,
    /// Port numbers inside a pod, by name; on one machine any free port may take their place.
    pub ports: BTreeMap<String, u16>,
    /// Folders that the processes see.
    pub mounts: Vec<Mount>,
    /// What each pod needs of the machine.
    pub resources: Resources,
    /// Whether rank 0 writes a result file ([`super::Part::ResultFile`]).
    pub result: bool,
    /// How to see that a replica is ready for work; without one, running is ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub readiness: Option<HttpProbe>,
}

/// A binary of this workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Program {
    /// Trains and compresses.
    Trainer,
    /// Serves.
    Server,
}

impl Program {
    /// File name of the binary.
    pub fn binary(self) -> &'static str {
        match self {
            Self::Trainer => "sensorium-trainer",
            Self::Server => "sensorium-server",
        }
    }
}

/// A folder that processes see; [`super::Part::MountPath`] is its path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Mount {
    /// Unique within the role: `config`, `scratch`, `tls`, `tokens`, or `volumes/CLAIM`.
    pub name: String,
    /// What is in it.
    pub source: MountSource,
    /// Whether the role only reads.
    pub read_only: bool,
}

/// What a mount shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum MountSource {
    /// A PersistentVolumeClaim; on one machine a folder that stands for it.
    Claim(String),
    /// The plan's files.
    Config,
    /// An empty folder that goes when the process does.
    Scratch,
    /// The keys of a Secret as files, which change when it does.
    Secret(String),
    /// An artifact that the node fetched from a bucket: a store with nothing else in it.
    Artifact(ArtifactVolume),
}

/// An artifact in a bucket, and how a pod is allowed to read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactVolume {
    /// The store: `s3://BUCKET/PREFIX`.
    pub store: String,
    /// The artifact's digest.
    pub digest: String,
    /// Name of the Secret with the credentials.
    pub secret: String,
    /// Settings of the store that are no secret, such as `AWS_REGION`.
    pub settings: BTreeMap<String, String>,
}

/// How long a workload runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Lifetime {
    /// Until every process has ended well.
    RunToCompletion(RunPolicy),
    /// Until it is deleted.
    Service,
}

/// `GET path` on a port answers 200 when the replica is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpProbe {
    /// Name of the port.
    pub port: String,
    /// Path of the URL.
    pub path: String,
}

/// How a workload that ends by itself may fail, wait and be cleaned up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RunPolicy {
    /// What a failed process means, and how often all of them are started again.
    pub failure: FailurePolicy,
    /// Seconds after which the job has failed, restarts included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_deadline_seconds: Option<u64>,
    /// Seconds within which every replica has to run.
    pub pre_running_deadline_seconds: u64,
    /// Seconds after its end when the job is deleted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds_after_finished: Option<u64>,
}

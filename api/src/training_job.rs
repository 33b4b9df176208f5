//! `TrainingJob`: trains a multimodal model and leaves it in an artifact store.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::architecture::Architecture;
use crate::run::{JobKey, JobKind};
use crate::status::JobStatus;
use crate::storage::{OutputSpec, location_schema};
use crate::training::TrainingParams;
use crate::workload::{FailurePolicy, PodSettings, Resources, Scheduling};

/// Trains a multimodal model on `workers` x `processesPerWorker` processes and exports it as a ModelArtifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "sensorium.dev",
    version = "v1alpha1",
    kind = "TrainingJob",
    namespaced,
    status = "JobStatus",
    derive = "PartialEq",
    doc = "Trains a multimodal model and leaves it in an artifact store.",
    category = "sensorium",
    shortname = "tj",
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Workers", type_ = "integer", json_path = ".spec.workers"),
    printcolumn(name = "Step", type_ = "integer", json_path = ".status.progress.step"),
    printcolumn(name = "Steps", type_ = "integer", json_path = ".spec.training.steps"),
    printcolumn(name = "Accuracy", type_ = "number", json_path = ".status.progress.accuracy"),
    printcolumn(name = "Artifact", type_ = "string", json_path = ".spec.output.artifact", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new(
        "self.parallelism.data * self.parallelism.tensor * self.parallelism.pipeline == \
         self.workers * self.processesPerWorker"
    )
    .field_path(".parallelism")
    .message("data x tensor x pipeline must equal workers x processesPerWorker, since every process has one place"),
    validation = Rule::new("self.training.batch.images % self.parallelism.data == 0")
        .field_path(".training.batch.images")
        .message("must be a multiple of parallelism.data, since every rank takes an equal part"),
    validation = Rule::new(
        "!self.tasks.exists(task, task.type == 'contrastive') || !has(self.model.architecture) || \
         has(self.model.architecture.embeddingDim)"
    )
    .field_path(".model.architecture")
    .message("a contrastive task compares embeddings; set embeddingDim, such as 64"),
    validation = Rule::new(
        "!has(self.elastic) || (self.elastic.minWorkers <= self.workers && self.workers <= self.elastic.maxWorkers)"
    )
    .field_path(".elastic")
    .message("workers must lie between minWorkers and maxWorkers"),
    validation = Rule::new(
        "self.model == oldSelf.model && self.data == oldSelf.data && self.tasks == oldSelf.tasks && \
         self.training == oldSelf.training && self.parallelism == oldSelf.parallelism && \
         self.workers == oldSelf.workers && self.processesPerWorker == oldSelf.processesPerWorker && \
         self.output == oldSelf.output"
    )
    .message(
        "what is trained (model, data, tasks, training, parallelism, workers, output) cannot change once the job is \
         created; delete it and create it anew, or give the new one another name"
    ),
)]
pub struct TrainingJobSpec {
    /// The network to train: described here, or taken with its weights from an artifact.
    pub model: ModelSource,
    /// What the network learns from, and what it is measured on: folders of shards with an `index.json`, as `sensorium data
    /// import` writes them and docs/data.md describes them.
    pub data: TrainingData,
    /// What the network learns to do, each at most once; their losses are added by weight.
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(
        merge_strategy = ListMerge::Map(vec!["type".into()]),
        validation = Rule::new("self.exists(task, task.weight > 0.0)")
            .message("the weights are all 0; nothing would be learned"),
    )]
    pub tasks: Vec<TaskSpec>,
    /// How the network is trained: number of steps, batch, optimiser, precision.
    pub training: TrainingParams,
    /// How the processes share the work: `data` x `tensor` x `pipeline` is their number.
    #[serde(default)]
    pub parallelism: Parallelism,
    /// Number of workers (pods).
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 10_000))]
    pub workers: u32,
    /// Processes in each worker. They share its CPUs.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub processes_per_worker: u32,
    /// Bounds of the number of workers. A group that cannot be placed whole is started again with fewer, never fewer than
    /// `minWorkers`, and with a global batch that stays the same. Always `workers` when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub elastic: Option<Elastic>,
    /// Where, and how often, the state of the run is saved. A job that was started again goes on from the newest whole
    /// checkpoint, and ends with the same weights as one that was never stopped.
    #[serde(default)]
    pub checkpoint: CheckpointSpec,
    /// What happens when a worker fails: all of them start again together, a limited number of times.
    #[serde(default)]
    pub failure_policy: FailurePolicy,
    /// Stop all workers after a checkpoint and hold the job; `false` lets it go on from there.
    #[serde(default)]
    pub suspend: bool,
    /// Seconds after which the job fails if it still runs, counted from its first start, restarts included; a suspension
    /// starts the count anew. No limit when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub active_deadline_seconds: Option<u64>,
    /// Seconds within which all workers must run once they are started. A group that is not whole by then is taken down
    /// whole and tried again later, so that two jobs that each have half of their pods never starve each other.
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
    /// What one worker (one pod) needs of the machine, in Kubernetes' words. Runs on one machine do not limit anything.
    #[serde(default)]
    pub resources: Resources,
    /// Under which name, and where, the trained model is left.
    pub output: OutputSpec,
}

/// The network to train: exactly one of these.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum ModelSource {
    /// A new network with random weights: an encoder for each modality, and a fusion Transformer that reads their features.
    Architecture(Architecture),
    /// Name (or `sha256:` digest) of an artifact in `output.store` whose network and weights are the start.
    #[schemars(schema_with = "crate::storage::artifact_reference_schema")]
    Artifact(String),
}

/// The data sets: folders of shards with an `index.json`, as `sensorium data import` writes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainingData {
    /// What the network learns from: `pvc://CLAIM/PATH`, or on one machine `file:///PATH`; `s3://BUCKET/PREFIX` cannot be
    /// read yet.
    #[schemars(schema_with = "location_schema")]
    pub train: String,
    /// Held-out data that the network is measured on and never learns from; a location as `train` is.
    #[schemars(schema_with = "location_schema")]
    pub evaluation: String,
}

/// One thing that the network learns to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TaskSpec {
    /// `vqa`: answer a question about an image, out of the answers seen in training. `contrastive`: bring an image's embedding
    /// and its caption's together, as CLIP does, over the batch of all ranks.
    #[serde(rename = "type")]
    pub type_: TaskType,
    /// Factor of this task's loss in the sum of all tasks' losses.
    #[serde(default = "default_weight")]
    #[schemars(range(min = 0.0))]
    pub weight: f64,
}

fn default_weight() -> f64 {
    1.0
}

/// The tasks there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum TaskType {
    /// Answer a question about an image, out of the answers seen in training.
    Vqa,
    /// Bring an image's embedding and its caption's together, as CLIP does, over the batch of all ranks.
    Contrastive,
}

/// How the processes share the work. `data` x `tensor` x `pipeline` is the number of processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Parallelism {
    /// Replicas of the network, each with its part of the batch (data parallel).
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 65_536))]
    pub data: u32,
    /// Processes that share each layer's weights (tensor parallel). Not available yet: only 1.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1024))]
    pub tensor: u32,
    /// Consecutive groups of layers, each on its own processes (pipeline parallel). Not available yet: only 1.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1024))]
    pub pipeline: u32,
    /// ZeRO stage, what the data-parallel replicas split instead of repeating: 0 nothing, 1 optimiser states, 2 also
    /// gradients, 3 also weights. Not available yet: only 0.
    #[serde(default)]
    #[schemars(range(max = 3))]
    pub zero_stage: u8,
}

impl Default for Parallelism {
    fn default() -> Self {
        Self { data: 1, tensor: 1, pipeline: 1, zero_stage: 0 }
    }
}

/// Bounds of the data-parallel width. A group that cannot be placed whole is started again with fewer workers, never
/// fewer than `minWorkers`, and with a global batch that stays the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Elastic {
    /// The fewest workers that are worth starting.
    #[schemars(range(min = 1, max = 10_000))]
    pub min_workers: u32,
    /// The most workers; `workers` is what the job is first started with.
    #[schemars(range(min = 1, max = 10_000))]
    pub max_workers: u32,
}

fn one() -> u32 {
    1
}

/// Where, and how often, the state of the run is saved. A restarted job goes on from the newest whole checkpoint and
/// ends with the same weights as one that was never stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CheckpointSpec {
    /// Folder of the checkpoints; `pvc://checkpoints/NAMESPACE/NAME` of the job when it is not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "optional_location_schema")]
    pub uri: Option<String>,
    /// Steps between checkpoints. The last step always leaves one.
    #[serde(default = "default_every_steps")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub every_steps: u64,
    /// How many checkpoints are kept; older ones are removed.
    #[serde(default = "default_keep")]
    #[schemars(range(min = 1, max = 10_000))]
    pub keep: u32,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { uri: None, every_steps: default_every_steps(), keep: default_keep() }
    }
}

fn default_every_steps() -> u64 {
    500
}

fn default_keep() -> u32 {
    2
}

fn optional_location_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    let mut schema = location_schema(generator);
    schema.insert("nullable".to_owned(), true.into());
    schema
}

impl TrainingJob {
    /// Where this job's checkpoints are: what the spec says, else [`JobKey::checkpoint_uri`].
    pub fn checkpoint_uri(&self) -> String {
        let job = || JobKey::of(self, JobKind::TrainingJob).checkpoint_uri();
        self.spec.checkpoint.uri.clone().unwrap_or_else(job)
    }
}

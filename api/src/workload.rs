//! What every job says about how it runs, whatever it computes.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What happens when a worker fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FailurePolicy {
    /// How often all workers are started again, from the newest checkpoint, before the job counts as failed. A lost
    /// node or an eviction does not count.
    #[serde(default = "default_max_restarts")]
    #[schemars(range(max = 1000))]
    pub max_restarts: u32,
    /// What certain exit codes mean; the first rule that lists a code decides. Without a rule, 2 (the job itself has to
    /// be changed) fails it and every other code starts it again.
    #[serde(default)]
    #[schemars(length(max = 32))]
    pub rules: Vec<FailureRule>,
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self { max_restarts: default_max_restarts(), rules: Vec::new() }
    }
}

/// What some exit codes mean.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FailureRule {
    /// The exit codes; a process that a signal ended has 128 and the signal's number.
    #[schemars(length(min = 1, max = 255), inner(range(min = 1, max = 255)))]
    pub exit_codes: Vec<i32>,
    /// `fail`: the job has failed, since starting it again could not help. `restart`: all workers start again from the
    /// newest checkpoint, within `maxRestarts`. `ignore`: the same without counting it, because the machine was at fault.
    pub action: FailureAction,
}

/// What to do about a failed worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum FailureAction {
    /// The job has failed; starting it again could not help.
    Fail,
    /// Start all workers again from the newest checkpoint, within `maxRestarts`.
    Restart,
    /// The same, without counting it: the machine was at fault.
    Ignore,
}

fn default_max_restarts() -> u32 {
    3
}

/// Ten minutes: a large image is pulled and an autoscaled node joins within that time.
pub(crate) fn default_pre_running_deadline_seconds() -> u64 {
    600
}

/// What one worker (one pod) needs of the machine, in Kubernetes' words. Runs on one machine do not limit anything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Resources {
    /// What the scheduler sets aside for the worker, such as `cpu: "4"`, `memory: 8Gi`.
    #[serde(default)]
    pub requests: BTreeMap<String, Quantity>,
    /// What the worker may not exceed, such as `memory: 8Gi`. A GPU is asked for here: `nvidia.com/gpu: "1"`, or a MIG slice
    /// such as `nvidia.com/mig-1g.10gb: "1"`. Only servers use one in this version: training and compression run on CPUs,
    /// and would hold it for nothing.
    #[serde(default)]
    pub limits: BTreeMap<String, Quantity>,
}

impl Resources {
    /// Whether GPUs, or parts of them, are asked for: `nvidia.com/gpu`, `nvidia.com/mig-1g.10gb`.
    pub fn has_gpus(&self) -> bool {
        self.limits.keys().chain(self.requests.keys()).any(|name| name.starts_with("nvidia.com/"))
    }
}

/// Where pods may run, and who decides. All of it is passed to Kubernetes as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Scheduling {
    /// Name of a Kueue LocalQueue. The job waits, suspended, until Kueue lets it in.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub queue_name: Option<String>,
    /// PriorityClass of the pods; the cluster's default one when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
    /// The scheduler that places the pods, such as `volcano`; Kubernetes' own when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub scheduler_name: Option<String>,
    /// RuntimeClass of the pods, such as `nvidia`; the nodes' default runtime when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,
    /// GPU model, as the label `nvidia.com/gpu.product` of the nodes names it, such as `NVIDIA-H100-80GB-HBM3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub gpu_product: Option<String>,
    /// Labels that a node must have, all of them, such as `disk: ssd`.
    #[serde(default)]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that the pods put up with. That of GPU nodes, `nvidia.com/gpu`, is tolerated by every pod that asks
    /// for a GPU.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub tolerations: Vec<Toleration>,
    /// Whether the pods are placed close together or far apart; as the scheduler likes when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
}

/// How a job's pods lie to each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Topology {
    /// Label of the nodes that tells one domain from another, such as `topology.kubernetes.io/zone`.
    #[schemars(length(min = 1, max = 317))]
    pub key: String,
    /// `pack`: all in one domain, for short ways between workers. `spread`: evenly over the domains, so that a lost one takes
    /// few pods along.
    pub mode: TopologyMode,
}

/// Together or apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum TopologyMode {
    /// All in one domain: short ways between workers.
    Pack,
    /// Evenly over the domains: a lost one takes few pods along.
    Spread,
}

/// What a job's pods are made of, where the operator's own choice does not fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodSettings {
    /// The image, such as `registry.example.com/sensorium-server:0.1.0-cuda`; the one that the operator was installed with
    /// when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub image: Option<String>,
    /// Environment variables on top of what the job needs, such as `SENSORIUM_LOG`.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// ServiceAccount of the pods; `default` when not set. Its token is not mounted: no program of ours calls the API server.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub service_account_name: Option<String>,
    /// Names of Secrets whose keys become environment variables: credentials of a store, such as `AWS_ACCESS_KEY_ID`.
    #[serde(default)]
    #[schemars(length(max = 16), inner(length(min = 1, max = 253)))]
    pub env_from_secrets: Vec<String>,
}

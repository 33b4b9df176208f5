//! What every job says about how it runs, whatever it computes.

use std::collections::BTreeMap;

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
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self { max_restarts: default_max_restarts() }
    }
}

fn default_max_restarts() -> u32 {
    3
}

/// What one worker (one pod) needs of the machine, in Kubernetes' words. Runs on one machine do not limit anything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Resources {
    /// What the scheduler sets aside, such as `cpu: "4"`, `memory: 8Gi`.
    #[serde(default)]
    pub requests: BTreeMap<String, Quantity>,
    /// What the worker may not exceed, such as `memory: 8Gi`, `nvidia.com/gpu: "1"`.
    #[serde(default)]
    pub limits: BTreeMap<String, Quantity>,
}

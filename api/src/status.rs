//! What the statuses of all kinds share.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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

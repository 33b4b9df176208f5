//! Why a spec that was accepted cannot be made true all the same.

use sensorium_telemetry::error_line;

use crate::plan::PlanError;

/// Why the servers cannot be made what the spec asks for, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Who is against it.
    pub cause: RefusalCause,
    /// One sentence that names what is wrong.
    pub message: String,
}

/// Who is against a spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalCause {
    /// The spec itself makes no sense.
    Spec,
    /// The artifact has no graph of that name.
    Graph,
    /// The API server does not take an object that the spec needs.
    Cluster,
}

impl RefusalCause {
    /// Reason of conditions and events.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Spec => "InvalidSpec",
            Self::Graph => "UnknownGraph",
            Self::Cluster => "RefusedByCluster",
        }
    }
}

impl Refusal {
    /// By the plan.
    pub(crate) fn of_plan(error: &PlanError) -> Self {
        let cause = match error {
            PlanError::RunsNothing { .. } | PlanError::Spec { .. } | PlanError::NotAvailable { .. } => {
                RefusalCause::Spec
            }
            PlanError::UnknownGraph { .. } => RefusalCause::Graph,
        };
        Self { cause, message: error_line(error) }
    }

    /// By the API server, which said `why` when the operator was to `action` an `object`.
    pub(crate) fn by_cluster(action: &str, object: &str, why: &str) -> Self {
        Self {
            cause: RefusalCause::Cluster,
            message: format!("the cluster does not let {object} be made ({action}): {why}"),
        }
    }
}

//! From a resource to what must run.

mod compression;
mod config;
mod order;
mod ranks;
mod serving;
mod spec_hash;
mod storage;
mod template;
mod training;
mod workload;

pub use order::{OrderError, order};
pub use ranks::Process;
pub use template::{Part, Resolve, Template};
pub use workload::{HttpProbe, Lifetime, Mount, MountSource, Program, Role, WorkloadPlan};

use sensorium_api::Resource;

/// Why a resource has no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A ModelArtifact is a record: there is nothing to run.
    #[error("ModelArtifact/{name} runs nothing; plan the job that makes it or serves it")]
    RunsNothing {
        /// Name of the artifact.
        name: String,
    },
    /// A spec that is not JSON, such as one with a NaN.
    #[error("the spec of {job} is not JSON")]
    Spec {
        /// The job.
        job: String,
        /// What the encoder says.
        source: serde_json::Error,
    },
}

/// What `resource` needs to run.
///
/// # Errors
/// [`PlanError::RunsNothing`] for a ModelArtifact.
pub fn plan(resource: &Resource) -> Result<WorkloadPlan, PlanError> {
    match resource {
        Resource::TrainingJob(job) => training::plan_training(job),
        Resource::CompressionJob(job) => compression::plan_compression(job),
        Resource::ServingJob(job) => serving::plan_serving(job),
        Resource::ModelArtifact(_) => Err(PlanError::RunsNothing { name: resource.name() }),
    }
}

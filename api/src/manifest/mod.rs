//! Manifests: YAML text to checked resources, with no cluster.
//!
//! A manifest is held to the very definitions that a cluster is given ([`crate::crds`]): first to the schema (types,
//! names, ranges), then to its CEL rules. So no rule is written twice, and what passes here passes there. Every
//! problem of a file is reported at once, each with its place, the value found and what would be right.

mod availability;
mod document;
mod problem;
mod rules;
mod schema;

pub use availability::unavailable;
pub use document::parse_documents;
pub use problem::{Cause, ManifestError, Problem};

use kube::ResourceExt;

use crate::run::{JobKey, JobKind};
use crate::{CompressionJob, ModelArtifact, ServingJob, TrainingJob};

/// A checked document.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "jobs of all kinds are about as large, and few are held as resources")]
pub enum Resource {
    /// Trains a model.
    TrainingJob(TrainingJob),
    /// Compresses a model.
    CompressionJob(CompressionJob),
    /// Serves a model.
    ServingJob(ServingJob),
    /// Records a model.
    ModelArtifact(ModelArtifact),
}

impl Resource {
    /// The kind as manifests write it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::TrainingJob(_) => "TrainingJob",
            Self::CompressionJob(_) => "CompressionJob",
            Self::ServingJob(_) => "ServingJob",
            Self::ModelArtifact(_) => "ModelArtifact",
        }
    }

    /// `metadata.name`.
    pub fn name(&self) -> String {
        match self {
            Self::TrainingJob(object) => object.name_any(),
            Self::CompressionJob(object) => object.name_any(),
            Self::ServingJob(object) => object.name_any(),
            Self::ModelArtifact(object) => object.name_any(),
        }
    }

    /// The job's key, or nothing for a ModelArtifact, which runs nothing.
    pub fn job(&self) -> Option<JobKey> {
        match self {
            Self::TrainingJob(object) => Some(JobKey::of(object, JobKind::TrainingJob)),
            Self::CompressionJob(object) => Some(JobKey::of(object, JobKind::CompressionJob)),
            Self::ServingJob(object) => Some(JobKey::of(object, JobKind::ServingJob)),
            Self::ModelArtifact(_) => None,
        }
    }
}

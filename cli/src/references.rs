//! What a job reads and writes outside itself, by the names its manifest uses.

use sensorium_api::manifest::Resource;
use sensorium_api::{CompressionStep, ModelSource};

/// An artifact by name (or digest) and store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ArtifactReference {
    /// URI of the store.
    pub store: String,
    /// Name, or `sha256:` and a digest.
    pub artifact: String,
}

/// The references of one job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// Data sets, without repetition.
    pub data: Vec<String>,
    /// The artifact that the job starts from, or that it serves.
    pub source: Option<ArtifactReference>,
    /// The artifact that the job makes.
    pub output: Option<ArtifactReference>,
}

impl References {
    /// The references of a job.
    pub fn of(resource: &Resource) -> Self {
        let reference = |store: &String, artifact: &String| {
            Some(ArtifactReference { store: store.clone(), artifact: artifact.clone() })
        };
        let mut references = match resource {
            Resource::TrainingJob(job) => Self {
                data: vec![job.spec.data.train.clone(), job.spec.data.evaluation.clone()],
                source: match &job.spec.model {
                    ModelSource::Architecture(_) => None,
                    ModelSource::Artifact(artifact) => reference(&job.spec.output.store, artifact),
                },
                output: reference(&job.spec.output.store, &job.spec.output.artifact),
            },
            Resource::CompressionJob(job) => {
                let calibration = job.spec.steps.iter().map(|step| match step {
                    CompressionStep::Quantize(quantize) => quantize.calibration.data.clone(),
                });
                Self {
                    data: calibration.chain([job.spec.acceptance.data.clone()]).collect(),
                    source: reference(&job.spec.source.store, &job.spec.source.artifact),
                    output: reference(&job.spec.output.store, &job.spec.output.artifact),
                }
            }
            Resource::ServingJob(job) => Self {
                data: job.spec.verification.iter().map(|verification| verification.data.clone()).collect(),
                source: reference(&job.spec.model.store, &job.spec.model.artifact),
                output: None,
            },
            Resource::ModelArtifact(_) => Self::default(),
        };
        references.data.sort();
        references.data.dedup();
        references
    }
}

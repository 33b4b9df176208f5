//! What can go wrong in a training run.

use std::path::PathBuf;

use sensorium_artifact::{ArtifactError, Digest};
use sensorium_data::DataError;
use sensorium_dist::DistError;
use sensorium_modality::ModalityError;
use sensorium_model::{ConfigError, ExportError, Slot};

/// Every way a training run ends early.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The run file is not there or does not parse.
    #[error("could not read the run's configuration {}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The job asks for something that this program or the data cannot give.
    #[error("{field}: {reason}")]
    Spec {
        /// Path of the field in the manifest.
        field: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The architecture cannot be built.
    #[error("spec.model.architecture")]
    Architecture(#[from] ConfigError),
    /// A parameter that the network has is missing in the weights.
    #[error("the weights lack parameter {name}")]
    MissingParameter {
        /// Full name.
        name: String,
    },
    /// A parameter has another shape than the network's.
    #[error("parameter {name} has shape {found:?}, the network needs {expected:?}")]
    ParameterShape {
        /// Full name.
        name: String,
        /// As found.
        found: Vec<i64>,
        /// As declared.
        expected: Vec<i64>,
    },
    /// A block's input was never produced.
    #[error("{block} needs {slot:?}, which nothing produced")]
    MissingInput {
        /// The block.
        block: String,
        /// The slot.
        slot: Slot,
    },
    /// A number became infinite or not a number.
    #[error("the {what} of step {step} is {value}; lower spec.training.optimizer.learningRate or raise warmupSteps")]
    NotFinite {
        /// Step, counted from 1.
        step: u64,
        /// "loss", say.
        what: &'static str,
        /// The number.
        value: f64,
    },
    /// A sample that a task cannot be trained on.
    #[error("sample {key}: {reason}")]
    Sample {
        /// Its key in the data set.
        key: String,
        /// Why.
        reason: String,
    },
    /// A saved checkpoint does not hold what its index says.
    #[error("checkpoint {}: {file} has digest {found}, its index says {expected}", folder.display())]
    DigestMismatch {
        /// The checkpoint.
        folder: PathBuf,
        /// The damaged file.
        file: String,
        /// Of what is there.
        found: Digest,
        /// Of what was written.
        expected: Digest,
    },
    /// Nobody can tell at the moment whether there are checkpoints, or what is in them.
    #[error("could not read {}", path.display())]
    CheckpointRead {
        /// A checkpoint's file, or the folder of all.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A saved checkpoint is none.
    #[error("checkpoint {}: {reason}", folder.display())]
    Checkpoint {
        /// The checkpoint.
        folder: PathBuf,
        /// Why.
        reason: String,
    },
    /// The thread that prepares batches is gone.
    #[error("the thread that prepares batches ended without an error")]
    LoaderGone,
    /// The run was asked to stop.
    #[error("stopped {} as asked; {}", at(*step), match unsaved {
        None => "the same job goes on from there".to_owned(),
        Some(why) => format!("its state could not be saved, so that the same job goes on from an earlier step: {why}"),
    })]
    Stopped {
        /// Steps that are done; 0 where this process did not come to any, and nothing has changed.
        step: u64,
        /// Why its state could not be saved, where it could not.
        unsaved: Option<String>,
    },
    /// The progress server could not start.
    #[error("could not serve progress on {address}")]
    Serve {
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Reading data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Decoding or tokenising.
    #[error(transparent)]
    Modality(#[from] ModalityError),
    /// Talking to the other ranks.
    #[error(transparent)]
    Dist(#[from] DistError),
    /// Storing or fetching an artifact.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// Writing the model as ONNX.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// Computing.
    #[error("libtorch refused an operation")]
    Torch(#[from] tch::TchError),
}

fn at(step: u64) -> String {
    if step == 0 { "before the first step".to_owned() } else { format!("at step {step}") }
}

impl TrainError {
    /// Whether a checkpoint is not what was saved.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, Self::DigestMismatch { .. } | Self::Checkpoint { .. })
    }

    /// Whether this worker only failed because others did.
    pub fn is_wake(&self) -> bool {
        matches!(self, Self::Dist(error) if error.is_wake())
    }

    /// Whether the job itself, or the data it names, is at fault: running it again unchanged ends the same way.
    pub fn is_users(&self) -> bool {
        match self {
            Self::Config { .. }
            | Self::Spec { .. }
            | Self::Architecture(_)
            | Self::ParameterShape { .. }
            | Self::NotFinite { .. }
            | Self::Sample { .. } => true,
            // A disk that does not give or take a file may do so later.
            Self::Modality(error) => !matches!(error, ModalityError::File { .. }),
            Self::Artifact(error) => error.is_users(),
            Self::MissingParameter { .. }
            | Self::MissingInput { .. }
            | Self::DigestMismatch { .. }
            | Self::CheckpointRead { .. }
            | Self::Checkpoint { .. }
            | Self::LoaderGone
            | Self::Stopped { .. }
            | Self::Serve { .. }
            | Self::Data(_)
            | Self::Dist(_)
            | Self::Export(_)
            | Self::Torch(_) => false,
        }
    }
}

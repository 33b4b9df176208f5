//! What a caller is told when a request is not answered.

use std::{sync::Arc, time::Duration};

use sensorium_engine::{EngineError, PipelineError, RawTensorError};
use sensorium_telemetry::error_line;
use tonic::{Code, Status};

use crate::{
    budget::Spent, model::SequenceError, pool::PoolError, scheduler::ScheduleError, shared_memory::SharedMemoryError,
    wire::InvalidRequest,
};

/// Why a request has no answer. [`InferError::code`] says whose fault it is and whether to try again.
#[derive(Debug, thiserror::Error)]
pub enum InferError {
    /// There is no such model here.
    #[error(
        "there is no model {model:?} on this server; it has {}",
        if known.is_empty() { "none".to_owned() } else { known.join(", ") }
    )]
    UnknownModel {
        /// As the request names it.
        model: String,
        /// Those there are.
        known: Vec<String>,
    },
    /// The model has no such version.
    #[error("model {model:?} has no version {version:?}; leave it empty or ask for one of {}", known.join(", "))]
    UnknownVersion {
        /// The model.
        model: String,
        /// As the request names it.
        version: String,
        /// Those there are.
        known: Vec<String>,
    },
    /// A version is a number.
    #[error("version {version:?} of model {model:?} is no number, as versions are; leave it empty for the newest")]
    NoVersion {
        /// The model.
        model: String,
        /// As the request names it.
        version: String,
    },
    /// The model is being loaded, was unloaded, or could not be loaded.
    #[error("model {model:?} is not ready: {reason}")]
    NotReady {
        /// The model.
        model: String,
        /// What it is doing, or why it is not here.
        reason: String,
    },
    /// The request is meant for another artifact than the one that the model is made of.
    #[error(
        "model {model:?} is of artifact {served}, and the request is meant for {}; ask a server of that one",
        crate::wire::excerpt(wanted)
    )]
    OtherArtifact {
        /// The model.
        model: String,
        /// Digest of its artifact.
        served: String,
        /// As the request says.
        wanted: String,
    },
    /// The model does not take typed parts.
    #[error("model {model:?} takes tensors: call ModelInfer")]
    TakesTensors {
        /// The model.
        model: String,
    },
    /// The model may answer any number of times, which one response cannot carry.
    #[error("model {model:?} is decoupled: call it with ModelStreamInfer, or generate_stream over HTTP")]
    Decoupled {
        /// The model.
        model: String,
    },
    /// The model has one response for each request, and was asked for several.
    #[error("model {model:?} does not iterate: each of its requests has one response")]
    OneResponse {
        /// The model.
        model: String,
    },
    /// Nobody took a response of a request that has several.
    #[error("nobody took the next response for {patience:?}; the request was given up")]
    Unread {
        /// How long it waited.
        patience: Duration,
    },
    /// The server is about to end.
    #[error("the server is shutting down; ask another one")]
    Draining,
    /// The caller's deadline passed.
    #[error("the deadline passed before the answer was there")]
    DeadlineExceeded,
    /// There is no room for the answer.
    #[error(transparent)]
    Spent(#[from] Spent),
    /// The request does not fit the model.
    #[error(transparent)]
    Invalid(#[from] InvalidRequest),
    /// The parts of a multimodal request do not make up its task.
    #[error(transparent)]
    Parts(#[from] PartsError),
    /// One item of a batch was refused, or failed.
    #[error("row {row} of input {input:?}")]
    Item {
        /// The input or modality.
        input: &'static str,
        /// Which of its rows.
        row: usize,
        /// Why.
        source: Box<PipelineError>,
    },
    /// The pipeline refused the request, or failed.
    #[error(transparent)]
    Pipeline(Box<PipelineError>),
    /// Preparing inputs did not happen.
    #[error(transparent)]
    Prepare(#[from] PoolError),
    /// Another caller asked the same and was told this.
    #[error(transparent)]
    Shared(Arc<InferError>),
    /// A step of an ensemble did not give what it was asked for.
    #[error("no step of {model:?} gave tensor {tensor:?}")]
    Ensemble {
        /// The ensemble.
        model: String,
        /// The tensor.
        tensor: String,
    },
    /// A step of an ensemble failed.
    #[error("its {step}")]
    Step {
        /// Its number and its model.
        step: String,
        /// What the model said.
        source: Box<InferError>,
    },
    /// The request does not fit into its sequence.
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    /// A tensor has not the elements of the shape that the model's configuration gives it.
    #[error("a tensor of {model:?} cannot be reshaped as its configuration says")]
    Reshape {
        /// The model.
        model: String,
        /// Why.
        source: RawTensorError,
    },
    /// The engine did not run, or failed.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
}

/// What is wrong with the parts of a multimodal request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartsError {
    /// The model cannot do this.
    #[error("model {model:?} has no task {task:?}; it has {}", known.join(", "))]
    UnknownTask {
        /// The model.
        model: String,
        /// As the request names it.
        task: String,
        /// What the model can do.
        known: Vec<&'static str>,
    },
    /// A part with nothing in it.
    #[error("part {part} is empty; set its text or its image")]
    Empty {
        /// Its index.
        part: usize,
    },
    /// The task needs another part.
    #[error("task {task:?} needs one {modality} part, the request has none")]
    Missing {
        /// The task.
        task: &'static str,
        /// What is missing.
        modality: &'static str,
    },
    /// The task takes one part of each modality.
    #[error("task {task:?} takes one {modality} part, part {part} is one more")]
    Extra {
        /// The task.
        task: &'static str,
        /// What there is too much of.
        modality: &'static str,
        /// Index of the second one.
        part: usize,
    },
    /// No parts, or more than fit into a batch.
    #[error("the request has {found} parts; task {task:?} takes 1 to {max}")]
    Count {
        /// The task.
        task: &'static str,
        /// Parts of the request.
        found: usize,
        /// The most it takes.
        max: usize,
    },
    /// A media type that is not one of an image that can be read, or not the file's.
    #[error("part {part} is declared as {declared:?}, {reason}")]
    MediaType {
        /// Its index.
        part: usize,
        /// As the request says.
        declared: String,
        /// What is right.
        reason: String,
    },
}

impl InferError {
    /// The gRPC code. Overload is RESOURCE_EXHAUSTED everywhere.
    pub fn code(&self) -> Code {
        match self {
            Self::UnknownModel { .. }
            | Self::UnknownVersion { .. }
            | Self::Invalid(InvalidRequest::SharedMemory(SharedMemoryError::Unknown { .. })) => Code::NotFound,
            Self::Spent(_)
            | Self::Invalid(InvalidRequest::SharedMemory(SharedMemoryError::Spent(_)))
            | Self::Prepare(PoolError::Overloaded { .. })
            | Self::Schedule(ScheduleError::Overloaded { .. } | ScheduleError::TooLate { .. })
            | Self::Sequence(SequenceError::Overloaded { .. }) => Code::ResourceExhausted,
            Self::Invalid(_)
            | Self::NoVersion { .. }
            | Self::TakesTensors { .. }
            | Self::Parts(_)
            | Self::Sequence(
                SequenceError::NoId { .. }
                | SequenceError::NotStarted { .. }
                | SequenceError::NamedId { .. }
                | SequenceError::Rows { .. }
                | SequenceError::TextId { .. },
            ) => Code::InvalidArgument,
            Self::Item { source, .. } | Self::Pipeline(source) => fault(source.is_callers_fault()),
            Self::Shared(error) => error.code(),
            Self::Step { source, .. } => source.code(),
            Self::Decoupled { .. } | Self::OneResponse { .. } => Code::Unimplemented,
            Self::Unread { .. } => Code::Cancelled,
            Self::DeadlineExceeded | Self::Schedule(ScheduleError::DeadlineExceeded { .. }) => Code::DeadlineExceeded,
            Self::Draining
            | Self::NotReady { .. }
            | Self::Schedule(
                ScheduleError::Stopped { .. }
                // As Triton says it.
                | ScheduleError::QueueFull { .. }
                | ScheduleError::TimedOut { .. },
            ) => Code::Unavailable,
            Self::OtherArtifact { .. } => Code::FailedPrecondition,
            Self::Schedule(error) if error.is_everybodys() => Code::Unavailable,
            Self::Schedule(ScheduleError::Engine { source, .. }) => fault(source.is_callers_fault()),
            Self::Prepare(PoolError::CutShort)
            | Self::Ensemble { .. }
            | Self::Reshape { .. }
            | Self::Schedule(ScheduleError::Outputs { .. }) => Code::Internal,
        }
    }

    /// The status for a request to `model`: the message has the model and the whole chain of causes.
    pub fn into_status(self, model: &str) -> Status {
        let (name, line) = (format!("{:?}", crate::wire::excerpt(model)), error_line(&self));
        let message = match &self {
            Self::UnknownModel { .. }
            | Self::UnknownVersion { .. }
            | Self::NoVersion { .. }
            | Self::NotReady { .. }
            | Self::TakesTensors { .. } => line,
            // As a graph does that is called as its model is.
            _ if line.starts_with(&name) => format!("model {line}"),
            _ => format!("model {name}: {line}"),
        };
        Status::new(self.code(), shortened(message))
    }
}

impl InferError {
    /// Whether it is one caller's patience that ended: another would be answered.
    pub(crate) fn is_one_callers(&self) -> bool {
        match self {
            Self::Shared(error) => error.is_one_callers(),
            Self::Step { source, .. } => source.is_one_callers(),
            Self::DeadlineExceeded => true,
            Self::Schedule(error) => {
                use ScheduleError::{DeadlineExceeded, TimedOut, TooLate};
                matches!(error, DeadlineExceeded { .. } | TimedOut { .. } | TooLate { .. })
            }
            _ => false,
        }
    }

    /// Whether an engine ran, or was about to, and said no to what it was given.
    pub(crate) fn is_of_the_input(&self) -> bool {
        matches!(self, Self::Schedule(error @ ScheduleError::Engine { .. }) if !error.is_everybodys())
    }

    /// A tensor could not take the shape that the configuration of `model` gives it.
    pub(crate) fn reshape(model: &str, source: RawTensorError) -> Self {
        Self::Reshape { model: model.to_owned(), source }
    }

    /// A graph was called with inputs that contradict each other.
    pub(crate) fn engine(graph: &str, source: EngineError) -> Self {
        Self::Schedule(ScheduleError::Engine { graph: graph.to_owned(), source: Box::new(source) })
    }
}

/// Boxed, because it is larger than everything else that an answer may be.
impl From<PipelineError> for InferError {
    fn from(error: PipelineError) -> Self {
        Self::Pipeline(Box::new(error))
    }
}

fn fault(callers: bool) -> Code {
    if callers { Code::InvalidArgument } else { Code::Internal }
}

/// A status travels in headers, and clients refuse headers of more than 8 KiB, percent-encoding included.
pub(crate) fn shortened(mut message: String) -> String {
    const LONGEST: usize = 6000;
    // All but these may have three for each of their bytes.
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.~:,;()[]=+'!*@&$|^/\\".contains(c);
    let mut length = 0;
    let end = message.char_indices().find(|(_, c)| {
        length += if is_plain(*c) { 1 } else { 3 * c.len_utf8() };
        length > LONGEST
    });
    if let Some((end, _)) = end {
        message.truncate(end);
        message.push_str("...");
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_any_letters_fits_into_headers() {
        for letter in ["x", " ", "é", "猫", "🐈"] {
            let status = Status::invalid_argument(shortened(letter.repeat(10_000)));
            let mut headers = tonic::codegen::http::HeaderMap::new();
            status.add_header(&mut headers).unwrap();
            let bytes = headers["grpc-message"].len();
            assert!((5_900..6_100).contains(&bytes), "{letter}: {bytes}");
        }
        assert_eq!(shortened("as it is".to_owned()), "as it is");
    }
}

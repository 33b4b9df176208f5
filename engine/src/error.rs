use std::path::PathBuf;

use sensorium_artifact::DType;
use sensorium_modality::{ModalityError, TensorError};

use crate::signature::{Shape, dtype_name};

/// Why a graph could not be opened or run.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// The onnxruntime library could not be loaded.
    #[error(
        "onnxruntime could not be loaded from {}: {reason}; set SENSORIUM_ONNXRUNTIME to the path of libonnxruntime.so, \
         version 1.{minimum_minor} or later",
        path.display()
    )]
    Library {
        /// What was tried.
        path: PathBuf,
        /// What the loader said.
        reason: String,
        /// The oldest version that works.
        minimum_minor: u32,
    },
    /// The library refused a setting, or has not what it asks for.
    #[error("the engine could not be set up: {reason}")]
    Setup {
        /// What it said.
        reason: String,
    },
    /// A file does not hold a graph that the engine can run.
    #[error("{origin} cannot be opened: {reason}")]
    Open {
        /// The file, or what the bytes are called.
        origin: String,
        /// What the engine said.
        reason: String,
    },
    /// A graph has an input or output of a type that tensors do not have, or that this caller cannot take.
    #[error(
        "{origin} cannot be used: `{tensor}` is {found}; inputs and outputs must be tensors of numbers, bools or texts"
    )]
    UnsupportedType {
        /// The file, or what the bytes are called.
        origin: String,
        /// The input or output.
        tensor: String,
        /// Its type.
        found: String,
    },
    /// An input that the graph needs is not there.
    #[error("input `{input}` is missing, it must be {}{wanted_shape}", dtype_name(*wanted))]
    MissingInput {
        /// The input.
        input: String,
        /// Its element type.
        wanted: DType,
        /// Its shape.
        wanted_shape: Shape,
    },
    /// An input that the graph does not have, or the second of the same name.
    #[error("input `{input}` is not one of the graph's inputs or comes twice; they are {}", known.join(", "))]
    UnknownInput {
        /// The input.
        input: String,
        /// The graph's inputs.
        known: Vec<String>,
    },
    /// An input's element type or shape is not the graph's.
    #[error("input `{input}` is {}{got_shape:?}, it must be {}{wanted_shape}", dtype_name(*got), dtype_name(*wanted))]
    WrongInput {
        /// The input.
        input: String,
        /// Its element type.
        got: DType,
        /// Its shape.
        got_shape: Vec<i64>,
        /// The element type it must have.
        wanted: DType,
        /// The shape it must have.
        wanted_shape: Shape,
    },
    /// Two inputs disagree about a size they share.
    #[error("inputs `{first}` and `{second}` share the size `{symbol}`, but it is {first_size} and {second_size}")]
    SizesDisagree {
        /// Name of the shared size.
        symbol: String,
        /// The input that came first.
        first: String,
        /// Its size.
        first_size: i64,
        /// The input that disagrees.
        second: String,
        /// Its size.
        second_size: i64,
    },
    /// A text input holds bytes that are not UTF-8, or a zero, at which the engine would end it.
    #[error("input `{input}` has bytes that are not UTF-8, or a zero, in element {index}")]
    NotUtf8 {
        /// The input.
        input: String,
        /// Position of the element, row-major.
        index: usize,
    },
    /// An output that the graph does not have.
    #[error("there is no output `{output}`, only {}", known.join(", "))]
    UnknownOutput {
        /// The output.
        output: String,
        /// The graph's outputs.
        known: Vec<String>,
    },
    /// The engine failed while it ran.
    #[error("the graph failed while running: {reason}")]
    Run {
        /// What it said.
        reason: String,
    },
    /// The engine failed while it ran, and may have changed what it keeps from run to run before it did: no part of the run can be
    /// done again.
    #[error("the graph failed while running: {reason}; its state is as the failed run left it")]
    Spoilt {
        /// What it said.
        reason: String,
    },
    /// The graph runs elsewhere, and nobody there can run it, whatever the inputs are. Trying again later may succeed.
    #[error("the graph runs at {address}, where nobody can run it now: {reason}")]
    Unavailable {
        /// Where.
        address: String,
        /// What the last attempt failed with, or what was answered.
        reason: String,
    },
    /// The GPU did what no process recovers from, such as a read beyond its memory: no engine of this process can use it any more,
    /// opened anew or not. Another process can.
    #[error("the GPU is lost to this process: {reason}")]
    DeviceLost {
        /// What was said of it.
        reason: String,
    },
    /// The run was given up, because nobody waited for it any more.
    #[error("the run was given up: nobody waited for it any more")]
    CutShort,
}

impl EngineError {
    /// Whether the inputs or the names asked for are at fault, so that trying again cannot help.
    pub fn is_callers_fault(&self) -> bool {
        match self {
            Self::MissingInput { .. }
            | Self::UnknownInput { .. }
            | Self::WrongInput { .. }
            | Self::SizesDisagree { .. }
            | Self::NotUtf8 { .. }
            | Self::UnknownOutput { .. } => true,
            Self::Library { .. }
            | Self::Setup { .. }
            | Self::Open { .. }
            | Self::UnsupportedType { .. }
            | Self::Run { .. }
            | Self::Spoilt { .. }
            | Self::Unavailable { .. }
            | Self::DeviceLost { .. }
            | Self::CutShort => false,
        }
    }
}

/// Why an artifact is no pipeline, or a request could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The artifact's manifest does not describe a pipeline.
    #[error("artifact `{artifact}` has no usable pipeline: {reason}")]
    NotAPipeline {
        /// Name of the artifact.
        artifact: String,
        /// What is missing or wrong.
        reason: String,
    },
    /// A graph is not what the manifest says.
    #[error("graph `{graph}` is not what the manifest says: {reason}")]
    SignatureMismatch {
        /// Name of the graph.
        graph: String,
        /// The first difference.
        reason: String,
    },
    /// The model was not trained for this task.
    #[error("this model has no {task} head")]
    NoSuchTask {
        /// `VQA` or `contrastive`.
        task: &'static str,
    },
    /// A graph gave something that the pipeline cannot read.
    #[error("output `{output}` of graph `{graph}` {reason}")]
    BadOutput {
        /// The graph.
        graph: String,
        /// The output.
        output: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An input could not be prepared.
    #[error(transparent)]
    Modality(#[from] ModalityError),
    /// Rows could not be put together.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A graph could not be opened or run.
    #[error("graph `{graph}` could not be opened or run")]
    Engine {
        /// The graph.
        graph: String,
        /// Why.
        source: EngineError,
    },
}

impl PipelineError {
    /// Whether the request is at fault, so that trying again cannot help.
    pub fn is_callers_fault(&self) -> bool {
        match self {
            Self::Modality(error) => error.is_callers_fault(),
            Self::Engine { source, .. } => source.is_callers_fault(),
            Self::NoSuchTask { .. } => true,
            Self::NotAPipeline { .. } | Self::SignatureMismatch { .. } | Self::BadOutput { .. } | Self::Tensor(_) => {
                false
            }
        }
    }
}

//! Inference engines behind one small trait, and the multimodal pipeline that runs on them.
//!
//! * [`Engine`] runs one graph. [`OnnxRuntime`] is the one in this crate: a session of the onnxruntime library, which is
//!   loaded when the first graph is opened, so that programs start, and say what is missing, without it.
//! * [`Opener`] is how a program is given an engine; those that link large libraries are crates of their own.
//! * [`RawTensor`] is what goes in and out: bytes as they come from the wire, shared and not copied.
//! * [`Signature`] is what a graph takes and gives. Inputs are held against it before an engine sees them, so a caller
//!   reads which input was wrong and how, not what some kernel made of it.
//! * [`Pipeline`] knows which graphs of an artifact turn an image and a question into an answer. It runs nothing
//!   itself: whoever holds a [`GraphRunner`] does, be it the server with a batcher in front of each graph or
//!   [`LocalPipeline`], which opens the graphs in this process and calls them one after the other.
//!
//! What it is not: a scheduler. An engine belongs to one thread at a time; queues, batches and deadlines are the
//! server's business.

mod by_shape;
mod cuda;
mod division;
mod engine;
mod error;
#[cfg(feature = "fixture")]
pub mod fixture;
pub mod onnxruntime;
mod opener;
mod options;
mod pipeline;
mod raw;
mod same_file;
mod signature;
mod watch;

pub use engine::{Engine, Named, Waiters};
pub use error::{EngineError, PipelineError};
pub use onnxruntime::OnnxRuntime;
pub use opener::{Declared, DeclaredTensor, ELSEWHERE, Elsewhere, Open, Opener, RESET_METHOD};
pub use options::{Device, DeviceError, Optimization, Options};
pub use pipeline::{Encoded, GraphRunner, LocalPipeline, Pipeline, VqaAnswer, VqaInput, open_graph, rank_answers};
pub use raw::{RawTensor, RawTensorError, Strings, element_size, smallest_shape};
pub use same_file::{FileStamp, SameFile};
pub use sensorium_artifact::DType;
pub use sensorium_artifact::TensorSpec;
pub use signature::{Signature, artifact_dtype, dtype_name};

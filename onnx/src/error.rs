use std::path::PathBuf;

/// Why a model could not be read, written or built.
#[derive(Debug, thiserror::Error)]
pub enum OnnxError {
    /// The file could not be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file could not be written; what was there before is untouched.
    #[error("could not write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The bytes are not a protobuf message of this kind.
    #[error("not an ONNX model")]
    Decode(#[from] prost::DecodeError),
    /// The file says something that the rest of Sensorium cannot keep.
    #[error("graph {graph:?} uses {what}, which is not supported")]
    Unsupported {
        /// Name of the graph.
        graph: String,
        /// The feature, and where it is used.
        what: String,
    },
    /// The graph breaks a rule of the format.
    #[error("graph {graph:?} is not valid: {rule}")]
    Invalid {
        /// Name of the graph.
        graph: String,
        /// The rule, with the names that break it.
        rule: String,
    },
    /// An initializer was asked for a type that it does not have.
    #[error("tensor {name:?} holds {found}, asked for {asked}")]
    WrongType {
        /// The tensor.
        name: String,
        /// What it holds.
        found: String,
        /// What was asked for.
        asked: super::DType,
    },
    /// The number of elements does not fit the shape.
    #[error("tensor {name:?} has {found} elements, its shape {dims:?} needs {expected}")]
    WrongLength {
        /// The tensor.
        name: String,
        /// Its shape.
        dims: Vec<i64>,
        /// Elements that the shape needs.
        expected: usize,
        /// Elements that are there.
        found: usize,
    },
}

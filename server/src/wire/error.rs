//! Why an inference request was refused before it cost anything.

use sensorium_engine::RawTensorError;
use sensorium_proto::inference::model_infer_request::InferInputTensor;

use crate::shared_memory::SharedMemoryError;

/// The beginning of a name that came with a request, which may be megabytes long, for use in a message.
pub(crate) fn excerpt(name: &str) -> String {
    const LONGEST: usize = 80; // longer than any sensible name, shorter than a line of a log
    match name.char_indices().nth(LONGEST) {
        None => name.to_owned(),
        Some((end, _)) => format!("{}...", &name[..end]),
    }
}

/// What is wrong with a request: always the client's to mend, so always INVALID_ARGUMENT.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRequest {
    /// A parameter of the protocol whose value means nothing, or contradicts another.
    #[error("{at} has a parameter {name:?} that cannot be used: {reason}")]
    Parameter {
        /// "the request", or an input or output by name.
        at: String,
        /// The parameter.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// An input that the model does not have.
    #[error("input {input:?} is not one of the model's: {}", expected.join(", "))]
    UnknownInput {
        /// As the request names it.
        input: String,
        /// Those of the model.
        expected: Vec<String>,
    },
    /// An input that came twice.
    #[error("input {input:?} is given twice")]
    DuplicateInput {
        /// Its name.
        input: String,
    },
    /// An input that did not come.
    #[error("input {input:?} is missing; it is {datatype} {shape}")]
    MissingInput {
        /// Its name.
        input: String,
        /// Its datatype.
        datatype: &'static str,
        /// Its shape, -1 for sizes that the request chooses.
        shape: String,
    },
    /// An output that the model does not have.
    #[error("requested output {output:?} is not one of the model's: {}", expected.join(", "))]
    UnknownOutput {
        /// As the request names it.
        output: String,
        /// Those of the model.
        expected: Vec<String>,
    },
    /// An output that is asked for twice.
    #[error("output {output:?} is requested twice")]
    DuplicateOutput {
        /// Its name.
        output: String,
    },
    /// A tensor of another type.
    #[error("input {input:?} has datatype {found:?}, the model takes {expected}")]
    Datatype {
        /// The input.
        input: String,
        /// As the request spells it.
        found: String,
        /// The model's.
        expected: &'static str,
    },
    /// A shape that does not fit the model.
    #[error(
        "input {input:?} has shape {found:?}, the model takes {expected}, where -1 is any size, of the batch at least 1"
    )]
    Shape {
        /// The input.
        input: String,
        /// The request's.
        found: Vec<i64>,
        /// The model's.
        expected: String,
    },
    /// A datatype that the protocol does not have.
    #[error("input {input:?} has datatype {found:?}, which the protocol does not have; it has FP32, INT64, BYTES, ...")]
    NoDatatype {
        /// The input.
        input: String,
        /// As the request spells it.
        found: String,
    },
    /// No datatype at all.
    #[error("input {input:?} has no datatype")]
    MissingDatatype {
        /// The input.
        input: String,
    },
    /// A size that is left open, as only models do it.
    #[error("input {input:?} has shape {shape:?}; in a request every size is written, and at least 0")]
    OpenSize {
        /// The input.
        input: String,
        /// The shape.
        shape: Vec<i64>,
    },
    /// A shape that no tensor has.
    #[error("input {input:?} has {found} dimensions; tensors have {max} at most")]
    Rank {
        /// The input.
        input: String,
        /// Dimensions that came.
        found: usize,
        /// The most that there may be.
        max: usize,
    },
    /// Bytes that are no tensor of the declared type and shape.
    #[error("input {input:?}: {source}")]
    Tensor {
        /// The input.
        input: String,
        /// What is wrong with them.
        source: RawTensorError,
    },
    /// Something about shared memory.
    #[error(transparent)]
    SharedMemory(#[from] SharedMemoryError),
    /// An output that does not fit into the shared memory that the request gives it.
    #[error("output {output:?} has {found} bytes, the request gives it {given} of shared memory")]
    SharedOutput {
        /// The output.
        output: String,
        /// Its bytes.
        found: usize,
        /// As the request says.
        given: u64,
    },
    /// Classes of an output that has no scores.
    #[error("output {output:?} is {datatype}, which has no classes; ask for it without `classification`")]
    NoClasses {
        /// The output.
        output: String,
        /// Its datatype.
        datatype: &'static str,
    },
    /// More strings than an answer may have.
    #[error(
        "output {output:?} would be {found} classes, an answer has {most} at most; ask for fewer, or for the scores"
    )]
    TooManyClasses {
        /// The output.
        output: String,
        /// Classes of all rows.
        found: usize,
        /// How many there may be.
        most: usize,
    },
    /// Inputs that disagree on the batch size.
    #[error(
        "input {input:?} has {rows} rows (its first dimension), input {other:?} has {other_rows}; all inputs need the same number"
    )]
    UnequalRows {
        /// The input.
        input: String,
        /// Its rows.
        rows: usize,
        /// The first input.
        other: String,
        /// Its rows.
        other_rows: usize,
    },
    /// A batch that can never be run at once.
    #[error("the request has {rows} rows, the model takes at most {max} at once; split it")]
    TooManyRows {
        /// Of the request.
        rows: usize,
        /// Of the model.
        max: usize,
    },
    /// Data in both places.
    #[error("input {input:?} has contents and the request has raw_input_contents; use one of the two for all inputs")]
    BothForms {
        /// The first input with contents.
        input: String,
    },
    /// Raw buffers that do not pair up with inputs.
    #[error("the request has {found} raw_input_contents for {expected} inputs; it needs one per input, in order")]
    RawCount {
        /// Buffers.
        found: usize,
        /// Inputs.
        expected: usize,
    },
    /// No data at all.
    #[error("input {input:?} has no data; put it into contents.{field} or into raw_input_contents")]
    NoContents {
        /// The input.
        input: String,
        /// Where its elements belong.
        field: &'static str,
    },
    /// Typed data in the field of another datatype.
    #[error("input {input:?} is {datatype} but has data in contents.{found}; it belongs into contents.{expected}")]
    WrongField {
        /// The input.
        input: String,
        /// Its datatype.
        datatype: &'static str,
        /// The field that is filled.
        found: &'static str,
        /// The field for the datatype.
        expected: &'static str,
    },
    /// Typed data that does not fill the shape.
    #[error("input {input:?} has {found} elements in contents.{field}, its shape {shape:?} needs {expected}")]
    ElementCount {
        /// The input.
        input: String,
        /// The field.
        field: &'static str,
        /// Elements that came.
        found: usize,
        /// Elements that the shape has.
        expected: usize,
        /// The shape.
        shape: Vec<i64>,
    },
    /// A typed element beyond its datatype, whose field is wider.
    #[error("element {element} of input {input:?} is {value}, which {datatype} cannot hold")]
    OutOfRange {
        /// The input.
        input: String,
        /// Index of the element.
        element: usize,
        /// Its value.
        value: i64,
        /// The datatype.
        datatype: &'static str,
    },
}

impl InvalidRequest {
    /// Of an input whose datatype the protocol does not have.
    pub(crate) fn datatype(input: &InferInputTensor) -> Self {
        let (name, found) = (excerpt(&input.name), excerpt(&input.datatype));
        if found.is_empty() { Self::MissingDatatype { input: name } } else { Self::NoDatatype { input: name, found } }
    }
}

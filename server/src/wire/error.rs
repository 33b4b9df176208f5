//! Why an inference request was refused before it cost anything.

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
    /// A parameter of the protocol that asks for something this server does not do.
    #[error("{at} has parameter {name:?}, which this server does not support: {reason}")]
    Parameter {
        /// "the request", or an input or output by name.
        at: String,
        /// The parameter.
        name: String,
        /// What it asks for.
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
    #[error("input {input:?} has shape {found:?}, the model takes {expected}, where -1 is any size of at least 1")]
    Shape {
        /// The input.
        input: String,
        /// The request's.
        found: Vec<i64>,
        /// The model's.
        expected: String,
    },
    /// A shape whose elements cannot be counted.
    #[error("input {input:?} has shape {found:?}, which has more elements than memory has addresses")]
    ShapeOverflow {
        /// The input.
        input: String,
        /// The request's.
        found: Vec<i64>,
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
    /// A raw buffer of the wrong length.
    #[error("input {input:?} has {found} bytes of raw contents, its shape {shape:?} of {datatype} needs {expected}")]
    RawLength {
        /// The input.
        input: String,
        /// Bytes that came.
        found: usize,
        /// Bytes that the shape needs.
        expected: usize,
        /// The shape.
        shape: Vec<usize>,
        /// The datatype.
        datatype: &'static str,
    },
    /// A BYTES buffer that ends too early.
    #[error(
        "input {input:?} ends inside element {element} of {elements}: {needed} bytes should follow byte {offset}, {available} do"
    )]
    BytesTruncated {
        /// The input.
        input: String,
        /// Index of the element.
        element: usize,
        /// Elements that the shape has.
        elements: usize,
        /// Where in the buffer.
        offset: usize,
        /// Bytes that should follow.
        needed: usize,
        /// Bytes that do follow.
        available: usize,
    },
    /// A BYTES buffer that goes on after its last element.
    #[error("input {input:?} has {extra} bytes after the last of its {elements} elements")]
    BytesTrailing {
        /// The input.
        input: String,
        /// Bytes too many.
        extra: usize,
        /// Elements that the shape has.
        elements: usize,
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
        shape: Vec<usize>,
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
    /// A raw BOOL that is neither.
    #[error("element {element} of input {input:?} is byte {value}; a BOOL is 0 or 1")]
    NotBool {
        /// The input.
        input: String,
        /// Index of the element.
        element: usize,
        /// The byte.
        value: u8,
    },
}

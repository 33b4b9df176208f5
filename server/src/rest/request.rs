//! An inference request as REST sends it, as the message that gRPC sends: JSON, and behind it the tensors that come as
//! bytes (the binary tensor data extension). Those stay where they are: the message shares the body.

use std::collections::HashMap;

use bytes::Bytes;
use sensorium_proto::inference::{
    InferParameter, ModelInferRequest,
    infer_parameter::ParameterChoice,
    model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
};

use super::{
    Refusal,
    json::{JsonError, Reader, Scalar},
    response::Wanted,
    tensor::{self, Growth, ReadError},
};
use crate::{
    budget::Spent,
    wire::{InvalidRequest, MAX_RANK, excerpt},
};

/// Tensors of a request at most, as many as a gRPC message of the same kind may have.
const MAX_TENSORS: usize = 1 << 12;
/// Parameters of a request, or of one of its tensors, at most,
pub(super) const MAX_PARAMETERS: usize = 256;
/// and of all of them together: each takes many times its bytes in the JSON.
const MOST_PARAMETERS: usize = 1 << 14;

/// Why a body is no inference request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RequestError {
    /// It is not the JSON that it should be.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// The header with the length of the JSON does not fit the body.
    #[error("Inference-Header-Content-Length is {length:?}; it must be the bytes of the JSON, 0 to {body}")]
    HeaderLength {
        /// As the header says.
        length: String,
        /// Bytes of the body.
        body: usize,
    },
    /// What is read takes more than there is room for.
    #[error(transparent)]
    Spent(#[from] Spent),
    /// An input is not the JSON that it should be.
    #[error("input {input:?}: {source}")]
    Input {
        /// The input.
        input: String,
        /// Where, and what should be there.
        source: JsonError,
    },
    /// What gRPC refuses in the same words.
    #[error(transparent)]
    Invalid(#[from] InvalidRequest),
    /// An input without a shape, which is not the same as that of a single element.
    #[error("input {input:?} has no shape")]
    NoShape {
        /// The input.
        input: String,
    },
    /// Elements that do not fill the shape.
    #[error("input {input:?} has {found} elements in data, its shape {shape} needs {expected}")]
    ElementCount {
        /// The input.
        input: String,
        /// Elements that came.
        found: usize,
        /// Elements that the shape has.
        expected: usize,
        /// The shape, or its beginning.
        shape: String,
    },
    /// An input without elements.
    #[error("input {input:?} has no data; give it `data`, `parameters.binary_data_size` or a shared memory region")]
    NoData {
        /// The input.
        input: String,
    },
    /// Elements in two places.
    #[error("input {input:?} has `data` and is declared to come elsewhere too; use one of them")]
    TwoData {
        /// The input.
        input: String,
    },
    /// The bytes behind the JSON are not those that the inputs ask for.
    #[error("{found} bytes of tensors follow the JSON, the inputs up to {input:?} need {needed}")]
    BinaryLength {
        /// The last input that was looked at.
        input: String,
        /// Bytes that came.
        found: usize,
        /// Bytes that are declared.
        needed: usize,
    },
    /// `inputs` is missing.
    #[error("the request has no `inputs`")]
    NoInputs,
    /// More inputs or outputs than any model has.
    #[error("the request has more than {MAX_TENSORS} tensors")]
    TooManyTensors,
}

/// Where an input's elements are.
enum Data<'a> {
    None,
    /// In the JSON, not read yet: the datatype may come after them.
    Json(Reader<'a>),
    /// Read, and how many there are.
    Raw(Bytes, usize),
}

impl From<RequestError> for Refusal {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Spent(spent) => spent.into(),
            error => Self::invalid(error.to_string()),
        }
    }
}

/// Reads a body whose first `header_length` bytes are JSON; all of it when there is no such header. What it makes of them is taken from
/// `growth`.
///
/// # Errors
/// [`RequestError`].
pub(super) fn read(
    body: &Bytes,
    header_length: Option<&str>,
    mut growth: Growth,
) -> Result<(ModelInferRequest, Wanted), RequestError> {
    let length = match header_length {
        None => body.len(),
        Some(length) => length
            .trim()
            .parse()
            .ok()
            .filter(|&length: &usize| length <= body.len())
            .ok_or_else(|| RequestError::HeaderLength { length: excerpt(length), body: body.len() })?,
    };
    let mut request = ModelInferRequest::default();
    let mut wanted = Wanted::default();
    let mut data = Vec::new();
    let mut has_inputs = false;
    let mut parameters = Parameters::default();
    let mut reader = Reader::new(&body[..length]);
    reader.object(|reader, key| {
        match key {
            "id" => request.id = text(reader)?,
            "parameters" if is_null(reader)? => {}
            "parameters" => reader.object(|reader, key| match key {
                "binary_data_output" => flag(reader, key).map(|value| wanted.all = value.unwrap_or(false)),
                key => parameters.read(reader, key, &mut request.parameters),
            })?,
            "inputs" => {
                has_inputs = true;
                reader.array(|reader| {
                    if data.len() == MAX_TENSORS {
                        return Err(RequestError::TooManyTensors);
                    }
                    let (input, elements, size) = input(reader, &mut parameters, &mut growth)?;
                    request.inputs.push(input);
                    data.push((elements, size));
                    Ok(())
                })?;
            }
            "outputs" => reader.array(|reader| {
                if request.outputs.len() == MAX_TENSORS {
                    return Err(RequestError::TooManyTensors);
                }
                let (output, is_binary) = output(reader, &mut parameters)?;
                wanted.outputs.extend(is_binary.map(|is_binary| (output.name.clone(), is_binary)));
                request.outputs.push(output);
                Ok::<_, RequestError>(())
            })?,
            _ => {
                reader.skip()?;
            }
        }
        Ok::<_, RequestError>(())
    })?;
    reader.end()?;
    if !has_inputs {
        return Err(RequestError::NoInputs);
    }

    let mut tail = body.slice(length..);
    let found = tail.len();
    for (input, (data, size)) in request.inputs.iter().zip(data) {
        let shared = input.parameters.contains_key("shared_memory_region");
        let raw = match (data, size, shared) {
            (Data::None, None, true) => continue,
            (Data::None, None, false) => return Err(RequestError::NoData { input: excerpt(&input.name) }),
            (Data::Json(mut elements), None, false) => {
                let dtype = tensor::dtype(&input.datatype).ok_or_else(|| InvalidRequest::datatype(input))?;
                let (elements, count) = tensor::read(&mut elements, dtype, &mut growth).map_err(within(&input.name))?;
                filling(input, elements, count)?
            }
            (Data::Raw(elements, count), None, false) => filling(input, elements, count)?,
            (Data::None, Some(size), false) => {
                if size > tail.len() {
                    let needed = (found - tail.len()).saturating_add(size);
                    return Err(RequestError::BinaryLength { input: excerpt(&input.name), found, needed });
                }
                tail.split_to(size)
            }
            _ => return Err(RequestError::TwoData { input: excerpt(&input.name) }),
        };
        request.raw_input_contents.push(raw);
    }
    if tail.is_empty() {
        Ok((request, wanted))
    } else {
        let input = request.inputs.last().map_or(String::new(), |input| excerpt(&input.name));
        Err(RequestError::BinaryLength { input, found, needed: found - tail.len() })
    }
}

/// The elements, if there are as many as the shape has. A shape that no tensor has is refused later, as gRPC's is.
fn filling(input: &InferInputTensor, elements: Bytes, found: usize) -> Result<Bytes, RequestError> {
    let size = |&size: &i64| usize::try_from(size).ok();
    let expected = input.shape.iter().try_fold(1_usize, |product, axis| product.checked_mul(size(axis)?));
    match expected.filter(|expected| *expected != found) {
        None => Ok(elements),
        Some(expected) => {
            let (input, shape) = (excerpt(&input.name), excerpt(&format!("{:?}", input.shape)));
            Err(RequestError::ElementCount { input, found, expected, shape })
        }
    }
}

/// Names the input whose JSON is wrong, where its name came before that.
fn within(input: &str) -> impl Fn(ReadError) -> RequestError {
    move |error| match (error, input) {
        (ReadError::Spent(spent), _) => spent.into(),
        (ReadError::Json(source), "") => source.into(),
        (ReadError::Json(source), _) => RequestError::Input { input: excerpt(input), source },
    }
}

/// An input, its elements where they are in the JSON, and how many bytes of them are behind it.
fn input<'a>(
    reader: &mut Reader<'a>,
    parameters: &mut Parameters,
    growth: &mut Growth,
) -> Result<(InferInputTensor, Data<'a>, Option<usize>), RequestError> {
    let mut input = InferInputTensor::default();
    let (mut data, mut size, mut has_shape) = (Data::None, None, false);
    let read = reader.object(|reader, key| {
        match key {
            "name" => input.name = text(reader)?,
            "datatype" => input.datatype = text(reader)?,
            "shape" => {
                if std::mem::replace(&mut has_shape, true) {
                    return Err(reader.error("an input has one shape").into());
                }
                reader.array(|reader| {
                    let at = reader.clone();
                    if input.shape.len() == MAX_RANK {
                        return Err(at.error(format!("a shape has {MAX_RANK} sizes at most")));
                    }
                    let size = reader.number()?.parse().map_err(|_| at.error("a size is an integer"))?;
                    input.shape.push(size);
                    Ok::<_, JsonError>(())
                })?;
            }
            // As KServe's client writes the data of what is behind the JSON and has no bytes.
            "parameters" | "data" if is_null(reader)? => {}
            "parameters" => reader.object(|reader, key| match key {
                "binary_data_size" => bytes(reader).map(|value| size = value),
                key => parameters.read(reader, key, &mut input.parameters),
            })?,
            "data" => {
                if !matches!(data, Data::None) {
                    return Err(reader.error("an input has data once").into());
                }
                data = match tensor::dtype(&input.datatype) {
                    // Read in passing, as all clients write it.
                    Some(dtype) => {
                        let (elements, count) = tensor::read(reader, dtype, growth)?;
                        Data::Raw(elements, count)
                    }
                    None => Data::Json(reader.skip()?),
                };
            }
            _ => {
                reader.skip()?;
            }
        }
        Ok::<_, ReadError>(())
    });
    read.map_err(within(&input.name))?;
    if !has_shape {
        return Err(RequestError::NoShape { input: excerpt(&input.name) });
    }
    Ok((input, data, size))
}

/// An output, and whether it is wanted as bytes, where that is said of it.
fn output(
    reader: &mut Reader<'_>,
    parameters: &mut Parameters,
) -> Result<(InferRequestedOutputTensor, Option<bool>), RequestError> {
    let mut output = InferRequestedOutputTensor::default();
    let mut is_binary = None;
    reader.object(|reader, key| {
        match key {
            "name" => output.name = text(reader)?,
            "parameters" if is_null(reader)? => {}
            "parameters" => reader.object(|reader, key| match key {
                "binary_data" => {
                    is_binary = flag(reader, key)?;
                    Ok(())
                }
                key => parameters.read(reader, key, &mut output.parameters),
            })?,
            _ => {
                reader.skip()?;
            }
        }
        Ok::<_, RequestError>(())
    })?;
    Ok((output, is_binary))
}

fn text(reader: &mut Reader<'_>) -> Result<String, JsonError> {
    reader.string().map(std::borrow::Cow::into_owned)
}

/// How many parameters a request has, those of its tensors included.
#[derive(Debug, Default)]
pub(super) struct Parameters(usize);

impl Parameters {
    /// Reads one more. Values that gRPC has no form for, such as lists, are for others and are passed over.
    pub(super) fn read(
        &mut self,
        reader: &mut Reader<'_>,
        key: &str,
        parameters: &mut HashMap<String, InferParameter>,
    ) -> Result<(), JsonError> {
        if let Some(value) = value(reader)? {
            if parameters.len() == MAX_PARAMETERS {
                return Err(reader.error(format!("there are more than {MAX_PARAMETERS} parameters before this")));
            }
            if self.0 == MOST_PARAMETERS {
                return Err(reader.error(format!("the request has more than {MOST_PARAMETERS} parameters before this")));
            }
            self.0 += 1;
            parameters.insert(key.to_owned(), InferParameter { parameter_choice: Some(value) });
        }
        Ok(())
    }
}

/// The value of a parameter; `None` for one that gRPC has no form for.
fn value(reader: &mut Reader<'_>) -> Result<Option<ParameterChoice>, JsonError> {
    if matches!(reader.peek(), b'[' | b'{') {
        return reader.skip().map(|_| None);
    }
    Ok(Some(match reader.scalar()? {
        Scalar::Null => return Ok(None),
        Scalar::Bool(value) => ParameterChoice::BoolParam(value),
        Scalar::Text(value) => ParameterChoice::StringParam(value.into_owned()),
        Scalar::Number(value) => number(reader, value)?,
    }))
}

/// Whether `null` stands here, which is read then.
fn is_null(reader: &mut Reader<'_>) -> Result<bool, JsonError> {
    Ok(reader.peek() == b'n' && reader.scalar()? == Scalar::Null)
}

/// A parameter that is true or false; null says nothing.
fn flag(reader: &mut Reader<'_>, name: &str) -> Result<Option<bool>, JsonError> {
    let at = reader.clone();
    match scalar(reader)? {
        Some(Scalar::Null) => Ok(None),
        Some(Scalar::Bool(value)) => Ok(Some(value)),
        _ => Err(at.error(format!("{name} is true or false"))),
    }
}

/// A parameter that counts bytes; null says nothing.
fn bytes(reader: &mut Reader<'_>) -> Result<Option<usize>, JsonError> {
    let at = reader.clone();
    let wrong = || at.error("binary_data_size is a number of bytes");
    match scalar(reader)? {
        Some(Scalar::Null) => Ok(None),
        Some(Scalar::Number(value)) => value.parse().map(Some).map_err(|_| wrong()),
        _ => Err(wrong()),
    }
}

/// What is no list and no object.
fn scalar<'a>(reader: &mut Reader<'a>) -> Result<Option<Scalar<'a>>, JsonError> {
    if matches!(reader.peek(), b'[' | b'{') { Ok(None) } else { reader.scalar().map(Some) }
}

fn number(reader: &Reader<'_>, value: &str) -> Result<ParameterChoice, JsonError> {
    if let Ok(value) = value.parse() {
        return Ok(ParameterChoice::Int64Param(value));
    }
    if let Ok(value) = value.parse() {
        return Ok(ParameterChoice::Uint64Param(value));
    }
    value.parse().map(ParameterChoice::DoubleParam).map_err(|_| reader.error("the number before this is none"))
}

/// A parameter that counts bytes.
#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<ModelInferRequest, RequestError> {
        read(&Bytes::copy_from_slice(text.as_bytes()), None, Growth::new(None)).map(|(request, _)| request)
    }

    #[test]
    fn json_tensors_become_raw_ones_in_the_order_of_the_inputs() {
        let request = parsed(
            r#"{"id": "7", "parameters": {"priority": 2, "sequence_id": "s", "f": 0.5, "list": [1], "none": null},
                "inputs": [{"name": "a", "shape": [2, 2], "datatype": "INT32", "data": [[1, 2], [3, 4]]},
                           {"data": ["x", "yz"], "name": "b", "shape": [2], "datatype": "BYTES"}],
                "outputs": [{"name": "o", "parameters": {"binary_data": false, "classification": 3}}], "other": {}}"#,
        )
        .unwrap();
        assert_eq!((request.id.as_str(), request.inputs.len()), ("7", 2));
        assert_eq!(request.parameters.len(), 3);
        assert_eq!(request.inputs[0].shape, [2, 2]);
        assert_eq!(request.raw_input_contents[0], [1_i32, 2, 3, 4].map(i32::to_le_bytes).concat());
        assert_eq!(request.raw_input_contents[1], [&b"\x01\0\0\0x\x02\0\0\0yz"[..]].concat());
        let classes = &request.outputs[0].parameters["classification"].parameter_choice;
        assert_eq!(*classes, Some(ParameterChoice::Int64Param(3)));
    }

    #[test]
    fn binary_tensors_share_the_body() {
        let json =
            br#"{"inputs": [{"name": "a", "shape": [2], "datatype": "INT8", "parameters": {"binary_data_size": 2}},
            {"name": "s", "shape": [1], "datatype": "INT8", "parameters": {"shared_memory_region": "r"}},
            {"name": "j", "shape": [1], "datatype": "INT8", "data": [9]},
            {"name": "b", "shape": [1], "datatype": "FP16", "parameters": {"binary_data_size": 2}}]}"#;
        let body = Bytes::from([&json[..], &[1, 2, 3, 4]].concat());
        let length = json.len().to_string();
        let read = |body| read(body, Some(&length), Growth::new(None));
        let (request, _) = read(&body).unwrap();
        assert_eq!(request.raw_input_contents, [&[1, 2][..], &[9], &[3, 4]], "those in shared memory have none");
        assert_eq!(request.raw_input_contents[0].as_ptr(), body[json.len()..].as_ptr());

        let short = body.slice(..body.len() - 1);
        let error = read(&short).unwrap_err();
        assert_eq!(error.to_string(), r#"3 bytes of tensors follow the JSON, the inputs up to "b" need 4"#);
        let long = Bytes::from([&body[..], &[5]].concat());
        let error = read(&long).unwrap_err();
        assert_eq!(error, RequestError::BinaryLength { input: "b".to_owned(), found: 5, needed: 4 });
    }

    #[test]
    fn null_says_nothing() {
        let text = br#"{"parameters": null, "outputs": [{"name": "o", "parameters": null}], "inputs": [
            {"name": "a", "shape": [0], "datatype": "FP32", "data": null, "parameters": {"binary_data_size": 0}},
            {"name": "b", "shape": [1], "datatype": "INT8", "data": [1], "parameters": null}]}"#;
        let (request, _) = read(&Bytes::from_static(text), Some(&text.len().to_string()), Growth::new(None)).unwrap();
        assert_eq!(request.raw_input_contents, [&[][..], &[1]]);
        assert!(request.parameters.is_empty() && request.outputs.len() == 1);
    }

    #[test]
    fn what_is_said_of_the_way_back_is_no_part_of_the_request() {
        let text = br#"{"inputs": [], "parameters": {"binary_data_output": true, "priority": 1},
            "outputs": [{"parameters": {"binary_data": false}, "name": "a"}, {"name": "b"},
                        {"name": "c", "parameters": {"binary_data": null}}]}"#;
        let (request, wanted) = read(&Bytes::from_static(text), None, Growth::new(None)).unwrap();
        assert_eq!(wanted, Wanted { all: true, outputs: vec![("a".to_owned(), false)] });
        assert_eq!(request.parameters.keys().collect::<Vec<_>>(), ["priority"]);
        assert!(request.outputs.iter().all(|output| output.parameters.is_empty()));
    }

    #[test]
    fn what_is_no_request_is_refused_with_a_reason() {
        for (text, words) in [
            ("", "an object, `{`, should begin here"),
            ("[]", "an object, `{`, should begin here"),
            ("{}", "no `inputs`"),
            (r#"{"inputs": 1}"#, "an array, `[`, should begin here"),
            (r#"{"inputs": [{"name": "a", "shape": [1], "datatype": "INT8"}]}"#, "input \"a\" has no data"),
            (r#"{"inputs": [{"name": "a", "data": [1], "shape": [1], "datatype": "INT"}]}"#, "datatype \"INT\""),
            (
                r#"{"inputs": [{"name": "a", "shape": [1.5]}]}"#,
                "input \"a\": the JSON is wrong at byte 36: a size is an",
            ),
            (r#"{"inputs": [{"name": "a", "shape": [1], "data": [1]}]}"#, "input \"a\" has no datatype"),
            (r#"{"inputs": [{"name": "a", "datatype": "INT8", "data": [1]}]}"#, "input \"a\" has no shape"),
            (
                r#"{"inputs": [{"name": "a", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3]}]}"#,
                "input \"a\" has 3 elements in data, its shape [1, 4] needs 4",
            ),
            (
                r#"{"inputs": [{"data": ["x"], "name": "a", "shape": [2], "datatype": "BYTES"}]}"#,
                "input \"a\" has 1 elements in data, its shape [2] needs 2",
            ),
            (r#"{"inputs": [{"name": "a", "shape": [1], "datatype": "INT64", "data": [1.5]}]}"#, "1.5 is no INT64"),
            (
                r#"{"inputs": [{"data": [true], "name": "a", "shape": [1], "datatype": "FP32"}]}"#,
                "input \"a\": the JSON",
            ),
            (
                r#"{"inputs": [{"name": "a", "datatype": "INT8", "data": [1], "parameters": {"binary_data_size": 1}, "shape": [1]}]}"#,
                "use one of them",
            ),
            (
                r#"{"inputs": [{"name": "a", "shape": [1], "datatype": "INT8", "data": [1], "shape": [2]}]}"#,
                "an input has one shape",
            ),
            (
                r#"{"inputs": [{"name": "a", "shape": [1], "datatype": "INT8", "data": [1], "data": [2]}]}"#,
                "an input has data once",
            ),
            (
                r#"{"inputs": [], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}"#,
                "binary_data is true or false",
            ),
            (r#"{"inputs": [], "parameters": {"binary_data_output": "true"}}"#, "binary_data_output is true or false"),
            (
                r#"{"inputs": [{"name": "a", "parameters": {"binary_data_size": "4"}}]}"#,
                "binary_data_size is a number of bytes",
            ),
            (r#"{"inputs": [{"name": "a", "parameters": {"binary_data_size": -1}}]}"#, "is a number of bytes"),
            (r#"{"inputs": []} x"#, "the text should end here"),
            (r#"{"id": 1, "inputs": []}"#, "a string should be here"),
        ] {
            let error = parsed(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let error = read(&Bytes::from_static(b"{}"), Some("3"), Growth::new(None)).unwrap_err();
        assert_eq!(error, RequestError::HeaderLength { length: "3".to_owned(), body: 2 });
    }

    #[test]
    fn a_flood_of_tensors_is_refused() {
        let flood = format!(r#"{{"inputs": [{}{{}}]}}"#, r#"{"shape": []},"#.repeat(MAX_TENSORS));
        assert_eq!(parsed(&flood).unwrap_err(), RequestError::TooManyTensors);
    }

    #[test]
    fn a_flood_of_parameters_or_sizes_is_refused() {
        let own: Vec<_> = (0..MAX_PARAMETERS).map(|index| format!("\"p{index}\": {index}")).collect();
        let output = format!(r#"{{"name": "o", "parameters": {{{}}}}}"#, own.join(","));
        let outputs = |count: usize| format!(r#"{{"inputs": [], "outputs": [{}]}}"#, vec![&*output; count].join(","));
        let most = MOST_PARAMETERS / MAX_PARAMETERS;
        assert_eq!(parsed(&outputs(most)).unwrap().outputs.len(), most);
        let error = parsed(&outputs(most + 1)).unwrap_err().to_string();
        assert!(error.contains("the request has more than 16384 parameters before this"), "{error}");
        let sizes = format!(r#"{{"inputs": [{{"name": "a", "shape": [{}1]}}]}}"#, "1,".repeat(MAX_RANK));
        let error = parsed(&sizes).unwrap_err().to_string();
        assert!(error.contains("a shape has 32 sizes at most"), "{error}");
    }
}

//! A `ModelInferRequest` as host tensors.

use std::collections::HashMap;

use bytes::Bytes;
use sensorium_artifact::{DType, TensorSpec};
use sensorium_modality::{Tensor, TensorData};
use sensorium_proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, infer_parameter::ParameterChoice,
    model_infer_request::InferInputTensor,
};

use super::{InvalidRequest, datatype, error::excerpt, validate};
use crate::scheduler::Work;

/// Reads a request for a model with these inputs and outputs, which takes up to `max_rows` rows at once. The first
/// dimension of every input is the batch.
///
/// # Errors
/// [`InvalidRequest`] for the first thing that does not fit.
pub fn decode(
    request: ModelInferRequest,
    inputs: &[TensorSpec],
    outputs: &[TensorSpec],
    max_rows: usize,
) -> Result<Work, InvalidRequest> {
    refuse_parameters(|| "the request".to_owned(), &request.parameters, &REQUEST_PARAMETERS)?;
    let outputs = validate::outputs(outputs, request.outputs.iter().map(|output| output.name.as_str()))?;
    for output in &request.outputs {
        refuse_parameters(|| format!("output {:?}", output.name), &output.parameters, &OUTPUT_PARAMETERS)?;
    }
    // Before raw contents are paired with inputs: a tensor in shared memory has none.
    for input in &request.inputs {
        refuse_parameters(|| format!("input {:?}", excerpt(&input.name)), &input.parameters, &INPUT_PARAMETERS)?;
    }

    let raw = request.raw_input_contents;
    if !raw.is_empty() {
        if let Some(input) = request.inputs.iter().find(|input| input.contents.is_some()) {
            return Err(InvalidRequest::BothForms { input: excerpt(&input.name) });
        }
        if raw.len() != request.inputs.len() {
            return Err(InvalidRequest::RawCount { found: raw.len(), expected: request.inputs.len() });
        }
    }
    let mut raw = raw.into_iter();

    // Bounded by the model: an input that is not its own, or comes twice, ends the loop.
    let mut tensors: Vec<Option<Tensor>> = vec![None; inputs.len()];
    for input in request.inputs {
        let Some(index) = inputs.iter().position(|spec| spec.name == input.name) else {
            let expected = inputs.iter().map(|spec| spec.name.clone()).collect();
            return Err(InvalidRequest::UnknownInput { input: excerpt(&input.name), expected });
        };
        if tensors[index].is_some() {
            return Err(InvalidRequest::DuplicateInput { input: input.name });
        }
        tensors[index] = Some(tensor(&inputs[index], input, raw.next())?);
    }

    let mut rows = None;
    let mut found = Vec::with_capacity(inputs.len());
    for (spec, tensor) in inputs.iter().zip(tensors) {
        let tensor = tensor.ok_or_else(|| InvalidRequest::MissingInput {
            input: spec.name.clone(),
            datatype: datatype::name(spec.dtype),
            shape: validate::shape_text(spec),
        })?;
        same_rows(&mut rows, &spec.name, tensor.row_count().unwrap_or(1))?;
        found.push((spec.name.clone(), tensor));
    }
    let rows = rows.map_or(1, |(_, rows)| rows);
    if rows > max_rows {
        return Err(InvalidRequest::TooManyRows { rows, max: max_rows });
    }
    Ok(Work { inputs: found, rows, outputs })
}

fn same_rows(first: &mut Option<(String, usize)>, input: &str, rows: usize) -> Result<(), InvalidRequest> {
    match first {
        None => *first = Some((input.to_owned(), rows)),
        Some((_, other_rows)) if *other_rows == rows => {}
        Some((other, other_rows)) => {
            let (other, other_rows) = (other.clone(), *other_rows);
            return Err(InvalidRequest::UnequalRows { input: input.to_owned(), rows, other, other_rows });
        }
    }
    Ok(())
}

/// Parameters that would change what a request means, so that ignoring them would be a wrong answer.
type Refused = [(&'static str, &'static str)];
const SHARED_MEMORY: (&str, &str) = ("shared_memory_region", "send the tensor in the message instead");
const REQUEST_PARAMETERS: [(&str, &str); 1] = [("sequence_id", "its models keep no state between requests")];
const INPUT_PARAMETERS: [(&str, &str); 1] = [SHARED_MEMORY];
const OUTPUT_PARAMETERS: [(&str, &str); 2] = [SHARED_MEMORY, ("classification", "ask for the scores and rank them")];
/// What the C++ client sends with every request; it matters to decoupled models alone.
const EMPTY_FINAL_RESPONSE: &str = "triton_enable_empty_final_response";

fn refuse_parameters(
    at: impl Fn() -> String,
    parameters: &HashMap<String, InferParameter>,
    refused: &Refused,
) -> Result<(), InvalidRequest> {
    let refuse = |name: &str, reason| Err(InvalidRequest::Parameter { at: at(), name: excerpt(name), reason });
    for (name, value) in parameters {
        if let Some((_, reason)) = refused.iter().find(|(known, _)| known == name) {
            if !is_default(value) {
                return refuse(name, reason);
            }
        } else if name == EMPTY_FINAL_RESPONSE {
            if !matches!(value.parameter_choice, Some(ParameterChoice::BoolParam(_))) {
                return refuse(name, "its value must be a bool");
            }
        } else if name.starts_with("triton_") {
            return refuse(name, "names with this prefix are reserved, and this one is not known");
        }
    }
    Ok(())
}

/// Clients send `sequence_id` 0 or "" for a request that is part of no sequence.
fn is_default(value: &InferParameter) -> bool {
    match &value.parameter_choice {
        None => true,
        Some(ParameterChoice::BoolParam(value)) => !value,
        Some(ParameterChoice::Int64Param(value)) => *value == 0,
        Some(ParameterChoice::Uint64Param(value)) => *value == 0,
        Some(ParameterChoice::DoubleParam(value)) => *value == 0.0,
        Some(ParameterChoice::StringParam(value)) => value.is_empty(),
    }
}

fn tensor(spec: &TensorSpec, input: InferInputTensor, raw: Option<Bytes>) -> Result<Tensor, InvalidRequest> {
    validate::datatype(spec, &input.datatype)?;
    let (shape, elements) = validate::shape(spec, &input.shape)?;
    let data = match raw {
        Some(raw) => from_raw(spec, &shape, elements, &raw)?,
        None => from_contents(spec, &shape, elements, input.contents.unwrap_or_default())?,
    };
    // Both readers return exactly `elements` elements; if one did not, this names it instead of panicking.
    Tensor::new(shape, data).map_err(|_| InvalidRequest::ShapeOverflow { input: spec.name.clone(), found: input.shape })
}

/// The datatype has no place in host memory: the signature of a model that opened never holds one.
fn no_host_type(spec: &TensorSpec) -> InvalidRequest {
    let found = datatype::name(spec.dtype).to_owned();
    InvalidRequest::Datatype { input: spec.name.clone(), found, expected: "a datatype that its engine can hold" }
}

fn from_raw(spec: &TensorSpec, shape: &[usize], elements: usize, raw: &[u8]) -> Result<TensorData, InvalidRequest> {
    /// Little-endian elements of `N` bytes; the length is exact when this is called.
    fn fixed<const N: usize, T>(raw: &[u8], element: fn([u8; N]) -> T) -> Vec<T> {
        raw.as_chunks::<N>().0.iter().copied().map(element).collect()
    }
    let sized = |size: usize| {
        let expected = elements * size; // cannot overflow: `validate::shape` checked it for eight bytes
        if raw.len() == expected {
            return Ok(());
        }
        let (input, datatype) = (spec.name.clone(), datatype::name(spec.dtype));
        Err(InvalidRequest::RawLength { input, found: raw.len(), expected, shape: shape.to_vec(), datatype })
    };
    match spec.dtype {
        DType::Bool => sized(1).and_then(|()| bools(spec, raw)),
        DType::Uint8 => sized(1).map(|()| TensorData::U8(raw.to_vec())),
        DType::Int8 => sized(1).map(|()| TensorData::I8(fixed(raw, i8::from_le_bytes))),
        DType::Int32 => sized(4).map(|()| TensorData::I32(fixed(raw, i32::from_le_bytes))),
        DType::Int64 => sized(8).map(|()| TensorData::I64(fixed(raw, i64::from_le_bytes))),
        DType::Fp32 => sized(4).map(|()| TensorData::F32(fixed(raw, f32::from_le_bytes))),
        DType::Fp64 => sized(8).map(|()| TensorData::F64(fixed(raw, f64::from_le_bytes))),
        DType::Bytes => byte_strings(spec, elements, raw),
        DType::Uint16 | DType::Uint32 | DType::Uint64 | DType::Int16 | DType::Fp16 | DType::Bf16 => {
            Err(no_host_type(spec))
        }
    }
}

fn bools(spec: &TensorSpec, raw: &[u8]) -> Result<TensorData, InvalidRequest> {
    let decode = |(element, &value): (usize, &u8)| match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(InvalidRequest::NotBool { input: spec.name.clone(), element, value }),
    };
    raw.iter().enumerate().map(decode).collect::<Result<_, _>>().map(TensorData::Bool)
}

/// Elements of a BYTES tensor: each a little-endian u32 length and that many bytes.
fn byte_strings(spec: &TensorSpec, elements: usize, raw: &[u8]) -> Result<TensorData, InvalidRequest> {
    const PREFIX: usize = size_of::<u32>();
    let mut rest = raw;
    // An element takes at least its prefix, so a claim of more elements than data reserves nothing for them.
    let mut strings = Vec::with_capacity(elements.min(raw.len() / PREFIX));
    for element in 0..elements {
        let truncated = |needed, rest: &[u8]| InvalidRequest::BytesTruncated {
            input: spec.name.clone(),
            element,
            elements,
            offset: raw.len() - rest.len(),
            needed,
            available: rest.len(),
        };
        let (prefix, after) = rest.split_first_chunk::<PREFIX>().ok_or_else(|| truncated(PREFIX, rest))?;
        let length = u32::from_le_bytes(*prefix) as usize;
        let (string, after) = after.split_at_checked(length).ok_or_else(|| truncated(length, after))?;
        strings.push(string.to_vec());
        rest = after;
    }
    if rest.is_empty() {
        Ok(TensorData::Bytes(strings))
    } else {
        Err(InvalidRequest::BytesTrailing { input: spec.name.clone(), extra: rest.len(), elements })
    }
}

fn from_contents(
    spec: &TensorSpec,
    shape: &[usize],
    elements: usize,
    contents: InferTensorContents,
) -> Result<TensorData, InvalidRequest> {
    let field = match spec.dtype {
        DType::Bool => "bool_contents",
        DType::Int8 | DType::Int16 | DType::Int32 => "int_contents",
        DType::Int64 => "int64_contents",
        DType::Uint8 | DType::Uint16 | DType::Uint32 => "uint_contents",
        DType::Uint64 => "uint64_contents",
        DType::Fp32 => "fp32_contents",
        DType::Fp64 => "fp64_contents",
        DType::Bytes => "bytes_contents",
        DType::Fp16 | DType::Bf16 => return Err(no_host_type(spec)), // raw only, by the protocol
    };
    let filled = [
        ("bool_contents", contents.bool_contents.len()),
        ("int_contents", contents.int_contents.len()),
        ("int64_contents", contents.int64_contents.len()),
        ("uint_contents", contents.uint_contents.len()),
        ("uint64_contents", contents.uint64_contents.len()),
        ("fp32_contents", contents.fp32_contents.len()),
        ("fp64_contents", contents.fp64_contents.len()),
        ("bytes_contents", contents.bytes_contents.len()),
    ];
    let input = spec.name.clone();
    if filled.iter().all(|(_, count)| *count == 0) {
        return Err(InvalidRequest::NoContents { input, field });
    }
    for (found, count) in filled {
        if found != field && count > 0 {
            let datatype = datatype::name(spec.dtype);
            return Err(InvalidRequest::WrongField { input, datatype, found, expected: field });
        }
        if found == field && count != elements {
            return Err(InvalidRequest::ElementCount {
                input,
                field,
                found: count,
                expected: elements,
                shape: shape.to_vec(),
            });
        }
    }
    match spec.dtype {
        DType::Bool => Ok(TensorData::Bool(contents.bool_contents)),
        DType::Int8 => narrow(spec, contents.int_contents).map(TensorData::I8),
        DType::Int32 => Ok(TensorData::I32(contents.int_contents)),
        DType::Int64 => Ok(TensorData::I64(contents.int64_contents)),
        DType::Uint8 => narrow(spec, contents.uint_contents).map(TensorData::U8),
        DType::Fp32 => Ok(TensorData::F32(contents.fp32_contents)),
        DType::Fp64 => Ok(TensorData::F64(contents.fp64_contents)),
        DType::Bytes => Ok(TensorData::Bytes(contents.bytes_contents.iter().map(|bytes| bytes.to_vec()).collect())),
        DType::Int16 | DType::Uint16 | DType::Uint32 | DType::Uint64 | DType::Fp16 | DType::Bf16 => {
            Err(no_host_type(spec))
        }
    }
}

/// Narrow integers travel in wider fields.
fn narrow<Wide, Narrow>(spec: &TensorSpec, values: Vec<Wide>) -> Result<Vec<Narrow>, InvalidRequest>
where
    Wide: Copy + Into<i64>,
    Narrow: TryFrom<Wide>,
{
    let convert = |(element, value): (usize, Wide)| {
        Narrow::try_from(value).map_err(|_| InvalidRequest::OutOfRange {
            input: spec.name.clone(),
            element,
            value: value.into(),
            datatype: datatype::name(spec.dtype),
        })
    };
    values.into_iter().enumerate().map(convert).collect()
}

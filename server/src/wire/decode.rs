//! A `ModelInferRequest` as a request to a model, which is not known here: this is about the message itself.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use sensorium_artifact::DType;
use sensorium_engine::{RawTensor, RawTensorError};
use sensorium_proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, infer_parameter::ParameterChoice,
    model_infer_request::InferInputTensor,
};

use super::{InvalidRequest, datatype, error::excerpt};
use crate::{
    model::{NamedTensor, Parameter, Request, Sequence, SequenceId},
    shared_memory::{Held, Region, SharedMemory},
};

/// A request, and how its answer is to be sent.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// What the model is asked.
    pub request: Request,
    /// What the client asks of the answer.
    pub reply: Reply,
}

/// What a client asks of an answer, apart from its values.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    /// Outputs that do not go into the message as they are.
    pub outputs: Vec<(String, Form)>,
}

/// The form of an output that is not sent as it is.
#[derive(Clone, Debug)]
pub enum Form {
    /// As the so many highest scores with their classes.
    Classes(usize),
    /// Into shared memory.
    Shared(Held),
}

/// Reads a request. Tensors share the bytes of the message where it has raw contents; those in `memory` are read now.
///
/// # Errors
/// [`InvalidRequest`] for the first thing that is wrong.
pub fn decode(message: ModelInferRequest, memory: &SharedMemory) -> Result<Decoded, InvalidRequest> {
    let mut request = Request { id: message.id, ..Request::default() };
    let mut reply = Reply::default();
    request_parameters(message.parameters, &mut request)?;
    for output in message.outputs {
        let form = form(&output.name, &output.parameters, memory)?;
        reply.outputs.extend(form.map(|form| (output.name.clone(), form)));
        request.outputs.push(output.name);
    }

    let is_raw = !message.raw_input_contents.is_empty();
    let mut raw = message.raw_input_contents.into_iter();
    let (sent, expected) = (raw.len(), message.inputs.iter().filter(|input| !is_shared(input)).count());
    if is_raw {
        if let Some(input) = message.inputs.iter().find(|input| input.contents.is_some()) {
            return Err(InvalidRequest::BothForms { input: excerpt(&input.name) });
        }
        if sent != expected {
            return Err(InvalidRequest::RawCount { found: sent, expected });
        }
    }
    request.inputs.reserve_exact(message.inputs.len());
    for mut input in message.inputs {
        if input.shape.len() > MAX_RANK {
            let (input, found) = (excerpt(&input.name), input.shape.len());
            return Err(InvalidRequest::Rank { input, found, max: MAX_RANK });
        }
        if input.shape.iter().any(|&size| size < 0) {
            return Err(InvalidRequest::OpenSize { input: excerpt(&input.name), shape: input.shape });
        }
        let region = region(|| format!("input {:?}", excerpt(&input.name)), &input.parameters)?;
        let tensor = match region {
            Some(region) => tensor(&mut input, memory.read(&region)?)?,
            None if is_raw => tensor(&mut input, raw.next().unwrap_or_default())?,
            None => typed(&mut input)?,
        };
        request.inputs.push(NamedTensor { name: input.name, tensor });
    }
    Ok(Decoded { request, reply })
}

fn is_shared(input: &InferInputTensor) -> bool {
    input.parameters.contains_key(SHARED_MEMORY)
}

/// Dimensions of a tensor at most: engines have their own, lower bounds.
pub(crate) const MAX_RANK: usize = 32;
/// Bytes of a sequence's id at most, as in Triton: ids are kept for as long as their sequences are.
const MAX_ID: usize = 128;
const SHARED_MEMORY: &str = "shared_memory_region";

/// Takes the parameters that mean something to every server; the rest are the model's.
fn request_parameters(
    parameters: HashMap<String, InferParameter>,
    request: &mut Request,
) -> Result<(), InvalidRequest> {
    let (mut start, mut end, mut sequence) = (false, false, None);
    for (name, value) in parameters {
        let Some(value) = value.parameter_choice else { continue };
        let wrong = |reason| InvalidRequest::Parameter { at: "the request".to_owned(), name: excerpt(&name), reason };
        match name.as_str() {
            "sequence_id" => {
                sequence = match value {
                    ParameterChoice::StringParam(id) if id.len() > MAX_ID => {
                        return Err(wrong("a text has at most 128 bytes here"));
                    }
                    ParameterChoice::StringParam(id) => (!id.is_empty()).then_some(SequenceId::Text(id)),
                    // Triton's client for C++ has no other place for ids from 2^63 on.
                    ParameterChoice::Int64Param(id) => (id != 0).then_some(SequenceId::Number(id.cast_unsigned())),
                    ParameterChoice::Uint64Param(id) => (id != 0).then_some(SequenceId::Number(id)),
                    _ => return Err(wrong("it must be a whole number or a string")),
                }
            }
            "sequence_start" => start = boolean(&value).ok_or_else(|| wrong("it must be a bool"))?,
            "sequence_end" => end = boolean(&value).ok_or_else(|| wrong("it must be a bool"))?,
            "priority" => {
                request.priority = unsigned(&value).ok_or_else(|| wrong("it must be a whole number of at least 0"))?;
            }
            "timeout" => {
                let micros = unsigned(&value).ok_or_else(|| wrong("it must be microseconds, at least 0"))?;
                request.timeout = (micros > 0).then_some(Duration::from_micros(micros));
            }
            "triton_enable_empty_final_response" => {
                // No answer of ours is empty, the last one neither.
                boolean(&value).ok_or_else(|| wrong("it must be a bool"))?;
            }
            // About the way back, and read where the request came in.
            "binary_data_output" => {}
            name if name.starts_with("triton_") => {
                return Err(wrong("names with this prefix are reserved, and this one is not known"));
            }
            _ => {
                request.parameters.insert(name, model_parameter(value));
            }
        }
    }
    request.sequence = sequence.map(|id| Sequence { id, start, end });
    Ok(())
}

fn model_parameter(value: ParameterChoice) -> Parameter {
    match value {
        ParameterChoice::BoolParam(value) => Parameter::Bool(value),
        ParameterChoice::Int64Param(value) => Parameter::Int(value),
        ParameterChoice::Uint64Param(value) => Parameter::Uint(value),
        ParameterChoice::DoubleParam(value) => Parameter::Double(value),
        ParameterChoice::StringParam(value) => Parameter::Text(value),
    }
}

fn unsigned(value: &ParameterChoice) -> Option<u64> {
    match value {
        ParameterChoice::Int64Param(value) => u64::try_from(*value).ok(),
        ParameterChoice::Uint64Param(value) => Some(*value),
        _ => None,
    }
}

fn boolean(value: &ParameterChoice) -> Option<bool> {
    if let ParameterChoice::BoolParam(value) = value { Some(*value) } else { None }
}

/// How an output is to be sent.
fn form(
    output: &str,
    parameters: &HashMap<String, InferParameter>,
    memory: &SharedMemory,
) -> Result<Option<Form>, InvalidRequest> {
    if parameters.is_empty() {
        return Ok(None);
    }
    let at = || format!("output {:?}", excerpt(output));
    let wrong = |name: &str, reason| InvalidRequest::Parameter { at: at(), name: name.to_owned(), reason };
    let shared = region(at, parameters)?;
    let classes = match parameters.get("classification").and_then(|value| value.parameter_choice.as_ref()) {
        None => None,
        Some(value) => {
            let classes = unsigned(value).ok_or_else(|| wrong("classification", "it must be how many classes"))?;
            // More classes than memory has are as many as there are.
            (classes > 0).then_some(Form::Classes(usize::try_from(classes).unwrap_or(usize::MAX)))
        }
    };
    match (shared, classes) {
        (Some(_), Some(_)) => {
            Err(wrong("classification", "classes have no fixed size, so they cannot go into shared memory"))
        }
        // Before the model runs: what is refused has changed nothing.
        (Some(region), None) => Ok(Some(Form::Shared(memory.hold(region)?))),
        (None, classes) => Ok(classes),
    }
}

/// The shared memory that a tensor is said to be in.
fn region(
    at: impl Fn() -> String,
    parameters: &HashMap<String, InferParameter>,
) -> Result<Option<Region>, InvalidRequest> {
    let get = |name: &str| parameters.get(name).and_then(|value| value.parameter_choice.as_ref());
    let wrong = |name: &str, reason| InvalidRequest::Parameter { at: at(), name: name.to_owned(), reason };
    let Some(name) = get(SHARED_MEMORY) else { return Ok(None) };
    let ParameterChoice::StringParam(name) = name else {
        return Err(wrong(SHARED_MEMORY, "it must be the name of a region"));
    };
    let size = |name: &str| match get(name) {
        None => Ok(None),
        Some(value) => unsigned(value).map(Some).ok_or_else(|| wrong(name, "it must be bytes, at least 0")),
    };
    let byte_size = size("shared_memory_byte_size")?
        .ok_or_else(|| wrong("shared_memory_byte_size", "it is missing beside shared_memory_region"))?;
    let offset = size("shared_memory_offset")?.unwrap_or(0);
    Ok(Some(Region { name: name.clone(), offset, byte_size }))
}

fn tensor(input: &mut InferInputTensor, data: Bytes) -> Result<RawTensor, InvalidRequest> {
    let shape = std::mem::take(&mut input.shape);
    RawTensor::new(dtype(input)?, shape, data).map_err(|source| unfit(input, source))
}

fn unfit(input: &InferInputTensor, source: RawTensorError) -> InvalidRequest {
    InvalidRequest::Tensor { input: excerpt(&input.name), source }
}

fn dtype(input: &InferInputTensor) -> Result<DType, InvalidRequest> {
    datatype::parse(&input.datatype).ok_or_else(|| InvalidRequest::datatype(input))
}

/// Elements from the field of their datatype.
fn typed(input: &mut InferInputTensor) -> Result<RawTensor, InvalidRequest> {
    let dtype = dtype(input)?;
    let field = match dtype {
        DType::Bool => "bool_contents",
        DType::Int8 | DType::Int16 | DType::Int32 => "int_contents",
        DType::Int64 => "int64_contents",
        DType::Uint8 | DType::Uint16 | DType::Uint32 => "uint_contents",
        DType::Uint64 => "uint64_contents",
        DType::Fp32 => "fp32_contents",
        DType::Fp64 => "fp64_contents",
        DType::Bytes => "bytes_contents",
        DType::Fp16 | DType::Bf16 => "raw_input_contents", // the protocol has no other place for them
    };
    let contents = input.contents.take().unwrap_or_default();
    let elements = input.shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size.try_into().ok()?));
    let filled = filled(&contents);
    if filled.iter().all(|(_, count)| *count == 0) && elements != Some(0) {
        return Err(InvalidRequest::NoContents { input: excerpt(&input.name), field });
    }
    for (found, count) in filled {
        if found != field && count > 0 {
            let (input, datatype) = (excerpt(&input.name), datatype::name(dtype));
            return Err(InvalidRequest::WrongField { input, datatype, found, expected: field });
        }
        if found == field
            && let Some(expected) = elements
            && expected != count
        {
            let (input, shape) = (excerpt(&input.name), input.shape.clone());
            return Err(InvalidRequest::ElementCount { input, field, found: count, expected, shape });
        }
    }
    let shape = std::mem::take(&mut input.shape);
    let numbers = match dtype {
        DType::Bool => {
            let bytes: Vec<u8> = contents.bool_contents.iter().map(|&value| u8::from(value)).collect();
            RawTensor::new(dtype, shape, bytes.into())
        }
        DType::Int8 => RawTensor::from_vec(dtype, shape, narrow::<_, i8>(input, dtype, &contents.int_contents)?),
        DType::Int16 => RawTensor::from_vec(dtype, shape, narrow::<_, i16>(input, dtype, &contents.int_contents)?),
        DType::Int32 => RawTensor::from_vec(dtype, shape, contents.int_contents),
        DType::Int64 => RawTensor::from_vec(dtype, shape, contents.int64_contents),
        DType::Uint8 => RawTensor::from_vec(dtype, shape, narrow::<_, u8>(input, dtype, &contents.uint_contents)?),
        DType::Uint16 => RawTensor::from_vec(dtype, shape, narrow::<_, u16>(input, dtype, &contents.uint_contents)?),
        DType::Uint32 => RawTensor::from_vec(dtype, shape, contents.uint_contents),
        DType::Uint64 => RawTensor::from_vec(dtype, shape, contents.uint64_contents),
        DType::Fp32 => RawTensor::from_vec(dtype, shape, contents.fp32_contents),
        DType::Fp64 => RawTensor::from_vec(dtype, shape, contents.fp64_contents),
        DType::Bytes => RawTensor::from_strings(shape, &contents.bytes_contents),
        DType::Fp16 | DType::Bf16 => RawTensor::new(dtype, shape, Bytes::new()),
    };
    numbers.map_err(|source| unfit(input, source))
}

fn filled(contents: &InferTensorContents) -> [(&'static str, usize); 8] {
    [
        ("bool_contents", contents.bool_contents.len()),
        ("int_contents", contents.int_contents.len()),
        ("int64_contents", contents.int64_contents.len()),
        ("uint_contents", contents.uint_contents.len()),
        ("uint64_contents", contents.uint64_contents.len()),
        ("fp32_contents", contents.fp32_contents.len()),
        ("fp64_contents", contents.fp64_contents.len()),
        ("bytes_contents", contents.bytes_contents.len()),
    ]
}

/// Narrow integers travel in wider fields.
fn narrow<Wide, Narrow>(input: &InferInputTensor, dtype: DType, values: &[Wide]) -> Result<Vec<Narrow>, InvalidRequest>
where
    Wide: Copy + Into<i64>,
    Narrow: TryFrom<Wide>,
{
    let convert = |(element, &value): (usize, &Wide)| {
        Narrow::try_from(value).map_err(|_| InvalidRequest::OutOfRange {
            input: excerpt(&input.name),
            element,
            value: value.into(),
            datatype: datatype::name(dtype),
        })
    };
    values.iter().enumerate().map(convert).collect()
}

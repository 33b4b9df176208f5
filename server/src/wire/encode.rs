//! A model's answer as a `ModelInferResponse`. Outputs always travel raw, as Triton's do.

use std::collections::HashMap;

use bytes::Bytes;
use sensorium_proto::inference::{
    InferParameter, ModelInferResponse, infer_parameter::ParameterChoice, model_infer_response::InferOutputTensor,
};

use super::{Form, InvalidRequest, Reply, classes, datatype};
use crate::{
    blocking::in_place,
    model::{ModelVersion, NamedTensor, Response},
    shared_memory::Region,
};

/// The response of one inference, its outputs in the forms that the request asked for.
///
/// # Errors
/// [`InvalidRequest`] when an output has no such form.
pub fn encode(
    model: &ModelVersion,
    id: String,
    answer: Response,
    reply: &Reply,
) -> Result<ModelInferResponse, InvalidRequest> {
    let mut response = ModelInferResponse {
        model_name: model.name().to_owned(),
        model_version: model.version().to_owned(),
        id,
        outputs: Vec::with_capacity(answer.outputs.len()),
        raw_output_contents: Vec::with_capacity(answer.outputs.len()),
        ..ModelInferResponse::default()
    };
    for NamedTensor { name, tensor } in answer.outputs {
        let form = reply.outputs.iter().find_map(|(output, form)| (*output == name).then_some(form));
        let tensor = match form {
            Some(Form::Classes(count)) => {
                let is_batched = model.config().max_batch_size > 0;
                let label = |index| model.label(&name, index);
                in_place(tensor.data().len(), || classes::top(&name, &tensor, *count, is_batched, label))?
            }
            _ => tensor,
        };
        let (dtype, shape, data) = tensor.into_parts();
        let mut output = InferOutputTensor { datatype: datatype::name(dtype).to_owned(), shape, ..Default::default() };
        if let Some(Form::Shared(held)) = form {
            let region = held.region();
            let found = data.len();
            if found as u64 > region.byte_size {
                return Err(InvalidRequest::SharedOutput { output: name, found, given: region.byte_size });
            }
            held.write(&data)?;
            output.parameters = place(region, found as u64);
            // Clients count entries to find an output's: each has one, and this one's is empty.
            response.raw_output_contents.push(Bytes::new());
        } else {
            response.raw_output_contents.push(data);
        }
        output.name = name;
        response.outputs.push(output);
    }
    Ok(response)
}

/// Where an output was put.
fn place(region: &Region, byte_size: u64) -> HashMap<String, InferParameter> {
    let parameter = |value| InferParameter { parameter_choice: Some(value) };
    // Sizes of memory are below 2^63.
    let number = |value: u64| parameter(ParameterChoice::Int64Param(value as i64));
    let mut parameters = HashMap::from([
        ("shared_memory_region".to_owned(), parameter(ParameterChoice::StringParam(region.name.clone()))),
        ("shared_memory_byte_size".to_owned(), number(byte_size)),
    ]);
    if region.offset > 0 {
        parameters.insert("shared_memory_offset".to_owned(), number(region.offset));
    }
    parameters
}

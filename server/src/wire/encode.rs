//! Host tensors as a `ModelInferResponse`. Outputs always travel raw, as Triton's do.

use bytes::Bytes;
use sensorium_modality::{DType, Tensor, TensorData};
use sensorium_proto::inference::{ModelInferResponse, model_infer_response::InferOutputTensor};

/// The response of one inference.
pub fn encode(
    model_name: String,
    model_version: String,
    id: String,
    outputs: Vec<(String, Tensor)>,
) -> ModelInferResponse {
    let mut response = ModelInferResponse { model_name, model_version, id, ..ModelInferResponse::default() };
    for (name, tensor) in outputs {
        let datatype = match tensor.dtype() {
            DType::F32 => "FP32",
            DType::F64 => "FP64",
            DType::I64 => "INT64",
            DType::I32 => "INT32",
            DType::I8 => "INT8",
            DType::U8 => "UINT8",
            DType::Bool => "BOOL",
            DType::Bytes => "BYTES",
        };
        let (shape, data) = tensor.into_parts();
        // A dimension of a tensor in memory is far below 2^63.
        let shape = shape.into_iter().map(|dim| dim as i64).collect();
        response.outputs.push(InferOutputTensor { name, datatype: datatype.to_owned(), shape, ..Default::default() });
        response.raw_output_contents.push(raw(data));
    }
    response
}

fn raw(data: TensorData) -> Bytes {
    fn fixed<const N: usize, T: Copy>(elements: &[T], bytes: fn(T) -> [u8; N]) -> Bytes {
        let mut raw = Vec::with_capacity(elements.len() * N);
        for &element in elements {
            raw.extend_from_slice(&bytes(element));
        }
        raw.into()
    }
    match data {
        TensorData::F32(elements) => fixed(&elements, f32::to_le_bytes),
        TensorData::F64(elements) => fixed(&elements, f64::to_le_bytes),
        TensorData::I64(elements) => fixed(&elements, i64::to_le_bytes),
        TensorData::I32(elements) => fixed(&elements, i32::to_le_bytes),
        TensorData::I8(elements) => fixed(&elements, i8::to_le_bytes),
        TensorData::U8(elements) => elements.into(),
        TensorData::Bool(elements) => fixed(&elements, |element| [u8::from(element)]),
        TensorData::Bytes(elements) => {
            let mut raw = Vec::with_capacity(elements.iter().map(|element| element.len() + 4).sum());
            for element in &elements {
                // An element that a u32 cannot count would not fit into a message either.
                raw.extend_from_slice(&(element.len() as u32).to_le_bytes());
                raw.extend_from_slice(element);
            }
            raw.into()
        }
    }
}

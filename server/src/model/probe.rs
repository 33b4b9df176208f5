//! The smallest request that a graph takes, to prove that its engine runs.

use sensorium_engine::{Named, Signature, host_dtype};
use sensorium_modality::{DType, Tensor, TensorData};

/// One row of zeros; sizes that a request chooses are 1. Zero is an index that every lookup table has. An input that
/// cannot be made is left out, and the engine names it.
pub(super) fn inputs(signature: &Signature) -> Named {
    let zeros = |spec: &sensorium_artifact::TensorSpec| {
        let shape: Vec<usize> =
            spec.shape.iter().map(|dim| dim.map_or(Some(1), |dim| usize::try_from(dim).ok())).collect::<Option<_>>()?;
        let elements = shape.iter().try_fold(1_usize, |product, dim| product.checked_mul(*dim))?;
        let data = match host_dtype(spec.dtype)? {
            DType::F32 => TensorData::F32(vec![0.0; elements]),
            DType::F64 => TensorData::F64(vec![0.0; elements]),
            DType::I64 => TensorData::I64(vec![0; elements]),
            DType::I32 => TensorData::I32(vec![0; elements]),
            DType::I8 => TensorData::I8(vec![0; elements]),
            DType::U8 => TensorData::U8(vec![0; elements]),
            DType::Bool => TensorData::Bool(vec![false; elements]),
            DType::Bytes => TensorData::Bytes(vec![Vec::new(); elements]),
        };
        Some((spec.name.clone(), Tensor::new(shape, data).ok()?))
    };
    signature.inputs().iter().filter_map(zeros).collect()
}

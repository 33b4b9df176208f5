//! A model's configuration as far as its file tells it.

use sensorium_artifact::{DType, TensorSpec};
use sensorium_proto::inference::{DataType, ModelConfig, ModelInput, ModelOutput};

use crate::model::Interface;

/// The configuration that an interface stands for; name, platform and backend are left open.
pub(super) fn config(interface: &Interface) -> ModelConfig {
    let max_rows = interface.max_rows.map_or(0, |rows| i32::try_from(rows).unwrap_or(i32::MAX));
    // The batch axis is understood where there is one.
    let dims = |spec: &TensorSpec| -> Vec<i64> {
        let axes = spec.shape.iter().skip(usize::from(max_rows > 0));
        axes.map(|size| size.map_or(-1, |size| size as i64)).collect()
    };
    let input = |spec: &TensorSpec| ModelInput {
        name: spec.name.clone(),
        data_type: data_type(spec.dtype).into(),
        dims: dims(spec),
        ..ModelInput::default()
    };
    let output = |spec: &TensorSpec| ModelOutput {
        name: spec.name.clone(),
        data_type: data_type(spec.dtype).into(),
        dims: dims(spec),
        ..ModelOutput::default()
    };
    ModelConfig {
        max_batch_size: max_rows,
        input: interface.inputs.iter().map(input).collect(),
        output: interface.outputs.iter().map(output).collect(),
        ..ModelConfig::default()
    }
}

/// How a configuration spells an element type.
pub(super) fn data_type(dtype: DType) -> DataType {
    match dtype {
        DType::Bool => DataType::TypeBool,
        DType::Uint8 => DataType::TypeUint8,
        DType::Uint16 => DataType::TypeUint16,
        DType::Uint32 => DataType::TypeUint32,
        DType::Uint64 => DataType::TypeUint64,
        DType::Int8 => DataType::TypeInt8,
        DType::Int16 => DataType::TypeInt16,
        DType::Int32 => DataType::TypeInt32,
        DType::Int64 => DataType::TypeInt64,
        DType::Fp16 => DataType::TypeFp16,
        DType::Bf16 => DataType::TypeBf16,
        DType::Fp32 => DataType::TypeFp32,
        DType::Fp64 => DataType::TypeFp64,
        DType::Bytes => DataType::TypeString,
    }
}

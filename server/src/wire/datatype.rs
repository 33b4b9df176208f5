//! Element types by their names on the wire.

use sensorium_artifact::DType;

/// Every datatype of the protocol, by its name.
const NAMES: [(DType, &str); 14] = [
    (DType::Bool, "BOOL"),
    (DType::Uint8, "UINT8"),
    (DType::Uint16, "UINT16"),
    (DType::Uint32, "UINT32"),
    (DType::Uint64, "UINT64"),
    (DType::Int8, "INT8"),
    (DType::Int16, "INT16"),
    (DType::Int32, "INT32"),
    (DType::Int64, "INT64"),
    (DType::Fp16, "FP16"),
    (DType::Bf16, "BF16"),
    (DType::Fp32, "FP32"),
    (DType::Fp64, "FP64"),
    (DType::Bytes, "BYTES"),
];

/// The protocol's name of an element type.
pub(crate) fn name(dtype: DType) -> &'static str {
    NAMES.iter().find(|(known, _)| *known == dtype).map_or("", |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_the_name_that_manifests_use() {
        for (dtype, name) in NAMES {
            assert_eq!(serde_json::to_value(dtype).unwrap(), name);
            assert_eq!(super::name(dtype), name);
        }
    }
}

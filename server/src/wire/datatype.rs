//! Element types by their names on the wire, which are those of manifests too.

use sensorium_artifact::DType;
pub(crate) use sensorium_engine::dtype_name as name;
use serde::{
    Deserialize as _,
    de::{IntoDeserializer as _, value::StrDeserializer},
};

/// The element type that a name stands for.
pub(crate) fn parse(name: &str) -> Option<DType> {
    let name: StrDeserializer<'_, serde::de::value::Error> = name.into_deserializer();
    DType::deserialize(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stands_for_the_type_that_has_it() {
        for written in [
            "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32",
            "FP64", "BYTES",
        ] {
            assert_eq!(parse(written).map(name), Some(written));
        }
        assert_eq!((parse("fp32"), parse("TYPE_FP32"), parse("")), (None, None, None));
    }
}

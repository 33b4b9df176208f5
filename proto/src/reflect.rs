//! The messages of this crate described at run time: for gRPC reflection, for the JSON of REST, for configuration files.

use std::sync::LazyLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

/// Every `.proto` file of this crate as an encoded `google.protobuf.FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The same, decoded.
#[expect(clippy::expect_used, reason = "the build wrote these bytes from files that compiled")]
pub fn descriptor_pool() -> &'static DescriptorPool {
    static POOL: LazyLock<DescriptorPool> =
        LazyLock::new(|| DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the build describes what it compiled"));
    &POOL
}

/// `message` of this crate as Triton's REST spells it: fields by their names in the `.proto` file, all of them but
/// unset messages and members of a `oneof`, and 64-bit integers as numbers.
#[expect(clippy::expect_used, reason = "a message decodes as what it was encoded from, and JSON can hold all of them")]
pub fn to_json<M: Message + Name>(message: &M) -> serde_json::Value {
    let descriptor = descriptor_pool().get_message_by_name(&M::full_name()).expect("the pool has every message");
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).expect("it was just encoded");
    let options =
        SerializeOptions::new().skip_default_fields(false).use_proto_field_name(true).stringify_64_bit_integers(false);
    dynamic.serialize_with_options(serde_json::value::Serializer, &options).expect("a JSON value holds any message")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::inference::{DataType, ModelConfig, ModelDynamicBatching, ModelInput, model_config::SchedulingChoice};

    #[test]
    fn json_has_the_names_of_the_files_and_plain_numbers() {
        let input = ModelInput {
            name: "x".to_owned(),
            data_type: DataType::TypeFp32.into(),
            dims: vec![-1],
            ..Default::default()
        };
        let batching = ModelDynamicBatching { max_queue_delay_microseconds: 1 << 40, ..Default::default() };
        let config = ModelConfig {
            name: "m".to_owned(),
            max_batch_size: 8,
            input: vec![input],
            scheduling_choice: Some(SchedulingChoice::DynamicBatching(batching)),
            ..Default::default()
        };
        let json = to_json(&config);
        assert_eq!(json["max_batch_size"], 8);
        assert_eq!(json["input"][0]["data_type"], "TYPE_FP32");
        assert_eq!(json["input"][0]["dims"], json!([-1]));
        assert_eq!(json["dynamic_batching"]["max_queue_delay_microseconds"], 1_u64 << 40);
        assert_eq!(json["instance_group"], json!([]), "empty lists are there");
        assert!(json.get("ensemble_scheduling").is_none() && json.get("optimization").is_none());
    }

    #[test]
    fn the_services_are_described() {
        let services: Vec<_> = descriptor_pool().services().map(|service| service.full_name().to_owned()).collect();
        assert_eq!(services, ["inference.GRPCInferenceService", "sensorium.v1.MultimodalService"]);
    }
}

//! Good manifests, and ways to spoil them.

use sensorium_api::Resource;
use sensorium_api::manifest::{ManifestError, parse_documents};
use serde_json::{Value, json};

/// The manifests of the quick start, and one of each thing that they do not use.
pub(crate) fn training() -> Value {
    yaml(include_str!("../../../examples/easy-vqa/training.yaml"))
}

pub(crate) fn compression() -> Value {
    yaml(include_str!("../../../examples/easy-vqa/compression.yaml"))
}

pub(crate) fn serving() -> Value {
    yaml(include_str!("../../../examples/easy-vqa/serving.yaml"))
}

pub(crate) fn artifact() -> Value {
    let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
    json!({
        "apiVersion": "sensorium.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": "vqa-0123456789ab", "namespace": "research", "labels": {"team": "vision"}},
        "spec": {
            "uri": "s3://models/vqa/objects/0123",
            "digest": digest,
            "format": "onnx",
            "signature": [{
                "name": "image_encoder",
                "inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, 64, 64]}],
                "outputs": [{"name": "image_features", "datatype": "FP32", "shape": [-1, 16, 64]}],
            }],
            "modalities": ["text", "image"],
            "metrics": {"vqa_accuracy": 0.99},
            "lineage": {
                "job": {"kind": "TrainingJob", "namespace": "default", "name": "vqa", "specHash": digest},
                "parents": [digest],
                "data": ["pvc://datasets/easy-vqa/train"],
                "steps": ["train"],
            },
        },
    })
}

pub(crate) fn all() -> [Value; 4] {
    [training(), compression(), serving(), artifact()]
}

pub(crate) fn yaml(text: &str) -> Value {
    serde_yaml_ng::from_str(text).unwrap()
}

/// `document` with `value` at the JSON pointer, made where it is missing; null removes what is there.
pub(crate) fn with(mut document: Value, pointer: &str, value: Value) -> Value {
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    match document.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent}")) {
        Value::Object(object) if value.is_null() => drop(object.remove(name)),
        Value::Object(object) => drop(object.insert(name.to_owned(), value)),
        Value::Array(items) if name == "-" => items.push(value),
        Value::Array(items) => items[name.parse::<usize>().unwrap()] = value,
        other => panic!("{parent} is {other}"),
    }
    document
}

pub(crate) fn parse(document: &Value) -> Result<Resource, ManifestError> {
    let text = serde_yaml_ng::to_string(document).unwrap();
    parse_documents(&text, "test.yaml").map(|mut resources| resources.remove(0))
}

/// What is said about a bad document: one line per problem.
pub(crate) fn complaint(document: &Value) -> String {
    parse(document).expect_err("the document should be refused").to_string()
}

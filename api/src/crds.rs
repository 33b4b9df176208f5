//! The CustomResourceDefinitions, generated from the types.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Map, Value, json};

use crate::canonical::sorted;
use crate::{CompressionJob, ModelArtifact, ServingJob, TrainingJob};

/// The command that writes `crds/`.
pub const GENERATE: &str = "cargo run --release -p sensorium-api --example crdgen";

/// One kind as the API server knows it.
#[derive(Clone, Debug)]
pub struct Definition {
    /// The kind, such as `TrainingJob`.
    pub kind: String,
    /// File below `crds/` that holds it, such as `trainingjobs.yaml`.
    pub file_name: String,
    /// The CustomResourceDefinition as JSON.
    pub definition: Value,
}

impl Definition {
    /// The OpenAPI schema that objects of the kind are held to.
    pub fn schema(&self) -> &Value {
        &self.definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    }

    /// The file's text.
    ///
    /// # Errors
    /// As [`definitions`].
    pub fn to_yaml(&self) -> Result<String, serde_yaml_ng::Error> {
        let body = serde_yaml_ng::to_string(&self.definition)?;
        Ok(format!("# Generated from api/src by `{GENERATE}`; do not edit.\n{body}"))
    }
}

/// The definitions of all kinds, in a fixed order.
///
/// # Errors
/// None of these types fails to become JSON; the error is `serde_json`'s, passed on.
pub fn definitions() -> Result<Vec<Definition>, serde_json::Error> {
    [TrainingJob::crd(), CompressionJob::crd(), ServingJob::crd(), ModelArtifact::crd()]
        .into_iter()
        .map(definition)
        .collect()
}

fn definition(crd: CustomResourceDefinition) -> Result<Definition, serde_json::Error> {
    let kind = crd.spec.names.kind.clone();
    let file_name = format!("{}.yaml", crd.spec.names.plural);
    let mut definition = serde_json::to_value(crd)?;
    use_kubernetes_formats(&mut definition);
    describe_for_readers(&mut definition);
    Ok(Definition { kind, file_name, definition: sorted(&definition) })
}

/// Kubernetes knows the formats `int32` and `int64` only and warns about others with every `kubectl apply`. The range
/// that an unsigned format implied becomes explicit, so that what the schema admits fits the Rust type.
fn use_kubernetes_formats(value: &mut Value) {
    match value {
        Value::Object(object) => {
            if object.get("type").is_some_and(|t| t == "integer") {
                use_kubernetes_integer(object);
            }
            object.values_mut().for_each(use_kubernetes_formats);
        }
        Value::Array(items) => items.iter_mut().for_each(use_kubernetes_formats),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// What readers of `kubectl explain` need: paragraphs without the line ends of the source, and the defaults, which it does
/// not print by itself.
fn describe_for_readers(value: &mut Value) {
    match value {
        Value::Object(object) => {
            if object.contains_key("x-kubernetes-int-or-string") {
                // Instead of Kubernetes' own words, the grammar of an amount and its Go type in forty lines.
                let short = "An amount, as Kubernetes writes it: `2`, `500m` (a half), `8Gi` (8 x 2^30).";
                object.insert("description".to_owned(), json!(short));
            }
            if let Some(Value::String(description)) = object.get("description") {
                let paragraphs = description.split("\n\n").map(|lines| lines.replace('\n', " "));
                let described = paragraphs.collect::<Vec<_>>().join("\n\n") + &default_sentence(object);
                object.insert("description".to_owned(), json!(described));
            }
            object.values_mut().for_each(describe_for_readers);
        }
        Value::Array(items) => items.iter_mut().for_each(describe_for_readers),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// What a description says at its end of the field's default. That of an object is told by the object's fields.
pub(crate) fn default_sentence(schema: &Map<String, Value>) -> String {
    match schema.get("default") {
        None | Some(Value::Null | Value::Object(_)) => String::new(),
        Some(Value::Array(items)) if items.is_empty() => String::new(),
        Some(Value::String(text)) => format!(" Default: `{text}`."),
        Some(default) => format!(" Default: `{default}`."),
    }
}

fn use_kubernetes_integer(schema: &mut Map<String, Value>) {
    let (format, largest) = match schema.get("format").and_then(Value::as_str) {
        Some("uint8") => ("int32", Some(u64::from(u8::MAX))),
        Some("uint16") => ("int32", Some(u64::from(u16::MAX))),
        Some("uint32") => ("int64", Some(u64::from(u32::MAX))),
        // A JSON schema's bounds are doubles, which cannot tell 2^63 - 1 from 2^63; the format itself is the bound.
        Some("uint64") => ("int64", None),
        _ => return,
    };
    schema.insert("format".to_owned(), json!(format));
    schema.entry("minimum").or_insert_with(|| json!(0));
    if let Some(largest) = largest {
        schema.entry("maximum").or_insert_with(|| json!(largest));
    }
}

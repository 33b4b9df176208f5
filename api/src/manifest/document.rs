//! Text to documents to resources.

use std::sync::LazyLock;

use kube::core::cel::apply_defaults;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::problem::{Cause, ManifestError, Problem};
use super::{Resource, availability, rules, schema};
use crate::crds::{self, Definition};

/// Reads every document of a YAML text; `file` is what problems call it. Empty documents are skipped.
///
/// # Errors
/// [`ManifestError`] with every problem of every document. Where a document breaks its schema, its CEL rules are not
/// looked at: they would stumble over the same fields.
pub fn parse_documents(text: &str, file: &str) -> Result<Vec<Resource>, ManifestError> {
    let mut resources = Vec::new();
    let mut problems = Vec::new();
    for (i, document) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
        let problem =
            |resource, (field, cause)| Problem { file: file.to_owned(), document: i + 1, resource, field, cause };
        match read_yaml(document) {
            // A syntax error ends the stream: what follows has no meaning any more.
            Err(cause) => {
                problems.push(problem(None, (String::new(), cause)));
                break;
            }
            Ok(Value::Null) => {}
            Ok(value) => match parse_document(value.clone()) {
                Ok(resource) => resources.push(resource),
                Err(found) => {
                    let title = title(&value);
                    problems.extend(found.into_iter().map(|(field, cause)| problem(title.clone(), (field, cause))));
                }
            },
        }
    }
    if problems.is_empty() { Ok(resources) } else { Err(ManifestError { problems }) }
}

/// YAML to JSON by way of YAML's own value, whose mappings refuse a key that is there twice.
fn read_yaml(document: serde_yaml_ng::Deserializer<'_>) -> Result<Value, Cause> {
    let value = serde_yaml_ng::Value::deserialize(document).map_err(|e| Cause::NotYaml { message: e.to_string() })?;
    serde_json::to_value(value).map_err(|e| Cause::NotYaml { message: e.to_string() })
}

/// `KIND/NAME` of a document that may be wrong in any way.
fn title(document: &Value) -> Option<String> {
    let kind = document["kind"].as_str()?;
    Some(match document["metadata"]["name"].as_str() {
        Some(name) => format!("{kind}/{name}"),
        None => kind.to_owned(),
    })
}

fn parse_document(mut document: Value) -> Result<Resource, Vec<(String, Cause)>> {
    let checker = checker(&document)?;
    schema::prune_null_defaults(&checker.schema, &mut document);
    let document = apply_defaults(&checker.schema, &document);
    let mut problems = Vec::new();
    schema::check(&checker.schema, &document, "", &mut problems);
    if problems.is_empty() {
        problems = rules::check(&checker.schema, &document);
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let resource =
        (checker.decode)(document).map_err(|e| vec![(String::new(), Cause::Undecodable { message: e.to_string() })])?;
    let unavailable = match &resource {
        Resource::TrainingJob(job) => availability::unavailable(&job.spec),
        _ => Vec::new(),
    };
    if unavailable.is_empty() { Ok(resource) } else { Err(unavailable) }
}

type Decode = fn(Value) -> Result<Resource, serde_json::Error>;

/// How the documents of one kind are checked and decoded.
struct Checker {
    kind: String,
    schema: Value,
    decode: Decode,
}

/// Generating the definitions takes milliseconds; a folder of manifests should pay that once.
static CHECKERS: LazyLock<Result<Vec<Checker>, String>> = LazyLock::new(|| {
    let definitions = crds::definitions().map_err(|e| e.to_string())?;
    Ok(definitions.iter().filter_map(|d| Some(Checker::new(d, decoder(&d.kind)?))).collect())
});

impl Checker {
    fn new(definition: &Definition, decode: Decode) -> Self {
        let mut schema = definition.schema().clone();
        // A definition leaves these to the API server.
        schema["properties"]["apiVersion"] = json!({"type": "string"});
        schema["properties"]["kind"] = json!({"type": "string"});
        schema["properties"]["metadata"] = metadata_schema();
        schema["required"] = json!(["metadata", "spec"]);
        Self { kind: definition.kind.clone(), schema, decode }
    }
}

fn decoder(kind: &str) -> Option<Decode> {
    fn decode<T: DeserializeOwned>(value: Value, wrap: fn(T) -> Resource) -> Result<Resource, serde_json::Error> {
        serde_json::from_value(value).map(wrap)
    }
    match kind {
        "TrainingJob" => Some(|value| decode(value, Resource::TrainingJob)),
        "CompressionJob" => Some(|value| decode(value, Resource::CompressionJob)),
        "ServingJob" => Some(|value| decode(value, Resource::ServingJob)),
        "ModelArtifact" => Some(|value| decode(value, Resource::ModelArtifact)),
        _ => None,
    }
}

/// What `apiVersion` and `kind` of the document call for.
fn checker(document: &Value) -> Result<&'static Checker, Vec<(String, Cause)>> {
    let fail = |field: &str, cause| Err(vec![(field.to_owned(), cause)]);
    if !document.is_object() {
        let found = schema::show(document);
        return fail("", Cause::WrongType { found, expected: "a mapping with apiVersion, kind, metadata and spec" });
    }
    match &document["apiVersion"] {
        Value::String(version) if version == crate::API_VERSION => {}
        Value::Null => {
            return fail(
                "apiVersion",
                Cause::Missing { description: Some(format!("write \"{}\"", crate::API_VERSION)) },
            );
        }
        other => return fail("apiVersion", Cause::WrongApiVersion { found: schema::show(other) }),
    }
    let checkers = match &*CHECKERS {
        Ok(checkers) => checkers,
        Err(message) => return fail("", Cause::Undecodable { message: message.clone() }),
    };
    if let Some(checker) = checkers.iter().find(|checker| document["kind"] == *checker.kind) {
        return Ok(checker);
    }
    let known: Vec<String> = checkers.iter().map(|checker| checker.kind.clone()).collect();
    let suggestion = document["kind"].as_str().and_then(|kind| schema::nearest(kind, &known));
    fail("kind", Cause::UnknownKind { found: schema::show(&document["kind"]), suggestion, known })
}

/// The part of ObjectMeta that authors write; what a cluster adds passes unread.
fn metadata_schema() -> Value {
    let words = json!({"type": "object", "additionalProperties": {"type": "string"}});
    json!({
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {
                "type": "string",
                "description": "Name of the object.",
                "maxLength": 253,
                "x-kubernetes-validations": [{
                    "rule": "self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",
                    "messageExpression": "\"'\" + self + \"' is not an object name; use lower-case letters, digits, \
                                          '-' and '.', with a letter or digit at both ends\"",
                }],
            },
            "namespace": {
                "type": "string",
                "maxLength": 63,
                "x-kubernetes-validations": [{
                    "rule": "self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
                    "messageExpression": "\"'\" + self + \"' is not a namespace; use lower-case letters, digits and \
                                          '-', with a letter or digit at both ends\"",
                }],
            },
            "labels": words,
            "annotations": words,
            "creationTimestamp": {},
            "deletionGracePeriodSeconds": {},
            "deletionTimestamp": {},
            "finalizers": {},
            "generation": {},
            "managedFields": {},
            "ownerReferences": {},
            "resourceVersion": {},
            "uid": {},
        },
    })
}

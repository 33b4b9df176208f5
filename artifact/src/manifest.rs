//! The manifest: what an artifact contains, what it takes and gives, how good it is and where it comes from.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::path::{validate_file_path, validate_name};
use crate::{ArtifactError, Digest};

/// The schema version that this program writes, and the only one that it reads.
pub const SCHEMA_VERSION: u64 = 1;

/// Name of the manifest's file; no other file of an artifact may have it.
pub const MANIFEST_FILE: &str = "manifest.json";

/// The description of an artifact. There is no time or host in it: the same content always has the same digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u64,
    /// The name it was made under; a store's names may point elsewhere later.
    pub name: String,
    /// The kind of files that an engine finds in it.
    pub format: Format,
    /// Every file but the manifest, in order of the paths.
    pub files: Vec<FileEntry>,
    /// The graphs that an engine can run.
    pub graphs: Vec<Graph>,
    /// How raw inputs become tensors and tensors become answers; the `modality` crate knows its schema.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<Value>,
    /// The modalities that it understands, such as `text` and `image`.
    #[serde(default)]
    pub modalities: Vec<String>,
    /// Measured qualities, such as `vqa_accuracy`; fractions and base units.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// Where it comes from.
    #[serde(default)]
    pub lineage: Lineage,
}

impl Manifest {
    /// The sum of the files' sizes, in bytes, without the manifest.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// The graph called `name`.
    pub fn graph(&self, name: &str) -> Option<&Graph> {
        self.graphs.iter().find(|graph| graph.name == name)
    }

    /// Reads and checks a manifest. `what` names it in errors.
    ///
    /// # Errors
    /// [`ArtifactError::UnknownSchema`] before anything else is looked at; [`ArtifactError::InvalidManifest`],
    /// [`ArtifactError::InvalidPath`] or [`ArtifactError::InvalidName`] for what does not follow the schema.
    pub fn from_slice(what: &str, bytes: &[u8]) -> Result<Self, ArtifactError> {
        let manifest: Self = versioned(what, bytes)?;
        manifest.validate(what)?;
        Ok(manifest)
    }

    /// The canonical bytes: JSON with sorted keys and two-space indentation. Their digest names the artifact.
    pub(crate) fn to_canonical(&self) -> Result<Vec<u8>, ArtifactError> {
        canonical(self).map_err(|error| self.invalid("the manifest", &error))
    }

    pub(crate) fn validate(&self, what: &str) -> Result<(), ArtifactError> {
        validate_name(&self.name)?;
        let mut paths = BTreeSet::new();
        for file in &self.files {
            validate_file_path(&file.path)?;
            if file.path == MANIFEST_FILE {
                return Err(self.invalid(what, &"`manifest.json` is listed as a file"));
            }
            if !paths.insert(&file.path) {
                return Err(self.invalid(what, &format_args!("file `{}` is listed twice", file.path)));
            }
        }
        let mut names = BTreeSet::new();
        for Graph { name, file, .. } in &self.graphs {
            if !paths.contains(file) {
                return Err(
                    self.invalid(what, &format_args!("graph `{name}` is in file `{file}`, which is not listed"))
                );
            }
            if !names.insert(name) {
                return Err(self.invalid(what, &format_args!("graph `{name}` is listed twice")));
            }
        }
        // JSON has no NaN: it would be written as null and never be read again.
        match self.metrics.iter().find(|(_, value)| !value.is_finite()) {
            Some((name, value)) => {
                Err(self.invalid(what, &format_args!("metric `{name}` is {value}, not a finite number")))
            }
            None => Ok(()),
        }
    }

    fn invalid(&self, what: &str, reason: &dyn std::fmt::Display) -> ArtifactError {
        ArtifactError::InvalidManifest { what: format!("{what} (`{}`)", self.name), reason: reason.to_string() }
    }
}

/// What the author of an artifact says about it; the store adds the files and their digests.
#[derive(Clone, Debug, PartialEq)]
pub struct ManifestParts {
    /// See [`Manifest::name`].
    pub name: String,
    /// See [`Manifest::format`].
    pub format: Format,
    /// See [`Manifest::graphs`]; each graph's file must be in the draft.
    pub graphs: Vec<Graph>,
    /// See [`Manifest::pipeline`].
    pub pipeline: Option<Value>,
    /// See [`Manifest::modalities`].
    pub modalities: Vec<String>,
    /// See [`Manifest::metrics`]; finite numbers.
    pub metrics: BTreeMap<String, f64>,
    /// See [`Manifest::lineage`].
    pub lineage: Lineage,
}

impl ManifestParts {
    /// The manifest of these parts and `files`, checked.
    pub(crate) fn into_manifest(self, files: Vec<FileEntry>) -> Result<Manifest, ArtifactError> {
        let Self { name, format, graphs, pipeline, modalities, metrics, lineage } = self;
        let schema_version = SCHEMA_VERSION;
        let manifest = Manifest { schema_version, name, format, files, graphs, pipeline, modalities, metrics, lineage };
        manifest.validate("the draft")?;
        Ok(manifest)
    }
}

/// The kind of files in an artifact: it decides which engine opens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// ONNX graphs.
    Onnx,
}

/// One file of an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FileEntry {
    /// `/`-separated path relative to the artifact.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Digest of the content.
    pub digest: Digest,
}

/// One graph that an engine can run, with its signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Graph {
    /// Name, unique in the artifact.
    pub name: String,
    /// Path of the file that holds it.
    pub file: String,
    /// What it takes, in order.
    pub inputs: Vec<TensorSpec>,
    /// What it gives, in order.
    pub outputs: Vec<TensorSpec>,
}

/// Name, element type and shape of one input or output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TensorSpec {
    /// Name of the input or output.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Size of each axis; `None` for one that a request decides.
    pub shape: Vec<Option<u64>>,
}

/// Element type of a tensor, spelled as in the inference v2 protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[expect(missing_docs, reason = "each name is its own explanation")]
pub enum DType {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Bf16,
    Fp32,
    Fp64,
    /// Strings of bytes, each of its own length.
    Bytes,
}

/// Where an artifact comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lineage {
    /// The job that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<LineageJob>,
    /// The artifacts that it was made from.
    #[serde(default)]
    pub parents: Vec<Digest>,
    /// URIs of the data that it has seen.
    #[serde(default)]
    pub data: Vec<String>,
    /// What was done, in order, in words such as `train` or `quantize static-int8`.
    #[serde(default)]
    pub steps: Vec<String>,
}

/// The job that made an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LineageJob {
    /// Kind of the job, such as `TrainingJob`.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Hash of the spec that it ran with.
    pub spec_hash: String,
}

/// Reads JSON that carries `schemaVersion`. The version is looked at first, because the rest of another version's
/// document may not parse and the message would mislead.
pub(crate) fn versioned<T: serde::de::DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, ArtifactError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Version {
        schema_version: u64,
    }
    let invalid =
        |error: serde_json::Error| ArtifactError::InvalidManifest { what: what.to_owned(), reason: error.to_string() };
    let Version { schema_version: found } = serde_json::from_slice(bytes).map_err(invalid)?;
    if found != SCHEMA_VERSION {
        return Err(ArtifactError::UnknownSchema { what: what.to_owned(), found, supported: SCHEMA_VERSION });
    }
    serde_json::from_slice(bytes).map_err(invalid)
}

/// JSON with sorted keys. serde_json keeps keys sorted or as inserted depending on a feature that any crate of the
/// build may turn on, so the order is made explicit here: digests must not depend on who else is linked.
pub(crate) fn canonical(value: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = serde_json::to_vec_pretty(&sorted(serde_json::to_value(value)?))?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Array(items) => items.into_iter().map(sorted).collect(),
        Value::Object(map) => {
            let fields: BTreeMap<String, Value> = map.into_iter().map(|(key, item)| (key, sorted(item))).collect();
            fields.into_iter().collect()
        }
        scalar => scalar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn document() -> Value {
        let digest = Digest::of(b"graph");
        json!({
            "schemaVersion": 1,
            "name": "vqa",
            "format": "onnx",
            "files": [{ "path": "graphs/fusion.onnx", "bytes": 5, "digest": digest }],
            "graphs": [{
                "name": "fusion",
                "file": "graphs/fusion.onnx",
                "inputs": [{ "name": "x", "dtype": "FP32", "shape": [null, 64] }],
                "outputs": [{ "name": "y", "dtype": "INT64", "shape": [] }],
            }],
            "pipeline": { "b": 1, "a": { "d": 2, "c": [1.5] } },
            "lineage": { "job": { "kind": "TrainingJob", "namespace": "default", "name": "vqa", "specHash": "00" } },
        })
    }

    fn parse(document: &Value) -> Result<Manifest, ArtifactError> {
        Manifest::from_slice("the manifest", document.to_string().as_bytes())
    }

    #[test]
    fn a_manifest_reads_as_it_is_written() {
        let manifest = parse(&document()).unwrap();
        let bytes = manifest.to_canonical().unwrap();
        assert_eq!(Manifest::from_slice("copy", &bytes).unwrap(), manifest);
        assert_eq!(manifest.graph("fusion").unwrap().inputs[0].shape, [None, Some(64)]);
        assert_eq!(manifest.graph("other"), None);
    }

    #[test]
    fn the_canonical_form_has_sorted_keys_at_every_depth() {
        let text = String::from_utf8(parse(&document()).unwrap().to_canonical().unwrap()).unwrap();
        let places: Vec<_> = ["\"files\"", "\"pipeline\"", "\"a\"", "\"c\"", "\"d\"", "\"b\"", "\"schemaVersion\""]
            .iter()
            .map(|key| text.find(key).unwrap())
            .collect();
        assert!(places.is_sorted(), "{text}");
        assert!(text.ends_with("}\n"));
    }

    #[test]
    fn a_manifest_with_a_path_that_leads_outside_is_refused() {
        for bad in ["../x", "/etc/x", "a\\x", "a/../x"] {
            let mut document = document();
            document["files"][0]["path"] = json!(bad);
            let error = parse(&document).unwrap_err();
            assert!(matches!(&error, ArtifactError::InvalidPath { path, .. } if path == bad), "{error}");
        }
    }

    #[test]
    fn an_unknown_schema_version_is_refused_before_the_rest_is_read() {
        let error = Manifest::from_slice("the manifest", br#"{"schemaVersion": 2, "novel": true}"#).unwrap_err();
        assert!(matches!(error, ArtifactError::UnknownSchema { found: 2, supported: 1, .. }), "{error}");
    }

    #[test]
    fn a_document_that_breaks_the_schema_is_refused_with_the_reason() {
        let changes: [(&str, Value, &str); 5] = [
            ("/novel", json!(1), "unknown field `novel`"),
            ("/format", json!("gguf"), "unknown variant `gguf`"),
            ("/files/0/digest", json!("md5:00"), "`md5:00` is not a digest"),
            ("/files/0/path", json!("manifest.json"), "listed as a file"),
            ("/graphs/0/file", json!("other.onnx"), "graph `fusion` is in file `other.onnx`, which is not listed"),
        ];
        for (pointer, value, reason) in changes {
            let mut document = document();
            match document.pointer_mut(pointer) {
                Some(place) => *place = value,
                None => document[&pointer[1..]] = value,
            }
            let error = parse(&document).unwrap_err();
            assert!(matches!(error, ArtifactError::InvalidManifest { .. }), "{error}");
            assert!(error.to_string().contains(reason), "{error}");
        }
        let mut twice = document();
        twice["files"] = json!([twice["files"][0], twice["files"][0]]);
        assert!(parse(&twice).unwrap_err().to_string().contains("listed twice"));
    }
}

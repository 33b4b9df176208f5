//! How a manifest names storage: a location (where data or checkpoints are) and an artifact (a model in a store).

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// The store that is used where a manifest names none.
pub const DEFAULT_STORE: &str = "pvc://artifacts";

/// Which artifact to read, and from where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ArtifactSource {
    /// Name of the artifact (its newest promoted version is read), or `sha256:` and 64 hexadecimal digits for exactly
    /// that one.
    #[schemars(schema_with = "artifact_reference_schema")]
    pub artifact: String,
    /// The store the artifact is in: `pvc://CLAIM/PATH`, `s3://BUCKET/PREFIX` or `file:///PATH`.
    #[serde(default = "default_store")]
    #[schemars(schema_with = "location_schema")]
    pub store: String,
}

/// Under which name, and where, a job leaves the artifact it makes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutputSpec {
    /// Name of the artifact, by which later jobs find it: lower-case letters, digits, `-` and `.`, at most 63.
    #[schemars(schema_with = "artifact_name_schema")]
    pub artifact: String,
    /// The store to write to: `pvc://CLAIM/PATH`, `s3://BUCKET/PREFIX` or `file:///PATH`.
    #[serde(default = "default_store")]
    #[schemars(schema_with = "location_schema")]
    pub store: String,
}

fn default_store() -> String {
    DEFAULT_STORE.to_owned()
}

/// A location. A CEL rule rather than `pattern`, because a failed pattern shows its reader a regular expression.
pub(crate) fn location_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 1024,
        "x-kubernetes-validations": [{
            "rule": "self.matches('^(pvc://[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?(/.*)?|\
                     s3://[a-z0-9][-a-z0-9.]{1,61}[a-z0-9](/.*)?|file:///.+)$') && !self.matches('/[.][.]?(/|$)')",
            "messageExpression": "\"'\" + self + \"' is not a storage location; write pvc://CLAIM/PATH, \
                                  s3://BUCKET/PREFIX or file:///PATH, without '.' and '..' in the path\"",
        }],
    })
}

fn artifact_name_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 63,
        "x-kubernetes-validations": [{
            "rule": "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
            "messageExpression": "\"'\" + self + \"' is not an artifact name; use lower-case letters, digits, '-' and \
                                  '.', with a letter or digit at both ends\"",
        }],
    })
}

pub(crate) fn artifact_reference_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 71,
        "x-kubernetes-validations": [{
            "rule": "self.matches('^(sha256:[0-9a-f]{64}|[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?)$')",
            "messageExpression": "\"'\" + self + \"' names no artifact; use its name (lower-case letters, digits, '-' \
                                  and '.') or sha256: and 64 hexadecimal digits\"",
        }],
    })
}

/// An artifact's digest in full.
pub(crate) fn digest_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 71,
        "x-kubernetes-validations": [{
            "rule": "self.matches('^sha256:[0-9a-f]{64}$')",
            "messageExpression": "\"'\" + self + \"' is not a digest; write sha256: and 64 hexadecimal digits\"",
        }],
    })
}

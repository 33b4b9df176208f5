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
    /// The store the artifact is in: `pvc://CLAIM/PATH`, `s3://BUCKET/PREFIX`, or on one machine `file:///PATH`.
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
    /// The store to write to: `pvc://CLAIM/PATH`, `s3://BUCKET/PREFIX`, or on one machine `file:///PATH`.
    #[serde(default = "default_store")]
    #[schemars(schema_with = "location_schema")]
    pub store: String,
    /// Which artifacts of this name stay, on a cluster; all of them by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
}

/// Which artifacts of one name stay. The newest one's rule holds for all of its name and store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Retention {
    /// How many stay, from the newest. An older one is deleted once no job that runs and no server uses it.
    #[schemars(range(min = 1, max = 1000))]
    pub keep: u32,
    /// What becomes of the stored files of a ModelArtifact that is deleted, by this rule or by somebody: `Retain` or
    /// `Delete`.
    #[serde(default)]
    pub files: FilePolicy,
}

/// What becomes of the files of a deleted ModelArtifact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FilePolicy {
    /// They stay in the store.
    #[default]
    Retain,
    /// They are removed from the store before the ModelArtifact is gone.
    Delete,
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
                     s3://[a-z0-9][-a-z0-9.]{1,61}[a-z0-9](/.*)?|file:///.+)$') && !self.matches('/[.][.]?(/|$)') && !self.matches('[^:/]//')",
            "messageExpression": "\"'\" + self + \"' is not a storage location; write pvc://CLAIM/PATH, \
                                  s3://BUCKET/PREFIX or file:///PATH, without '.' and '..' in the path, and without empty parts\"",
        }],
    })
}

fn artifact_name_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 63,
        "x-kubernetes-validations": [{
            "rule": "self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",
            "messageExpression": "\"'\" + self + \"' is not an artifact name; use lower-case letters, digits, '-' and \
                                  '.', with a letter or digit at both ends and on either side of '.'\"",
        }],
    })
}

pub(crate) fn artifact_reference_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 71,
        "x-kubernetes-validations": [{
            "rule": "self.matches('^(sha256:[0-9a-f]{64}|[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*)$') && \
                     (self.startsWith('sha256:') || size(self) <= 63)",
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

//! The index: where each sample is, and what its bytes must be.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::DataError;
use crate::sample::key_problem;

/// Name of the index's file.
pub const INDEX_FILE: &str = "index.json";

/// The schema version that this program writes, and the only one that it reads.
pub(crate) const SCHEMA_VERSION: u64 = 1;

/// What `index.json` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Index {
    /// 1.
    pub schema_version: u64,
    /// The possible answers in the order of the classes; empty when they are open.
    #[serde(default)]
    pub answers: Vec<String>,
    /// What it was made from; an importer compares it to see whether it has anything to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Number of questions in all samples.
    pub questions: u64,
    /// Number of samples with a caption.
    pub captions: u64,
    /// The shards, in order.
    pub shards: Vec<ShardEntry>,
}

/// One shard of the index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ShardEntry {
    /// File name.
    pub file: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Digest of the file, `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Its samples, in order.
    pub samples: Vec<SampleEntry>,
}

/// One sample of the index. Offsets are of the content, after the tar header, in bytes from the start of the shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SampleEntry {
    /// Key of the sample.
    pub key: String,
    /// Where the image begins.
    pub image_offset: u64,
    /// Its size in bytes.
    pub image_bytes: u64,
    /// Where the annotation (`KEY.json`) begins; after the image.
    pub annotation_offset: u64,
    /// Its size in bytes.
    pub annotation_bytes: u64,
    /// Digest of the image followed by the annotation, `sha256:` and 64 hexadecimal digits.
    pub digest: String,
}

impl SampleEntry {
    /// Where the annotation ends; `None` for numbers that cannot be right.
    pub(crate) fn end(&self) -> Option<u64> {
        let image_end = self.image_offset.checked_add(self.image_bytes)?;
        let end = self.annotation_offset.checked_add(self.annotation_bytes)?;
        (image_end <= self.annotation_offset).then_some(end)
    }
}

impl Index {
    /// Parses and checks the bytes of the index at `path`. The files it speaks of are not looked at.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, DataError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Version {
            schema_version: u64,
        }
        let invalid = |reason: String| DataError::InvalidIndex { path: path.to_owned(), reason };
        // First of all: the rest of another version's document may not parse, and the message would mislead.
        let Version { schema_version: found } =
            serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        if found != SCHEMA_VERSION {
            return Err(DataError::UnknownSchema { path: path.to_owned(), found, supported: SCHEMA_VERSION });
        }
        let index: Self = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        index.problem().map_or(Ok(()), |reason| Err(invalid(reason)))?;
        Ok(index)
    }

    fn problem(&self) -> Option<String> {
        let mut keys = BTreeSet::new();
        for shard in &self.shards {
            let file = &shard.file;
            if file.contains(['/', '\\'])
                || file.starts_with('.')
                || Path::new(file).extension() != Some("tar".as_ref())
            {
                return Some(format!("shard `{file}` is not the name of a .tar file"));
            }
            for sample in &shard.samples {
                let key = &sample.key;
                if let Some(problem) = key_problem(key) {
                    return Some(format!("sample `{key}` of shard `{file}`: {problem}"));
                }
                if !keys.insert(key) {
                    return Some(format!("sample `{key}` of shard `{file}` is listed twice"));
                }
                if sample.end().is_none_or(|end| end > shard.bytes) {
                    return Some(format!(
                        "sample `{key}` does not lie within the {} bytes of shard `{file}`",
                        shard.bytes
                    ));
                }
            }
        }
        None
    }
}

/// The printed form of what `hasher` has seen.
pub(crate) fn digest(hasher: Sha256) -> String {
    format!("sha256:{}", hex::encode(hasher.finalize()))
}

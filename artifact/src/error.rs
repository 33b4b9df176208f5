//! The one error type of this crate.

use std::io;
use std::path::{Path, PathBuf};

use crate::Digest;

/// What can go wrong with artifacts and their storage. Every message names the thing; `source` says why it failed.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// A storage URI that no store can be opened by.
    #[error(
        "storage URI `{uri}` is not valid: {reason}; use pvc://CLAIM/PATH, file:///ABSOLUTE/PATH or s3://BUCKET/PREFIX"
    )]
    InvalidUri {
        /// The URI as it was given.
        uri: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A `--volume` argument that is not `CLAIM=DIR`.
    #[error("volume `{value}` is not valid: {reason}; use CLAIM=DIR, such as datasets=/mnt/datasets")]
    InvalidVolume {
        /// The argument as it was given.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A `pvc://` URI whose claim no volume was given for.
    #[error("`{uri}` names claim `{claim}`, but no such volume was given (known: {})", one_of(known))]
    UnknownClaim {
        /// The URI that was to be resolved.
        uri: String,
        /// Its claim.
        claim: String,
        /// The claims that do have a volume.
        known: Vec<String>,
    },
    /// A URI of remote storage where a path on this machine is needed.
    #[error("`{uri}` is not on this machine's file system; use a pvc:// or file:// URI here")]
    NotLocal {
        /// The URI that was given.
        uri: String,
    },
    /// An artifact name outside the alphabet of names.
    #[error("`{name}` is not an artifact name: {reason}")]
    InvalidName {
        /// The name as it was given.
        name: String,
        /// What a name must look like.
        reason: &'static str,
    },
    /// Text that is not a digest.
    #[error("`{value}` is not a digest; a digest is `sha256:` and 64 lower-case hexadecimal digits")]
    InvalidDigest {
        /// The text as it was given.
        value: String,
    },
    /// A file path inside an artifact that could lead outside it, or is not portable.
    #[error("`{path}` is not a path inside an artifact: {reason}")]
    InvalidPath {
        /// The path as it was given.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A manifest, or a name record, that does not follow its schema.
    #[error("{what} is not valid: {reason}")]
    InvalidManifest {
        /// Which manifest or record.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A manifest of a schema that this program does not know.
    #[error("{what} has schema version {found}, this program reads version {supported}; use a newer sensorium")]
    UnknownSchema {
        /// Which manifest or record.
        what: String,
        /// The version it says it has.
        found: u64,
        /// The only version this program reads.
        supported: u64,
    },
    /// No artifact of that name or digest.
    #[error("no artifact `{reference}` in {store} (names there: {})", one_of(names))]
    NotFound {
        /// The name or digest that was looked up.
        reference: String,
        /// URI of the store.
        store: String,
        /// The names that the store does have.
        names: Vec<String>,
    },
    /// Stored bytes are not the bytes that were committed.
    #[error("artifact {artifact} is damaged: {}", listed(mismatches))]
    Corrupt {
        /// The artifact.
        artifact: Digest,
        /// Every file that does not match; never empty.
        mismatches: Vec<Mismatch>,
    },
    /// A folder that was to be created by an atomic commit is there already.
    #[error("`{}` is there already; it was not changed", path.display())]
    AlreadyExists {
        /// The folder.
        path: PathBuf,
    },
    /// The disk, a quota or the file-size limit is exhausted.
    #[error("no space left to {action} `{}`; nothing that was stored before has changed: free space and try again", path.display())]
    NoSpace {
        /// What was being done.
        action: &'static str,
        /// To which path.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Another error of the file system.
    #[error("could not {action} `{}`", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which path.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// An error of the object store. The message has its causes, and is the end of the chain: most of the client's errors
    /// repeat their causes, so whoever prints a chain would print them over and over.
    #[error("could not {action} `{uri}`: {}", in_one_line(error))]
    Remote {
        /// What was being done.
        action: &'static str,
        /// To which URI.
        uri: String,
        /// The error of the client; it contains the server's answer.
        error: object_store::Error,
    },
    /// The async runtime shut down before the operation began.
    #[error("the operation was cancelled because the program is shutting down")]
    Cancelled,
}

impl ArtifactError {
    /// Whether what was asked for can never be, whatever becomes of disks and servers.
    pub fn is_users(&self) -> bool {
        use ArtifactError::{InvalidDigest, InvalidName, InvalidUri, InvalidVolume, NotLocal, UnknownClaim};
        matches!(
            self,
            InvalidUri { .. }
                | InvalidVolume { .. }
                | UnknownClaim { .. }
                | NotLocal { .. }
                | InvalidName { .. }
                | InvalidDigest { .. }
        )
    }

    /// The error for a failed `action` on `path`; a full disk gets a variant, and so a message, of its own.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        let path = path.as_ref().to_owned();
        match source.kind() {
            // FileTooLarge is the file-size limit of the process: for its owner just another way to have no space.
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::NoSpace { action, path, source }
            }
            _ => Self::Io { action, path, source },
        }
    }
}

/// An error and its causes, each once.
fn in_one_line(error: &object_store::Error) -> String {
    let error: &dyn std::error::Error = match error {
        // Its own words are no more than that.
        object_store::Error::Generic { source, .. } => source.as_ref(),
        other => other,
    };
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |line, cause| {
        let cause = cause.to_string();
        if line.contains(&cause) { line } else { format!("{line}: {cause}") }
    })
}

/// A stored file whose bytes are not those of the manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Path inside the artifact; `manifest.json` for the manifest itself.
    pub path: String,
    /// The digest that the manifest, or the artifact's name, promises.
    pub expected: Digest,
    /// The digest of what is stored; `None` when the file is missing.
    pub found: Option<Digest>,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { path, expected, found } = self;
        match found {
            Some(found) => write!(f, "`{path}` has digest {found}, expected {expected}"),
            None => write!(f, "`{path}` is missing, expected digest {expected}"),
        }
    }
}

fn listed(mismatches: &[Mismatch]) -> String {
    mismatches.iter().map(Mismatch::to_string).collect::<Vec<_>>().join("; ")
}

fn one_of(known: &[String]) -> String {
    if known.is_empty() { "none".to_owned() } else { known.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Errors as the client nests them: some tell their cause, some leave that to others.
    #[derive(Debug, thiserror::Error)]
    enum Nested {
        #[error("HTTP error: {0}")]
        Telling(#[source] Box<Self>),
        #[error("error sending request")]
        Silent(#[source] Box<Self>),
        #[error("connection refused")]
        Last,
    }

    #[test]
    fn a_remote_error_tells_each_of_its_causes_once() {
        let source = Nested::Telling(Box::new(Nested::Silent(Box::new(Nested::Last))));
        let source = object_store::Error::Generic { store: "S3", source: Box::new(source) };
        let error = ArtifactError::Remote { action: "list", uri: "s3://models".to_owned(), error: source };
        assert_eq!(
            error.to_string(),
            "could not list `s3://models`: HTTP error: error sending request: connection refused"
        );
        assert!(std::error::Error::source(&error).is_none());
    }
}

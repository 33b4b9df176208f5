//! The one error type of this crate.

use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong with a data set. Every message names the file, and the sample where there is one.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The folder is not a data set.
    #[error("`{}` is not a data set: it has no index.json; make one with `sensorium data import`, or as docs/data.md says", folder.display())]
    NotADataset {
        /// The folder.
        folder: PathBuf,
    },
    /// The index does not follow its schema or contradicts itself.
    #[error("the index `{}` is not valid: {reason}", path.display())]
    InvalidIndex {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The index has a schema version that this program does not know.
    #[error("the index `{}` has schema version {found}, this program reads version {supported}; use a newer sensorium", path.display())]
    UnknownSchema {
        /// The index.
        path: PathBuf,
        /// The version it says it has.
        found: u64,
        /// The only version this program reads.
        supported: u64,
    },
    /// A shard is not as long as the index says.
    #[error("shard `{}` has {found} bytes, the index says {expected}; import the data again", path.display())]
    ShardSize {
        /// The shard.
        path: PathBuf,
        /// Bytes that the index promises.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// A shard's bytes are not those that were written.
    #[error("shard `{}` is damaged: it has digest {found}, the index says {expected}; import the data again", path.display())]
    ShardDigest {
        /// The shard.
        path: PathBuf,
        /// Digest that the index promises.
        expected: String,
        /// Digest of what is there.
        found: String,
    },
    /// A sample's bytes are not those that were written.
    #[error("sample `{key}` in shard `{}` is damaged: {reason}; import the data again", shard.display())]
    CorruptSample {
        /// Key of the sample.
        key: String,
        /// The shard that it is in.
        shard: PathBuf,
        /// How it shows.
        reason: String,
    },
    /// A sample number past the end.
    #[error("there is no sample {index}: the data set has {len}")]
    OutOfRange {
        /// The number that was asked for.
        index: usize,
        /// How many samples there are.
        len: usize,
    },
    /// A sample that cannot be written.
    #[error("sample `{key}` cannot be written: {reason}")]
    InvalidSample {
        /// Key of the sample.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A sampler over nothing, or of batches of nothing.
    #[error("cannot draw batches of {batch} from {len} samples; both must be at least 1")]
    InvalidSampler {
        /// Samples there are.
        len: usize,
        /// Samples wanted per step.
        batch: usize,
    },
    /// What is to be imported is not there or not what it should be.
    #[error("`{}` {reason}", path.display())]
    InvalidSource {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The target of a write is something else than a data set.
    #[error("`{}` is there and is not a data set; nothing was changed: choose another folder or remove it", path.display())]
    Occupied {
        /// The target.
        path: PathBuf,
    },
    /// An import would replace a data set that it has not made.
    #[error(
        "`{}` is a data set from elsewhere; nothing was changed: choose another folder (--out), or remove it",
        path.display()
    )]
    Foreign {
        /// The target.
        path: PathBuf,
    },
    /// Another process writes the same data set.
    #[error("another process is writing `{}`; wait until it is done", path.display())]
    Busy {
        /// The target.
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
}

impl DataError {
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

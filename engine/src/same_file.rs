//! A file that is opened more than once.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::error::EngineError;

/// A file as it was when its first engine was opened. Another engine of the same model that came from what is there now would answer by
/// other weights, or take other inputs, while nobody knows.
#[derive(Clone, Debug)]
pub struct SameFile {
    path: PathBuf,
    was: Option<Stamp>,
}

/// Device, inode, bytes, and when it was written, in seconds and nanoseconds.
type Stamp = (u64, u64, u64, i64, i64);

impl SameFile {
    /// The file that is at `path` now.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), was: stamp(path) }
    }

    /// That it is still the one.
    ///
    /// # Errors
    /// [`EngineError::Open`].
    pub fn check(&self) -> Result<(), EngineError> {
        if stamp(&self.path) == self.was {
            return Ok(());
        }
        let reason = "it is not the file any more that was opened first; load the model again".to_owned();
        Err(EngineError::Open { origin: self.path.display().to_string(), reason })
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let found = std::fs::metadata(path).ok()?;
    Some((found.dev(), found.ino(), found.size(), found.mtime(), found.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_replaced_or_written_to_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        std::fs::write(&path, "old").unwrap();
        let file = SameFile::at(&path);
        file.check().unwrap();
        let new = folder.path().join("new");
        std::fs::write(&new, "new").unwrap();
        std::fs::rename(&new, &path).unwrap();
        assert!(file.check().unwrap_err().to_string().contains("load the model again"));
        let file = SameFile::at(&path);
        std::fs::write(&path, "longer").unwrap();
        file.check().unwrap_err();
        let file = SameFile::at(&path);
        std::fs::remove_file(&path).unwrap();
        file.check().unwrap_err();
    }
}

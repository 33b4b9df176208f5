//! A model's files, which are opened more than once.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::error::EngineError;
use crate::onnxruntime;

/// A file, and those of its weights that lie beside it, as they were when its first engine was opened. Another engine of the same model that
/// came from what is there now would answer by other weights, or take other inputs, while nobody knows.
#[derive(Clone, Debug)]
pub struct SameFile {
    files: Vec<(PathBuf, Option<FileStamp>)>,
}

/// What tells a file from another that took its place, or that was written to: device, inode, bytes; when it was written, and when anything of it was
/// changed, in seconds and nanoseconds, since whoever copies a file may keep its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileStamp([u64; 3], [i64; 4]);

impl FileStamp {
    /// That of the file at `path`; `None` where there is none that can be seen.
    pub fn at(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().as_ref().map(Self::from)
    }
}

impl From<&Metadata> for FileStamp {
    fn from(found: &Metadata) -> Self {
        let times = [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()];
        Self([found.dev(), found.ino(), found.size()], times)
    }
}

impl SameFile {
    /// What is at `path` now, and the files that it names, if it is ONNX.
    pub fn at(path: &Path) -> Self {
        let beside = onnxruntime::beside(path).into_iter();
        let files = std::iter::once(path.to_owned()).chain(beside);
        Self { files: files.map(|path| (path.clone(), FileStamp::at(&path))).collect() }
    }

    /// That all of it is still as it was. To be asked before and after an engine is opened, which reads it meanwhile.
    ///
    /// # Errors
    /// [`EngineError::Open`].
    pub fn check(&self) -> Result<(), EngineError> {
        let Some((path, _)) = self.files.iter().find(|(path, was)| FileStamp::at(path) != *was) else { return Ok(()) };
        let reason = "it is not the file any more that was opened first; load the model again".to_owned();
        Err(EngineError::Open { origin: path.display().to_string(), reason })
    }
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

    #[test]
    fn weights_beside_a_model_are_of_it_and_what_else_lies_there_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (path, weights) = (folder.path().join("model.onnx"), folder.path().join("weights.bin"));
        // ModelProto.graph { initializer { external_data { key: "location" value: "weights.bin" } } }
        let entry = [b"\x0a\x08location\x12\x0bweights.bin".as_slice()].concat();
        let within = |field: u8, content: &[u8]| [&[field << 3 | 2, content.len() as u8], content].concat();
        std::fs::write(&path, within(7, &within(5, &within(13, &entry)))).unwrap();
        std::fs::write(&weights, "old").unwrap();
        let file = SameFile::at(&path);
        std::fs::write(folder.path().join("README"), "more").unwrap();
        file.check().unwrap();
        let written = std::fs::metadata(&weights).unwrap().modified().unwrap();
        std::fs::write(&weights, "new").unwrap();
        std::fs::File::open(&weights).unwrap().set_modified(written).unwrap();
        let told = file.check().unwrap_err().to_string();
        assert!(told.contains("weights.bin") && told.contains("load the model again"), "{told}");
    }
}

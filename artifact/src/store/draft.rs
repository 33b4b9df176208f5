//! An artifact that is being written.

use std::fs;
use std::path::{Path, PathBuf};

use crate::atomic::Scratch;
use crate::manifest::MANIFEST_FILE;
use crate::path::validate_file_path;
use crate::{ArtifactError, Digest, FileEntry};

/// A temporary folder for the files of an artifact to be. Dropping it without [`Store::commit`](crate::Store::commit)
/// removes it.
#[derive(Debug)]
pub struct Draft {
    pub(crate) scratch: Scratch,
}

impl Draft {
    /// Where to write the file that will be `path` of the artifact, such as `graphs/fusion.onnx`. Creates the folders
    /// on the way.
    ///
    /// # Errors
    /// [`ArtifactError::InvalidPath`] when `path` is not relative and portable, or is `manifest.json`, which the
    /// store writes.
    pub fn path(&self, path: &str) -> Result<PathBuf, ArtifactError> {
        refuse_manifest(path)?;
        self.scratch.file(path)
    }

    /// The temporary folder.
    pub fn folder(&self) -> &Path {
        self.scratch.content()
    }

    /// Every file with its size and digest, in order of the paths.
    pub(crate) fn entries(&self) -> Result<Vec<FileEntry>, ArtifactError> {
        let mut entries = Vec::new();
        collect(self.folder(), "", &mut entries)?;
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(entries)
    }
}

fn collect(folder: &Path, prefix: &str, entries: &mut Vec<FileEntry>) -> Result<(), ArtifactError> {
    let failed = |source| ArtifactError::io("read", folder, source);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let path = format!("{prefix}{}", name.to_string_lossy());
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() {
            collect(&entry.path(), &format!("{path}/"), entries)?;
        } else if kind.is_file() {
            refuse_manifest(&path)?;
            validate_file_path(&path)?;
            let read = |source| ArtifactError::io("read", entry.path(), source);
            let (digest, bytes) = Digest::of_file(&entry.path()).map_err(read)?;
            entries.push(FileEntry { path, bytes, digest });
        } else {
            // A link would be renamed as a link and could point anywhere tomorrow.
            return Err(ArtifactError::InvalidPath { path, reason: "it is neither a file nor a folder" });
        }
    }
    Ok(())
}

fn refuse_manifest(path: &str) -> Result<(), ArtifactError> {
    if path == MANIFEST_FILE {
        return Err(ArtifactError::InvalidPath {
            path: path.to_owned(),
            reason: "the store writes the manifest itself",
        });
    }
    Ok(())
}

//! A store in a folder of this machine, or of a mounted claim. All calls block.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::atomic::{self, Published, Scratch};
use crate::error::Mismatch;
use crate::manifest::MANIFEST_FILE;
use crate::store::{NAMES, OBJECTS, object_key};
use crate::{ArtifactError, Digest, Manifest, path};

/// Folder for what is not committed yet. On the same file system as the rest, so that a rename commits.
const TMP: &str = "tmp";

#[derive(Clone, Debug)]
pub(crate) struct LocalStore {
    root: PathBuf,
}

impl LocalStore {
    /// Touches nothing: a store that is only read may be on a read-only volume, and one that is not there is empty.
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn folder(&self, digest: &Digest) -> PathBuf {
        self.root.join(OBJECTS).join(digest.hex())
    }

    pub(crate) fn scratch(&self) -> Result<Scratch, ArtifactError> {
        atomic::sweep(self.root.join(NAMES));
        Scratch::shared(&self.root.join(TMP))
    }

    pub(crate) fn read(&self, key: &str) -> Result<Option<Vec<u8>>, ArtifactError> {
        let path = self.root.join(key);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ArtifactError::io("read", path, error)),
        }
    }

    pub(crate) fn write(&self, key: &str, bytes: &[u8]) -> Result<(), ArtifactError> {
        atomic::write(self.root.join(key), bytes)
    }

    /// Makes the content of `scratch` the artifact `digest` with the manifest `bytes`.
    ///
    /// Content that is there already is kept when it is whole, whoever wrote it, and replaced when it is damaged.
    pub(crate) fn publish(
        &self,
        scratch: Scratch,
        digest: &Digest,
        manifest: &Manifest,
        bytes: &[u8],
    ) -> Result<(), ArtifactError> {
        let path = scratch.content().join(MANIFEST_FILE);
        fs::write(&path, bytes).map_err(|source| ArtifactError::io("write", path, source))?;
        atomic::sync_tree(scratch.content())?;
        atomic::create_folder(&self.root.join(OBJECTS))?;
        let target = self.folder(digest);
        let Published::Exists(scratch) = scratch.publish(&target)? else { return Ok(()) };
        let mismatches = self.check(digest, manifest)?;
        if mismatches.is_empty() {
            return Ok(());
        }
        tracing::warn!(artifact = %digest, damaged = mismatches.len(), "replacing a damaged artifact by the same content");
        scratch.take_away(&target)?;
        // If another process replaced it in the same instant, it has the same content, or `verify` will find it out.
        scratch.publish(&target).map(drop)
    }

    pub(crate) fn delete(&self, key: &str) -> Result<(), ArtifactError> {
        let path = self.root.join(key);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ArtifactError::io("remove", path, error)),
            _ => Ok(()),
        }
    }

    /// Whether there is anything of an artifact.
    pub(crate) fn has(&self, digest: &Digest) -> Result<bool, ArtifactError> {
        let folder = self.folder(digest);
        folder.try_exists().map_err(|error| ArtifactError::io("read", folder, error))
    }

    /// Takes an artifact away in one step, then removes its files. What a killed process leaves of them is in the folder for
    /// what is not committed, which every draft sweeps.
    pub(crate) fn remove(&self, digest: &Digest) -> Result<(), ArtifactError> {
        let folder = self.folder(digest);
        match folder.try_exists() {
            Ok(false) => Ok(()),
            Ok(true) => self.scratch()?.take_away(&folder),
            Err(error) => Err(ArtifactError::io("read", folder, error)),
        }
    }

    /// The files, and the manifest, whose stored bytes are not those that were committed.
    pub(crate) fn check(&self, digest: &Digest, manifest: &Manifest) -> Result<Vec<Mismatch>, ArtifactError> {
        let folder = self.folder(digest);
        let mut mismatches = Vec::new();
        let files = manifest.files.iter().map(|file| (file.path.as_str(), file.digest));
        for (name, expected) in files.chain([(MANIFEST_FILE, *digest)]) {
            let path = path::join(&folder, name)?;
            let found = match Digest::of_file(&path) {
                Ok((found, _)) => Some(found),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(ArtifactError::io("read", path, error)),
            };
            if found != Some(expected) {
                mismatches.push(Mismatch { path: name.to_owned(), expected, found });
            }
        }
        Ok(mismatches)
    }

    pub(crate) fn digests(&self) -> Result<Vec<Digest>, ArtifactError> {
        let found = self.file_names(OBJECTS)?.into_iter().filter_map(|name| Digest::from_hex(&name));
        Ok(found.filter(|digest| self.root.join(object_key(digest, MANIFEST_FILE)).is_file()).collect())
    }

    pub(crate) fn names(&self) -> Result<Vec<String>, ArtifactError> {
        let files = self.file_names(NAMES)?;
        Ok(files.iter().filter_map(|file| file.strip_suffix(".json")).map(str::to_owned).collect())
    }

    fn file_names(&self, folder: &str) -> Result<Vec<String>, ArtifactError> {
        let path = self.root.join(folder);
        let read = |path: &Path| -> io::Result<Vec<String>> {
            fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        };
        match read(&path) {
            Ok(names) => Ok(names),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(ArtifactError::io("list", path, error)),
        }
    }
}

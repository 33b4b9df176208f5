//! Writes that survive a crash: flushed files and folders.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use crate::DataError;

/// Writes a new file and flushes it to the disk.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let written = File::create(path).and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    written.map_err(|source| DataError::io("write", path, source))
}

/// Flushes a folder's list of names: without it a rename may not survive a power failure.
pub(crate) fn sync_folder(path: &Path) -> Result<(), DataError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(|source| DataError::io("flush", path, source))
}

pub(crate) fn create_folder(path: &Path) -> Result<(), DataError> {
    fs::create_dir_all(path).map_err(|source| DataError::io("create", path, source))
}

pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), DataError> {
    fs::rename(from, to).map_err(|source| DataError::io("rename a finished folder to", to, source))
}

/// Removes a folder with all it holds; one that is not there is fine.
pub(crate) fn remove_folder(path: &Path) -> Result<(), DataError> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(DataError::io("remove", path, source)),
        _ => Ok(()),
    }
}

//! Files beside a model, by names that come from a configuration, which a client may have sent.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

/// Bytes of such a file at most: a configuration, the names of classes, the state that a sequence begins with.
const LARGEST: u64 = 256 << 20;

/// What is in a file.
///
/// # Errors
/// The system's; and of what would be waited for for ever, such as a pipe, or is larger than any such file, that it is.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"));
    }
    if metadata.len() > LARGEST {
        let reason = format!("it has {} bytes, and may have {LARGEST}", metadata.len());
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
    }
    fs::read(path)
}

/// As [`read`], of text.
///
/// # Errors
/// As [`read`], and of what is not UTF-8.
pub(crate) fn read_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

/// The path of `name` below `folder`.
///
/// # Errors
/// A sentence about the name, where it would lead out of the folder.
pub(crate) fn inside(folder: &Path, name: &str) -> Result<PathBuf, String> {
    let mut parts = Path::new(name).components().peekable();
    if parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_))) {
        return Ok(folder.join(name));
    }
    Err(format!(
        "{:?} leads out of the model's folder; name a file in it, such as 1/model.onnx",
        crate::wire::excerpt(name)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_or_too_large_or_no_text_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("labels.txt");
        let said = || read_text(&path).map_err(|error| error.to_string());
        fs::write(&path, "cat").unwrap();
        assert_eq!(said().unwrap(), "cat");
        fs::write(&path, b"\xff").unwrap();
        assert_eq!(said().unwrap_err(), "it is not UTF-8");
        fs::File::options().write(true).open(&path).unwrap().set_len(LARGEST + 1).unwrap();
        assert_eq!(said().unwrap_err(), "it has 268435457 bytes, and may have 268435456");
        fs::remove_file(&path).unwrap();
        let pipe = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(pipe.success());
        assert_eq!(said().unwrap_err(), "it is no file");
    }

    #[test]
    fn a_name_stays_in_its_folder() {
        let folder = Path::new("/models/m");
        assert_eq!(inside(folder, "1/labels.txt").unwrap(), Path::new("/models/m/1/labels.txt"));
        for name in ["", "/etc/passwd", "../other/labels.txt", "1/../../other", ".", "./a"] {
            assert!(inside(folder, name).unwrap_err().contains("leads out of the model's folder"), "{name:?}");
        }
    }
}

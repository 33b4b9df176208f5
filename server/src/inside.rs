//! Names of files that come from a configuration, which a client may have sent.

use std::path::{Component, Path, PathBuf};

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
    fn a_name_stays_in_its_folder() {
        let folder = Path::new("/models/m");
        assert_eq!(inside(folder, "1/labels.txt").unwrap(), Path::new("/models/m/1/labels.txt"));
        for name in ["", "/etc/passwd", "../other/labels.txt", "1/../../other", ".", "./a"] {
            assert!(inside(folder, name).unwrap_err().contains("leads out of the model's folder"), "{name:?}");
        }
    }
}

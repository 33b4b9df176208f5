//! Names and paths inside a store: one alphabet that is safe as a file name, an object key and a Kubernetes name.

use std::path::{Path, PathBuf};

use crate::ArtifactError;

/// Checks a file path inside an artifact: `/`-separated, relative, portable, unable to leave the folder.
pub(crate) fn validate_file_path(path: &str) -> Result<(), ArtifactError> {
    let refused = |reason| Err(ArtifactError::InvalidPath { path: path.to_owned(), reason });
    if path.len() > 512 {
        return refused("it is longer than 512 bytes");
    }
    for segment in path.split('/') {
        if segment.is_empty() {
            return refused("it is empty, starts or ends with `/`, or has `//`");
        }
        if segment.starts_with('.') {
            return refused("a part starts with `.`");
        }
        if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
            return refused("only letters, digits, `.`, `_`, `-` and `/` are allowed");
        }
    }
    Ok(())
}

/// `folder` and a path inside an artifact, checked.
pub(crate) fn join(folder: &Path, path: &str) -> Result<PathBuf, ArtifactError> {
    validate_file_path(path)?;
    Ok(folder.join(path))
}

/// Checks an artifact name: a DNS-1123 subdomain, so that it can name a Kubernetes object too.
///
/// # Errors
/// [`ArtifactError::InvalidName`].
pub fn validate_name(name: &str) -> Result<(), ArtifactError> {
    let edge = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let is_label = |part: &str| {
        let bytes = part.as_bytes();
        bytes.first().is_some_and(edge) && bytes.last().is_some_and(edge) && bytes.iter().all(|b| edge(b) || *b == b'-')
    };
    if name.len() <= 253 && name.split('.').all(is_label) {
        return Ok(());
    }
    let reason = "use 1 to 253 lower-case letters, digits, `-` and `.`, with a letter or digit at both ends and on either side of `.`";
    Err(ArtifactError::InvalidName { name: name.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_could_leave_the_artifact_is_refused() {
        for bad in
            ["", "../x", "/etc/passwd", "a/../b", "a\\b", "a//b", "a/", "./a", "c:x", "a b", "a\0", ".hidden", "ä"]
        {
            let error = validate_file_path(bad).unwrap_err();
            assert!(matches!(error, ArtifactError::InvalidPath { .. }), "{bad}: {error}");
        }
        for good in ["manifest.json", "graphs/text_encoder.onnx", "a/b/c-1.bin", "a..b"] {
            validate_file_path(good).unwrap();
        }
    }

    #[test]
    fn a_name_with_other_characters_is_refused() {
        for bad in
            ["", "VQA", "a/b", "a_b", "-a", "a-", ".a", "a..b", "a-.b", "a.-b", "a b", "sha256:00", &"a".repeat(254)]
        {
            let error = validate_name(bad).unwrap_err();
            assert!(matches!(error, ArtifactError::InvalidName { .. }), "{bad}: {error}");
        }
        for good in ["vqa", "vqa-int8", "team.vqa-2", "7"] {
            validate_name(good).unwrap();
        }
    }

    proptest::proptest! {
        #[test]
        fn an_accepted_path_stays_inside_its_folder(path in "[./\\\\a-c]{0,12}") {
            if let Ok(joined) = join(Path::new("/root"), &path) {
                let inside = joined.strip_prefix("/root").unwrap();
                proptest::prop_assert!(inside.components().all(|part| matches!(part, std::path::Component::Normal(_))));
            }
        }
    }
}

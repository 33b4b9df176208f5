//! Which artifact is served under which name.

use std::str::FromStr;

/// Which artifact to serve, and under which name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSource {
    /// What clients call it.
    pub name: String,
    /// URI of the store.
    pub store: String,
    /// Name or digest of the artifact in the store.
    pub artifact: String,
}

/// Text that is not `NAME=URI`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a model to serve: {reason}; write NAME=STORE/ARTIFACT, such as vqa=pvc://artifacts/vqa-int8")]
pub struct SourceError {
    value: String,
    reason: &'static str,
}

impl FromStr for ModelSource {
    type Err = SourceError;

    /// `NAME=STORE/ARTIFACT`, or `NAME=STORE/objects/HEX`, which is how an artifact's own URI ends.
    fn from_str(value: &str) -> Result<Self, SourceError> {
        let refused = |reason| SourceError { value: value.to_owned(), reason };
        let (name, uri) = value.split_once('=').ok_or_else(|| refused("it has no `=`"))?;
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
            return Err(refused("the name needs letters, digits, `-`, `_` and `.`"));
        }
        let (store, last) = uri.rsplit_once('/').ok_or_else(|| refused("the URI has no `/`"))?;
        if last.is_empty() || store.ends_with('/') || !store.contains("://") {
            return Err(refused("the URI has no store before the artifact"));
        }
        let (store, artifact) = match store.strip_suffix("/objects") {
            Some(store) => (store, format!("sha256:{last}")),
            None => (store, last.to_owned()),
        };
        Ok(Self { name: name.to_owned(), store: store.to_owned(), artifact })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_name_a_store_and_an_artifact() {
        let source = |name: &str, store: &str, artifact: &str| {
            Ok(ModelSource { name: name.to_owned(), store: store.to_owned(), artifact: artifact.to_owned() })
        };
        assert_eq!("vqa=pvc://artifacts/vqa-int8".parse(), source("vqa", "pvc://artifacts", "vqa-int8"));
        assert_eq!("a=s3://b/c/d".parse(), source("a", "s3://b/c", "d"));
        assert_eq!("a=file:///s/objects/00ff".parse(), source("a", "file:///s", "sha256:00ff"));
    }

    #[test]
    fn a_source_that_lacks_something_is_refused_with_the_form_it_needs() {
        for value in ["vqa", "=pvc://a/b", "a b=pvc://a/b", "vqa=pvc://a", "vqa=pvc://a/", "vqa=b", "vqa=a/b"] {
            let error = value.parse::<ModelSource>().unwrap_err();
            assert!(error.to_string().contains("NAME=STORE/ARTIFACT"), "{error}");
        }
    }
}

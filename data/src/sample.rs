//! One sample, and its two files in a shard.

use serde::{Deserialize, Serialize};

/// An image with what is asked and said about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Unique in the data set: letters, digits, `_` and `-`.
    pub key: String,
    /// The image, encoded as PNG, JPEG or WebP.
    pub image: Vec<u8>,
    /// Questions with their answers.
    pub questions: Vec<QuestionAnswer>,
    /// A sentence that describes the image.
    pub caption: Option<String>,
}

/// A question and its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuestionAnswer {
    /// The question, as a person asks it.
    pub question: String,
    /// The answer, one of the data set's answers where these are a closed set.
    pub answer: String,
}

/// What `KEY.json` holds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Annotation {
    pub(crate) questions: Vec<QuestionAnswer>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) caption: Option<String>,
}

/// WebDataset readers take the file's kind from its extension and a sample's key up to the first dot.
pub(crate) fn key_problem(key: &str) -> Option<&'static str> {
    let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    // A USTAR name has 100 bytes.
    let fits = (1..=90).contains(&key.len());
    (!fits || !key.bytes().all(valid)).then_some("its key must be 1 to 90 letters, digits, `_` or `-`")
}

/// The extension for an encoded image, by its first bytes.
pub(crate) fn image_extension(image: &[u8]) -> Option<&'static str> {
    match image {
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some("png"),
        [0xff, 0xd8, 0xff, ..] => Some("jpg"),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some("webp"),
        _ => None,
    }
}

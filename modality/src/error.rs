use std::fmt;
use std::path::PathBuf;

use crate::tensor::TensorError;

/// Why an item was refused, or a processor could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum ModalityError {
    /// A part claims a modality that this pipeline has no processor for.
    #[error("there is no modality `{name}` here, only {}", known.join(", "))]
    UnknownModality {
        /// The modality asked for.
        name: String,
        /// Those that are registered, sorted.
        known: Vec<String>,
    },
    /// An item is larger than its limit.
    #[error("the {modality} has {got} {unit}, the limit is {limit}")]
    TooLarge {
        /// `text` or `image`.
        modality: &'static str,
        /// What was counted.
        unit: Unit,
        /// The amount found.
        got: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// The bytes start like none of the accepted image formats.
    #[error("the image is neither PNG, JPEG nor WebP: it starts with {found}")]
    UnsupportedFormat {
        /// The format recognised, or the first bytes in hexadecimal.
        found: String,
    },
    /// The image's format is accepted, its content cannot be decoded.
    #[error("the {format} image cannot be decoded: {reason}")]
    BrokenImage {
        /// The format its first bytes announce.
        format: &'static str,
        /// What the decoder met.
        reason: String,
    },
    /// The bytes of a text are not UTF-8.
    #[error("the text is not UTF-8 from byte {valid_up_to} on")]
    NotUtf8 {
        /// How many bytes were fine.
        valid_up_to: usize,
    },
    /// A text without a single token: there is nothing a model could read.
    #[error("the text has no words")]
    NoTokens,
    /// A setting cannot work.
    #[error("{field} is {value}, it must be {wanted}")]
    BadConfig {
        /// The setting, as it is written in the pipeline specification.
        field: &'static str,
        /// What it was.
        value: String,
        /// What would be right.
        wanted: &'static str,
    },
    /// The tokenizer could not be built, or a file does not hold one that suits.
    #[error("the tokenizer {origin} cannot be used: {reason}")]
    Tokenizer {
        /// The file, or where else it came from.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("could not {action} {}", path.display())]
    File {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Rows of a batch did not fit together.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

impl ModalityError {
    /// Whether the item itself is at fault, so that sending it again cannot help; otherwise our set-up is.
    pub fn is_callers_fault(&self) -> bool {
        match self {
            Self::UnknownModality { .. }
            | Self::TooLarge { .. }
            | Self::UnsupportedFormat { .. }
            | Self::BrokenImage { .. }
            | Self::NotUtf8 { .. }
            | Self::NoTokens => true,
            Self::BadConfig { .. } | Self::Tokenizer { .. } | Self::File { .. } | Self::Tensor(_) => false,
        }
    }
}

/// What a size limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes as they arrived, still encoded.
    Bytes,
    /// Width times height.
    Pixels,
    /// Bytes a decoder needs for the pixels.
    DecodedBytes,
    /// Unicode scalar values.
    Characters,
    /// Tokens after splitting.
    Tokens,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bytes => "bytes",
            Self::Pixels => "pixels",
            Self::DecodedBytes => "bytes of pixels to decode",
            Self::Characters => "characters",
            Self::Tokens => "tokens",
        })
    }
}

//! Compressions that requests and answers may come in, over gRPC and HTTP.

use std::io::{self, Read};

use bytes::Bytes;
use flate2::read::{MultiGzDecoder, ZlibDecoder};

use crate::budget::{Spent, Tally};

/// Bytes that are inflated before they are taken from the budget: it is exceeded by no more than this per thread.
const PIECE: u64 = 256 << 10;

/// A compression that both sides know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Coding {
    Gzip,
    /// In its zlib wrapping, as HTTP and gRPC define the word.
    Deflate,
}

/// Why something is not inflated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InflateError {
    /// It is not what it says.
    #[error(transparent)]
    Broken(#[from] io::Error),
    /// It has more bytes than a message may have.
    #[error("it is too large")]
    TooLarge,
    /// Requests hold too much already.
    #[error(transparent)]
    Spent(#[from] Spent),
}

impl Coding {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        // HTTP's names of codings ignore case, and one has an old name.
        match name.trim().to_ascii_lowercase().as_str() {
            "gzip" | "x-gzip" => Some(Self::Gzip),
            "deflate" => Some(Self::Deflate),
            _ => None,
        }
    }

    /// Whether what is compressed so may begin like this: no JSON does.
    pub(crate) fn begins(self, packed: &[u8]) -> bool {
        match self {
            Self::Gzip => packed.starts_with(&[0x1f, 0x8b]),
            // The method, in the lower half of the first byte.
            Self::Deflate => packed.first().is_some_and(|first| first & 0x0f == 8),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
        }
    }

    /// What `packed` says, of at most `max` bytes, which are taken from the budget as they are made.
    pub(crate) fn inflate(self, packed: &[u8], max: usize, tally: Option<&Tally>) -> Result<Bytes, InflateError> {
        match self {
            Self::Gzip => inflate(MultiGzDecoder::new(packed), max, tally),
            Self::Deflate => inflate(ZlibDecoder::new(packed), max, tally),
        }
    }
}

fn inflate(mut reader: impl Read, max: usize, tally: Option<&Tally>) -> Result<Bytes, InflateError> {
    let mut out = Vec::new();
    loop {
        // One more than may be, to see that there are more.
        let rest = (max as u64).saturating_add(1).saturating_sub(out.len() as u64);
        let made = reader.by_ref().take(rest.min(PIECE)).read_to_end(&mut out)?;
        if made == 0 {
            return Ok(out.into());
        }
        if out.len() > max {
            return Err(InflateError::TooLarge);
        }
        tally.map_or(Ok(()), |tally| tally.take(made))?;
    }
}

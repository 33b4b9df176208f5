//! Content digests: what artifacts, their files and their lineage are named by.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest as _, Sha256};

use crate::ArtifactError;

const PREFIX: &str = "sha256:";

/// A SHA-256 digest, written `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest and the length in bytes of the file at `path`, which is read in pieces of constant size.
    pub fn of_file(path: &Path) -> io::Result<(Self, u64)> {
        let mut file = File::open(path)?;
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                return Ok(hasher.finish());
            }
            hasher.update(&buffer[..read]);
        }
    }

    /// The 64 hexadecimal digits without the algorithm: the folder name of an artifact.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first twelve hexadecimal digits, for tables that people read. Not unique: never look anything up by it.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }

    pub(crate) fn from_hex(digits: &str) -> Option<Self> {
        let lower = digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let mut bytes = [0; 32];
        (lower && hex::decode_to_slice(digits, &mut bytes).is_ok()).then_some(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ArtifactError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.strip_prefix(PREFIX)
            .and_then(Self::from_hex)
            .ok_or_else(|| ArtifactError::InvalidDigest { value: text.to_owned() })
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Digest and length of bytes that arrive in pieces.
#[derive(Default)]
pub(crate) struct Hasher {
    hasher: Sha256,
    bytes: u64,
}

impl Hasher {
    pub(crate) fn update(&mut self, piece: &[u8]) {
        self.hasher.update(piece);
        self.bytes += piece.len() as u64;
    }

    pub(crate) fn finish(self) -> (Digest, u64) {
        (Digest(self.hasher.finalize().into()), self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // FIPS 180-2, the digest of "abc".
    const ABC: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_digest_prints_and_parses_in_one_form() {
        assert_eq!(Digest::of(b"abc").to_string(), ABC);
        assert_eq!(ABC.parse::<Digest>().unwrap(), Digest::of(b"abc"));
        assert_eq!(serde_json::to_string(&Digest::of(b"abc")).unwrap(), format!("\"{ABC}\""));
    }

    #[test]
    fn a_file_has_the_digest_of_its_bytes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..700_000_u32).map(|i| i as u8).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        assert_eq!(Digest::of_file(file.path()).unwrap(), (Digest::of(&bytes), 700_000));
    }

    #[test]
    fn anything_but_64_lower_case_digits_with_the_algorithm_is_refused() {
        for bad in ["", "sha256:", &ABC[7..], &ABC.to_uppercase(), &ABC[..70], &format!("{ABC}0"), "sha256:../../etc"] {
            let error = bad.parse::<Digest>().unwrap_err();
            assert!(matches!(&error, ArtifactError::InvalidDigest { value } if value == bad), "{error}");
        }
    }
}

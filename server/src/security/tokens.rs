//! Bearer tokens: a file with one per line.

use std::{fmt, path::Path};

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tonic::metadata::{Ascii, MetadataValue, errors::InvalidMetadataValue};

use super::ReloadError;

/// Shorter tokens can be guessed.
const SHORTEST: usize = 16;

/// The tokens that are accepted, each with the name of its client. Only their hashes are kept.
#[derive(Clone, Debug, Default)]
pub struct Tokens(Vec<(String, [u8; 32])>);

/// A line of the file that is no token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} {problem}; write NAME TOKEN, the token of at least {SHORTEST} characters without blanks")]
pub(super) struct TokenError {
    line: usize,
    problem: &'static str,
}

impl Tokens {
    /// Reads a file: on each line a client's name, blanks, and its token. Empty lines and those that begin with `#` are
    /// passed over. A client may have several tokens, so that one can replace the other.
    ///
    /// # Errors
    /// [`ReloadError`] with [`TokenError`], or the system's answer.
    pub fn read(path: &Path) -> Result<Self, ReloadError> {
        let text = std::fs::read_to_string(path).map_err(|error| ReloadError::new(path, error))?;
        Self::parse(&text).map_err(|error| ReloadError::new(path, error))
    }

    fn parse(text: &str) -> Result<Self, TokenError> {
        let hashed = |(name, token): (&str, &str)| (name.to_owned(), Sha256::digest(token).into());
        Ok(Self(lines(text)?.into_iter().map(hashed).collect()))
    }

    /// The client whose token this is. The time it takes says nothing about how much of a token is right: hashes are
    /// compared, and all of them.
    pub fn client(&self, token: &[u8]) -> Option<&str> {
        let hash: [u8; 32] = Sha256::digest(token).into();
        let mut found = None;
        for (name, known) in &self.0 {
            if bool::from(known.ct_eq(&hash)) {
                found = Some(name.as_str());
            }
        }
        found
    }
}

/// The tokens that this server shows to others, in the order of the file. They do not get into logs.
#[derive(Clone)]
pub struct OwnTokens(Vec<MetadataValue<Ascii>>);

impl OwnTokens {
    /// Reads a file such as [`Tokens::read`] does; the names are of no concern.
    ///
    /// # Errors
    /// As [`Tokens::read`].
    pub fn read(path: &Path) -> Result<Self, ReloadError> {
        let text = std::fs::read_to_string(path).map_err(|error| ReloadError::new(path, error))?;
        let lines = lines(&text).map_err(|error| ReloadError::new(path, error))?;
        let header = |(_, token): (&str, &str)| {
            let mut header: MetadataValue<Ascii> = format!("Bearer {token}").parse()?;
            header.set_sensitive(true);
            Ok(header)
        };
        let headers = lines.into_iter().map(header).collect::<Result<_, InvalidMetadataValue>>();
        Ok(Self(headers.map_err(|_| ReloadError::new(path, "a token has characters that no header may have"))?))
    }

    /// The `authorization` of each.
    pub(crate) fn headers(&self) -> &[MetadataValue<Ascii>] {
        &self.0
    }
}

impl fmt::Debug for OwnTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OwnTokens").field(&self.0.len()).finish()
    }
}

/// The lines of a file that are tokens, each with its name.
fn lines(text: &str) -> Result<Vec<(&str, &str)>, TokenError> {
    let mut tokens = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // The token itself is never part of a message.
        let wrong = |problem| TokenError { line: index + 1, problem };
        let mut words = line.split_whitespace();
        let (Some(name), Some(token), None) = (words.next(), words.next(), words.next()) else {
            return Err(wrong("has not two words"));
        };
        if token.len() < SHORTEST {
            return Err(wrong("has a token that is too short"));
        }
        tokens.push((name, token));
    }
    if tokens.is_empty() {
        return Err(TokenError { line: text.lines().count(), problem: "is the last, and there was no token" });
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_its_client() {
        let tokens =
            Tokens::parse("# clients\n\nalice  0123456789abcdef\nbob fedcba9876543210\nbob another-one-of-his\n")
                .unwrap();
        assert_eq!(tokens.client(b"0123456789abcdef"), Some("alice"));
        assert_eq!(tokens.client(b"another-one-of-his"), Some("bob"));
        for wrong in [&b""[..], b"0123456789abcde", b"0123456789abcdef0", b"alice"] {
            assert_eq!(tokens.client(wrong), None);
        }
        assert!(!format!("{tokens:?}").contains("0123456789abcdef"), "tokens do not get into logs");
    }

    #[test]
    fn own_tokens_are_headers_in_the_order_of_the_file_and_do_not_get_into_logs() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "# ours\nold 0123456789abcdef\nnew fedcba9876543210\n").unwrap();
        let own = OwnTokens::read(file.path()).unwrap();
        let headers: Vec<&str> = own.headers().iter().map(|header| header.to_str().unwrap()).collect();
        assert_eq!(headers, ["Bearer 0123456789abcdef", "Bearer fedcba9876543210"]);
        assert!(!format!("{own:?} {:?}", own.headers()).contains("0123456789abcdef"));
        std::fs::write(file.path(), "a 0123456789\u{7}abcdef").unwrap();
        let error = sensorium_telemetry::error_line(&OwnTokens::read(file.path()).unwrap_err());
        assert!(error.contains("no header may have") && !error.contains("0123456789"), "{error}");
    }

    #[test]
    fn a_line_that_is_no_token_is_named_by_its_number_alone() {
        for (text, line) in [("a 0123456789abcdef\nalone", 2), ("a b c", 1), ("a short", 1), ("# nothing\n", 1)] {
            let error = Tokens::parse(text).unwrap_err();
            assert_eq!(error.line, line, "{text}");
            assert!(!error.to_string().contains("short\""), "{error}");
        }
    }
}

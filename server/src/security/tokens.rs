//! Bearer tokens: a file with one per line.

use std::path::Path;

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

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
            tokens.push((name.to_owned(), Sha256::digest(token).into()));
        }
        if tokens.is_empty() {
            return Err(TokenError { line: text.lines().count(), problem: "is the last, and there was no token" });
        }
        Ok(Self(tokens))
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
    fn a_line_that_is_no_token_is_named_by_its_number_alone() {
        for (text, line) in [("a 0123456789abcdef\nalone", 2), ("a b c", 1), ("a short", 1), ("# nothing\n", 1)] {
            let error = Tokens::parse(text).unwrap_err();
            assert_eq!(error.line, line, "{text}");
            assert!(!error.to_string().contains("short\""), "{error}");
        }
    }
}

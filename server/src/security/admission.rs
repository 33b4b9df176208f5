//! Whether a request is let in.

use std::{
    net::IpAddr,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use super::{
    Limits, Reloaded, Tokens,
    limits::{Beyond, Used},
};

/// Tokens and limits together. Clones share what is counted.
#[derive(Clone, Debug)]
pub struct Admission {
    tokens: Option<Reloaded<Tokens>>,
    limits: Limits,
    used: Arc<Mutex<Used>>,
}

/// A request that was let in, until this is dropped.
#[derive(Debug)]
pub struct Pass {
    used: Arc<Mutex<Used>>,
    client: String,
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).end(&self.client);
    }
}

/// Why a request is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    /// No token came with it.
    #[error("the request has no token; send `authorization: Bearer TOKEN`")]
    NoToken,
    /// The token is nobody's.
    #[error("the token is not one of this server's")]
    WrongToken,
    /// The client asks too often.
    #[error("this client may send {limit} requests per second; try again in a second")]
    TooFast {
        /// Requests per second.
        limit: NonZeroU32,
    },
    /// The client asks too much at a time.
    #[error("this client may have {limit} requests at a time; wait for one to end")]
    TooMany {
        /// Requests at a time.
        limit: NonZeroU32,
    },
}

impl Admission {
    /// Lets in who has one of `tokens`, or everybody without any, within `limits`.
    pub fn new(tokens: Option<Reloaded<Tokens>>, limits: Limits) -> Self {
        Self { tokens, limits, used: Arc::default() }
    }

    /// Whether a request with this `authorization` from this address is let in. A client is whom its token names, or
    /// without tokens its address.
    ///
    /// # Errors
    /// [`AdmissionError`].
    pub fn admit(&self, authorization: Option<&[u8]>, address: Option<IpAddr>) -> Result<Pass, AdmissionError> {
        let client = match &self.tokens {
            Some(tokens) => {
                let token = authorization.and_then(bearer).ok_or(AdmissionError::NoToken)?;
                tokens.get().client(token).ok_or(AdmissionError::WrongToken)?.to_owned()
            }
            None => address.map_or_else(String::new, |address| address.to_string()),
        };
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.begin(self.limits, &client, Instant::now()).map_err(|beyond| match beyond {
            Beyond::PerSecond(limit) => AdmissionError::TooFast { limit },
            Beyond::AtOnce(limit) => AdmissionError::TooMany { limit },
        })?;
        drop(used);
        Ok(Pass { used: self.used.clone(), client })
    }
}

/// The token of an `authorization` header; its scheme is spelled in any case.
fn bearer(authorization: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = authorization.split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_needs_a_token_where_there_are_any() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "alice 0123456789abcdef").unwrap();
        let path = file.path().to_owned();
        let tokens = Reloaded::watch(vec![path.clone()], move || Tokens::read(&path)).unwrap();
        let limits = Limits { at_once: NonZeroU32::new(1), per_second: None };
        let admission = Admission::new(Some(tokens), limits);
        let admit = |header: Option<&str>| admission.admit(header.map(str::as_bytes), None);
        assert_eq!(admit(None).unwrap_err(), AdmissionError::NoToken);
        assert_eq!(admit(Some("Basic 0123456789abcdef")).unwrap_err(), AdmissionError::NoToken);
        assert_eq!(admit(Some("Bearer fedcba9876543210")).unwrap_err(), AdmissionError::WrongToken);
        let pass = admit(Some("bearer 0123456789abcdef")).unwrap();
        assert_eq!(
            admit(Some("Bearer 0123456789abcdef")).unwrap_err(),
            AdmissionError::TooMany { limit: NonZeroU32::MIN }
        );
        drop(pass);
        assert!(admit(Some("Bearer  0123456789abcdef")).is_ok());
    }
}

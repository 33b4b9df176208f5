//! TLS, with certificates of clients where they are asked for.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{ReloadError, Reloaded};

/// Files in PEM format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, and those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Authorities of clients: each client then has to show a certificate of one of them.
    pub client_authorities: Option<PathBuf>,
}

/// Accepts TLS connections. Certificates that change are used for new connections.
#[derive(Clone, Debug)]
pub struct Tls(Reloaded<ServerConfig>);

impl Tls {
    /// Reads the files, and again when they change.
    ///
    /// # Errors
    /// [`ReloadError`], which names the file.
    pub fn watch(files: TlsFiles) -> Result<Self, ReloadError> {
        let paths = [Some(&files.certificate), Some(&files.key), files.client_authorities.as_ref()];
        let paths = paths.into_iter().flatten().cloned().collect();
        Reloaded::watch(paths, move || read(&files)).map(Self)
    }

    /// Shakes hands.
    ///
    /// # Errors
    /// What the client did wrong.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        TlsAcceptor::from(self.0.get()).accept(stream).await
    }
}

fn read(files: &TlsFiles) -> Result<ServerConfig, ReloadError> {
    let chain = certificates(&files.certificate)?;
    let key = private_key(&files.key)?;
    let provider = Arc::new(ring::default_provider());
    let of_certificate = |error: rustls::Error| ReloadError::new(&files.certificate, error);
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(of_certificate)?;
    let builder = match &files.client_authorities {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let authorities = Arc::new(authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(authorities, provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| ReloadError::new(path, error))?)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(of_certificate)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ReloadError> {
    let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let all = all.map_err(|error| ReloadError::new(path, error))?;
    if all.is_empty() { Err(ReloadError::new(path, "it has no certificate in PEM format")) } else { Ok(all) }
}

pub(super) fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, ReloadError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| ReloadError::new(path, error))
}

/// The certificates of a file as those that others may be signed by.
pub(super) fn authorities(path: &Path) -> Result<RootCertStore, ReloadError> {
    let mut authorities = RootCertStore::empty();
    for certificate in certificates(path)? {
        authorities.add(certificate).map_err(|error| ReloadError::new(path, error))?;
    }
    Ok(authorities)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_that_are_no_certificates_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = file("certificate", &made.cert.pem());
        let key = file("key", &made.signing_key.serialize_pem());
        let empty = file("empty", "");
        let files = TlsFiles { certificate: certificate.clone(), key: key.clone(), client_authorities: None };
        assert!(Tls::watch(files.clone()).is_ok());
        for (wrong, name) in [
            (TlsFiles { certificate: empty.clone(), ..files.clone() }, "empty"),
            (TlsFiles { key: empty.clone(), ..files.clone() }, "empty"),
            (TlsFiles { client_authorities: Some(empty), ..files.clone() }, "empty"),
            (TlsFiles { key: folder.path().join("nothing"), ..files }, "nothing"),
        ] {
            let error = Tls::watch(wrong).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}

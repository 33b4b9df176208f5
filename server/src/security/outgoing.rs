//! How this server calls others: over TLS, with a token.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc};

use rustls::{ClientConfig, crypto::ring, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    OwnTokens, ReloadError, Reloaded, TlsFiles,
    tls::{authorities, certificates, private_key},
};

/// Where it is written how others are called. Nothing of it: in plain text, without a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutgoingFiles {
    /// How they are known, where calls go over TLS.
    pub tls: Option<PeerTls>,
    /// File of the tokens that they accept.
    pub tokens: Option<PathBuf>,
}

/// How servers that are called are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerTls {
    /// File of their authorities, PEM. Where there is none, the certificates of `own` are all that is trusted: servers that
    /// share one certificate know each other without an authority.
    pub authorities: PathBuf,
    /// The name that their certificates have to be for; the host of their address where this is not set.
    pub name: Option<String>,
    /// This server's certificate, which those see that ask for one.
    pub own: Option<TlsFiles>,
}

/// What [`OutgoingFiles`] say, as of lately.
#[derive(Clone, Debug, Default)]
pub struct Outgoing {
    /// Makes connections; none for plain text.
    pub(crate) tls: Option<TlsClient>,
    /// What calls show; the next is for those who do not know the one before.
    pub(crate) tokens: Option<Reloaded<OwnTokens>>,
}

impl Outgoing {
    /// Reads the files, and again when they change.
    ///
    /// # Errors
    /// [`ReloadError`], which names the file.
    pub fn watch(files: OutgoingFiles) -> Result<Self, ReloadError> {
        let tokens = files.tokens.map(|path| Reloaded::watch(vec![path.clone()], move || OwnTokens::read(&path)));
        Ok(Self { tls: files.tls.map(TlsClient::watch).transpose()?, tokens: tokens.transpose()? })
    }
}

/// Makes TLS connections. Certificates that change are used for new connections.
#[derive(Clone, Debug)]
pub(crate) struct TlsClient {
    config: Reloaded<ClientConfig>,
    name: Option<Arc<str>>,
}

impl TlsClient {
    fn watch(peers: PeerTls) -> Result<Self, ReloadError> {
        let own = peers.own.iter().flat_map(|own| [&own.certificate, &own.key]);
        let files = own.chain([&peers.authorities]).cloned().collect();
        let name = peers.name.as_deref().map(Arc::from);
        Ok(Self { config: Reloaded::watch(files, move || read(&peers))?, name })
    }

    /// The name that the certificate of a server at `host` has to be for.
    pub(crate) fn name_of<'a>(&'a self, host: &'a str) -> &'a str {
        self.name.as_deref().unwrap_or(host)
    }

    /// Connects to a server, which has to prove that it is `name`.
    ///
    /// # Errors
    /// What went wrong on the way, or with its certificate.
    pub(crate) async fn connect(&self, address: SocketAddr, name: &str) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(self.config.get()).connect(name, stream).await
    }
}

fn read(peers: &PeerTls) -> Result<ClientConfig, ReloadError> {
    let roots = match &peers.own {
        Some(own) if !peers.authorities.exists() => authorities(&own.certificate)?,
        _ => authorities(&peers.authorities)?,
    };
    let failed = |error: rustls::Error| ReloadError::new(&peers.authorities, error);
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(failed)?
        .with_root_certificates(roots);
    let mut config = match &peers.own {
        None => builder.with_no_client_auth(),
        Some(own) => builder
            .with_client_auth_cert(certificates(&own.certificate)?, private_key(&own.key)?)
            .map_err(|error| ReloadError::new(&own.certificate, error))?,
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

//! Who may talk to this server, and how much: TLS, tokens, limits for each client. And how it shows itself to servers that
//! it calls.

mod admission;
mod limits;
mod outgoing;
mod reload;
mod tls;
mod tokens;

pub use admission::{Admission, AdmissionError, Pass};
pub use limits::Limits;
pub(crate) use outgoing::TlsClient;
pub use outgoing::{Outgoing, OutgoingFiles, PeerTls};
pub use reload::{ReloadError, Reloaded};
pub use tls::{Tls, TlsFiles};
pub use tokens::{OwnTokens, Tokens};

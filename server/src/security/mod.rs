//! Who may talk to this server, and how much: TLS, tokens, limits for each client.

mod admission;
mod limits;
mod reload;
mod tls;
mod tokens;

pub use admission::{Admission, AdmissionError, Pass};
pub use limits::Limits;
pub use reload::{ReloadError, Reloaded};
pub use tls::{Tls, TlsFiles};
pub use tokens::Tokens;

//! Tensors between the wire and models: decode, encode. No model is known when a request is read, and no clock or queue
//! at all.
//!
//! A request is read strictly: whatever contradicts itself is refused with a message that says what was found, where, and
//! what would be right. Nothing is allocated for a size that a request only claims: every buffer here is as large as data
//! that has arrived.

mod classes;
mod datatype;
mod decode;
mod encode;
mod error;
#[cfg(test)]
mod tests;

pub(crate) use datatype::{name as datatype_name, parse as datatype};
pub(crate) use decode::MAX_RANK;
pub use decode::{Decoded, Form, Reply, decode};
pub use encode::encode;
pub use error::InvalidRequest;
pub(crate) use error::excerpt;

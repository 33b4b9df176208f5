//! Tensors between the wire and the engine: decode, validate, encode. No model, clock or queue is known here.
//!
//! A request is read strictly: whatever does not fit the model's signature is refused with a message that says what was
//! found, where, and what would be right. Nothing is allocated for a size that a request only claims: every buffer here
//! is as large as data that has arrived.

mod datatype;
mod decode;
mod encode;
mod error;
#[cfg(test)]
mod tests;
mod validate;

pub(crate) use datatype::name as datatype_name;
pub use decode::decode;
pub use encode::encode;
pub use error::InvalidRequest;
pub(crate) use error::excerpt;

//! Wire contracts: the Open Inference Protocol v2 and `sensorium.v1`, with generated clients and servers.
//!
//! The `.proto` files beside this crate are the reference; the modules here are compiled from them at build time.
//! Large payloads (`raw_input_contents`, `Image.data`) are [`bytes::Bytes`](prost::bytes::Bytes) that share the
//! received message.
//!
//! ```
//! use sensorium_proto::multimodal::{Image, InferRequest, Part, Text, part::Content};
//!
//! let request = InferRequest {
//!     model: "vqa".to_owned(),
//!     parts: vec![
//!         Part { content: Some(Content::Image(Image { data: vec![0x89].into(), media_type: String::new() })) },
//!         Part { content: Some(Content::Text(Text { text: "what color is the circle?".to_owned() })) },
//!     ],
//!     ..InferRequest::default()
//! };
//! assert_eq!(request.parts.len(), 2);
//! ```

pub mod codec;
mod reflect;

pub use reflect::{FILE_DESCRIPTOR_SET, descriptor_pool, to_json};

/// The Open Inference Protocol v2 (package `inference`): a superset of Triton's and KServe's dialects.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the documentation is in the .proto files"
)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// Typed multimodal requests (package `sensorium.v1`).
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the documentation is in the .proto files"
)]
pub mod multimodal {
    tonic::include_proto!("sensorium.v1");
}

//! The model server: the Open Inference Protocol v2 with Triton's extensions over gRPC and HTTP, `sensorium.v1`, and a
//! scheduler in front of every model.
//!
//! A request passes through one module after the other:
//!
//! ```text
//! front       connections, TLS, who is let in; the routes of gRPC and REST
//! rest        JSON and binary tensors as the messages that gRPC carries, and back
//! service     finds the model, counts and traces the call: one operation for both ways in
//! wire        tensors between messages and memory, without a copy where they come as bytes
//! model       holds the request against what the model takes; prepares images and texts; calls graphs in order
//! scheduler   admits or refuses, batches with other requests, runs on the engine's own thread, splits the answer
//! ```
//!
//! Around them, [`budget`] bounds the bytes of all requests, [`repository`] has the models and lets them come and go, [`serve`] binds and drains, [`health`] proves that
//! engines run, [`scrape`] serves metrics, [`security`] keeps certificates, tokens and limits, [`config`] is what the
//! operator set.

mod aligned;
mod allocator;
mod blocking;
pub mod budget;
mod coding;
pub mod config;
pub mod error;
mod files;
#[cfg(feature = "fixture")]
pub mod fixture;
pub mod front;
pub mod health;
pub mod metrics;
pub mod model;
pub mod pool;
pub mod program;
pub mod repository;
pub mod rest;
pub mod scheduler;
pub mod scrape;
pub mod security;
pub mod serve;
pub mod service;
pub mod shared_memory;
mod spans;
pub mod wire;

pub use allocator::Allocator;

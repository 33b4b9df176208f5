//! The gRPC model server: the Open Inference Protocol v2, `sensorium.v1`, and a batcher in front of every graph.
//!
//! A request passes through one module after the other:
//!
//! ```text
//! service    finds the model in the repository, counts and traces the call
//! wire       decodes and validates tensors against the model's signature; encodes the answer
//! model      prepares images and texts on CPU threads, and calls graphs in order
//! scheduler  admits or refuses, batches with other requests, runs on the engine's own thread, splits the answer
//! ```
//!
//! Around them, [`serve`] binds and drains, [`health`] proves that engines run, [`http`] serves health and metrics,
//! [`config`] is what the operator set.
//!
//! What it is not: it loads its models once, when it starts, and speaks HTTP for health and metrics alone.

pub mod config;
pub mod error;
pub mod front;
pub mod health;
pub mod http;
pub mod metrics;
pub mod model;
pub mod pool;
pub mod repository;
pub mod scheduler;
pub mod rest;
pub mod security;
pub mod serve;
pub mod service;
pub mod shared_memory;
pub mod wire;

//! What the API promises, seen from outside. One binary, because each would link the whole API again.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "in a test, a panic is a failure with its place")]

mod definitions;
mod fixtures;
mod laws;
mod manifests;
mod rules;

//! What a plan promises, seen from outside. One binary, because each would link the whole API again.

#![expect(clippy::unwrap_used, reason = "in a test, a panic is a failure with its place")]

mod examples;
mod fixtures;
mod laws;
mod order;
mod purity;
mod spec_hash;
mod whole_plans;

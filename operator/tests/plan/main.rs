//! What a plan promises, seen from outside. One binary, because each would link the whole API again.

mod examples;
mod fixtures;
mod laws;
mod order;
mod purity;
mod spec_hash;
mod whole_plans;

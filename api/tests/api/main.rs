//! What the API promises, seen from outside. One binary, because each would link the whole API again.

mod definitions;
mod fixtures;
mod laws;
mod manifests;
mod rules;

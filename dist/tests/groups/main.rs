//! Groups of real processes. A table of contents:
//! - `ranks`: starts a test once per rank, each in a process of its own.
//! - `values`: every operation against computed references, for all kinds, on two and four ranks.
//! - `training`: the uses that matter: averaged gradients, and a contrastive loss over gathered features.
//! - `failures`: dead, late, absent and contradicting peers.

mod failures;
mod ranks;
mod training;
mod values;

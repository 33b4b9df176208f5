//! Groups of real processes. A table of contents:
//! - `ranks`: starts a test once per rank, each in a process of its own.
//! - `values`: every operation against computed references, for all kinds, on two and four ranks.
//! - `training`: the uses that matter: averaged gradients, and a contrastive loss over gathered features.
//! - `failures`: dead, late, absent and contradicting peers.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on is to panic")]

mod failures;
mod ranks;
mod training;
mod values;

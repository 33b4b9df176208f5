//! The operator behind a network and an API server that fail: a program of its own, as it takes a cluster for itself.

#[allow(dead_code, reason = "shared with the other tests of the operator")]
#[path = "../operator/common.rs"]
mod common;

mod faults;

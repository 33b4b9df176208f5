//! Models that come and go: repositories in Triton's layout, opened in this process.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which clippy does not count as tests")]
#![allow(clippy::float_cmp, reason = "small whole numbers, which floats hold exactly")]
#![allow(clippy::large_stack_arrays, reason = "futures of a test's requests, which are joined as an array")]

mod batching;
mod bench;
mod cache;
mod control;
#[path = "../graphs/counter.rs"]
mod counter;
mod ensembles;
mod fairness;
mod gpu;
mod iteration;
mod loading;
mod overload;
mod ragged;
mod sequences;

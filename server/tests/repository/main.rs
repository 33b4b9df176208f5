//! Models that come and go: repositories in Triton's layout, opened in this process.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which clippy does not count as tests")]

mod batching;
mod bench;
mod cache;
mod control;
mod ensembles;
mod loading;
mod sequences;

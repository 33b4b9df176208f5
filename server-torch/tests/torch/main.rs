//! TorchScript models and models that keep state, opened as the server opens them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which clippy does not count as tests")]
#![allow(clippy::float_cmp, reason = "small whole numbers, which floats hold exactly")]

mod bench;
mod program;
mod seats;
mod serving;
mod voice;

//! The public behaviour of data sets. One program with a module per feature.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests; the lint knows only the tests themselves"
)]

mod common;
mod easy_vqa;
mod reading;
mod sampling;
mod writing;

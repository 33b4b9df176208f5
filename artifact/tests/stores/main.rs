//! The public behaviour of the stores. One program with a module per store, because each program of tests links all of S3.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests; the lint knows only the tests themselves"
)]

mod common;
mod folder;
mod full_disk;
mod s3;

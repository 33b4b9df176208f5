//! The public behaviour of the stores. One program with a module per store, because each program of tests links all of S3.

mod common;
mod folder;
mod full_disk;
mod s3;

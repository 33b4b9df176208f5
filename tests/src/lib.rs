//! Whole-system tests: they start the programs as a user would and look at what comes out.
//!
//! The tests are in `tests/`, a file per feature; this library is what they share. They need the programs to be built
//! (`cargo build --release`), beside each other in `target/release` or in `SENSORIUM_BIN_DIR`, and say so if they are
//! not.

mod bench;
mod command;
mod manifests;

pub use bench::Bench;
pub use command::{Finished, Running};
pub use manifests::{compression, serving, training};

//! Whole-system tests: they start the programs as a user would and look at what comes out.
//!
//! The tests are in `tests/`, a file per feature; this library is what they share. They need the programs to be built
//! (`cargo build --release`), beside each other in `target/release` or in `SENSORIUM_BIN_DIR`, and say so if they are
//! not.
//!
//! Tests of the operator use a real API server, which `make cluster-binaries` builds: [`ApiCluster`] is one per test
//! program, [`Operator`] the program under test, and [`Kubelet`] plays the node that is not there. [`Node`] is a
//! real one, for root, and [`FakeGpus`] are what its kubelet takes for GPUs. [`S3Server`] is a bucket store in a folder.

mod bench;
mod cluster;
mod command;
mod device_plugin;
mod kubelet;
mod manifests;
mod node;
mod operator;
mod s3;

pub use bench::Bench;
pub use cluster::{ApiCluster, Namespace, refusal};
pub use command::{Finished, Running};
pub use device_plugin::FakeGpus;
pub use kubelet::{Kubelet, RunAll};
pub use manifests::{compression, serving, training};
pub use node::{Node, images, python};
pub use operator::Operator;
pub use s3::{S3Server, S3User};

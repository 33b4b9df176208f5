//! The command line: runs, plans and inspects Sensorium jobs on one machine.
//!
//! `sensorium up` is the whole product without a cluster: the manifests that a cluster takes, planned by the same pure
//! code, run as processes of this machine.
//!
//! * [`args`] is what can be typed; one module per command says what it means: [`up`], [`plan`], [`infer`], [`data`],
//!   [`artifact`].
//! * [`local`] is the backend for one machine: processes that never outlive us, ports, the state folder, reuse.
//! * [`report`] is what a run leaves for people and scripts, [`view`] what it shows meanwhile.
//! * [`error`] says what went wrong and what to do about it.
//!
//! What this is not: an API server. Nothing stays behind when a command ends, and jobs run one after the other; whoever
//! wants queues, quotas or many machines applies the same manifests to a cluster.

pub mod args;
pub mod artifact;
pub mod client;
pub mod command;
pub mod data;
pub mod error;
pub mod http;
pub mod infer;
pub mod local;
pub mod manifests;
pub mod output;
pub mod plan;
pub mod references;
pub mod report;
pub mod text;
pub mod up;
pub mod view;

//! Artifacts once per node.
//!
//! A pod that needs an artifact from a bucket asks for it as a volume. The kubelet passes the wish on to this plugin, one per
//! node, which fetches the artifact into a folder of the node, once and whole, and shows it to the pod read-only. The next pod
//! on the node gets the same files.
//!
//! - [`volume`]: what a pod may ask for, and with which credentials: its own, never the node's.
//! - [`cache`]: the folder; one download at a time per artifact, verified, bounded, the longest unused goes first.
//! - [`mounts`]: how files of the node appear in a pod, and who uses what. The kernel's table of mounts is the only record of
//!   that, so nothing is forgotten when the plugin dies.
//! - [`plugin`]: the kubelet's interfaces to all this.
//!
//! A volume has the layout of a store with one artifact in it: whoever reads a store in a folder reads a volume.

pub mod cache;
mod failure;
pub mod mounts;
pub mod plugin;
pub mod volume;

pub use failure::Failure;

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the documentation is in the .proto files"
)]
mod api {
    pub mod csi {
        tonic::include_proto!("csi.v1");
    }
    pub mod registration {
        tonic::include_proto!("pluginregistration");
    }
}

//! Every network of Sensorium, defined once and run by two interpreters.
//!
//! A network is an ordered list of [`Block`]s over named [`Slot`]s. A block says which slots it reads and writes, which
//! parameters it has, and computes through the [`Ops`] trait, so the same code trains with libtorch ([`Eager`]) and is
//! exported to ONNX ([`export`]): the two cannot drift apart. Autograd never crosses a block: the trainer decides what to
//! keep, recompute, gather or send between blocks.
//!
//! Not here: losses, optimisers and anything distributed (the trainer's), pixels and words (modality's).
//!
//! The price: every operation a network needs has to be written twice, once for each interpreter. There are about twenty.

mod block;
mod config;
mod eager;
mod export;
mod init;
mod network;
mod ops;
mod params;

pub use block::{Acts, Block, Section, Slot};
pub use config::{ConfigError, FusionConfig, ImageConfig, NetworkConfig, StemLayer, TextConfig};
pub use eager::Eager;
pub use export::{ExportError, Exported, export, import};
pub use init::initialise;
pub use network::{Network, Task};
pub use ops::{Ops, Size};
pub use params::{HostTensor, Init, ParamSpec, ParamView, Weights};

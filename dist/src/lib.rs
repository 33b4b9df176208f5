//! Process groups and collectives over libtorch's c10d, for one process per rank on tch tensors.
//!
//! ```no_run
//! use sensorium_dist::{Launch, Patience, ReduceOp};
//! use std::time::Duration;
//! use tch::Tensor;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Without WORLD_SIZE in the environment this is a group of one, and collectives cost nothing.
//! let patience = Patience::new(Duration::from_mins(10), Duration::from_secs(30));
//! let group = Launch::from_env()?.connect(&patience)?;
//! let gradient = Tensor::from_slice(&[1.0f32, 2.0]);
//! let work = group.all_reduce(&gradient, ReduceOp::Avg)?; // runs in the background
//! work.wait()?; // from here on `gradient` is the mean over all ranks
//! # Ok(())
//! # }
//! ```
//!
//! # How the parts link
//! [`Launch`] reads the launch contract (`RANK`, `WORLD_SIZE`, ...) and makes a [`Store`], through which the ranks find
//! each other, and a [`ProcessGroup`] on it; [`Patience`] says how long it waits for them. Each operation of a group gives a [`Work`] to wait for. [`autograd`] has
//! the few differentiation primitives that a block executor needs and tch lacks, and [`keep_freed_memory`] is for whoever
//! computes in steps. `ffi`, the only module with `unsafe` in this crate, calls `cpp/shim.cpp`, which calls c10d; no
//! C++ exception passes it.
//!
//! # Rules
//! - Ranks are processes. libtorch's random generator and thread pool are per process, so ranks cannot be threads.
//! - All ranks of a group call the same collectives in the same order with the same sizes and kinds. Where they do not,
//!   Gloo may abort the process that gets more data than it expects: it finds out on a thread of its own, where nobody
//!   can catch it. Its message is on stderr, and the other ranks report this one as lost.
//! - A group is `Send` and `Sync`, which is about memory: threads that share one still have to agree on the order with
//!   all ranks. Give each thread a group of its own instead.
//! - Between a call and the end of its `wait`, leave its tensors alone. Results are undefined before that, not after.
//! - Autograd does not see collectives: they work on the data, and no version counter moves. Call them on gradients and
//!   on leaves, and connect the graph with [`autograd::backward`].
//! - A failure breaks the group for good ([`DistError`] says which kinds do). There is no repair, as there is none in
//!   the backend: leave the process and restart from a checkpoint.
//!
//! # What this is not
//! There is no mesh, no sharding and no NCCL here yet, and no elasticity: the size of a group is fixed.
//!
//! # Linking
//! Programs find libtorch by a run-time path, and cargo does not hand linker arguments on to dependents. So a crate
//! with a binary or tests that link this one needs a `build.rs` of its own:
//! ```text
//! println!("cargo:rerun-if-env-changed=LIBTORCH");
//! let libtorch = std::env::var("LIBTORCH").expect("LIBTORCH is set: scripts/setup writes it");
//! println!("cargo:rustc-link-arg=-Wl,-rpath,{libtorch}/lib");
//! ```

pub mod autograd;
mod error;
#[expect(unsafe_code, reason = "the one module that calls C++; each block says why it is sound")]
mod ffi;
mod launch;
mod memory;
mod patience;
mod process_group;
mod roll_call;
mod store;
mod work;

pub use error::{Call, DistError, Operation, Problem};
pub use launch::Launch;
pub use memory::keep_freed_memory;
pub use patience::Patience;
pub use process_group::{ProcessGroup, ReduceOp};
pub use store::Store;
pub use work::Work;

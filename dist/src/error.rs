//! What can go wrong, told with rank, peer and operation.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tch::{Device, Kind};

use crate::process_group::ReduceOp;

/// Why a store, a group or an operation failed.
///
/// After [`PeersLost`](Self::PeersLost), [`Timeout`](Self::Timeout) or [`Failed`](Self::Failed) the group is broken:
/// every later operation answers [`Broken`](Self::Broken). Leave it, and start again from a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DistError {
    /// The call was refused before anything was sent; the group is as good as before.
    #[error("{call}: {problem}")]
    Argument {
        /// The call that was refused.
        call: Call,
        /// What is wrong with it.
        problem: Problem,
    },
    /// Peers died or left the group while they were needed.
    #[error("{call}: {} died or left the group: {cause}", Ranks(lost))]
    PeersLost {
        /// The operation that needed them.
        call: Call,
        /// Their ranks, ascending.
        lost: Vec<u32>,
        /// What was seen first, here or on the rank that it names.
        cause: String,
    },
    /// All peers live, and the operation did not end in time.
    #[error("{call} did not end within {timeout:?}{}: {cause}", Silent(silent))]
    Timeout {
        /// The operation.
        call: Call,
        /// The group's timeout.
        timeout: Duration,
        /// The ranks that were not waiting for an operation of this group: they are late, stuck, or out of step.
        /// Empty where this could not be found out.
        silent: Vec<u32>,
        /// What was seen first, here or on the rank that it names.
        cause: String,
    },
    /// The backend refused or failed; no peer is known to be lost.
    #[error("{call} failed: {cause}")]
    Failed {
        /// The operation.
        call: Call,
        /// What the backend said, or the rank that reported its failure.
        cause: String,
    },
    /// An earlier operation broke the group.
    #[error("{call}: the group is broken by an earlier failure: {cause}")]
    Broken {
        /// The operation that was refused.
        call: Call,
        /// The earlier failure.
        cause: String,
    },
    /// The group did not come together.
    #[error("rank {rank} of {size} could not join group {group:?} within {timeout:?}{}: {cause}", Missing(missing))]
    Join {
        /// This rank.
        rank: u32,
        /// The size that the group was to have.
        size: u32,
        /// The name of the group in the store.
        group: String,
        /// How long it waited.
        timeout: Duration,
        /// The ranks that did not show up, ascending; empty where all did.
        missing: Vec<u32>,
        /// What the store or the backend said.
        cause: String,
    },
    /// A store's server could not listen.
    #[error("could not serve the store on {address}")]
    Listen {
        /// Where it was to listen.
        address: SocketAddr,
        /// Why it could not.
        source: io::Error,
    },
    /// No store answered.
    #[error("no store answered at {host}:{port} within {timeout:?}: {cause}")]
    Connect {
        /// The name or address that was asked for.
        host: String,
        /// The port that was asked for.
        port: u16,
        /// How long it was tried.
        timeout: Duration,
        /// What the last try met.
        cause: String,
    },
    /// An operation on a store failed, or its key did not appear in time.
    #[error("could not {action} {keys:?} in the store: {cause}")]
    Store {
        /// `set`, `get`, `wait for`, ...
        action: &'static str,
        /// The keys it was about.
        keys: Vec<String>,
        /// What the store said.
        cause: String,
    },
    /// The environment does not describe a rank.
    #[error("{variable}={value:?} is not {expected}")]
    Environment {
        /// The variable.
        variable: &'static str,
        /// Its value; empty where it is not set.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// libtorch refused a tensor operation.
    #[error("{operation} failed: {cause}")]
    Torch {
        /// The operation.
        operation: &'static str,
        /// What libtorch said.
        cause: String,
    },
}

impl DistError {
    /// Whether all that is known is that others are missing, late or gone: this rank then ends in the wake of one of them,
    /// which is the one to ask for the reason.
    pub fn is_wake(&self) -> bool {
        match self {
            Self::PeersLost { .. }
            | Self::Timeout { .. }
            | Self::Failed { .. }
            | Self::Broken { .. }
            | Self::Join { .. }
            | Self::Connect { .. } => true,
            Self::Argument { .. }
            | Self::Listen { .. }
            | Self::Store { .. }
            | Self::Environment { .. }
            | Self::Torch { .. } => false,
        }
    }
}

/// One operation of one rank, for messages: `all_reduce(sum) on rank 0 of 4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The operation.
    pub operation: Operation,
    /// The rank that called.
    pub rank: u32,
    /// The size of its group.
    pub size: u32,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on rank {} of {}", self.operation, self.rank, self.size)
    }
}

/// What a group can be asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the methods of `ProcessGroup` with these names say it")]
pub enum Operation {
    AllReduce(ReduceOp),
    Broadcast { root: u32 },
    AllGatherInto,
    ReduceScatterInto(ReduceOp),
    AllToAll,
    Send { to: u32, tag: u32 },
    Recv { from: u32, tag: u32 },
    Barrier,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllReduce(op) => write!(f, "all_reduce({op})"),
            Self::Broadcast { root } => write!(f, "broadcast(root {root})"),
            Self::AllGatherInto => f.write_str("all_gather_into"),
            Self::ReduceScatterInto(op) => write!(f, "reduce_scatter_into({op})"),
            Self::AllToAll => f.write_str("all_to_all"),
            Self::Send { to, tag } => write!(f, "send(to {to}, tag {tag})"),
            Self::Recv { from, tag } => write!(f, "recv(from {from}, tag {tag})"),
            Self::Barrier => f.write_str("barrier"),
        }
    }
}

/// What is wrong with the arguments of a call.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Problem {
    #[error("the {tensor} tensor is undefined")]
    Undefined { tensor: &'static str },
    #[error("the {tensor} tensor of shape {shape:?} is not contiguous; call contiguous() first")]
    NotContiguous { tensor: &'static str, shape: Vec<i64> },
    #[error("the {tensor} tensor is on {device:?}; this backend takes CPU tensors")]
    Device { tensor: &'static str, device: Device },
    #[error("the {tensor} tensor is of kind {kind:?}; Float, Double, Half, BFloat16, Int64 and Uint8 are supported")]
    Kind { tensor: &'static str, kind: Kind },
    #[error("the output is of kind {output:?} and the input of {input:?}; they must be the same")]
    KindsDiffer { output: Kind, input: Kind },
    #[error("an average of {kind:?} has no exact type; use a sum, or a floating-point tensor")]
    IntegerAverage { kind: Kind },
    #[error("the output has {output} elements and the input {input}; the output needs {expected}")]
    Elements { output: usize, input: usize, expected: usize },
    #[error("the input has {elements} elements, which do not split into {parts} equal parts")]
    Uneven { elements: usize, parts: u32 },
    #[error("there is no rank {rank}; ranks are below {size}")]
    Rank { rank: u32, size: u32 },
    #[error("a rank cannot send to or receive from itself")]
    SelfMessage,
    #[error("tag {tag} is too large; the largest is {}", i32::MAX)]
    Tag { tag: u32 },
}

/// Writes `rank 1` or `ranks 1, 3`.
struct Ranks<'a>(&'a [u32]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<_> = self.0.iter().map(u32::to_string).collect();
        write!(f, "rank{} {}", if list.len() == 1 { "" } else { "s" }, list.join(", "))
    }
}

/// Writes which ranks did not take part, if that is known.
struct Silent<'a>(&'a [u32]);

impl fmt::Display for Silent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "; {} did not take part", Ranks(self.0)) }
    }
}

/// Writes which ranks did not show up, if any.
struct Missing<'a>(&'a [u32]);

impl fmt::Display for Missing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "; {} did not show up", Ranks(self.0)) }
    }
}

//! Groups of ranks and their collective operations.

use std::ffi::c_int;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use crate::error::{Call, DistError, Operation, Problem};
use crate::ffi::{self, RawGroup, RawWork};
use crate::patience::Patience;
use crate::roll_call::{Member, RollCall};
use crate::store::Store;
use crate::work::{Finish, Work};

/// How values of different ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// The sum.
    Sum,
    /// The sum divided by the size of the group; floating-point kinds only.
    Avg,
    /// The smallest.
    Min,
    /// The largest.
    Max,
}

impl ReduceOp {
    /// The number in `c10d::ReduceOp::RedOpType`. Gloo has no average: it is a sum, divided at the end.
    fn backend(self) -> c_int {
        match self {
            Self::Sum | Self::Avg => 0,
            Self::Min => 3,
            Self::Max => 4,
        }
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sum => "sum",
            Self::Avg => "avg",
            Self::Min => "min",
            Self::Max => "max",
        })
    }
}

/// This process's membership in a group of ranks `0..size`. Clones are the same membership.
///
/// All operations take contiguous CPU tensors of kind Float, Double, Half, BFloat16, Int64 or Uint8, are called by all
/// ranks in the same order, and return once they have started. Shapes do not matter beyond the number of elements:
/// "parts" are equal stretches of the flat, row-major data. The crate's documentation has the rules on threads and order.
///
/// Operations fail with [`DistError::Argument`] for arguments that cannot be right, [`DistError::Broken`] after an
/// earlier failure, and else as [`Work::wait`].
#[derive(Clone)]
pub struct ProcessGroup(Arc<Shared>);

struct Shared {
    rank: u32,
    size: u32,
    backend: Backend,
}

enum Backend {
    /// One rank: results are there at once.
    Single,
    Gloo(Box<Gloo>),
}

struct Gloo {
    // Before the roll call, so that it is dropped first: this rank answers while its last operations end.
    group: RawGroup,
    roll_call: RollCall,
    timeout: Duration,
    /// On the rank that serves the store, this keeps it served: ranks read it while they connect.
    _store: Store,
    /// Why the group can no longer be used.
    broken: OnceLock<String>,
}

impl ProcessGroup {
    /// The group of one rank, which needs no network: each operation gives this rank's own values.
    pub fn single() -> Self {
        Self(Arc::new(Shared { rank: 0, size: 1, backend: Backend::Single }))
    }

    /// Joins a group over TCP, which runs on CPU tensors, and returns when all ranks are connected.
    ///
    /// * `store`, `name`: where the ranks meet; a name is used once per store.
    /// * `interface`: the local address to take connections of peers on.
    ///
    /// # Errors
    /// [`DistError::Join`] names the ranks that did not show up.
    pub fn gloo(
        store: &Store,
        name: &str,
        rank: u32,
        size: u32,
        interface: IpAddr,
        patience: &Patience<'_>,
    ) -> Result<Self, DistError> {
        let failed = |missing, cause| {
            let (group, timeout) = (name.to_owned(), patience.joining);
            DistError::Join { rank, size, group, timeout, missing, cause }
        };
        if rank >= size {
            return Err(failed(Vec::new(), format!("there is no rank {rank}; ranks are below {size}")));
        }
        // A connection of its own, so that a thread that waits in the caller's does not hold up this group.
        let connection = store.raw().reconnect().map_err(|cause| failed(Vec::new(), cause))?;
        let member = Member { group: name, rank, size, interface };
        let roll_call =
            RollCall::open(&connection, &member, patience).map_err(|(missing, cause)| failed(missing, cause))?;
        let timeout = patience.operation;
        let group = RawGroup::gloo(&connection, name, rank, size, &interface.to_string(), timeout)
            .map_err(|cause| failed(Vec::new(), cause))?;
        let broken = OnceLock::new();
        let backend = Backend::Gloo(Box::new(Gloo { group, roll_call, timeout, _store: store.clone(), broken }));
        let group = Self(Arc::new(Shared { rank, size, backend }));
        // Without this the rank that serves the store could be done, and gone, while others still connect.
        group.barrier()?.wait()?;
        Ok(group)
    }

    /// This process's rank in the group.
    pub fn rank(&self) -> u32 {
        self.0.rank
    }

    /// How many ranks the group has.
    pub fn size(&self) -> u32 {
        self.0.size
    }

    /// Replaces `tensor` on every rank by the reduction over all ranks; all get the same bits.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, DistError> {
        let call = self.call(Operation::AllReduce(op));
        let flat = flatten(call, "given", tensor)?;
        refuse_integer_average(call, &flat, op)?;
        let Some(gloo) = self.gloo_for(call, &flat)? else { return Ok(Work::done()) };
        let started = gloo.group.all_reduce(&flat, op.backend());
        self.started(call, started, if op == ReduceOp::Avg { Finish::Divide(flat) } else { Finish::Nothing })
    }

    /// Replaces `tensor` on every rank by that of rank `root`.
    pub fn broadcast(&self, tensor: &Tensor, root: u32) -> Result<Work, DistError> {
        let call = self.call(Operation::Broadcast { root });
        let flat = flatten(call, "given", tensor)?;
        self.check_rank(call, root)?;
        let Some(gloo) = self.gloo_for(call, &flat)? else { return Ok(Work::done()) };
        let started = gloo.group.broadcast(&flat, root);
        self.started(call, started, Finish::Nothing)
    }

    /// Fills part `r` of `output` with the `input` of rank `r`.
    ///
    /// * `output`: `size` times as many elements as `input`, for example `[size * N, D]` or `[size, N, D]` for `[N, D]`.
    pub fn all_gather_into(&self, output: &Tensor, input: &Tensor) -> Result<Work, DistError> {
        let call = self.call(Operation::AllGatherInto);
        let (output, input) = flatten_pair(call, output, input, |input| input * self.0.size as usize)?;
        let Some(gloo) = self.gloo_for(call, &input)? else { return copied(&output, &input) };
        let started = gloo.group.all_gather(&output, &input);
        self.started(call, started, Finish::Nothing)
    }

    /// Gives this rank the reduction of part `rank` of every rank's `input`; the adjoint of
    /// [`all_gather_into`](Self::all_gather_into). Values are added in the order of ranks.
    ///
    /// Sends what an optimal reduce-scatter sends, and needs a temporary of the size of `input`. Gloo's own, as c10d
    /// uses it, reduces everything everywhere and throws most of it away.
    ///
    /// * `input`: `size` times as many elements as `output`.
    pub fn reduce_scatter_into(&self, output: &Tensor, input: &Tensor, op: ReduceOp) -> Result<Work, DistError> {
        let call = self.call(Operation::ReduceScatterInto(op));
        let (output, input) = flatten_pair(call, output, input, |input| input / self.0.size as usize)?;
        self.check_even(call, &input)?;
        refuse_integer_average(call, &input, op)?;
        let Some(gloo) = self.gloo_for(call, &input)? else { return copied(&output, &input) };
        let parts = input.f_empty_like().map_err(torch("empty_like"))?;
        let started = gloo.group.all_to_all(&parts, &input);
        self.started(call, started, Finish::Reduce { parts, output, op })
    }

    /// Sends part `r` of `input` to rank `r`, and fills part `r` of `output` with what rank `r` sent.
    ///
    /// * `output`, `input`: one number of elements, a multiple of `size`.
    pub fn all_to_all(&self, output: &Tensor, input: &Tensor) -> Result<Work, DistError> {
        let call = self.call(Operation::AllToAll);
        let (output, input) = flatten_pair(call, output, input, |input| input)?;
        self.check_even(call, &input)?;
        let Some(gloo) = self.gloo_for(call, &input)? else { return copied(&output, &input) };
        let started = gloo.group.all_to_all(&output, &input);
        self.started(call, started, Finish::Nothing)
    }

    /// Sends `tensor` to rank `to`. Waiting for it blocks until the peer receives: where two ranks exchange, start both
    /// before waiting for either.
    ///
    /// * `tag`: tells apart messages between the same two ranks; up to `i32::MAX`.
    pub fn send(&self, tensor: &Tensor, to: u32, tag: u32) -> Result<Work, DistError> {
        let call = self.call(Operation::Send { to, tag });
        let flat = flatten(call, "given", tensor)?;
        let tag = self.check_peer(call, to, tag)?;
        let Some(gloo) = self.gloo_for(call, &flat)? else { return Ok(Work::done()) };
        let started = gloo.group.send(&flat, to, tag);
        self.started(call, started, Finish::Nothing)
    }

    /// Fills `tensor` with what rank `from` sends with the same tag, kind and number of elements.
    pub fn recv(&self, tensor: &Tensor, from: u32, tag: u32) -> Result<Work, DistError> {
        let call = self.call(Operation::Recv { from, tag });
        let flat = flatten(call, "given", tensor)?;
        let tag = self.check_peer(call, from, tag)?;
        let Some(gloo) = self.gloo_for(call, &flat)? else { return Ok(Work::done()) };
        let started = gloo.group.recv(&flat, from, tag);
        self.started(call, started, Finish::Nothing)
    }

    /// Ends when all ranks have called it and their earlier operations have ended.
    pub fn barrier(&self) -> Result<Work, DistError> {
        let call = self.call(Operation::Barrier);
        let Some(gloo) = self.usable(call)? else { return Ok(Work::done()) };
        let started = gloo.group.barrier();
        self.started(call, started, Finish::Nothing)
    }

    fn call(&self, operation: Operation) -> Call {
        Call { operation, rank: self.0.rank, size: self.0.size }
    }

    fn started(&self, call: Call, raw: ffi::Result<RawWork>, finish: Finish) -> Result<Work, DistError> {
        match raw {
            Ok(raw) => Ok(Work::running(raw, self.clone(), call, finish)),
            Err(cause) => Err(self.fail(call, Some(cause))),
        }
    }

    /// The backend, if this group has one.
    fn usable(&self, call: Call) -> Result<Option<&Gloo>, DistError> {
        match &self.0.backend {
            Backend::Single => Ok(None),
            Backend::Gloo(gloo) => match gloo.broken.get() {
                None => Ok(Some(gloo)),
                Some(cause) => Err(DistError::Broken { call, cause: cause.clone() }),
            },
        }
    }

    /// The backend, if there is something to send. Empty tensors are empty on all ranks, and Gloo does not take them.
    fn gloo_for(&self, call: Call, input: &Tensor) -> Result<Option<&Gloo>, DistError> {
        let gloo = self.usable(call)?;
        Ok(if input.numel() == 0 { None } else { gloo })
    }

    /// Whether another rank has reported a failure.
    pub(crate) fn heard_of_failure(&self) -> bool {
        match &self.0.backend {
            Backend::Single => false,
            Backend::Gloo(gloo) => gloo.roll_call.heard_of_failure(),
        }
    }

    /// Finds out what a failure is about, tells the other ranks, and gives the group up.
    ///
    /// * `cause`: what the backend said; none where it is another rank that failed.
    pub(crate) fn fail(&self, call: Call, cause: Option<String>) -> DistError {
        let error = match &self.0.backend {
            Backend::Single => DistError::Failed { call, cause: cause.unwrap_or_default() },
            Backend::Gloo(gloo) => gloo.roll_call.explain(call, gloo.timeout, cause.as_deref()),
        };
        if let Backend::Gloo(gloo) = &self.0.backend {
            // Of several failures the first one counts.
            gloo.broken.get_or_init(|| error.to_string());
        }
        error
    }

    fn check_rank(&self, call: Call, rank: u32) -> Result<(), DistError> {
        let size = self.0.size;
        refuse_if(rank >= size, call, || Problem::Rank { rank, size })
    }

    fn check_peer(&self, call: Call, peer: u32, tag: u32) -> Result<c_int, DistError> {
        self.check_rank(call, peer)?;
        refuse_if(peer == self.0.rank, call, || Problem::SelfMessage)?;
        c_int::try_from(tag).map_err(|_| DistError::Argument { call, problem: Problem::Tag { tag } })
    }

    fn check_even(&self, call: Call, input: &Tensor) -> Result<(), DistError> {
        let (elements, parts) = (input.numel(), self.0.size);
        refuse_if(elements % parts as usize != 0, call, || Problem::Uneven { elements, parts })
    }
}

impl fmt::Debug for ProcessGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backend = match self.0.backend {
            Backend::Single => "single",
            Backend::Gloo(_) => "gloo",
        };
        write!(f, "ProcessGroup({backend}, rank {} of {})", self.0.rank, self.0.size)
    }
}

fn refuse_if(wrong: bool, call: Call, problem: impl FnOnce() -> Problem) -> Result<(), DistError> {
    if wrong { Err(DistError::Argument { call, problem: problem() }) } else { Ok(()) }
}

fn refuse_integer_average(call: Call, tensor: &Tensor, op: ReduceOp) -> Result<(), DistError> {
    let kind = tensor.kind();
    let integer = matches!(kind, Kind::Int64 | Kind::Uint8);
    refuse_if(op == ReduceOp::Avg && integer, call, || Problem::IntegerAverage { kind })
}

/// Checks a tensor and returns the same data as one flat dimension, free of autograd.
fn flatten(call: Call, name: &'static str, tensor: &Tensor) -> Result<Tensor, DistError> {
    refuse_if(!tensor.defined(), call, || Problem::Undefined { tensor: name })?;
    let device = tensor.device();
    refuse_if(device != Device::Cpu, call, || Problem::Device { tensor: name, device })?;
    let kind = tensor.f_kind().map_err(torch("kind"))?;
    let supported =
        matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16 | Kind::Int64 | Kind::Uint8);
    refuse_if(!supported, call, || Problem::Kind { tensor: name, kind })?;
    let contiguous = !tensor.is_sparse() && tensor.is_contiguous();
    refuse_if(!contiguous, call, || Problem::NotContiguous { tensor: name, shape: tensor.size() })?;
    tensor.f_detach().and_then(|data| data.f_view([-1])).map_err(torch("view"))
}

/// As [`flatten`] for both, which have one kind; `expected` gives the output's elements for those of the input.
fn flatten_pair(
    call: Call,
    output: &Tensor,
    input: &Tensor,
    expected: impl FnOnce(usize) -> usize,
) -> Result<(Tensor, Tensor), DistError> {
    let (output, input) = (flatten(call, "output", output)?, flatten(call, "input", input)?);
    let (kinds, elements) = ((output.kind(), input.kind()), (output.numel(), input.numel()));
    refuse_if(kinds.0 != kinds.1, call, || Problem::KindsDiffer { output: kinds.0, input: kinds.1 })?;
    let expected = expected(elements.1);
    refuse_if(elements.0 != expected, call, || Problem::Elements { output: elements.0, input: elements.1, expected })?;
    Ok((output, input))
}

/// What a group of one does with two tensors.
fn copied(output: &Tensor, input: &Tensor) -> Result<Work, DistError> {
    output.shallow_clone().f_copy_(input).map_err(torch("copy_"))?;
    Ok(Work::done())
}

fn torch(operation: &'static str) -> impl Fn(tch::TchError) -> DistError {
    move |error| DistError::Torch { operation, cause: error.to_string() }
}

//! An operation in flight.

use std::time::Duration;

use tch::{TchError, Tensor};

use crate::error::{Call, DistError, Operation};
use crate::ffi::{Progress, RawWork};
use crate::process_group::{ProcessGroup, ReduceOp};

/// How long a wait goes on before it looks whether another rank has reported a failure.
const SLICE: Duration = Duration::from_millis(250);

/// An operation that runs in the background. Its tensors are to be left alone, and hold no result, until
/// [`wait`](Self::wait) returns.
///
/// It owns shares of its group and tensors, so one that is dropped or forgotten is no danger to memory. But the other
/// ranks still wait for this one's part, an average or a reduce-scatter never gets its last step, and a dropped send or
/// receive may not take place.
#[must_use = "the result is there when `wait` returns"]
pub struct Work(Option<Running>);

struct Running {
    // Before the group, so that it is dropped first.
    raw: RawWork,
    group: ProcessGroup,
    call: Call,
    finish: Finish,
}

/// What is left to do with the data that arrived.
pub(crate) enum Finish {
    Nothing,
    /// Divide a sum by the group's size.
    Divide(Tensor),
    /// Reduce the parts that all ranks sent, `[size, elements]` flattened, into `output`, `[elements]`.
    Reduce {
        parts: Tensor,
        output: Tensor,
        op: ReduceOp,
    },
}

impl Work {
    /// Nothing to wait for.
    pub(crate) fn done() -> Self {
        Self(None)
    }

    pub(crate) fn running(raw: RawWork, group: ProcessGroup, call: Call, finish: Finish) -> Self {
        Self(Some(Running { raw, group, call, finish }))
    }

    /// Blocks until the operation has ended on this rank and its result is in place.
    ///
    /// # Errors
    /// [`DistError::PeersLost`] within about a second of a peer's death, [`DistError::Timeout`] about a second after
    /// the group's timeout, [`DistError::Failed`] for all else that the backend reports. Each breaks the group. Where a
    /// machine is gone and does not even refuse, all take a few seconds more.
    pub fn wait(self) -> Result<(), DistError> {
        let Some(Running { mut raw, group, call, finish }) = self.0 else { return Ok(()) };
        // Gloo breaks the connection when a send or receive is waited for in slices.
        let slice = match call.operation {
            Operation::Send { .. } | Operation::Recv { .. } => None,
            _ => Some(SLICE),
        };
        loop {
            match raw.wait(slice) {
                Ok(Progress::Done) => break,
                Ok(Progress::Pending) if group.heard_of_failure() => return Err(group.fail(call, None)),
                Ok(Progress::Pending) => {}
                Err(cause) => return Err(group.fail(call, Some(cause))),
            }
        }
        finish
            .run(call.size)
            .map_err(|error| DistError::Torch { operation: "the last step of a reduction", cause: error.to_string() })
    }
}

impl Finish {
    fn run(self, size: u32) -> Result<(), TchError> {
        match self {
            Self::Nothing => Ok(()),
            Self::Divide(mut tensor) => tensor.f_div_scalar_(i64::from(size)).map(drop),
            Self::Reduce { parts, mut output, op } => {
                let rows = parts.f_view([i64::from(size), -1])?;
                // Half-precision kinds are summed in single precision.
                let sum = || rows.f_sum_dim_intlist([0i64].as_slice(), false, rows.kind());
                output.f_copy_(&match op {
                    ReduceOp::Sum => sum()?,
                    ReduceOp::Avg => sum()?.f_div_scalar_(i64::from(size))?,
                    ReduceOp::Min => rows.f_amin([0i64].as_slice(), false)?,
                    ReduceOp::Max => rows.f_amax([0i64].as_slice(), false)?,
                })
            }
        }
    }
}

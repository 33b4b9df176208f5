//! Models that answer a request with several responses: the request is a loop over the graph, and each step of it is one
//! response.
//!
//! A step runs the graph on the request's inputs and on what the step before left as state, through the scheduler like any
//! other work, so that steps of different requests share batches. Nothing runs ahead: a step begins when it is asked for,
//! and a loop that nobody asks any more ends by being dropped, which gives its place to the next.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use sensorium_engine::{DType, RawTensor};

use super::{Binding, Fitted, Graph, ModelVersion, NamedTensor, Request, Response, Runs, Statistics, Timings};
use super::{
    sequence::{Own, SequenceError, Sequences},
    statistics::{Failure, Responded},
};
use crate::{
    error::InferError,
    scheduler::{ScheduleError, Work},
};

/// When the loops of a model end, and how long they wait for their readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// The output of the graph that says so, by not being zero.
    pub(crate) end: Option<usize>,
    /// Steps at most, whatever that output says.
    pub(crate) most_steps: usize,
    /// How long a response may wait for somebody to take it.
    pub(crate) patience: Duration,
}

/// What the requests of one model have in common.
#[derive(Debug)]
pub(crate) struct Iteration {
    /// One graph, or one for each instance where sequences sit in them.
    graphs: Vec<Arc<Graph>>,
    binding: Binding,
    sequences: Arc<Sequences>,
    bounds: Bounds,
    /// Of the sequences, which no client names.
    ids: AtomicU64,
}

impl Iteration {
    pub(crate) fn new(graphs: Vec<Arc<Graph>>, binding: Binding, sequences: Arc<Sequences>, bounds: Bounds) -> Self {
        Self { graphs, binding, sequences, bounds, ids: AtomicU64::new(1) }
    }

    pub(super) fn graphs(&self) -> &[Arc<Graph>] {
        &self.graphs
    }
}

impl ModelVersion {
    /// Whether a request is a loop, and has as many responses as that has steps: [`ModelVersion::begin`].
    pub fn iterates(&self) -> bool {
        matches!(self.runs, Runs::Iteration(_))
    }

    /// How long a response of such a model may wait for somebody to take it; no time where there is only one.
    pub(crate) fn patience(&self) -> Duration {
        match &self.runs {
            Runs::Iteration(iteration) => iteration.bounds.patience,
            _ => Duration::ZERO,
        }
    }

    /// Begins a request that has several responses, once there is a place for it. Dropping the future gives that up.
    ///
    /// # Errors
    /// [`InferError`], which says whose fault it is; of a model that does not iterate, that it is called in the wrong way.
    pub async fn begin(self: Arc<Self>, mut request: Request) -> Result<Steps, InferError> {
        let Runs::Iteration(iteration) = &self.runs else {
            return Err(InferError::OneResponse { model: self.name.clone() });
        };
        let iteration = iteration.clone();
        let mut count = Count::new(self.statistics.clone());
        let taken = self.take_place(&iteration, &mut request).await;
        let taken = taken.inspect_err(|error| count.why = error.code().into())?;
        Ok(Steps { model: self, iteration, request, taken, done: 0, count })
    }

    async fn take_place(&self, iteration: &Arc<Iteration>, request: &mut Request) -> Result<Taken, InferError> {
        self.check_artifact(request)?;
        let inputs = std::mem::take(&mut request.inputs);
        let fitted = self.interface.fit(inputs, &request.outputs)?;
        if fitted.rows != 1 {
            return Err(SequenceError::Rows { rows: fitted.rows }.into());
        }
        // Each request is a sequence of its own, whatever it is called. One that goes on with another has none to go on with.
        if request.sequence.as_ref().is_some_and(|sequence| !sequence.start) {
            return Err(SequenceError::NamedId { model: self.name.clone() }.into());
        }
        let Fitted { inputs, outputs: wanted, .. } = fitted;
        let bound = iteration.binding.bind(inputs, &wanted);
        let (inputs, mut outputs) = bound.map_err(|source| InferError::reshape(&self.name, source))?;
        let end = iteration.bounds.end.map(|end| {
            outputs.iter().position(|output| *output == end).unwrap_or_else(|| {
                outputs.push(end);
                outputs.len() - 1
            })
        });
        outputs.extend_from_slice(iteration.sequences.state_outputs());
        let asked = Instant::now();
        let waiting = iteration.graphs.first().map(|graph| graph.waits());
        let sequence = Own::begin(iteration.sequences.clone(), iteration.ids.fetch_add(1, Ordering::Relaxed)).await?;
        drop(waiting);
        Ok(Taken { inputs, outputs, wanted, end, sequence, waited: asked.elapsed() })
    }
}

/// What a request that has several responses has of its model.
#[derive(Debug)]
struct Taken {
    /// Of the graph; `None` for those that the server fills.
    inputs: Vec<Option<RawTensor>>,
    /// Of the graph: those of the response, then that which ends it where it is none of them, then the state.
    outputs: Vec<usize>,
    /// Of the interface: those of the response.
    wanted: Vec<usize>,
    /// Which of `outputs` ends it.
    end: Option<usize>,
    sequence: Own,
    /// How long it waited for its place, until a step has told that.
    waited: Duration,
}

/// A request under way. Dropping it, in any moment, is its end.
#[derive(Debug)]
pub struct Steps {
    model: Arc<ModelVersion>,
    iteration: Arc<Iteration>,
    /// Without its inputs.
    request: Request,
    taken: Taken,
    done: usize,
    count: Count,
}

impl Steps {
    /// Runs one step: its response, and whether that is the last. `None` after the last one, and after an error.
    /// Dropping the future takes the step out of the queue, and leaves the request as if it had not been begun.
    ///
    /// # Errors
    /// [`InferError`], which ends this request and no other.
    pub async fn next(&mut self) -> Option<Result<(Response, bool), InferError>> {
        if self.count.is_over {
            return None;
        }
        let step = self.step().await;
        if let Err(error) = &step {
            self.count.failed(self.done, error.code().into());
        }
        Some(step)
    }

    async fn step(&mut self) -> Result<(Response, bool), InferError> {
        let most = self.iteration.bounds.most_steps;
        let (is_first, is_utmost) = (self.done == 0, self.done + 1 >= most);
        let Taken { inputs, outputs, wanted, end, sequence, waited } = &mut self.taken;
        let inputs = sequence.fill(inputs.clone(), is_first, is_utmost);
        let graph = self.iteration.graphs.get(sequence.instance());
        let graph = graph.ok_or_else(|| ScheduleError::Stopped { graph: self.model.name.clone() })?;
        let Request { priority, timeout, deadline, .. } = self.request;
        let work = Work { inputs, rows: 1, outputs: outputs.clone(), priority, timeout, deadline, ..Work::default() };
        let mut ran = graph.run(work).await?;
        let states = self.iteration.sequences.state_outputs().len();
        sequence.keep(&ran.outputs.split_off(outputs.len() - states));
        let is_last = is_utmost || end.and_then(|end| ran.outputs.get(end)).is_some_and(is_set);
        // What was asked for its end alone is behind what was asked for.
        ran.outputs.truncate(wanted.len());
        let unbound = self.iteration.binding.unbind(wanted, ran.outputs);
        let tensors = unbound.map_err(|source| InferError::reshape(&self.model.name, source))?;
        ran.timings.queue += std::mem::take(waited);
        self.count.made(self.done, ran.timings, is_last);
        self.done += 1;
        let specs = self.model.outputs();
        let named = wanted.iter().zip(tensors);
        let named = named.map(|(output, tensor)| NamedTensor { name: specs[*output].name.clone(), tensor });
        Ok((Response { outputs: named.collect(), timings: ran.timings }, is_last))
    }
}

/// Whether an output says yes: anything in it is not zero. A NaN is not.
fn is_set(tensor: &RawTensor) -> bool {
    let is_float = matches!(tensor.dtype(), DType::Fp16 | DType::Bf16 | DType::Fp32 | DType::Fp64);
    let Some(size) = sensorium_engine::element_size(tensor.dtype()) else { return false };
    tensor.data().chunks_exact(size).any(|element| {
        let (highest, rest) = element.split_last().unwrap_or((&0, &[]));
        // A zero may have a sign.
        let highest = if is_float { highest & 0x7f } else { *highest };
        highest != 0 || rest.iter().any(|byte| *byte != 0)
    })
}

/// Counts a request and its responses, however it ends: also one whose caller leaves, which is dropped in the middle.
#[derive(Debug)]
struct Count {
    statistics: Arc<Statistics>,
    started: Instant,
    /// Since the last response, or the beginning.
    since: Instant,
    responses: usize,
    spent: Timings,
    is_over: bool,
    /// What it counts if it is dropped before it is over.
    why: Failure,
}

impl Count {
    fn new(statistics: Arc<Statistics>) -> Self {
        let now = Instant::now();
        let (spent, why) = (Timings::default(), Failure::Canceled);
        Self { statistics, started: now, since: now, responses: 0, spent, is_over: false, why }
    }

    fn made(&mut self, index: usize, timings: Timings, is_last: bool) {
        self.spent += timings;
        self.responses = index + 1;
        self.since = Instant::now();
        self.statistics.responded(index, Responded::Made(timings));
        if is_last {
            self.is_over = true;
            self.statistics.succeeded(self.started.elapsed(), 1, &self.spent);
        }
    }

    fn failed(&mut self, index: usize, why: Failure) {
        self.is_over = true;
        self.statistics.responded(index, Responded::Failed(self.since.elapsed()));
        self.statistics.failed(self.started.elapsed(), why);
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        if !self.is_over {
            // Before its first response it is not known that there would have been any.
            if self.responses > 0 {
                self.statistics.responded(self.responses, Responded::Cancelled(self.since.elapsed()));
            }
            self.statistics.failed(self.started.elapsed(), self.why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_says_yes_by_any_number_but_zero_of_either_sign() {
        let f32s =
            |values: &[f32]| RawTensor::from_vec(DType::Fp32, vec![values.len() as i64], values.to_vec()).unwrap();
        assert!(!is_set(&f32s(&[0.0, -0.0])));
        assert!(is_set(&f32s(&[0.0, 1e-30])) && is_set(&f32s(&[f32::NAN])));
        let bools = |values: &[u8]| RawTensor::new(DType::Bool, vec![1], values.to_vec().into()).unwrap();
        assert!(!is_set(&bools(&[0])) && is_set(&bools(&[1])));
        let i64s = |value: i64| RawTensor::from_vec(DType::Int64, vec![1], vec![value]).unwrap();
        assert!(!is_set(&i64s(0)) && is_set(&i64s(i64::MIN)) && is_set(&i64s(1)));
    }
}

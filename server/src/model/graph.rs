//! One graph behind its queue.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use sensorium_artifact::TensorSpec;
use sensorium_engine::{EngineError, Named, RawTensor, Signature, dtype_name};
use sensorium_modality::Tensor;

use crate::{
    error::InferError,
    metrics::Elsewhere,
    scheduler::{Done, Scheduler, Work},
};

/// A graph with its signature and its engine.
#[derive(Debug)]
pub struct Graph {
    name: String,
    signature: Signature,
    scheduler: Scheduler,
    /// Inputs that its configuration says are good ones.
    sample: Option<Vec<RawTensor>>,
    /// Inputs that a probe has succeeded with.
    proven: OnceLock<Vec<RawTensor>>,
    /// Whether it was asked with all that could be thought of, and took nothing.
    takes_no_guess: AtomicBool,
}

impl Graph {
    /// A graph called `name` whose engine `scheduler` owns.
    pub(crate) fn new(
        name: String,
        signature: Signature,
        scheduler: Scheduler,
        sample: Option<Vec<RawTensor>>,
    ) -> Arc<Self> {
        let (proven, takes_no_guess) = (OnceLock::new(), AtomicBool::new(false));
        Arc::new(Self { name, signature, scheduler, sample, proven, takes_no_guess })
    }

    /// Its name, that of the model it is or is part of.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it takes and gives.
    pub fn signature(&self) -> &Signature {
        &self.signature
    }

    /// Time since the engine last ran without failing.
    pub fn last_success(&self) -> Option<Duration> {
        self.scheduler.last_success()
    }

    /// Runs work of this signature, in a batch.
    pub(super) async fn run(&self, work: Work) -> Result<Done, InferError> {
        // What contradicts itself across inputs must not meet other requests in a batch.
        self.signature.validate(&work.inputs).map_err(|source| InferError::engine(&self.name, source))?;
        Ok(self.scheduler.run(work).await?)
    }

    /// One more waits for it, before it comes to its queue, until this is dropped.
    pub(super) fn waits(&self) -> Elsewhere<'_> {
        self.scheduler.waits()
    }

    /// As a pipeline calls it: typed tensors by name in, all outputs out.
    pub(super) async fn run_named(&self, inputs: Named, deadline: Option<Instant>) -> Result<Named, InferError> {
        let inputs = self.signature.place(inputs).map_err(|source| InferError::engine(&self.name, source))?;
        let rows = inputs.first().and_then(RawTensor::row_count).unwrap_or(1);
        let specs = self.signature.outputs();
        let outputs = (0..specs.len()).collect();
        let done = self.run(Work { inputs, rows, outputs, deadline, ..Work::default() }).await?;
        let typed = |(spec, raw): (&TensorSpec, RawTensor)| {
            let unsupported = |dtype| {
                let (origin, found) = (self.name.clone(), dtype_name(dtype).to_owned());
                InferError::engine(
                    &self.name,
                    EngineError::UnsupportedType { origin, tensor: spec.name.clone(), found },
                )
            };
            Ok((spec.name.clone(), Tensor::try_from(raw).map_err(unsupported)?))
        };
        specs.iter().zip(done.outputs).map(typed).collect()
    }

    /// That the engine answers, unless it has done so in the last `age`. One that takes no guess of [`Graph::prove`] has at least
    /// read it.
    ///
    /// # Errors
    /// That nobody answers, or what is wrong with the engine.
    pub async fn probe(&self, age: Duration) -> Result<(), InferError> {
        if self.scheduler.last_success().is_some_and(|ago| ago < age) {
            return Ok(());
        }
        match self.prove().await {
            Err(error) if error.is_of_the_input() => {
                self.scheduler.note_success();
                Ok(())
            }
            proven => proven,
        }
    }

    /// Whether something is known that it runs.
    pub fn is_proven(&self) -> bool {
        self.proven.get().is_some()
    }

    /// Runs something small: the inputs that its configuration warms it up with, else one row of zeros.
    ///
    /// Zeros are a guess, and so is their shape: an image may be too small for a model's filters. The first guess that
    /// the engine takes is what it is probed with from then on.
    ///
    /// # Errors
    /// What the engine says to the first guess, or that nobody answers.
    pub async fn prove(&self) -> Result<(), InferError> {
        if let Some(inputs) = self.proven.get() {
            return self.run(self.probing(inputs.clone())).await.map(drop);
        }
        let mut refusal = None;
        // One that took none of them takes none of them later either.
        let count = if self.takes_no_guess.load(Ordering::Relaxed) { 1 } else { usize::MAX };
        for inputs in self.sample.iter().cloned().chain(guesses(&self.signature)).take(count) {
            match self.run(self.probing(inputs.clone())).await {
                Ok(_) => {
                    // Another probe may have found one before.
                    let _ = self.proven.set(inputs);
                    return Ok(());
                }
                Err(error) if error.is_of_the_input() => drop(refusal.get_or_insert(error)),
                Err(error) => return Err(error),
            }
        }
        self.takes_no_guess.store(true, Ordering::Relaxed);
        refusal.map_or(Ok(()), Err)
    }

    fn probing(&self, inputs: Vec<RawTensor>) -> Work {
        let outputs = (0..self.signature.outputs().len()).collect();
        Work { inputs, rows: 1, outputs, is_probe: true, ..Work::default() }
    }

    /// Runs what waits and closes the engine.
    pub async fn stop(&self) {
        self.scheduler.stop().await;
    }
}

/// Elements of an input that is guessed, at most.
const LARGEST_GUESS: i64 = 1 << 24;

/// Requests of zeros that a graph may take, the smallest first: sizes that a request chooses are all 1, then all 2, and so
/// on, in one row and then in as many. Zero is an index that every lookup table has. An input that cannot be made is left
/// out, and the signature names it.
pub(crate) fn guesses(signature: &Signature) -> impl Iterator<Item = Vec<RawTensor>> {
    /// Small ones, and those that filters, patches and heads are usually made for.
    const SIZES: [i64; 17] = [1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 96, 128, 224, 256, 384, 512];
    let mut shapes: Vec<Vec<Vec<i64>>> = Vec::new();
    for is_one_row in [true, false] {
        for size in SIZES {
            let shape = |spec: &TensorSpec| {
                let axis = |(axis, known): (usize, &Option<u64>)| match known {
                    Some(known) => *known as i64,
                    None if axis == 0 && is_one_row => 1,
                    None => size,
                };
                spec.shape.iter().enumerate().map(axis).collect::<Vec<i64>>()
            };
            let guess: Vec<_> = signature.inputs().iter().map(shape).collect();
            let is_small = |shape: &Vec<i64>| {
                shape.iter().try_fold(1_i64, |all, size| all.checked_mul(*size)).is_some_and(|all| all <= LARGEST_GUESS)
            };
            if shapes.is_empty() || (!shapes.contains(&guess) && guess.iter().all(is_small)) {
                shapes.push(guess);
            }
        }
    }
    shapes.into_iter().map(|shapes| {
        let made = signature.inputs().iter().zip(shapes).map(|(spec, shape)| RawTensor::zeros(spec.dtype, shape));
        made.filter_map(Result::ok).collect()
    })
}

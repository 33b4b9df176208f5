//! One graph behind its queue.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sensorium_engine::{EngineError, Named, RawTensor, Signature, dtype_name};
use sensorium_modality::Tensor;

use crate::{
    error::InferError,
    scheduler::{Done, ScheduleError, Scheduler, Work},
};

/// A graph with its signature and its engine.
#[derive(Debug)]
pub struct Graph {
    name: String,
    signature: Signature,
    scheduler: Scheduler,
    /// Whether a probe has ever succeeded.
    takes_zeros: AtomicBool,
}

impl Graph {
    /// A graph called `name` whose engine `scheduler` owns.
    pub(crate) fn new(name: String, signature: Signature, scheduler: Scheduler) -> Arc<Self> {
        Arc::new(Self { name, signature, scheduler, takes_zeros: AtomicBool::new(false) })
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

    /// As a pipeline calls it: typed tensors by name in, all outputs out.
    pub(super) async fn run_named(&self, inputs: Named) -> Result<Named, InferError> {
        let inputs = self.signature.place(inputs).map_err(|source| InferError::engine(&self.name, source))?;
        let rows = inputs.first().and_then(RawTensor::row_count).unwrap_or(1);
        let specs = self.signature.outputs();
        let done = self.run(Work { inputs, rows, outputs: (0..specs.len()).collect(), ..Work::default() }).await?;
        let typed = |(spec, raw): (&sensorium_artifact::TensorSpec, RawTensor)| {
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

    /// Runs one row of zeros, unless the engine has proven itself in the last `age`.
    ///
    /// Zeros of the smallest shape are a guess, and some models take none of it: an image may be too small for its
    /// filters. As long as it has never been a good one, an engine that refuses it has answered, and that is proof enough.
    ///
    /// # Errors
    /// What the engine says, when it says so about something that it could do before, or that nobody answers.
    pub async fn probe(&self, age: Duration) -> Result<(), InferError> {
        if self.scheduler.last_success().is_some_and(|ago| ago < age) {
            return Ok(());
        }
        let outputs = (0..self.signature.outputs().len()).collect();
        let work = Work { inputs: zeros(&self.signature), rows: 1, outputs, is_probe: true, ..Work::default() };
        match self.run(work).await {
            Ok(_) => {
                self.takes_zeros.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(InferError::Schedule(error @ ScheduleError::Engine { .. }))
                if !error.is_everybodys() && !self.takes_zeros.load(Ordering::Relaxed) =>
            {
                self.scheduler.note_success();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Runs what waits and closes the engine.
    pub async fn stop(&self) {
        self.scheduler.stop().await;
    }
}

/// The smallest request that a graph takes: sizes that a request chooses are 1. Zero is an index that every lookup table
/// has. An input that cannot be made is left out, and the signature names it.
fn zeros(signature: &Signature) -> Vec<RawTensor> {
    signature.inputs().iter().filter_map(|spec| RawTensor::smallest(spec, 1).ok()).collect()
}

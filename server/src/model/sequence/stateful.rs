//! An engine that keeps something of each run for the next ones, and says so when it fails.

use sensorium_engine::{Engine, EngineError, RawTensor, Signature, Waiters};

/// Says of a run that failed that it cannot be done again: what the engine keeps may have changed before it failed, for all of
/// the batch.
pub(crate) struct Stateful(pub(crate) Box<dyn Engine>);

type Found = Result<Vec<RawTensor>, EngineError>;

pub(super) fn spoilt(error: EngineError) -> EngineError {
    match error {
        EngineError::Run { reason } => EngineError::Spoilt { reason },
        error => error,
    }
}

impl Engine for Stateful {
    fn signature(&self) -> &Signature {
        self.0.signature()
    }

    fn run_raw(&mut self, inputs: &[RawTensor], outputs: &[usize]) -> Found {
        self.0.run_raw(inputs, outputs).map_err(spoilt)
    }

    fn run_for(&mut self, inputs: &[RawTensor], outputs: &[usize], waiters: Waiters<'_>) -> Found {
        self.0.run_for(inputs, outputs, waiters).map_err(spoilt)
    }

    fn runs_on_any_thread(&self) -> bool {
        self.0.runs_on_any_thread()
    }

    fn keeps_state(&self) -> bool {
        true
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        self.0.reset()
    }
}

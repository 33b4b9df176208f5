//! A sequence that one request has to itself, from its first step to its last.

use std::sync::Arc;

use sensorium_engine::RawTensor;

use super::{Carried, SequenceError, Sequences, seated};
use crate::model::{Sequence, SequenceId};

/// The seat and the state of one request's sequence. Nobody else can name it, so it is in no table: dropping this, in any
/// moment, is its end, and gives the seat to whoever waits.
#[derive(Debug)]
pub(in crate::model) struct Own {
    sequences: Arc<Sequences>,
    id: SequenceId,
    carried: Carried,
}

impl Own {
    /// Waits for a seat behind those who came before. Dropping the future gives the place in the line up.
    ///
    /// # Errors
    /// [`SequenceError::Overloaded`], at once.
    pub(in crate::model) async fn begin(sequences: Arc<Sequences>, id: u64) -> Result<Self, SequenceError> {
        let overloaded = || SequenceError::Overloaded { model: sequences.name.clone(), limit: sequences.limit };
        let seat = sequences.ask()?.seat().await.ok_or_else(overloaded)?;
        let carried = Carried { state: sequences.fills.initial.clone(), seat };
        Ok(Self { sequences, id: SequenceId::Number(id), carried })
    }

    /// Which instance runs it; the first where any may.
    pub(in crate::model) fn instance(&self) -> usize {
        self.carried.seat.position.instance
    }

    /// The graph's inputs for the next step: those in `inputs` that are `None` have their control or state.
    pub(in crate::model) fn fill(&self, inputs: Vec<Option<RawTensor>>, start: bool, end: bool) -> Vec<RawTensor> {
        let sequence = Sequence { id: self.id.clone(), start, end };
        let mut inputs = self.sequences.fills.fill(inputs, &sequence, &self.carried.state);
        if let Some(batches) = self.sequences.seated {
            inputs.extend(seated::seat_input(self.carried.seat.position, start, batches));
        }
        inputs
    }

    /// Keeps the state that the graph gave for the next step.
    pub(in crate::model) fn keep(&mut self, state: &[RawTensor]) {
        // A row of a large batch must not keep the whole of it alive until the next one.
        self.carried.state = state.iter().map(RawTensor::detached).collect();
    }
}

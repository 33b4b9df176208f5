//! Asks parent and candidate the same held-out questions, in turn.

use std::time::{Duration, Instant};

use sensorium_engine::{LocalPipeline, VqaAnswer, VqaInput};
use tokio::runtime::Runtime;

use crate::error::CompressError;
use crate::gate::Measured;
use crate::job::Control;
use crate::questions::{Asked, Questions};

/// Questions per batch: what a server under load runs at a time, and small enough for every cache.
const BATCH: usize = 16;

/// Single questions that are timed; the median of so many pairs is steady.
const SINGLES: usize = 64;

/// Measures accuracy on all questions, and the times of all batches and of the first single questions. Only the graphs are
/// timed: preparing images and texts is the same work for both models.
pub(crate) fn measure(
    parent: &LocalPipeline,
    candidate: &LocalPipeline,
    questions: &Questions,
    runtime: &Runtime,
    control: &Control<'_>,
) -> Result<Measured, CompressError> {
    let pair = Pair { parent, candidate, runtime };
    let known = parent.pipeline().spec().vqa_answers().unwrap_or_default();
    let mut measured = Measured::default();
    let mut answerable = false;
    let mut iter = questions.iter();
    loop {
        let batch: Vec<Asked> = iter.by_ref().take(BATCH).collect::<Result<_, _>>()?;
        if batch.is_empty() {
            break;
        }
        control.step("gating", measured.questions, questions.len() as u64)?;
        answerable |= batch.iter().any(|asked| known.contains(&asked.answer));
        let inputs = batch
            .iter()
            .map(|asked| parent.pipeline().prepare_vqa(&asked.image, &asked.question))
            .collect::<Result<Vec<VqaInput>, _>>()?;
        if measured.questions == 0 {
            // First runs allocate and plan; they say nothing about the rest.
            pair.run(&inputs, 0)?;
            pair.run(&inputs[..1], 0)?;
        }
        let turn = measured.batches.len();
        let (answers, times) = pair.run(&inputs, turn)?;
        // The last batch may be smaller, which shifts the balance of fixed and growing costs.
        if inputs.len() == BATCH || measured.batches.is_empty() {
            measured.batches.push(times);
        }
        for input in inputs.iter().take(SINGLES - measured.singles.len()) {
            let turn = measured.singles.len();
            measured.singles.push(pair.run(std::slice::from_ref(input), turn)?.1);
        }
        let right = |answers: &[VqaAnswer]| {
            answers.iter().zip(&batch).filter(|(found, asked)| found.answer == asked.answer).count() as u64
        };
        measured.parent_right += right(&answers.0);
        measured.candidate_right += right(&answers.1);
        measured.questions += batch.len() as u64;
    }
    if measured.questions == 0 {
        return Err(CompressError::NoQuestions { uri: questions.uri().to_owned() });
    }
    if !answerable {
        return Err(CompressError::ForeignData { uri: questions.uri().to_owned(), known: known.to_vec() });
    }
    Ok(measured)
}

struct Pair<'a> {
    parent: &'a LocalPipeline,
    candidate: &'a LocalPipeline,
    runtime: &'a Runtime,
}

type Timed<T> = ((T, T), (Duration, Duration));

impl Pair<'_> {
    /// Answers and times of both, parent first in the result. Who runs first alternates with `turn`: the second finds the
    /// inputs in the cache.
    fn run(&self, inputs: &[VqaInput], turn: usize) -> Result<Timed<Vec<VqaAnswer>>, CompressError> {
        if turn.is_multiple_of(2) {
            let (parent, parent_time) = self.answer(self.parent, inputs)?;
            let (candidate, candidate_time) = self.answer(self.candidate, inputs)?;
            Ok(((parent, candidate), (parent_time, candidate_time)))
        } else {
            let (candidate, candidate_time) = self.answer(self.candidate, inputs)?;
            let (parent, parent_time) = self.answer(self.parent, inputs)?;
            Ok(((parent, candidate), (parent_time, candidate_time)))
        }
    }

    fn answer(&self, model: &LocalPipeline, inputs: &[VqaInput]) -> Result<(Vec<VqaAnswer>, Duration), CompressError> {
        let start = Instant::now();
        let answers = self.runtime.block_on(model.pipeline().vqa(model, inputs))?;
        Ok((answers, start.elapsed()))
    }
}

//! The curves of a run, for people: `history.jsonl` and `evaluation.json` beside the checkpoints.

use std::fs;
use std::path::{Path, PathBuf};

use sensorium_api::run::{Evaluation, HistoryPoint};
use sensorium_artifact::{ArtifactError, atomic};

/// Points that a curve is drawn from at most; a longer run keeps every n-th.
const MOST_POINTS: u64 = 2_000;

/// Written by rank 0 only; on other ranks every call does nothing. Losing a curve ends no run: failures are logged.
#[derive(Debug)]
pub struct History {
    folder: Option<PathBuf>,
    every: u64,
    points: Vec<HistoryPoint>,
}

impl History {
    /// Goes on with the curve in `folder` up to `first`, the steps that are done; what came after is forgotten.
    pub fn open(folder: &Path, first: u64, steps: u64, writes: bool) -> Self {
        if writes {
            atomic::sweep(folder);
        }
        let text = if first > 0 {
            fs::read_to_string(folder.join("history.jsonl")).unwrap_or_default()
        } else {
            String::new()
        };
        let points = text.lines().filter_map(|line| serde_json::from_str::<HistoryPoint>(line).ok());
        let points = points.filter(|point| point.step <= first).collect();
        Self { folder: writes.then(|| folder.to_owned()), every: steps.div_ceil(MOST_POINTS).max(1), points }
    }

    /// Adds a step, unless the curve is dense enough without it.
    pub fn note(&mut self, point: HistoryPoint) {
        if point.step.is_multiple_of(self.every) || point.accuracy.is_some() {
            self.points.push(point);
        }
    }

    /// Writes the curve.
    pub fn save(&self) {
        let Some(folder) = &self.folder else { return };
        let lines = self.points.iter().filter_map(|point| serde_json::to_string(point).ok());
        let text = lines.map(|line| line + "\n").collect::<String>();
        report(atomic::write(folder.join("history.jsonl"), text));
    }

    /// Adds the last evaluation to the curve and writes both.
    pub fn finish(&mut self, evaluation: &Evaluation) {
        if let Some(last) = self.points.last_mut() {
            last.accuracy = Some(evaluation.accuracy);
        }
        self.save();
        let Some(folder) = &self.folder else { return };
        match serde_json::to_vec_pretty(evaluation) {
            Ok(bytes) => report(atomic::write(folder.join("evaluation.json"), bytes)),
            Err(error) => tracing::warn!(%error, "could not write the evaluation"),
        }
    }
}

fn report(written: Result<(), ArtifactError>) {
    if let Err(error) = written {
        tracing::warn!(error = &error as &dyn std::error::Error, "could not write the run's curves");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(step: u64) -> HistoryPoint {
        HistoryPoint { step, loss: 1.0, learning_rate: 1e-3, grad_norm: 1.0, accuracy: None, seconds: 0.0 }
    }

    #[test]
    fn a_resumed_curve_forgets_the_steps_after_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let mut history = History::open(folder.path(), 0, 100, true);
        (1..=30).for_each(|step| history.note(point(step)));
        history.save();
        let resumed = History::open(folder.path(), 20, 100, true);
        assert_eq!(resumed.points.last().map(|point| point.step), Some(20));
        assert!(History::open(folder.path(), 0, 100, true).points.is_empty());
    }

    #[test]
    fn a_long_run_keeps_a_bounded_number_of_points() {
        let folder = tempfile::tempdir().unwrap();
        let mut history = History::open(folder.path(), 0, 100_000, false);
        (1..=100_000).for_each(|step| history.note(point(step)));
        assert_eq!(history.points.len(), 2_000);
    }
}

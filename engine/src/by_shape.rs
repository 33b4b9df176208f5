//! For engines that take long over inputs of another shape than the last run's.
//!
//! onnxruntime's CUDA provider plans each convolution for the shape that comes, and keeps the last plan alone. A network of fifty
//! convolutions ran in 5 ms on an H200 after a run of the same shape, and in 540 ms after one of another, however often both had
//! been there (bench/RESULTS.md). So there is an engine for each shape, once it is found that they cost so much; engines that
//! plan nothing stay one.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::engine::{Engine, Waiters};
use crate::error::EngineError;
use crate::raw::RawTensor;
use crate::signature::Signature;

/// Engines at most: each has the weights once more.
const MOST: usize = 12;

/// Makes an engine like the others.
type Open = dyn Fn() -> Result<Box<dyn Engine>, EngineError> + Send;

/// Sizes of all inputs.
type Shapes = Vec<Vec<i64>>;

/// One engine to its caller: one for all shapes, and as soon as changes of shape are found to be dear one for each.
pub(crate) struct ByShape {
    open: Box<Open>,
    signature: Signature,
    /// The one that ran last is the last; never empty.
    engines: Vec<Owned>,
    /// How many there may be.
    most: usize,
    changes: Changes,
}

/// An engine, and what it ran last.
struct Owned {
    engine: Box<dyn Engine>,
    shapes: Shapes,
}

impl ByShape {
    /// With what makes the engines, of which the first is made.
    ///
    /// # Errors
    /// Its.
    pub(crate) fn new(
        open: impl Fn() -> Result<Box<dyn Engine>, EngineError> + Send + 'static,
    ) -> Result<Self, EngineError> {
        let engine = open()?;
        let signature = engine.signature().clone();
        let engines = vec![Owned { engine, shapes: Shapes::new() }];
        Ok(Self { open: Box::new(open), signature, engines, most: MOST, changes: Changes::default() })
    }

    /// The place of the engine for these shapes: the one that ran them last, else a new one, else the one that has not run for the
    /// longest.
    fn place_for(&mut self, shapes: &Shapes) -> usize {
        if let Some(place) = self.engines.iter().position(|own| own.shapes == *shapes) {
            return place;
        }
        if !self.changes.are_dear() || self.engines.len() >= self.most {
            return 0;
        }
        match (self.open)() {
            Ok(engine) => {
                self.engines.push(Owned { engine, shapes: Shapes::new() });
                self.engines.len() - 1
            }
            Err(error) => {
                self.be_content(&error);
                0
            }
        }
    }

    /// Makes do with the engines that there are: memory is short, most likely, which another attempt would not mend.
    fn be_content(&mut self, error: &EngineError) {
        self.most = self.engines.len();
        tracing::warn!(%error, engines = self.most, "shapes that are new get no engine of their own any more");
    }

    fn run_on<T>(
        &mut self,
        inputs: &[RawTensor],
        mut run: impl FnMut(&mut dyn Engine) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let shapes: Shapes = inputs.iter().map(|input| input.shape().to_vec()).collect();
        let mut place = self.place_for(&shapes);
        let is_new = self.engines.len() > 1 && self.engines[place].shapes.is_empty();
        let started = Instant::now();
        let mut found = run(self.engines[place].engine.as_mut());
        if let Err(error) = &found
            && is_new
            && is_for_want_of_memory(error)
        {
            // The weights had room and the run had not. What it has goes, and who has room already runs.
            self.engines.pop();
            self.be_content(error);
            place = 0;
            found = run(self.engines[place].engine.as_mut());
        }
        self.engines[place].shapes.clone_from(&shapes);
        self.engines[place..].rotate_left(1);
        if found.is_ok() && !self.changes.are_dear() {
            self.changes.ran(shapes, started.elapsed());
            if self.changes.are_dear() {
                tracing::info!("shapes of inputs get engines of their own: a change of shape costs many runs");
            }
        }
        found
    }
}

/// Libraries have no name for it but what they say.
fn is_for_want_of_memory(error: &EngineError) -> bool {
    matches!(error, EngineError::Run { reason } if reason.to_lowercase().contains("memory"))
}

impl Engine for ByShape {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run_raw(&mut self, inputs: &[RawTensor], outputs: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
        self.run_on(inputs, |engine| engine.run_raw(inputs, outputs))
    }

    fn run_for(
        &mut self,
        inputs: &[RawTensor],
        outputs: &[usize],
        waiters: Waiters<'_>,
    ) -> Result<Vec<RawTensor>, EngineError> {
        let Waiters { deadline, poll_gone } = waiters;
        self.run_on(inputs, |engine| engine.run_for(inputs, outputs, Waiters { deadline, poll_gone: &mut *poll_gone }))
    }

    fn runs_on_any_thread(&self) -> bool {
        self.engines.iter().all(|own| own.engine.runs_on_any_thread())
    }
}

/// What runs say of a change of shape.
#[derive(Debug, Default)]
struct Changes {
    known: BTreeSet<Shapes>,
    last: Shapes,
    /// How long the last change took, until it is followed by a run of the same shape.
    change: Option<Duration>,
    /// Changes in a row that were dear.
    dear: u32,
}

impl Changes {
    /// So many times the run after it makes a change dear, if it is also so much. What else the machine does weighs on both.
    const TIMES: u32 = 4;
    const LEAST: Duration = Duration::from_millis(10);
    /// So many dear changes in a row are no accident.
    const ENOUGH: u32 = 2;
    /// Shapes to know of.
    const MOST_KNOWN: usize = 64;

    fn are_dear(&self) -> bool {
        self.dear >= Self::ENOUGH
    }

    /// Notes a run. Only a shape that is known says something: the first run of any may well take long.
    fn ran(&mut self, shapes: Shapes, took: Duration) {
        if shapes == self.last {
            if let Some(change) = self.change.take() {
                let is_dear = change > took * Self::TIMES && change > Self::LEAST;
                self.dear = if is_dear { self.dear + 1 } else { 0 };
            }
            return;
        }
        let is_known = self.known.contains(&shapes);
        if !is_known && self.known.len() < Self::MOST_KNOWN {
            self.known.insert(shapes.clone());
        }
        self.change = is_known.then_some(took);
        self.last = shapes;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use sensorium_artifact::DType;

    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// After runs of so many rows, that took so many milliseconds.
    fn after(runs: &[(i64, u64)]) -> bool {
        let mut changes = Changes::default();
        for &(rows, took) in runs {
            changes.ran(vec![vec![rows, 3]], ms(took));
        }
        changes.are_dear()
    }

    #[test]
    fn changes_are_dear_where_shapes_that_are_known_take_long_again_and_again() {
        let known = [(1, 900), (1, 2), (8, 800), (8, 4)];
        assert!(!after(&known), "the first runs of a shape say nothing");
        assert!(!after(&[&known[..], &[(1, 500), (1, 2), (8, 500)]].concat()));
        assert!(after(&[&known[..], &[(1, 500), (1, 2), (8, 500), (8, 4)]].concat()));
        assert!(after(&[&known[..], &[(1, 500), (1, 2), (8, 500), (1, 500), (8, 500), (8, 5)]].concat()));
        assert!(!after(&[&known[..], &[(1, 500), (1, 2), (8, 5), (8, 4)]].concat()), "once may be an accident");
        assert!(!after(&[&known[..], &[(1, 9), (1, 2), (8, 9), (8, 2)]].concat()), "that is nothing");
        let slow = [(1, 90), (1, 85), (8, 300), (8, 280)];
        assert!(!after(&[&known[..], &slow[..], &slow[..]].concat()), "the machine has become slow, changes have not");
    }

    /// Notes what it is asked, and takes its time over every change.
    struct Planner {
        id: usize,
        last: Option<i64>,
        has_room: bool,
        asked: Arc<Mutex<Vec<(usize, i64)>>>,
        signature: Signature,
    }

    impl Engine for Planner {
        fn signature(&self) -> &Signature {
            &self.signature
        }

        fn run_raw(&mut self, inputs: &[RawTensor], _: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
            let rows = inputs[0].shape()[0];
            self.asked.lock().unwrap().push((self.id, rows));
            if !self.has_room {
                return Err(EngineError::Run { reason: "Failed to allocate memory".to_owned() });
            }
            if self.last.replace(rows) != Some(rows) {
                std::thread::sleep(ms(40));
            }
            Ok(inputs.to_vec())
        }
    }

    /// What engines of which `openable` can be opened, and `with_room` of these run, are asked, by number, once changes are known to be
    /// dear, at the last of rows 8.
    fn asked(openable: usize, with_room: usize, rows: &[i64]) -> Vec<(usize, i64)> {
        let asked: Arc<Mutex<Vec<_>>> = Arc::default();
        let open = {
            let (asked, made) = (asked.clone(), Mutex::new(0));
            move || {
                let mut made = made.lock().unwrap();
                *made += 1;
                if *made > openable {
                    return Err(EngineError::Setup { reason: "there is no more".to_owned() });
                }
                let (signature, has_room) = (Signature::of_manifest(&[], &[]), *made <= with_room);
                let planner = Planner { id: *made, last: None, has_room, asked: asked.clone(), signature };
                Ok(Box::new(planner) as Box<dyn Engine>)
            }
        };
        let mut engine = ByShape::new(open).unwrap();
        let run = |engine: &mut ByShape, rows: i64| {
            let found = engine.run_raw(&[RawTensor::zeros(DType::Fp32, vec![rows, 2]).unwrap()], &[]).unwrap();
            assert_eq!(found[0].shape(), [rows, 2]);
        };
        // A machine that stands still for a moment makes it take longer.
        while !engine.changes.are_dear() {
            for rows in [1, 1, 8, 8] {
                run(&mut engine, rows);
            }
        }
        asked.lock().unwrap().clear();
        for rows in rows {
            run(&mut engine, *rows);
        }
        asked.lock().unwrap().clone()
    }

    #[test]
    fn shapes_get_engines_of_their_own_as_far_as_there_are_any() {
        let rows = [1, 8, 1, 4, 8, 1, 2, 8];
        let of_three = [(2, 1), (1, 8), (2, 1), (3, 4), (1, 8), (2, 1), (3, 2), (1, 8)];
        assert_eq!(asked(3, 3, &rows), of_three, "there is no fourth");
        assert_eq!(asked(9, 9, &rows)[6], (4, 2));
    }

    #[test]
    fn an_engine_that_has_no_room_to_run_goes_and_another_one_runs_in_its_place() {
        let found = asked(9, 2, &[1, 4, 8, 2]);
        assert_eq!(found, [(2, 1), (3, 4), (1, 4), (2, 8), (1, 2)]);
    }
}

//! An engine that remembers, in the rows of its batch, what sequences did before: Triton's `direct`.
//!
//! The scheduler puts requests of different sequences together as for any model, and each brings along where it sits. Here
//! its rows become those of the whole batch: each in its seat, and in seats of which nothing came a row that says so. The
//! model is run on all of them, and what it gives is taken out of the seats again.

use std::sync::Arc;

use sensorium_artifact::{DType, TensorSpec};
use sensorium_engine::{Engine, EngineError, RawTensor, Signature, Waiters};

use super::{
    seats::{Position, Seats},
    stateful::spoilt,
};

/// The input that tells where a request sits, behind those of the graph: the row from 1 on, 0 for a request of no
/// sequence; and whether the sequence begins. No graph can have one of this name from a file.
const SEAT: &str = "\u{1}seat";

/// An engine whose rows are the seats of sequences.
pub(crate) struct Seated {
    engine: Box<dyn Engine>,
    signature: Signature,
    room: Arc<Room>,
    /// Whether a sequence has begun in each row since the engine was opened.
    begun: Vec<bool>,
}

type Found = Result<Vec<RawTensor>, EngineError>;

/// What all instances of a model and their replacements have in common, but for the instance.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    pub(super) seats: Arc<Seats>,
    pub(super) instance: usize,
    /// Rows of the batch; 1 where the graph has no batch axis.
    pub(super) rows: usize,
    pub(super) batches: bool,
    /// For each input of the graph, the row of a seat of which nothing came; `None` for zeros like the other rows.
    pub(super) empty: Vec<Option<RawTensor>>,
    /// Whether the graph is told which rows to leave alone.
    pub(super) has_ready: bool,
}

/// Where a request sits, as its last input.
pub(super) fn seat_input(position: Position, is_start: bool, batches: bool) -> Option<RawTensor> {
    let shape = if batches { vec![1, 2] } else { vec![2] };
    let row = i32::try_from(position.row + 1).ok()?;
    RawTensor::from_vec(DType::Int32, shape, vec![row, i32::from(is_start)]).ok()
}

impl Seated {
    /// Puts an engine behind the seats of `room`.
    pub(crate) fn new(engine: Box<dyn Engine>, room: Room) -> Self {
        let shape = if room.batches { vec![None, Some(2)] } else { vec![Some(2)] };
        let seat = TensorSpec { name: SEAT.to_owned(), dtype: DType::Int32, shape };
        let signature = engine.signature().with_input(seat);
        let begun = vec![false; room.rows];
        Self { engine, signature, room: Arc::new(room), begun }
    }

    /// Where each row of the run sits, in its order. `None` for that of no sequence, of which there is only one.
    fn positions(&self, seats: &RawTensor) -> Result<Option<Vec<usize>>, EngineError> {
        let mut rows = Vec::new();
        for pair in seats.numbers::<i32>().chunks_exact(2) {
            let Some(row) = usize::try_from(pair[0]).unwrap_or(0).checked_sub(1) else { return Ok(None) };
            if row >= self.room.rows || rows.contains(&row) {
                return Err(failed(format!("two requests have seat {row}, or there are fewer")));
            }
            if pair[1] == 0 && !self.begun[row] {
                return Err(failed(
                    "the sequence's state died with an engine that was replaced; begin it again".to_owned(),
                ));
            }
            rows.push(row);
        }
        Ok(Some(rows))
    }

    /// One input for all rows of the batch.
    fn spread(&self, index: usize, input: &RawTensor, rows: &[usize]) -> Result<RawTensor, EngineError> {
        let unfit = || failed(format!("the rows of input `{}` are not those of its requests", self.name(index)));
        // A probe may have any number of rows, and none of them sits.
        let count = if rows.is_empty() { input.row_count().unwrap_or(1) } else { rows.len() };
        let given = input.split(std::iter::repeat_n(1, count)).ok_or_else(unfit)?;
        let like = given.first().ok_or_else(unfit)?;
        let empty = match self.room.empty.get(index) {
            Some(Some(empty)) if empty.shape() == like.shape() => empty.clone(),
            _ => RawTensor::zeros(like.dtype(), like.shape().to_vec()).map_err(|error| failed(error.to_string()))?,
        };
        let row = |seat: usize| rows.iter().position(|row| *row == seat).map_or(&empty, |index| &given[index]);
        let all: Vec<_> = (0..self.room.rows).map(row).collect();
        RawTensor::concat(&all).map_err(|error| failed(error.to_string()))
    }

    /// The rows of an output that are somebody's, in the order of the requests.
    fn gather(&self, output: &RawTensor, rows: &[usize]) -> Result<RawTensor, EngineError> {
        let all = output.split(std::iter::repeat_n(1, self.room.rows)).ok_or_else(|| {
            failed(format!(
                "it gave an output of shape {:?}, but its batch has {} rows",
                output.shape(),
                self.room.rows
            ))
        })?;
        let own: Vec<_> = rows.iter().map(|row| &all[*row]).collect();
        RawTensor::concat(&own).map_err(|error| failed(error.to_string()))
    }

    fn name(&self, index: usize) -> &str {
        self.signature.inputs().get(index).map_or("", |spec| &spec.name)
    }

    /// Runs the whole batch with the requests' rows in the seats `into`, and takes those of the seats `from` out of it.
    fn run_seats(
        &mut self,
        inputs: &[RawTensor],
        into: &[usize],
        from: &[usize],
        run: impl FnOnce(&mut dyn Engine, &[RawTensor]) -> Found,
    ) -> Found {
        let spread = |(index, input)| self.spread(index, input, into);
        let inputs: Vec<_> = inputs.iter().enumerate().map(spread).collect::<Result<_, _>>()?;
        let found = run(self.engine.as_mut(), &inputs)?;
        // It has run, and may have kept something of that.
        let again = |error| if self.engine.keeps_state() { spoilt(error) } else { error };
        found.iter().map(|output| self.gather(output, from).map_err(again)).collect()
    }

    /// A run for nobody, to see that the engine runs: every seat is empty.
    fn probe(
        &mut self,
        inputs: &[RawTensor],
        outputs: &[usize],
        run: impl FnOnce(&mut dyn Engine, &[RawTensor]) -> Found,
    ) -> Found {
        if !self.room.has_ready && self.room.seats.is_any_taken(self.room.instance) {
            // It would change what the model knows of a sequence, which by being under way shows that the engine runs.
            let specs = outputs.iter().filter_map(|output| self.signature.outputs().get(*output));
            let zeros = specs.map(|spec| RawTensor::smallest(spec, 1).map_err(|error| failed(error.to_string())));
            return zeros.collect();
        }
        if !self.room.batches {
            return run(self.engine.as_mut(), inputs);
        }
        self.run_seats(inputs, &[], &[0], run)
    }

    /// As [`Engine::run_raw`], by `run`, which is one of the engine's ways to give `outputs`.
    fn run_by(
        &mut self,
        inputs: &[RawTensor],
        outputs: &[usize],
        run: impl FnOnce(&mut dyn Engine, &[RawTensor]) -> Found,
    ) -> Found {
        let Some((seats, inputs)) = inputs.split_last() else { return Err(failed("it has no inputs".to_owned())) };
        // A start is noted before it is run: what follows a start that failed is told by the model, not by us.
        let starts = seats.numbers::<i32>();
        for pair in starts.chunks_exact(2).filter(|pair| pair[1] != 0) {
            let row = usize::try_from(pair[0]).unwrap_or(0).checked_sub(1);
            if let Some(begun) = row.and_then(|row| self.begun.get_mut(row)) {
                *begun = true;
                if self.room.rows == 1 {
                    self.engine.reset()?;
                }
            }
        }
        let Some(rows) = self.positions(seats)? else { return self.probe(inputs, outputs, run) };
        if !self.room.batches {
            return run(self.engine.as_mut(), inputs);
        }
        self.run_seats(inputs, &rows, &rows, run)
    }
}

impl Engine for Seated {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run_raw(&mut self, inputs: &[RawTensor], outputs: &[usize]) -> Found {
        self.run_by(inputs, outputs, |engine, inputs| engine.run_raw(inputs, outputs))
    }

    fn run_for(&mut self, inputs: &[RawTensor], outputs: &[usize], waiters: Waiters<'_>) -> Found {
        self.run_by(inputs, outputs, |engine, inputs| engine.run_for(inputs, outputs, waiters))
    }

    fn runs_on_any_thread(&self) -> bool {
        self.engine.runs_on_any_thread()
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        self.engine.reset()
    }
}

fn failed(reason: String) -> EngineError {
    EngineError::Run { reason }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use sensorium_engine::{OnnxRuntime, Options};
    use sensorium_onnx::{DType as OnnxDType, Dim, GraphBuilder};

    use super::*;

    /// Three seats before a graph that gives each row, and the sum of all rows.
    fn seated() -> Seated {
        let one = [Dim::Symbol("batch"), Dim::Fixed(1)];
        let mut graph = GraphBuilder::new("rows");
        let x = graph.input("x", OnnxDType::F32, &one);
        let axis = graph.vector_i64(&[0]);
        let sum = graph.node("ReduceSum", &[&x, &axis], vec![]);
        let zero = graph.node("Sub", &[&x, &x], vec![]);
        let sums = graph.node("Add", &[&zero, &sum], vec![]);
        let same = graph.node("Identity", &[&x], vec![]);
        graph.output("same", &same, OnnxDType::F32, &one);
        graph.output("sums", &sums, OnnxDType::F32, &one);
        let bytes = graph.finish(20).unwrap().to_bytes();
        three_seats(Box::new(OnnxRuntime::open_bytes("rows", &bytes, Options::default()).unwrap()))
    }

    fn three_seats(engine: Box<dyn Engine>) -> Seated {
        let empty = vec![Some(f32s(&[100.0]))];
        let seats = Seats::new(1, 3, 0);
        Seated::new(engine, Room { seats, instance: 0, rows: 3, batches: true, empty, has_ready: false })
    }

    fn f32s(values: &[f32]) -> RawTensor {
        RawTensor::from_vec(DType::Fp32, vec![values.len() as i64, 1], values.to_vec()).unwrap()
    }

    /// Rows from 0 on, and whether they begin.
    fn run(engine: &mut Seated, values: &[f32], seats: &[(usize, bool)]) -> Result<Vec<Vec<f32>>, String> {
        let seat =
            |&(row, is_start): &(usize, bool)| seat_input(Position { instance: 0, row }, is_start, true).unwrap();
        let seats: Vec<_> = seats.iter().map(seat).collect();
        let seats = RawTensor::concat(&seats.iter().collect::<Vec<_>>()).unwrap();
        let found = engine.run_raw(&[f32s(values), seats], &[0, 1]).map_err(|error| error.to_string())?;
        Ok(found.iter().map(|tensor| tensor.numbers().into_owned()).collect())
    }

    #[test]
    fn rows_go_to_their_seats_and_come_back_in_the_order_of_the_requests() {
        let mut engine = seated();
        let found = run(&mut engine, &[5.0, 7.0], &[(2, true), (0, true)]);
        assert_eq!(found, Ok(vec![vec![5.0, 7.0], vec![112.0, 112.0]]), "the third seat is run as empty");
        let found = run(&mut engine, &[1.0, 2.0, 3.0], &[(1, true), (2, false), (0, false)]);
        assert_eq!(found, Ok(vec![vec![1.0, 2.0, 3.0], vec![6.0; 3]]));
    }

    /// Gives what it takes, to those who wait for as long as it takes.
    struct Cut(Signature);

    impl Engine for Cut {
        fn signature(&self) -> &Signature {
            &self.0
        }

        fn run_raw(&mut self, inputs: &[RawTensor], _: &[usize]) -> Found {
            Ok(inputs.to_vec())
        }

        fn run_for(&mut self, _: &[RawTensor], _: &[usize], _: Waiters<'_>) -> Found {
            Err(EngineError::CutShort)
        }
    }

    #[test]
    fn a_run_behind_seats_can_be_cut_short_like_any_other() {
        let x = [TensorSpec { name: "x".to_owned(), dtype: DType::Fp32, shape: vec![None, Some(1)] }];
        let mut engine = three_seats(Box::new(Cut(Signature::of_manifest(&x, &x))));
        let inputs = [f32s(&[5.0]), seat_input(Position { instance: 0, row: 1 }, true, true).unwrap()];
        assert_eq!(engine.run_raw(&inputs, &[0]).unwrap(), [f32s(&[5.0])]);
        let waiters = Waiters { deadline: None, poll_gone: &mut |_| Poll::Pending };
        assert!(matches!(engine.run_for(&inputs, &[0], waiters), Err(EngineError::CutShort)));
    }

    #[test]
    fn a_sequence_whose_engine_was_replaced_is_told_to_begin_again() {
        let mut engine = seated();
        run(&mut engine, &[1.0], &[(1, true)]).unwrap();
        run(&mut engine, &[1.0], &[(1, false)]).unwrap();
        let error = run(&mut seated(), &[1.0], &[(1, false)]).unwrap_err();
        assert!(error.contains("died with an engine that was replaced; begin it again"), "{error}");
        let error = run(&mut engine, &[1.0, 2.0], &[(1, false), (1, false)]).unwrap_err();
        assert!(error.contains("two requests have seat 1"), "{error}");
    }

    #[test]
    fn a_request_of_no_sequence_is_run_in_no_seat_and_only_while_nobody_sits() {
        let mut engine = seated();
        let nobody = RawTensor::zeros(DType::Int32, vec![1, 2]).unwrap();
        let probe = |engine: &mut Seated| {
            let found = engine.run_raw(&[f32s(&[0.0]), nobody.clone()], &[1]).unwrap();
            found[0].numbers::<f32>().into_owned()
        };
        assert_eq!(probe(&mut engine), [300.0]);
        let seat = engine.room.seats.ask().unwrap();
        assert_eq!(probe(&mut engine), [0.0]);
        drop(seat);
        assert_eq!(probe(&mut engine), [300.0]);
    }
}

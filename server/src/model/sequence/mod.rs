//! Models that keep state between the requests of a sequence.
//!
//! The state travels: each request of a sequence takes it from the one before and leaves it for the one after, so that
//! they run one at a time and in the order of their coming, while requests of different sequences share batches. The
//! number of sequences that are under way at a time is bounded; more of them wait for one to end.
//!
//! Both strategies of Triton's configuration are run so. They differ in what a place among those under way is: with
//! `oldest` it is one of a number, of one instance where engines keep state by the sequence's id, and with `direct` it is a
//! seat, the same row of the same instance's batch for all of a sequence's life, so that an engine can keep state by rows
//! ([`seated`]).
//!
//! What a request leaves, by what becomes of it. Refused, by the queue that it goes to, is also: failed, or left by its caller.
//!
//! | request | | entry in the table | seat | state |
//! |---|---|---|---|---|
//! | START | refused for want of a place | none | none | none |
//! | START | of an id that is under way | its own | that of the id, if it is not lost | the initial one |
//! | START | gone before it sat | one of which nothing comes | none | none |
//! | START | refused once it sat | its own | kept | the initial one |
//! | START | answered | its own | kept | what the graph gave |
//! | middle | refused | kept | kept | as before |
//! | middle | answered | kept | kept | what the graph gave |
//! | END | refused | put back, unless the id was taken meanwhile | kept with it | as before |
//! | END | answered | none | given back | none |
//! | START and END | either | none | given back | none |

mod fill;
mod own;
mod seated;
mod seats;
mod stateful;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sensorium_engine::{RawTensor, Signature};
use sensorium_proto::inference::{ModelSequenceBatching, model_sequence_batching::StrategyChoice};
use tokio::sync::oneshot;

pub(super) use self::own::Own;
pub(crate) use self::seated::{Room, Seated};
pub(crate) use self::stateful::Stateful;
use self::{
    fill::Fills,
    seats::{Asked, Full, Seat, Seats},
};
use super::{Sequence, SequenceId};

/// How long a sequence may be idle where `max_sequence_idle_microseconds` does not say, as with Triton.
pub(crate) const IDLE: Duration = Duration::from_secs(1);
/// Sequences that may wait for others to end, for each that may be under way.
const BACKLOG: usize = 32;

/// The sequences of one model.
#[derive(Debug)]
pub struct Sequences {
    name: String,
    fills: Fills,
    idle: Duration,
    /// Sequences that may be under way or wait.
    limit: usize,
    /// One for each sequence that may be under way.
    seats: Arc<Seats>,
    /// Whether a sequence stays with one instance.
    stays: bool,
    /// Where seats are rows of an instance's batch: whether that has a batch axis.
    seated: Option<bool>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    under_way: HashMap<SequenceId, Entry>,
    swept: Option<Instant>,
}

/// A sequence of which more is expected.
#[derive(Debug)]
struct Entry {
    /// Where the last request leaves the state.
    last: oneshot::Receiver<Carried>,
    touched: Instant,
    /// Held by each request that waits or runs.
    users: Arc<()>,
}

/// What goes from one request of a sequence to the next.
#[derive(Debug)]
struct Carried {
    state: Vec<RawTensor>,
    seat: Seat,
}

/// Why a request is not part of any sequence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SequenceError {
    /// It does not say which.
    #[error("inference request to model {model:?} must specify a non-zero or non-empty correlation ID (sequence_id)")]
    NoId {
        /// The model.
        model: String,
    },
    /// There is no such sequence, or it was idle for too long.
    #[error(
        "inference request for sequence {sequence} to model {model:?} must specify the START flag on the first request of \
         the sequence; it has ended, was idle for more than {idle:?}, or never began"
    )]
    NotStarted {
        /// The model.
        model: String,
        /// The id.
        sequence: String,
        /// How long a sequence may be idle.
        idle: Duration,
    },
    /// A request of a sequence is one step of it.
    #[error("a request of a sequence has one row, this one has {rows}")]
    Rows {
        /// Of the request.
        rows: usize,
    },
    /// The model takes the id as a number.
    #[error("model {model:?} takes correlation IDs as numbers, this one is a text")]
    TextId {
        /// The model.
        model: String,
    },
    /// A request of a model that runs each as a sequence goes on with one.
    #[error(
        "model {model:?} runs every request as a sequence of its own; leave sequence_id out, or set sequence_start"
    )]
    NamedId {
        /// The model.
        model: String,
    },
    /// Too many sequences wait. Trying again later may succeed.
    #[error("model {model:?} has as many sequences as it takes, {limit}; try again later")]
    Overloaded {
        /// The model.
        model: String,
        /// Sequences under way and waiting.
        limit: usize,
    },
}

impl Sequences {
    /// The sequences of a model with this configuration that has `instances` engines, whose batches have `rows` rows;
    /// `None` for engines without a batch axis. `keeps_state` says that the engines may keep something of a sequence.
    ///
    /// # Errors
    /// The first option that does not fit the graph, as a sentence about the model.
    pub(crate) fn new(
        name: &str,
        config: &ModelSequenceBatching,
        signature: &Signature,
        instances: usize,
        rows: Option<usize>,
        keeps_state: bool,
        folder: &std::path::Path,
    ) -> Result<Arc<Self>, String> {
        let (instances, rows_each, seated) = match &config.strategy_choice {
            Some(StrategyChoice::Oldest(oldest)) => {
                let candidates = usize::try_from(oldest.max_candidate_sequences).ok().filter(|count| *count > 0);
                let candidates = candidates.unwrap_or(rows.unwrap_or(1));
                // Where all state is the server's any instance runs any of them, and each brings as many.
                if keeps_state {
                    (instances, candidates, None)
                } else {
                    (1, candidates.saturating_mul(instances), None)
                }
            }
            Some(StrategyChoice::Direct(_)) | None => (instances, rows.unwrap_or(1), Some(rows.is_some())),
        };
        let count = instances.saturating_mul(rows_each);
        let idle = match config.max_sequence_idle_microseconds {
            0 => IDLE,
            microseconds => Duration::from_micros(microseconds),
        };
        Ok(Arc::new(Self {
            name: name.to_owned(),
            fills: Fills::new(config, signature, rows.is_some(), folder)?,
            idle,
            limit: count.saturating_mul(1 + BACKLOG),
            seats: Seats::new(instances, rows_each, count.saturating_mul(BACKLOG)),
            stays: keeps_state || seated.is_some(),
            seated,
            table: Mutex::default(),
        }))
    }

    /// Whether a sequence stays with one instance, so that each has a line of its own.
    pub(crate) fn stays(&self) -> bool {
        self.stays
    }

    /// Where the sequences of an instance sit; `None` where any instance may run any request.
    pub(crate) fn room(&self, instance: usize, rows: usize) -> Option<Room> {
        Some(Room {
            seats: self.seats.clone(),
            instance,
            rows,
            batches: self.seated?,
            empty: self.fills.empty(),
            has_ready: self.fills.has_ready(),
        })
    }

    /// The graph's outputs that are state, to be asked for beside those that the client wants.
    pub(super) fn state_outputs(&self) -> &[usize] {
        &self.fills.state_outputs
    }

    /// Takes the request's place behind those of its sequence that came before, in the moment of the call.
    ///
    /// # Errors
    /// [`SequenceError`].
    pub(super) fn enter(self: &Arc<Self>, sequence: Option<&Sequence>, rows: usize) -> Result<Turn, SequenceError> {
        let sequence = sequence.ok_or_else(|| SequenceError::NoId { model: self.name.clone() })?;
        Self::check_rows(rows)?;
        self.fills.check_id(&self.name, &sequence.id)?;
        let (next, last) = oneshot::channel();
        let mut table = self.lock();
        self.sweep(&mut table);
        // One that begins again has a seat already, or will be given that of the request before it.
        let is_new = sequence.start && !table.under_way.contains_key(&sequence.id);
        let admission = is_new.then(|| self.ask()).transpose()?;
        let before = table.under_way.remove(&sequence.id);
        let before = if sequence.start {
            before.map(|entry| (entry.last, entry.users))
        } else {
            let entry = before.ok_or_else(|| SequenceError::NotStarted {
                model: self.name.clone(),
                sequence: sequence.id.to_string(),
                idle: self.idle,
            })?;
            Some((entry.last, entry.users))
        };
        let (before, users) = before.map_or((None, Arc::default()), |(last, users)| (Some(last), users));
        let mut left = None;
        if !sequence.end {
            let entry = Entry { last, touched: Instant::now(), users: users.clone() };
            table.under_way.insert(sequence.id.clone(), entry);
        } else if !sequence.start {
            left = Some(last);
        }
        drop(table);
        let (sequences, sequence) = (self.clone(), sequence.clone());
        Ok(Turn { sequences, sequence, before, admission, next: Some(next), left, users })
    }

    /// That a request with so many rows is a step of a sequence.
    ///
    /// # Errors
    /// [`SequenceError::Rows`].
    pub(super) fn check_rows(rows: usize) -> Result<(), SequenceError> {
        if rows == 1 { Ok(()) } else { Err(SequenceError::Rows { rows }) }
    }

    /// A seat, or a place among those who wait for one.
    fn ask(&self) -> Result<Asked, SequenceError> {
        let asked = self.seats.ask();
        asked.map_err(|Full| SequenceError::Overloaded { model: self.name.clone(), limit: self.limit })
    }

    /// Lets go of sequences that nobody continued in time: the state, and the place among candidates.
    fn sweep(&self, table: &mut Table) {
        let now = Instant::now();
        // Twice in the time that one may be idle is often enough, whatever the traffic.
        if table.swept.is_some_and(|swept| now.saturating_duration_since(swept) < self.idle / 2) {
            return;
        }
        table.swept = Some(now);
        table.under_way.retain(|_, entry| {
            Arc::strong_count(&entry.users) > 1 || now.saturating_duration_since(entry.touched) <= self.idle
        });
    }

    /// Lets go of idle sequences now and then, for those that wait for their place; ends with the model.
    pub(crate) fn watch(self: &Arc<Self>) {
        let (weak, pause) = (Arc::downgrade(self), (self.idle / 2).max(Duration::from_millis(1)));
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                let Some(sequences) = weak.upgrade() else { return };
                sequences.sweep(&mut sequences.lock());
            }
        });
    }

    /// Only this module's few lines run under the lock.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request's turn in its sequence. Dropping it in any moment passes the state on as it was.
#[derive(Debug)]
pub(super) struct Turn {
    sequences: Arc<Sequences>,
    sequence: Sequence,
    before: Option<oneshot::Receiver<Carried>>,
    admission: Option<Asked>,
    next: Option<oneshot::Sender<Carried>>,
    /// The other end of `next`, of an END that has not been answered.
    left: Option<oneshot::Receiver<Carried>>,
    users: Arc<()>,
}

impl Turn {
    /// Waits for the requests before this one, and for a place if it begins a sequence. Then the graph's inputs are
    /// whole: those in `inputs` that are `None` have their control or state.
    ///
    /// # Errors
    /// [`SequenceError`].
    pub(super) async fn begin(
        mut self,
        inputs: Vec<Option<RawTensor>>,
    ) -> Result<(Step, Vec<RawTensor>), SequenceError> {
        let mut carried = match &mut self.before {
            Some(before) => before.await.ok(),
            None => None,
        };
        self.before = None;
        if self.sequence.start {
            let seat = match (carried, self.admission.take()) {
                (Some(carried), _) => Some(carried.seat),
                (None, Some(asked)) => asked.seat().await,
                // The one before it had none, or lost it.
                (None, None) => self.sequences.ask()?.seat().await,
            };
            carried = seat.map(|seat| Carried { state: self.sequences.fills.initial.clone(), seat });
        }
        let Some(carried) = carried else {
            let (model, sequence) = (self.sequences.name.clone(), self.sequence.id.to_string());
            return Err(SequenceError::NotStarted { model, sequence, idle: self.sequences.idle });
        };
        let mut inputs = self.sequences.fills.fill(inputs, &self.sequence, &carried.state);
        let position = carried.seat.position;
        if let Some(batches) = self.sequences.seated {
            inputs.extend(seated::seat_input(position, self.sequence.start, batches));
        }
        Ok((Step { turn: self, carried: Some(carried), instance: position.instance }, inputs))
    }

    /// Nothing goes on from here: unless somebody waits all the same, and hears it, the sequence is not under way any more.
    fn forget(&self) {
        let mut table = self.sequences.lock();
        // The table's, and this one.
        let is_last = |entry: &Entry| Arc::ptr_eq(&entry.users, &self.users) && Arc::strong_count(&self.users) == 2;
        if table.under_way.get(&self.sequence.id).is_some_and(is_last) {
            table.under_way.remove(&self.sequence.id);
        }
    }

    /// An END that was not answered can be sent again, as any other request; unless somebody has begun anew under its id.
    fn put_back(&mut self) {
        if let Some(last) = self.left.take() {
            let entry = Entry { last, touched: Instant::now(), users: self.users.clone() };
            self.sequences.lock().under_way.entry(self.sequence.id.clone()).or_insert(entry);
        }
    }
}

impl Drop for Turn {
    /// Somebody who left before it was his turn must not cut the others off, unless they wait for what he was to begin.
    fn drop(&mut self) {
        let Some(next) = self.next.take() else { return };
        if let (Some(before), false) = (self.before.take(), self.sequence.start)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            self.put_back();
            runtime.spawn(async move {
                if let Ok(carried) = before.await {
                    // Without a next request the state ends here.
                    let _ = next.send(carried);
                }
            });
        } else {
            self.forget();
        }
    }
}

/// A request of a sequence that runs.
#[derive(Debug)]
pub(super) struct Step {
    turn: Turn,
    carried: Option<Carried>,
    /// Which instance runs it; the first where any may.
    pub(super) instance: usize,
}

impl Step {
    /// Keeps the state that the graph gave; after an END, nobody asks for it.
    pub(super) fn finish(mut self, state: &[RawTensor]) {
        if let Some(carried) = &mut self.carried {
            // A row of a large batch must not keep the whole of it alive between requests.
            carried.state = state.iter().map(RawTensor::detached).collect();
        }
        self.turn.left = None;
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let (Some(next), Some(carried)) = (self.turn.next.take(), self.carried.take()) {
            let mut table = self.turn.sequences.lock();
            if let Some(entry) = table.under_way.get_mut(&self.turn.sequence.id)
                && Arc::ptr_eq(&entry.users, &self.turn.users)
            {
                entry.touched = Instant::now();
            }
            drop(table);
            self.turn.put_back();
            // Without a next request the state ends here.
            let _ = next.send(carried);
        }
    }
}

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "{:?}", crate::wire::excerpt(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use sensorium_artifact::{DType, TensorSpec};
    use sensorium_proto::inference::model_sequence_batching::{State, StrategyOldest};

    use super::*;

    /// Sequences of which two may be under way, with one number as their state, which begins as 0.
    struct Bench(Arc<Sequences>);

    impl Bench {
        fn new() -> Self {
            let spec =
                |name: &str| TensorSpec { name: name.to_owned(), dtype: DType::Fp32, shape: vec![None, Some(1)] };
            let signature = Signature::of_manifest(&[spec("total")], &[spec("sum")]);
            let state = State { input_name: "total".to_owned(), output_name: "sum".to_owned(), ..State::default() };
            let oldest = StrategyOldest { max_candidate_sequences: 2, ..StrategyOldest::default() };
            let config = ModelSequenceBatching {
                max_sequence_idle_microseconds: 60_000_000,
                strategy_choice: Some(StrategyChoice::Oldest(oldest)),
                state: vec![state],
                ..ModelSequenceBatching::default()
            };
            Self(Sequences::new("m", &config, &signature, 1, Some(4), false, std::path::Path::new("")).unwrap())
        }

        fn enter(&self, start: bool, end: bool) -> Result<Turn, SequenceError> {
            self.0.enter(Some(&Sequence { id: SequenceId::Number(1), start, end }), 1)
        }

        /// A step that runs, and the state that it was given.
        async fn begin(&self, start: bool, end: bool) -> Result<(Step, f32), SequenceError> {
            let (step, inputs) = self.enter(start, end)?.begin(vec![None]).await?;
            Ok((step, inputs[0].numbers::<f32>()[0]))
        }

        async fn step(&self, start: bool, end: bool, state: f32) -> Result<f32, SequenceError> {
            let (step, before) = self.begin(start, end).await?;
            step.finish(&[f32s(state)]);
            Ok(before)
        }
    }

    fn f32s(value: f32) -> RawTensor {
        RawTensor::from_vec(DType::Fp32, vec![1, 1], vec![value]).unwrap()
    }

    fn is_over(found: &Result<f32, SequenceError>) -> bool {
        matches!(found, Err(SequenceError::NotStarted { .. }))
    }

    #[tokio::test]
    async fn an_end_that_is_not_answered_can_be_sent_again() {
        let bench = Bench::new();
        bench.step(true, false, 5.0).await.unwrap();
        drop(bench.begin(false, true).await.unwrap());
        assert_eq!(bench.step(false, false, 6.0).await, Ok(5.0), "so can anything else");
        // One that leaves before its turn.
        let (running, _) = bench.begin(false, false).await.unwrap();
        drop(bench.enter(false, true).unwrap());
        running.finish(&[f32s(7.0)]);
        assert_eq!(bench.step(false, true, 8.0).await, Ok(7.0));
        assert!(is_over(&bench.step(false, true, 9.0).await));
        assert!(bench.0.lock().under_way.is_empty());
        assert!(!bench.0.seats.is_any_taken(0));
    }

    #[tokio::test]
    async fn an_end_that_is_not_answered_takes_the_id_from_nobody() {
        let bench = Bench::new();
        bench.step(true, false, 5.0).await.unwrap();
        let ending = bench.begin(false, true).await.unwrap();
        assert_eq!(bench.step(true, false, 6.0).await, Ok(0.0), "it began anew");
        drop(ending);
        assert_eq!(bench.step(false, true, 7.0).await, Ok(6.0));
        assert!(!bench.0.seats.is_any_taken(0), "both seats came back");
    }

    #[tokio::test]
    async fn who_begins_again_keeps_the_seat_and_waits_behind_nobody() {
        let bench = Bench::new();
        bench.step(true, false, 5.0).await.unwrap();
        let other = |id| Some(Sequence { id: SequenceId::Number(id), start: true, end: false });
        let taken = bench.0.enter(other(2).as_ref(), 1).unwrap().begin(vec![None]).await.unwrap();
        let waiting = bench.0.enter(other(3).as_ref(), 1).unwrap();
        assert_eq!(bench.step(true, false, 6.0).await, Ok(0.0), "in the seat that it had");
        assert_eq!(bench.step(false, true, 7.0).await, Ok(6.0));
        waiting.begin(vec![None]).await.unwrap();
        drop(taken);
    }

    #[tokio::test]
    async fn who_leaves_before_a_sequence_has_begun_leaves_nothing_behind() {
        let bench = Bench::new();
        let begin = |id| {
            let sequence = Sequence { id: SequenceId::Number(id), start: true, end: false };
            bench.0.enter(Some(&sequence), 1).unwrap()
        };
        let sitting = [begin(1).begin(vec![None]).await.unwrap(), begin(2).begin(vec![None]).await.unwrap()];
        for id in 3..1000 {
            let mut waiting = Box::pin(begin(id).begin(vec![None]));
            assert!(futures::poll!(&mut waiting).is_pending());
        }
        assert_eq!(bench.0.lock().under_way.len(), sitting.len());
        // Whoever wants to go on with what did not begin hears that, and leaves nothing either.
        let waiting = begin(3);
        let next = Sequence { id: SequenceId::Number(3), start: false, end: false };
        let next = bench.0.enter(Some(&next), 1).unwrap();
        drop(waiting);
        assert!(matches!(next.begin(vec![None]).await, Err(SequenceError::NotStarted { .. })));
        assert_eq!(bench.0.lock().under_way.len(), sitting.len());
    }

    #[tokio::test]
    async fn a_sequence_of_one_request_that_is_not_answered_keeps_no_seat() {
        let bench = Bench::new();
        drop(bench.begin(true, true).await.unwrap());
        assert!(!bench.0.seats.is_any_taken(0));
        assert!(is_over(&bench.step(false, true, 1.0).await));
    }
}

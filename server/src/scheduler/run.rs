//! Running a batch: its inputs put together, the engine called, its outputs split.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use sensorium_engine::{Engine, EngineError, RawTensor, Waiters};
use sensorium_telemetry::{batch_span, error_line, record_end};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    Done, LONGEST_PROBE, ScheduleError, Work,
    admit::Queue,
    outbox::Outbox,
    shape::Shapes,
    slots::{Held, Share},
    state::{Job, Outcome},
};
use crate::model::Timings;

/// Bytes of an output from which on an answer is sent as it is; smaller ones are copied into it.
const LARGE: usize = 4 << 10;
/// Such an output is copied where it is so small a part of its batch's.
const SHARE: usize = 8;

/// Memory in which the inputs of batches are put together, one for each input: that of the last batch, used again.
type Rooms = Vec<BytesMut>;

/// What runs the batches of a queue, on whatever thread.
#[derive(Debug)]
pub(super) struct Runner {
    pub(super) queue: Arc<Queue>,
    pub(super) share: Share,
    /// Cancelled when only another process can go on.
    pub(super) lost: CancellationToken,
    /// Whether batches are not filled up, since outputs were found that have no row for each of the inputs'.
    pub(super) never_fills: AtomicBool,
}

/// An engine that may run, and what goes with it.
pub(super) struct Ready {
    pub(super) engine: Box<dyn Engine>,
    rooms: Rooms,
    /// Whether it has run a batch since nothing waited.
    pub(super) was_busy: bool,
    /// How long its last batch took; zero before there was one.
    pub(super) took: Duration,
    /// Requests that it answered.
    pub(super) answered: usize,
}

impl Ready {
    pub(super) fn new(engine: Box<dyn Engine>) -> Self {
        Self { engine, rooms: Rooms::new(), was_busy: false, took: Duration::ZERO, answered: 0 }
    }
}

impl fmt::Debug for Ready {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Ready").field("took", &self.took).finish_non_exhaustive()
    }
}

/// What is written down of some jobs that run at once.
#[derive(Clone, Copy)]
struct Batch {
    /// When an engine began with them.
    begun: Instant,
    rows: usize,
    /// Whether the server itself asks: that counts nowhere.
    is_probe: bool,
}

impl Batch {
    fn of(jobs: &[Job], begun: Instant) -> Self {
        let rows = jobs.iter().map(|job| job.work.rows).sum();
        Self { begun, rows, is_probe: jobs.iter().any(|job| job.work.is_probe) }
    }
}

/// Places among answers that a batch holds; they are given up if it dies.
struct Owed<'a> {
    queue: &'a Queue,
    places: Vec<u64>,
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        for place in &self.places {
            self.queue.give_up(*place);
        }
    }
}

impl Runner {
    /// Runs `jobs` on `ready` and puts the answers into `outbox`. Slots that are not `held` are waited for.
    pub(super) fn run_batch(&self, ready: &mut Ready, mut jobs: Vec<Job>, held: Option<Held<'_>>, outbox: &mut Outbox) {
        let queue = &self.queue;
        let taken = Instant::now();
        let mut owed = Owed { queue, places: jobs.iter().filter_map(|job| job.place).collect() };
        let held = held.or_else(|| self.share.try_hold()).unwrap_or_else(|| {
            queue.deliver(outbox);
            let _waiting = queue.waiting.more(jobs.len());
            self.share.hold()
        });
        let batch = Batch::of(&jobs, Instant::now());
        for job in jobs.iter().filter(|_| !batch.is_probe) {
            queue.metrics.queued(batch.begun.saturating_duration_since(job.admitted));
        }
        let Ready { engine, rooms, .. } = ready;
        let outcomes = self.outcomes(engine.as_mut(), &mut jobs, batch, rooms);
        drop(held);
        owed.places.clear();
        let took = taken.elapsed();
        (ready.was_busy, ready.took, ready.answered) = (true, took, jobs.len());
        let bytes = jobs.iter().map(|job| job.work.bytes()).sum();
        let is_answered = outcomes.iter().any(Result::is_ok);
        if let Some(error) = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).find(|e| e.is_device_lost()) {
            if !self.lost.is_cancelled() {
                let error = error_line(error);
                tracing::error!(graph = queue.graph, error, "this process has to end, so that another one begins anew");
            }
            self.lost.cancel();
        }
        let waiting = if batch.is_probe { 0 } else { queue.ran(batch.rows, bytes, took, is_answered) };
        queue.answer(jobs.into_iter().zip(outcomes).map(|(job, outcome)| (job.place, job.reply, outcome)), outbox);
        outbox.ran(took, waiting);
    }

    /// What comes of each job. One member's values may fail all of them: then each half runs by itself, so that few runs show whose
    /// they are.
    fn outcomes(&self, engine: &mut dyn Engine, jobs: &mut [Job], batch: Batch, rooms: &mut Rooms) -> Vec<Outcome> {
        match self.run_together(engine, jobs, batch, rooms) {
            Ok(answers) => answers.into_iter().map(Ok).collect(),
            // An engine that keeps something of each run has it of this one.
            Err(error)
                if jobs.len() < 2
                    || error.is_of_the_whole_batch()
                    || self.queue.policy.runs_once && matches!(error, ScheduleError::Outputs { .. }) =>
            {
                jobs.iter().map(|_| Err(error.clone())).collect()
            }
            Err(error) => {
                tracing::debug!(graph = self.queue.graph, requests = jobs.len(), %error, "batch failed, running its halves");
                let (first, second) = jobs.split_at_mut(jobs.len() / 2);
                let mut half = |jobs: &mut [Job]| {
                    let batch = Batch::of(jobs, batch.begun);
                    self.outcomes(engine, jobs, batch, rooms)
                };
                let mut outcomes = half(first);
                outcomes.extend(half(second));
                outcomes
            }
        }
    }

    /// Runs the rows of all jobs at once: an answer for each.
    fn run_together(
        &self,
        engine: &mut dyn Engine,
        jobs: &mut [Job],
        batch: Batch,
        rooms: &mut Rooms,
    ) -> Result<Vec<Done>, ScheduleError> {
        let queue = &self.queue;
        let Batch { begun, rows, is_probe } = batch;
        let failed = |source| match source {
            EngineError::CutShort => ScheduleError::DeadlineExceeded { graph: queue.graph.clone() },
            source => ScheduleError::Engine { graph: queue.graph.clone(), source: Box::new(source) },
        };
        let unfit = || ScheduleError::Outputs { graph: queue.graph.clone(), rows };

        let span = batch_span(&queue.graph, rows, jobs.len());
        for job in jobs.iter().filter(|job| !job.span.is_none()) {
            span.follows_from(&job.span);
            // Who looks at the request finds its batch, too.
            job.span.follows_from(&span);
        }
        let _entered = span.enter();
        let started = Instant::now();
        let never_fills = self.never_fills.load(Ordering::Relaxed);
        let filling = if never_fills { 0 } else { queue.policy.filling(rows) };
        let (inputs, wanted) = self.join(&works_of(jobs), filling, rooms).ok_or_else(unfit)?;
        let joined = Instant::now();
        let deadline = if is_probe { Some(started + LONGEST_PROBE) } else { last_deadline(jobs) };
        let poll_gone = &mut |context: &mut Context<'_>| poll_gone(jobs, context);
        // What nobody asked for must not take an engine for good.
        let found = engine.run_for(&inputs, &wanted, Waiters { deadline, poll_gone });
        let ran = Instant::now();
        let in_vain = || {
            if !is_probe {
                queue.metrics.ran(rows, ran - joined);
                queue.statistics.ran_in_vain();
            }
        };
        let found = found.map_err(|error| failed(engine.signature().explain(&inputs, error))).inspect_err(|error| {
            record_end(&span, Code::Internal.into(), Some(&error_line(error)));
            in_vain();
        })?;
        let works = works_of(jobs);
        let found = if filling == 0 {
            found
        } else if let Some(found) = without(&found, rows, filling) {
            found
        } else {
            // One of them lies otherwise, and what was filled in is somewhere in it.
            self.never_fills.store(true, Ordering::Relaxed);
            return self.run_together(engine, jobs, batch, rooms);
        };
        let Some(outputs) = self.split(&works, &wanted, &found) else {
            in_vain();
            return Err(unfit());
        };
        let timings = Timings {
            compute_input: joined - started,
            compute_infer: ran - joined,
            compute_output: ran.elapsed(),
            ..Timings::default()
        };
        if is_probe {
            queue.note_success();
        } else {
            queue.metrics.ran(rows, timings.compute_infer);
            queue.statistics.executed(rows, &timings);
            let in_rows = (!queue.policy.steps.is_empty() && !never_fills).then_some((rows, filling));
            if let Some((useful, padding)) = queue.shapes.padded(&works).or(in_rows) {
                queue.metrics.padded(useful, padding);
            }
            // What is filled in and padded takes time, and is of no use.
            let bytes = works.iter().map(|work| work.bytes()).sum();
            queue.succeeded(rows, bytes, timings.compute_input + timings.compute_infer + timings.compute_output);
        }
        let done = |(outputs, job): (Vec<_>, &Job)| Done {
            outputs,
            timings: Timings { queue: begun.saturating_duration_since(job.admitted), ..timings },
        };
        Ok(outputs.into_iter().zip(&*jobs).map(done).collect())
    }

    /// The rows of all, one after the other, the last one `filling` times more, and every output that any of them wants, ascending.
    fn join(&self, works: &[&Work], filling: usize, rooms: &mut Rooms) -> Option<(Vec<RawTensor>, Vec<usize>)> {
        let inputs = works.first()?.inputs.len();
        rooms.resize(inputs, BytesMut::new());
        let column = |(index, room): (usize, &mut BytesMut)| {
            let mut parts: Vec<_> = works.iter().map(|work| &work.inputs[index]).collect();
            // What a client has sent is what the model takes, which zeros need not be.
            let last = if filling > 0 { Some(last_row(parts.last()?)?) } else { None };
            parts.extend(std::iter::repeat_n(last.as_ref(), filling).flatten());
            self.queue.shapes.join(index, &parts, room).ok()
        };
        let mut outputs: Vec<usize> = works.iter().flat_map(|work| &work.outputs).copied().collect();
        outputs.sort_unstable();
        outputs.dedup();
        Some((rooms.iter_mut().enumerate().map(column).collect::<Option<_>>()?, outputs))
    }

    /// What each of `works` gets of `found`, the outputs `indices` of their common run: its own rows of those it wants.
    /// `None` when the rows of an output are not theirs.
    fn split(&self, works: &[&Work], indices: &[usize], found: &[RawTensor]) -> Option<Vec<Vec<RawTensor>>> {
        // Alone, there is nothing to split, and the outputs of a model without a batch axis could not be.
        let split = |(output, tensor): (&usize, &RawTensor)| {
            if let Some(place) = works.first()?.scattered.iter().position(|(scattered, _)| scattered == output) {
                return Shapes::scatter(tensor, works.iter().filter_map(|work| Some(&work.scattered.get(place)?.1)));
            }
            match works {
                [_] => Some(vec![tensor.clone()]),
                works => tensor.split(works.iter().map(|work| work.rows)),
            }
        };
        let columns: Vec<Vec<RawTensor>> = indices.iter().zip(found).map(split).collect::<Option<_>>()?;
        let answer = |(member, work): (usize, &&Work)| {
            let own = |output: &usize| {
                let column = indices.binary_search(output).ok()?;
                let rows = columns[column][member].clone();
                let (start, all) = (rows.data().as_ptr(), found[column].data().len());
                let rows = self.queue.shapes.trim(*output, rows, work).ok()?;
                let is_shared = rows.data().as_ptr() == start;
                let bytes = rows.data().len();
                // An answer may be on its way for long, and what is held for it is not to be all of its batch.
                Some(if is_shared && bytes >= LARGE && bytes <= all / SHARE { rows.detached() } else { rows })
            };
            work.outputs.iter().map(own).collect()
        };
        works.iter().enumerate().map(answer).collect()
    }
}

fn last_row(tensor: &RawTensor) -> Option<RawTensor> {
    tensor.split([tensor.row_count()?.checked_sub(1)?, 1])?.pop()
}

/// Outputs without their last `filling` rows; `None` where one does not have as many and `rows` before them.
fn without(found: &[RawTensor], rows: usize, filling: usize) -> Option<Vec<RawTensor>> {
    let cut = |tensor: &RawTensor| Some(tensor.split([rows, filling])?.swap_remove(0));
    found.iter().map(cut).collect()
}

fn works_of(jobs: &[Job]) -> Vec<&Work> {
    jobs.iter().map(|job| &job.work).collect()
}

/// When the last of the callers stops waiting; `None` where one of them does not say.
fn last_deadline(jobs: &[Job]) -> Option<Instant> {
    jobs.iter().map(|job| job.work.deadline).collect::<Option<Vec<_>>>()?.into_iter().max()
}

/// Ready once no caller waits any more. The first one that does is the one whose leaving wakes the task: those behind it are
/// asked then.
fn poll_gone(jobs: &mut [Job], context: &mut Context<'_>) -> Poll<()> {
    if jobs.iter_mut().any(|job| job.reply.poll_closed(context).is_pending()) { Poll::Pending } else { Poll::Ready(()) }
}

//! The queue of one graph: who gets in, who leaves early, and who is next.
//!
//! A lock and a condition variable instead of a channel, because a channel cannot give up an element in its middle: work
//! whose caller is gone would hold its memory and its place until the engine comes to it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use tokio::sync::oneshot;
use tracing::Span;

use super::{Batching, Done, ScheduleError, Work, batch};
use crate::{metrics::GraphMetrics, model::Statistics};

pub(super) type Reply = oneshot::Sender<Result<Done, ScheduleError>>;
pub(super) type Answer = oneshot::Receiver<Result<Done, ScheduleError>>;

/// Work that waits or runs.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    pub(super) reply: Reply,
    /// The request's span, which the batch's span links to.
    pub(super) span: Span,
    pub(super) admitted: Instant,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) graph: String,
    pub(super) batching: Batching,
    pub(super) metrics: GraphMetrics,
    pub(super) statistics: Arc<Statistics>,
    state: Mutex<State>,
    /// Signalled when work arrives and when the queue is closed.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// By order of arrival; bounded by `Batching::max_waiting_rows`.
    waiting: BTreeMap<u64, Job>,
    /// Sum over `waiting`.
    rows: usize,
    next_place: u64,
    closed: bool,
    last_success: Option<Instant>,
}

/// A place in the queue: dropping it gives the place up, if the engine has not taken the work yet.
#[derive(Debug)]
pub(super) struct Place {
    queue: Arc<Queue>,
    number: u64,
}

impl Queue {
    pub(super) fn new(graph: String, batching: Batching, metrics: GraphMetrics, statistics: Arc<Statistics>) -> Self {
        Self { graph, batching, metrics, statistics, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Puts work at the end of the line.
    pub(super) fn admit(self: &Arc<Self>, work: Work) -> Result<(Answer, Place), ScheduleError> {
        let (reply, answer) = oneshot::channel();
        let limit = self.batching.max_waiting_rows;
        let mut state = self.lock();
        if state.closed {
            return Err(ScheduleError::Stopped { graph: self.graph.clone() });
        }
        // An empty queue takes any work, so that what fits into a batch can always be run.
        if state.rows > 0 && state.rows.saturating_add(work.rows) > limit {
            return Err(ScheduleError::Overloaded { graph: self.graph.clone(), waiting: state.rows, limit });
        }
        let number = state.next_place;
        state.next_place += 1;
        state.rows = state.rows.saturating_add(work.rows);
        state.waiting.insert(number, Job { work, reply, span: Span::current(), admitted: Instant::now() });
        self.metrics.waiting(state.waiting.len());
        drop(state);
        self.changed.notify_one();
        Ok((answer, Place { queue: self.clone(), number }))
    }

    /// The next batch, as soon as there is one to run; `None` when the queue is closed and empty.
    ///
    /// After a run (`was_busy`) what is here already came meanwhile, and more may be on its way. Work that finds the
    /// engine idle does not wait.
    pub(super) fn next_batch(&self, mut was_busy: bool) -> Option<Vec<Job>> {
        let mut state = self.lock();
        loop {
            let Some(oldest) = state.waiting.values().next() else {
                if state.closed {
                    return None;
                }
                was_busy = false;
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let waited = oldest.admitted.elapsed();
            if !was_busy || state.closed || state.rows >= self.batching.max_rows || waited >= self.batching.max_delay {
                break;
            }
            let rest = self.batching.max_delay.saturating_sub(waited);
            state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        let jobs = batch::take(&mut state.waiting, self.batching.max_rows);
        state.rows = state.rows.saturating_sub(jobs.iter().map(|job| job.work.rows).sum());
        self.metrics.waiting(state.waiting.len());
        Some(jobs)
    }

    /// Admits nothing from now on.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Closes the queue and refuses what waits, because nobody will run it. Whether it was open.
    pub(super) fn abandon(&self) -> bool {
        let mut state = self.lock();
        let was_open = !std::mem::replace(&mut state.closed, true);
        // Dropping the replies tells the callers.
        state.waiting.clear();
        state.rows = 0;
        self.metrics.waiting(0);
        was_open
    }

    pub(super) fn note_success(&self) {
        self.lock().last_success = Some(Instant::now());
    }

    pub(super) fn last_success(&self) -> Option<Instant> {
        self.lock().last_success
    }

    /// Only this module's few lines run under the lock, and none of them leaves the state half-changed, so a panic
    /// elsewhere is no reason to refuse it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        if let Some(job) = state.waiting.remove(&self.number) {
            state.rows = state.rows.saturating_sub(job.work.rows);
            self.queue.metrics.waiting(state.waiting.len());
            drop(state);
            self.queue.metrics.abandoned();
        }
    }
}

//! The line of one model, shared by those who ask and the threads that run.
//!
//! A lock and a condition variable instead of a channel, because a channel cannot give up an element in its middle: work
//! whose caller is gone would hold its memory and its place until an engine comes to it.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::oneshot};
use tracing::Span;

use super::{
    Done, Policy, ScheduleError, Work,
    line::{Line, Next, Number, Refused, Ticket},
    order::Order,
    pace::Pace,
    shape::Shapes,
};
use crate::{metrics::GraphMetrics, model::Statistics};

pub(super) type Reply = oneshot::Sender<Outcome>;
pub(super) type Outcome = Result<Done, ScheduleError>;

/// Work that waits or runs.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    pub(super) reply: Reply,
    /// The request's span, which the batch's span links to.
    pub(super) span: Span,
    pub(super) admitted: Instant,
    /// Its place among answers, where they keep the order of requests; given when an engine takes it.
    pub(super) place: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) graph: String,
    pub(super) policy: Policy,
    pub(super) shapes: Shapes,
    pub(super) metrics: GraphMetrics,
    pub(super) statistics: Arc<Statistics>,
    /// Where the callers are, if there is one.
    runtime: Option<Handle>,
    /// Threads that run what waits.
    engines: usize,
    state: Mutex<State>,
    /// Signalled when work arrives and when the queue is closed.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    line: Line<Job>,
    /// `None` stands for an answer that died with its engine.
    order: Order<Option<(Reply, Outcome)>>,
    closed: bool,
    last_success: Option<Instant>,
    pace: Pace,
}

/// What an instance has just done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Last {
    /// Whether it ran a batch at all.
    pub(super) was_busy: bool,
    /// Whether that took no longer than it takes to receive a few requests.
    pub(super) is_quick: bool,
    /// How long it looks out for more before it sleeps.
    pub(super) lookout: Duration,
}

/// A place in the line: dropping it gives the place up, if no engine has taken the work yet.
#[derive(Debug)]
pub(super) struct Place {
    queue: Arc<Queue>,
    /// `None` once an engine has taken the work.
    number: Option<Number>,
    /// When the caller has to look whether it still waits.
    pub(super) timeout: Option<Instant>,
}

impl Queue {
    pub(super) fn new(
        graph: String,
        policy: Policy,
        shapes: Shapes,
        metrics: GraphMetrics,
        statistics: Arc<Statistics>,
        engines: usize,
    ) -> Self {
        let (runtime, state) = (Handle::try_current().ok(), Mutex::default());
        Self { graph, policy, shapes, metrics, statistics, runtime, engines, state, changed: Condvar::new() }
    }

    /// Puts work in the line.
    pub(super) fn admit(self: &Arc<Self>, work: Work) -> Result<(oneshot::Receiver<Outcome>, Place), ScheduleError> {
        let now = Instant::now();
        if work.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(ScheduleError::DeadlineExceeded { graph: self.graph.clone() });
        }
        let level = if work.priority == 0 { self.policy.default_level } else { work.priority.min(self.policy.levels) };
        let queue = self.policy.level(level);
        // A request may ask for less than its level gives, never for more.
        let timeout = match (queue.timeout, work.timeout.filter(|_| queue.allow_override)) {
            (Some(own), Some(asked)) => Some(own.min(asked)),
            (own, asked) => own.or(asked),
        };
        let timeout = timeout.map(|timeout| now + timeout);
        let (mut class, extent) = self.shapes.class(&work.inputs);
        if work.is_probe {
            // No size is negative: it joins nobody.
            class.push(-1);
        }
        let ticket = Ticket {
            rows: work.rows,
            level,
            class,
            extent,
            arrived: now,
            is_alone: work.is_probe,
            timeout,
            deadline: work.deadline,
        };
        let (reply, answer) = oneshot::channel();
        let mut state = self.lock();
        if state.closed {
            return Err(ScheduleError::Stopped { graph: self.graph.clone() });
        }
        if let Some(rest) = work.deadline.map(|deadline| deadline.saturating_duration_since(now)) {
            // Who finds nobody waiting is let in whatever is expected, and shows whether that still holds.
            let ahead = state.line.rows_before(level);
            let expected = state.pace.expect(ahead, work.rows, self.policy.max_rows, self.engines);
            if ahead > 0 && expected > rest {
                return Err(ScheduleError::TooLate { graph: self.graph.clone(), expected });
            }
        }
        let job = Job { work, reply, span: Span::current(), admitted: now, place: None };
        let number = state.line.push(&self.policy, ticket, job).map_err(|refused| self.refusal(refused))?;
        self.metrics.waiting(state.line.len());
        drop(state);
        self.changed.notify_one();
        let timeout = timeout.filter(|_| !queue.delay_timed_out);
        Ok((answer, Place { queue: self.clone(), number: Some(number), timeout }))
    }

    fn refusal(&self, refused: Refused) -> ScheduleError {
        let graph = self.graph.clone();
        match refused {
            Refused::Level { limit } => ScheduleError::QueueFull { graph, limit },
            Refused::Rows { waiting, limit } => ScheduleError::Overloaded { graph, waiting, limit },
        }
    }

    /// The next batch, as soon as there is one to run; `None` when the queue is closed and empty. Where the model is quick
    /// and a batch has room, those who share this thread's core first do what they have to: they may bring more requests,
    /// and to change between threads for each of them costs more than to run it.
    pub(super) fn next_batch(&self, last: Last) -> Option<Vec<Job>> {
        let Last { mut was_busy, is_quick, lookout } = last;
        let mut gives_way = is_quick;
        let lookout = (!lookout.is_zero()).then(|| Instant::now() + lookout);
        let mut state = self.lock();
        loop {
            let waiting = state.line.len();
            if std::mem::take(&mut gives_way) && (1..self.policy.max_rows).contains(&waiting) {
                drop(state);
                std::thread::yield_now();
                state = self.lock();
            }
            let now = Instant::now();
            for job in state.line.expire(&self.policy, now) {
                let graph = self.graph.clone();
                let is_over = job.work.deadline.is_some_and(|deadline| deadline <= now);
                let error =
                    if is_over { ScheduleError::DeadlineExceeded { graph } } else { ScheduleError::TimedOut { graph } };
                // Its caller has most likely noticed by itself.
                let _ = job.reply.send(Err(error));
            }
            let closing = state.closed;
            match state.line.next(&self.policy, now, was_busy, closing) {
                Next::Run(mut jobs) => {
                    if self.policy.preserve_ordering {
                        for job in &mut jobs {
                            job.place = Some(state.order.place());
                        }
                    }
                    self.metrics.waiting(state.line.len());
                    if state.line.len() > 0 {
                        state.pace.leaves_behind(jobs.iter().map(|job| job.work.rows).sum());
                        // Another instance may begin with the rest.
                        self.changed.notify_one();
                    }
                    return Some(jobs);
                }
                Next::Wait(_) if closing && state.line.len() == 0 => return None,
                Next::Wait(None) if lookout.is_some_and(|until| now < until) => {
                    (was_busy, gives_way) = (false, false);
                    drop(state);
                    std::thread::yield_now();
                    state = self.lock();
                }
                Next::Wait(None) => {
                    (was_busy, gives_way) = (false, is_quick);
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                Next::Wait(Some(until)) => {
                    let rest = until.saturating_duration_since(now);
                    state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    /// Hands the answers of a batch out, and keeps those back that have to wait for others before them.
    pub(super) fn answer(&self, answers: impl Iterator<Item = (Option<u64>, Reply, Outcome)>) {
        let mut free = Vec::new();
        for (place, reply, outcome) in answers {
            match place {
                None => free.push((reply, outcome)),
                Some(place) => self.leave(place, Some((reply, outcome))),
            }
        }
        let deliver = move || {
            for (reply, outcome) in free {
                // A caller that left does not want its answer.
                drop(reply.send(outcome));
            }
        };
        // From the runtime, which is woken once: waking it for each answer from here would mean a change of threads for each.
        match &self.runtime {
            Some(runtime) => drop(runtime.spawn(async { deliver() })),
            None => deliver(),
        }
    }

    /// Gives a place among answers up: those behind it must not wait for what does not come.
    pub(super) fn give_up(&self, place: u64) {
        self.leave(place, None);
    }

    fn leave(&self, place: u64, answer: Option<(Reply, Outcome)>) {
        let leaving = self.lock().order.finish(place, answer);
        for (reply, outcome) in leaving.into_iter().flatten() {
            let _ = reply.send(outcome);
        }
    }

    /// Admits nothing from now on.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits, unless the queue is closed before: then `false`.
    pub(super) fn pause(&self, until: Instant) -> bool {
        let mut state = self.lock();
        loop {
            let rest = until.saturating_duration_since(Instant::now());
            if state.closed || rest.is_zero() {
                return !state.closed;
            }
            state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Closes the queue and refuses what waits, because nobody will run it. Whether it was open.
    pub(super) fn abandon(&self) -> bool {
        let mut state = self.lock();
        let was_open = !std::mem::replace(&mut state.closed, true);
        // Dropping the replies tells the callers.
        drop(state.line.clear());
        self.metrics.waiting(0);
        was_open
    }

    pub(super) fn note_success(&self) {
        self.lock().last_success = Some(Instant::now());
    }

    /// A batch of requests took so long, with whatever it waited for.
    pub(super) fn ran(&self, rows: usize, took: Duration) {
        self.lock().pace.ran(rows, took);
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

impl Place {
    /// The work was answered: there is nothing to give up.
    pub(super) fn leave(mut self) {
        self.number = None;
    }

    /// Takes the work out of the line; whether it was still there.
    pub(super) fn withdraw(&mut self) -> bool {
        let Some(number) = self.number.take() else { return false };
        let mut state = self.queue.lock();
        let job = state.line.remove(number);
        if job.is_some() {
            self.queue.metrics.waiting(state.line.len());
        }
        drop(state);
        job.is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.withdraw() {
            self.queue.metrics.abandoned();
        }
    }
}

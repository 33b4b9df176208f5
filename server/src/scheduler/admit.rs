//! The line of one model and its engines, shared by those who ask and those who run.
//!
//! A lock and a condition variable instead of a channel, because a channel cannot give up an element in its middle: work
//! whose caller is gone would hold its memory and its place until an engine comes to it.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sensorium_engine::Engine;
use tokio::{runtime::Handle, sync::oneshot};
use tracing::Span;

use super::{
    Policy, ScheduleError, Work,
    aim::Aim,
    company::Company,
    line::{Next, Number, Refused, Ticket},
    outbox::Outbox,
    pace::QUICK,
    run::Ready,
    shape::Shapes,
    slots::{Held, Share},
    state::{Job, Outcome, Reply, State},
};
use crate::{
    metrics::{GraphMetrics, Waiting},
    model::Statistics,
};

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) graph: String,
    pub(super) policy: Policy,
    pub(super) shapes: Shapes,
    pub(super) metrics: GraphMetrics,
    /// How many wait, as it is shown.
    pub(super) waiting: Waiting,
    pub(super) statistics: Arc<Statistics>,
    /// Where the callers are, if there is one.
    pub(super) runtime: Option<Handle>,
    /// Threads that run what waits, one for each engine.
    threads: usize,
    /// Whether callers may run the engines, which are all alike.
    callers_may_run: bool,
    /// Threads of the runtime.
    workers: usize,
    /// How many of all models' callers may do that at a time: half of the runtime's threads, or the only one.
    callers: usize,
    state: Mutex<State>,
    /// Signalled when work or an engine is there, and when the queue is closed.
    changed: Condvar,
    /// Signalled when the queue is closed, for those who pause: a signal that work is there must not end at them.
    ended: Condvar,
}

/// What a thread is to do.
#[derive(Debug)]
pub(super) enum Task {
    Run(Vec<Job>, Ready),
    /// Open an engine in the place of one that died.
    Replace,
}

/// Work that was let in.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) answer: oneshot::Receiver<Outcome>,
    pub(super) place: Place,
    /// Whether the caller is to run the next batch: nobody else was told of the work.
    pub(super) is_promised: bool,
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
        engines: Vec<Box<dyn Engine>>,
    ) -> Self {
        let runtime = Handle::try_current().ok();
        let threads = engines.len();
        let callers_may_run = runtime.is_some() && engines.iter().all(|engine| engine.runs_on_any_thread());
        let workers = runtime.as_ref().map_or(1, |runtime| runtime.metrics().num_workers());
        let callers = (workers / 2).max(1);
        let resting = engines.into_iter().map(Ready::new).collect();
        let aim = policy.finds_size.then(|| Aim::at_most(policy.max_rows));
        metrics.batch_rows_limit(policy.max_rows);
        let waiting = metrics.waiting();
        let state = Mutex::new(State { aim, resting, ..State::default() });
        let (changed, ended) = (Condvar::new(), Condvar::new());
        Self {
            graph,
            policy,
            shapes,
            metrics,
            waiting,
            statistics,
            runtime,
            threads,
            callers_may_run,
            workers,
            callers,
            state,
            changed,
            ended,
        }
    }

    /// Puts work in the line.
    pub(super) fn admit(self: &Arc<Self>, work: Work) -> Result<Admitted, ScheduleError> {
        let now = Instant::now();
        if work.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(ScheduleError::DeadlineExceeded { graph: self.graph.clone() });
        }
        // As in Triton, one that is no level is the default.
        let is_level = (1..=self.policy.levels).contains(&work.priority);
        let level = if is_level { work.priority } else { self.policy.default_level };
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
            let expected = state.pace.expect(ahead, work.rows, self.policy.max_rows, self.threads);
            if ahead > 0 && expected > rest {
                return Err(ScheduleError::TooLate { graph: self.graph.clone(), expected });
            }
        }
        let admitted = work.since.unwrap_or(now);
        let job = Job { work, reply, span: Span::current(), admitted, place: None };
        let number = state.line.push(&self.policy, ticket, job).map_err(|refused| self.refusal(refused))?;
        self.waiting.set(state.line.len());
        let is_promised = self.callers_may_run && state.promise(now);
        // Who makes an engine free looks at the line himself.
        let is_told = state.wants_a_thread(now);
        drop(state);
        if is_told {
            self.changed.notify_one();
        }
        let timeout = timeout.filter(|_| !queue.delay_timed_out);
        Ok(Admitted { answer, place: Place { queue: self.clone(), number: Some(number), timeout }, is_promised })
    }

    fn refusal(&self, refused: Refused) -> ScheduleError {
        let graph = self.graph.clone();
        match refused {
            Refused::Level { limit } => ScheduleError::QueueFull { graph, limit },
            Refused::Rows { waiting, limit } => ScheduleError::Overloaded { graph, waiting, limit },
        }
    }

    /// What one of the scheduler's threads does next, as soon as there is something, having run `back`; `None` when the
    /// queue is closed and empty, and the thread's engine with it. The answers in `outbox` go before it rests, before it looks
    /// out for [`Company`], and before what may take long. Meanwhile those who share this thread's core do what they have to.
    pub(super) fn take(&self, back: Option<Ready>, outbox: &mut Outbox) -> Option<Task> {
        let last = back.as_ref().map(|back| (back.answered, back.took));
        let mut state = self.lock();
        state.resting.extend(back);
        let overhead = state.pace.overhead();
        let mut company = last.map(|(answered, took)| {
            let expected = state.habit.expected();
            Company::after(answered, took, overhead, Instant::now()).expecting(expected)
        });
        loop {
            let waiting = state.line.len();
            let has_room = !state.closed && (1..state.max_rows(&self.policy)).contains(&waiting);
            if has_room && company.as_mut().is_some_and(|company| company.may_come(waiting, Instant::now())) {
                drop(state);
                self.deliver(outbox);
                std::thread::yield_now();
                state = self.lock();
                continue;
            }
            if state.vacancies > 0 {
                state.vacancies -= 1;
                // Whoever waits for a time has left this to us, and we go.
                self.tell(&state);
                return Some(Task::Replace);
            }
            let now = Instant::now();
            let closing = state.closed;
            match self.next(&mut state, now, |_| true) {
                Next::Run((jobs, ready)) => {
                    if company.is_some_and(|company| company.was_asked()) {
                        state.habit.came(waiting);
                    }
                    let bytes = || jobs.iter().map(|job| job.work.bytes()).sum();
                    let is_due = !outbox.is_empty() && !state.quick.is_short(bytes());
                    drop(state);
                    if is_due {
                        self.deliver(outbox);
                    }
                    return Some(Task::Run(jobs, ready));
                }
                Next::Wait(_) if !outbox.is_empty() => {
                    drop(state);
                    self.deliver(outbox);
                    state = self.lock();
                }
                Next::Wait(_) if closing && state.line.len() == 0 && !state.resting.is_empty() => {
                    let engine = state.resting.pop();
                    drop(state);
                    drop(engine);
                    return None;
                }
                Next::Wait(None) if company.is_some_and(|company| company.is_watchful(now)) => {
                    drop(state);
                    std::thread::yield_now();
                    state = self.lock();
                }
                Next::Wait(None) => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                    company = match last {
                        // A quick model wakes for each request, and that costs more than to run it.
                        Some((_, took)) if took < QUICK => Some(Company::after(0, took, overhead, now)),
                        // Who comes now may be the first of those who were answered.
                        _ => company.filter(|company| company.is_open(Instant::now())),
                    };
                }
                Next::Wait(Some(until)) => {
                    let rest = until.saturating_duration_since(now);
                    state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    /// Rows that wait.
    pub(super) fn rows(&self) -> usize {
        self.lock().line.rows()
    }

    /// The next batch for a caller that has promised to run it, if it will be quick and there are slots; if not, a thread is
    /// told.
    pub(super) fn take_now<'a>(&self, share: &'a Share) -> Option<(Vec<Job>, Ready, Held<'a>)> {
        let mut state = self.lock();
        state.promised = None;
        let (quick, mut held) = (state.quick, None);
        let mut left = state.line.len();
        let next = self.next(&mut state, Instant::now(), |jobs| {
            let bytes = jobs.inspect(|_| left = left.saturating_sub(1)).map(|job| job.work.bytes()).sum();
            if quick.expects(bytes, left == 0) {
                held = share.try_hold_here(self.callers);
            }
            held.is_some()
        });
        if let Next::Run((jobs, ready)) = next
            && let Some(held) = held
        {
            return Some((jobs, ready, held));
        }
        self.tell(&state);
        None
    }

    /// Sees that another thread of the runtime looks after sockets and timers while this one is in a run, which may take longer than anybody
    /// expected. One of those that have nothing to do looks after them, and the others sleep until they are woken: if it was this
    /// one that did, nobody would.
    pub(super) fn leave_runtime_to_others(&self) {
        if let Some(runtime) = self.runtime.as_ref().filter(|_| self.workers > 1) {
            // The first is this thread's next task, where others cannot take it, until the second takes its place: then somebody is woken.
            for _ in 0..2 {
                runtime.spawn(std::future::ready(()));
            }
        }
    }

    /// A caller has run a batch: whether it, or somebody in its place, promises to run another.
    pub(super) fn give_back(&self, ready: Ready) -> bool {
        let mut state = self.lock();
        state.rest(ready);
        // Once it is closed, the threads run what is left.
        let is_promised =
            self.callers_may_run && !state.closed && state.line.len() > 0 && state.promise(Instant::now());
        self.tell(&state);
        is_promised
    }

    /// The engine that a caller ran has died.
    pub(super) fn lose(&self) {
        self.lock().vacancies += 1;
        self.changed.notify_one();
    }

    /// A caller that had promised to run a batch does not.
    pub(super) fn break_promise(&self) {
        let mut state = self.lock();
        state.promised = None;
        self.tell(&state);
    }

    /// Wakes who has something to do.
    fn tell(&self, state: &State) {
        if state.closed {
            self.changed.notify_all();
        } else if state.wants_a_thread(Instant::now()) {
            self.changed.notify_one();
        }
    }

    /// The next batch with the engine for it, if it is time, an engine rests, and `accepts` has nothing against the jobs.
    fn next(
        &self,
        state: &mut State,
        now: Instant,
        accepts: impl FnOnce(&mut dyn Iterator<Item = &Job>) -> bool,
    ) -> Next<(Vec<Job>, Ready)> {
        let before = state.line.len();
        for job in state.line.expire(&self.policy, now) {
            let graph = self.graph.clone();
            let is_over = job.work.deadline.is_some_and(|deadline| deadline <= now);
            let error =
                if is_over { ScheduleError::DeadlineExceeded { graph } } else { ScheduleError::TimedOut { graph } };
            self.metrics.abandoned();
            // Its caller has most likely noticed by itself.
            let _ = job.reply.send(Err(error));
        }
        let next = state.next(&self.policy, now, accepts);
        if state.line.len() != before {
            self.waiting.set(state.line.len());
        }
        if matches!(next, Next::Run(_)) {
            // Another engine may begin with the rest.
            self.tell(state);
        }
        next
    }

    /// Puts the answers of a batch into `outbox`, and those that have to wait for others before them where these find them.
    pub(super) fn answer(&self, answers: impl Iterator<Item = (Option<u64>, Reply, Outcome)>, outbox: &mut Outbox) {
        for (place, reply, outcome) in answers {
            match place {
                None => outbox.push(reply, outcome),
                Some(place) => self.leave(place, Some((reply, outcome))),
            }
        }
    }

    /// Hands the answers out, from a thread that is not the runtime's.
    pub(super) fn deliver(&self, outbox: &mut Outbox) {
        if outbox.is_empty() {
            return;
        }
        // From the runtime, which is woken once: waking it for each answer from here would mean a change of threads for each.
        let mut answers = outbox.take();
        match &self.runtime {
            Some(runtime) => drop(runtime.spawn(async move { answers.deliver() })),
            None => answers.deliver(),
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
        self.ended.notify_all();
    }

    /// Waits, unless the queue is closed before: then `false`.
    pub(super) fn pause(&self, until: Instant) -> bool {
        let mut state = self.lock();
        loop {
            let rest = until.saturating_duration_since(Instant::now());
            if state.closed || rest.is_zero() {
                return !state.closed;
            }
            state = self.ended.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Closes the queue and refuses what waits, because nobody will run it. Whether it was open.
    pub(super) fn abandon(&self) -> bool {
        let mut state = self.lock();
        let was_open = !std::mem::replace(&mut state.closed, true);
        // Dropping the replies tells the callers.
        drop(state.line.clear());
        self.waiting.set(0);
        was_open
    }

    pub(super) fn note_success(&self) {
        self.lock().last_success = Some(Instant::now());
    }

    /// A batch of requests took so long, with whatever it waited for, and whether any of them was answered. How many wait
    /// behind it.
    pub(super) fn ran(&self, rows: usize, bytes: usize, took: Duration, is_answered: bool) -> usize {
        let mut state = self.lock();
        if is_answered {
            state.pace.ran(rows, took);
        }
        state.quick.ran(bytes, took, is_answered);
        state.line.len()
    }

    /// As [`Queue::note_success`], of a batch of requests with so many bytes of inputs, which took an engine so long: that says
    /// something of the size of batches, too.
    pub(super) fn succeeded(&self, rows: usize, bytes: usize, took: Duration) {
        let mut state = self.lock();
        state.last_success = Some(Instant::now());
        let found = state.aim.as_mut().and_then(|aim| aim.ran(rows, bytes, took));
        drop(state);
        if let Some(rows) = found {
            self.metrics.batch_rows_limit(rows);
            tracing::info!(graph = self.graph, rows, "batches of so many rows run more of them per second");
        }
    }

    pub(super) fn last_success(&self) -> Option<Instant> {
        self.lock().last_success
    }

    /// Whether a batch with so many bytes of inputs would be run by a caller.
    #[cfg(test)]
    pub(super) fn is_quick(&self, bytes: usize) -> bool {
        self.lock().quick.expects(bytes, false)
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
            self.queue.waiting.set(state.line.len());
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

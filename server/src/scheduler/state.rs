//! What is known of one model's line and its engines, and what is to be done next. No lock, no thread, no clock: what has
//! them is `admit`.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::Span;

use super::{
    Done, Policy, ScheduleError, Work,
    aim::Aim,
    company::Habit,
    line::{Free, Line, Next},
    order::Order,
    pace::{DISMAY, Pace, Quick},
    run::Ready,
};

pub(super) type Reply = oneshot::Sender<Outcome>;
pub(super) type Outcome = Result<Done, ScheduleError>;

/// A caller that has promised to run the next batch does so as soon as those have had their turn that are ready on its thread. Where one of
/// them runs a batch of another model there, which takes longer than anybody expected, somebody else has to come in.
const KEPT_WITHIN: Duration = DISMAY;

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
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) line: Line<Job>,
    /// `None` stands for an answer that died with its engine.
    pub(super) order: Order<Option<(Reply, Outcome)>>,
    pub(super) closed: bool,
    pub(super) last_success: Option<Instant>,
    pub(super) pace: Pace,
    pub(super) quick: Quick,
    pub(super) habit: Habit,
    /// `None` where batches are as large as the policy lets them be.
    pub(super) aim: Option<Aim>,
    /// Engines that run nothing.
    pub(super) resting: Vec<Ready>,
    /// Engines that died in the hands of a caller, and are not replaced yet.
    pub(super) vacancies: usize,
    /// When a caller promised to run the next batch.
    pub(super) promised: Option<Instant>,
}

impl State {
    /// Rows of the next batch at most.
    pub(super) fn max_rows(&self, policy: &Policy) -> usize {
        self.aim.as_ref().map_or(policy.max_rows, Aim::rows)
    }

    /// Whether a caller that may is to run the next batch: nobody else is about to, an engine rests, and batches are quick. To
    /// wake a thread for one, and to be woken by it, costs more than to run it. The caller lets others of this turn of the
    /// runtime come first, which join the batch.
    pub(super) fn promise(&mut self, now: Instant) -> bool {
        let is_able = !self.is_promised(now) && self.quick.has_any(self.line.len() == 1) && !self.resting.is_empty();
        if is_able {
            self.promised = Some(now);
        }
        is_able
    }

    /// Whether a caller is about to run the next batch.
    fn is_promised(&self, now: Instant) -> bool {
        self.promised.is_some_and(|promised| now.saturating_duration_since(promised) < KEPT_WITHIN)
    }

    /// Whether a thread has something to do, and nobody else will do it.
    pub(super) fn wants_a_thread(&self, now: Instant) -> bool {
        self.line.len() > 0 && !self.resting.is_empty() && !self.is_promised(now)
    }

    /// A caller has run a batch on `ready`.
    pub(super) fn rest(&mut self, mut ready: Ready) {
        ready.was_busy = self.line.len() > 0;
        self.resting.push(ready);
    }

    /// The next batch with the engine for it, if it is time, an engine rests, and `accepts` has nothing against the jobs.
    pub(super) fn next(
        &mut self,
        policy: &Policy,
        now: Instant,
        accepts: impl FnOnce(&mut dyn Iterator<Item = &Job>) -> bool,
    ) -> Next<(Vec<Job>, Ready)> {
        // One that has just run something may have to wait for company.
        let rested = self.resting.iter().rposition(|ready| !ready.was_busy);
        let Some(index) = rested.or(self.resting.len().checked_sub(1)) else { return Next::Wait(None) };
        let was_busy = self.resting[index].was_busy;
        let free = Free { now, was_busy, closing: self.closed, max_rows: self.max_rows(policy) };
        let mut jobs = match self.line.next(policy, free, accepts) {
            Next::Run(jobs) => jobs,
            Next::Wait(until) => {
                if until.is_none() {
                    self.resting.iter_mut().for_each(|ready| ready.was_busy = false);
                }
                return Next::Wait(until);
            }
        };
        if policy.preserve_ordering {
            for job in &mut jobs {
                job.place = Some(self.order.place());
            }
        }
        if self.line.len() > 0 {
            self.pace.leaves_behind(jobs.iter().map(|job| job.work.rows).sum());
        }
        Next::Run((jobs, self.resting.swap_remove(index)))
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::LazyLock, time::Duration};

    use sensorium_engine::{Engine, EngineError, RawTensor, Signature};

    use super::*;
    use crate::scheduler::{Batching, extent::Extent, line::Ticket};

    /// An engine that is only kept.
    struct Idle;

    static UNKNOWN: LazyLock<Signature> = LazyLock::new(|| Signature::of_manifest(&[], &[]));

    impl Engine for Idle {
        fn signature(&self) -> &Signature {
            &UNKNOWN
        }

        fn run_raw(&mut self, _: &[RawTensor], _: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
            Ok(Vec::new())
        }
    }

    fn policy() -> Policy {
        let max_delay = Duration::from_millis(5);
        Policy::of_server(Batching { max_rows: 4, max_waiting_rows: 100, max_delay })
    }

    fn engine() -> Ready {
        Ready::new(Box::new(Idle))
    }

    fn come(state: &mut State, policy: &Policy, now: Instant) {
        let ticket = Ticket {
            rows: 1,
            level: 1,
            class: Vec::new(),
            extent: Extent::default(),
            arrived: now,
            is_alone: false,
            timeout: None,
            deadline: None,
        };
        let work = Work { rows: 1, ..Work::default() };
        let job = Job { work, reply: oneshot::channel().0, span: Span::none(), admitted: now, place: None };
        state.line.push(policy, ticket, job).unwrap();
    }

    #[test]
    fn one_caller_at_a_time_promises_to_run_a_batch_and_no_thread_is_wanted_meanwhile() {
        let (policy, now) = (policy(), Instant::now());
        let mut state = State { resting: vec![engine()], ..State::default() };
        assert!(!state.wants_a_thread(now), "nothing waits");
        come(&mut state, &policy, now);
        assert!(!state.promise(now), "nobody knows whether its batches are quick");
        assert!(state.wants_a_thread(now));
        state.quick.ran(1000, Duration::from_micros(10), true);
        assert!(state.promise(now) && !state.promise(now));
        assert!(!state.wants_a_thread(now));
        // As a caller does that begins to keep its promise.
        state.promised = None;
        let Next::Run((jobs, ready)) = state.next(&policy, now, |_| true) else { panic!("it is time") };
        assert_eq!(jobs.len(), 1);
        come(&mut state, &policy, now);
        assert!(!state.promise(now) && !state.wants_a_thread(now), "no engine rests");
        state.rest(ready);
        assert!(state.wants_a_thread(now) && state.promise(now));
    }

    #[test]
    fn a_promise_that_is_not_kept_at_once_keeps_nobody_else_waiting() {
        let (policy, now) = (policy(), Instant::now());
        let mut state = State { resting: vec![engine()], ..State::default() };
        state.quick.ran(1000, Duration::from_micros(10), true);
        come(&mut state, &policy, now);
        assert!(state.promise(now));
        let (soon, later) = (now + KEPT_WITHIN / 2, now + KEPT_WITHIN);
        assert!(!state.wants_a_thread(soon) && state.wants_a_thread(later));
        assert!(!state.promise(soon) && state.promise(later), "another caller is as good as a thread");
        assert!(!state.wants_a_thread(later));
    }

    #[test]
    fn what_comes_after_a_run_waits_for_company_until_the_line_was_empty() {
        let (policy, now) = (policy(), Instant::now());
        let mut state = State { resting: vec![engine(), engine()], ..State::default() };
        come(&mut state, &policy, now);
        let Next::Run((_, first)) = state.next(&policy, now, |_| true) else { panic!("nothing ran before") };
        come(&mut state, &policy, now);
        let Next::Run((_, second)) = state.next(&policy, now, |_| true) else { panic!("the other one has rested") };
        come(&mut state, &policy, now);
        state.rest(first);
        let Next::Wait(Some(until)) = state.next(&policy, now, |_| true) else { panic!("more may come") };
        assert_eq!(until, now + Duration::from_millis(5));
        state.rest(second);
        let Next::Run((_, mut ready)) = state.next(&policy, until, |_| true) else { panic!("none came") };
        // As it comes back from a thread, whatever waits.
        ready.was_busy = true;
        state.resting.push(ready);
        assert!(matches!(state.next(&policy, until, |_| true), Next::Wait(None)));
        // Both engines rest now, whichever of them ran last.
        for _ in 0..2 {
            come(&mut state, &policy, until);
            assert!(matches!(state.next(&policy, until, |_| true), Next::Run(_)));
        }
        come(&mut state, &policy, until);
        assert!(matches!(state.next(&policy, until, |_| true), Next::Wait(None)), "no engine rests");
    }

    #[test]
    fn what_is_not_accepted_stays_in_line() {
        let (policy, now) = (policy(), Instant::now());
        let mut state = State { resting: vec![engine()], ..State::default() };
        come(&mut state, &policy, now);
        assert!(matches!(state.next(&policy, now, |_| false), Next::Wait(_)));
        assert_eq!((state.line.len(), state.resting.len()), (1, 1));
    }
}

//! Answers on their way to those who asked.
//!
//! To hand one out means to wake the runtime, which then sends it and reads the next request: for a model of 100 microseconds that
//! cannot batch, as much work again, most of it the changes between the two. So answers of short runs wait for each other for a
//! moment, while there is more to run.

use std::time::{Duration, Instant};

use super::{
    pace::SHORT,
    state::{Outcome, Reply},
};

/// Answers that wait for each other: as many as still wait to be run, within these bounds. If more did, those who asked would have
/// nothing to do, and the engine soon neither.
const FEWEST: usize = 4;
const MOST: usize = 16;
/// How long the first of them waits at most, runs between them included.
const PATIENCE: Duration = SHORT;
/// What a long run counts of itself one run later.
const LASTS: f64 = 7.0 / 8.0;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    answers: Vec<(Reply, Outcome)>,
    /// When the first of them was there.
    since: Option<Instant>,
    /// How long the longest run of late took.
    took: Duration,
    /// How many wait to be run.
    waiting: usize,
}

impl Outbox {
    pub(super) fn push(&mut self, reply: Reply, outcome: Outcome) {
        self.since.get_or_insert_with(Instant::now);
        self.answers.push((reply, outcome));
    }

    /// A run took so long, and so many are `waiting` for others.
    pub(super) fn ran(&mut self, took: Duration, waiting: usize) {
        // Where one was long, of which the inputs need not tell, another one may be: for a dozen.
        (self.took, self.waiting) = (took.max(self.took.mul_f64(LASTS)), waiting);
    }

    /// The answers, out of the box, which goes on.
    pub(super) fn take(&mut self) -> Self {
        Self { answers: std::mem::take(&mut self.answers), since: self.since.take(), ..*self }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Whether there are answers that are not to wait for another run at `now`, which may take as long as any did.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        let is_due = |since| {
            let is_late = now.saturating_duration_since(since) + self.took > PATIENCE;
            self.waiting == 0 || self.answers.len() >= self.waiting.clamp(FEWEST, MOST) || is_late
        };
        self.since.is_some_and(is_due)
    }

    /// Hands all out.
    pub(super) fn deliver(&mut self) {
        self.since = None;
        for (reply, outcome) in self.answers.drain(..) {
            // A caller that left does not want its answer.
            drop(reply.send(outcome));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::{super::ScheduleError, *};

    /// A box with so many answers, and where they arrive.
    fn filled(count: usize, took: Duration, waiting: usize) -> (Outbox, Vec<oneshot::Receiver<Outcome>>) {
        let mut outbox = Outbox::default();
        let answers = (0..count).map(|_| {
            let (reply, answer) = oneshot::channel();
            outbox.push(reply, Err(ScheduleError::Stopped { graph: "m".to_owned() }));
            answer
        });
        let answers = answers.collect();
        outbox.ran(took, waiting);
        (outbox, answers)
    }

    #[test]
    fn answers_wait_for_each_other_while_there_are_few_and_runs_are_short() {
        let now = Instant::now();
        assert!(!filled(0, Duration::ZERO, 0).0.is_due(now + 2 * PATIENCE));
        assert!(!filled(FEWEST - 1, Duration::ZERO, 1).0.is_due(now));
        assert!(filled(FEWEST, Duration::ZERO, 1).0.is_due(now));
        assert!(!filled(7, Duration::ZERO, 8).0.is_due(now), "the engine has enough to do");
        assert!(filled(8, Duration::ZERO, 8).0.is_due(now));
        assert!(filled(MOST, Duration::ZERO, 100).0.is_due(now));
        assert!(filled(1, Duration::ZERO, 0).0.is_due(now), "there is nobody to wait for");
        assert!(filled(1, 2 * PATIENCE, 1).0.is_due(now), "another run would take too long");
        let (mut outbox, _answers) = filled(1, 2 * PATIENCE, 1);
        outbox.ran(Duration::ZERO, 1);
        assert!(outbox.is_due(now), "another run may take as long as the one before the last");
        let (outbox, _answers) = filled(1, Duration::ZERO, 1);
        assert!(outbox.is_due(Instant::now() + 2 * PATIENCE), "they have waited long enough");
    }

    #[test]
    fn a_long_run_is_remembered_when_its_answers_have_gone() {
        let (mut outbox, _answers) = filled(1, 2 * PATIENCE, 9);
        let taken = outbox.take();
        assert!(outbox.is_empty() && !taken.is_empty());
        let (reply, _answer) = oneshot::channel();
        outbox.push(reply, Err(ScheduleError::Stopped { graph: "m".to_owned() }));
        outbox.ran(Duration::ZERO, 9);
        assert!(outbox.is_due(Instant::now()), "another run may take as long");
        (0..8).for_each(|_| outbox.ran(Duration::ZERO, 9));
        assert!(!outbox.is_due(Instant::now()));
    }

    #[test]
    fn what_is_delivered_arrives_and_is_no_longer_due() {
        let (mut outbox, answers) = filled(FEWEST, Duration::ZERO, 1);
        outbox.deliver();
        assert!(outbox.is_empty() && !outbox.is_due(Instant::now()));
        assert!(answers.into_iter().all(|mut answer| answer.try_recv().is_ok()));
    }
}

//! How many rows a batch should have where more wait than it takes. Pure.
//!
//! Rows share what a run costs whatever its size, so that more of them are better, up to where what they need does not fit into
//! a cache any more: many a model runs more rows per second with fewer than its `max_batch_size`. Where that is depends on the
//! model and the machine, so it is measured while it serves. Sizes are the largest one, halved again and again. Now and then
//! the neighbour of the size in use is tried, in turn with it, so that what disturbs the machine disturbs both. Who tries and
//! wins nothing tries ever more rarely.

use std::time::Duration;

use super::pause::Pause;

/// Batches of the larger size in a trial, and twice as many of the smaller one, of which the median counts: one run says little,
/// and the first of a size may be the first of its shape that the engine ever sees.
const RUNS: usize = 3;
/// The same where a trial was won, which has to be shown once more: on a restless machine chance wins one of twenty.
const RUNS_AGAIN: usize = 5;
/// A trial has to come about in this many times as many batches. Where too few wait for the larger size it does not.
const PATIENCE: usize = 4;
/// The part of its time that a change has to save.
const GAIN: f64 = 0.03;
/// Batches that could have had the other size, until the next trial: at first, and at most. Four times as many where the last one
/// won nothing: trials show in the longest of the answers' times.
const PAUSE: Pause = Pause::new(16, 1 << 12, 4);
/// Runs of less time than this are no more than what there is to do about their messages, which larger batches share.
const SHORTEST: Duration = Duration::from_millis(1);

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Aim {
    /// Rows of the largest batch.
    largest: usize,
    /// Rows of the best one, as far as is known.
    rows: usize,
    /// Which neighbour is tried next.
    direction: Direction,
    pause: Pause,
    trial: Option<Trial>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Smaller,
    Larger,
}

/// Seconds for each byte of inputs, by the size in use and by the other one.
#[derive(Clone, Debug)]
struct Trial {
    other: usize,
    is_smaller: bool,
    with_own: Vec<f64>,
    with_other: Vec<f64>,
    /// Batches so far, of whatever size.
    batches: usize,
    /// Batches of the larger size that it takes.
    runs: usize,
}

impl Aim {
    /// Of batches of so many rows at most.
    pub(super) fn at_most(largest: usize) -> Self {
        Self { largest, rows: largest, direction: Direction::Smaller, pause: PAUSE, trial: None }
    }

    /// Rows of the next batch at most.
    pub(super) fn rows(&self) -> usize {
        match &self.trial {
            Some(trial) if trial.wants_other() => trial.other,
            _ => self.rows,
        }
    }

    /// A batch of so many rows, whose inputs have so many bytes, took an engine so long. The size, where that was the last run
    /// that was needed to change it. Times are compared by the byte: rows may be of unequal length.
    pub(super) fn ran(&mut self, rows: usize, bytes: usize, took: Duration) -> Option<usize> {
        let size = self.size_of(rows);
        let Some(trial) = &mut self.trial else {
            if size == self.rows && took >= SHORTEST {
                self.pause.pass();
            }
            if self.pause.is_over() {
                self.trial = self.neighbour().map(|other| Trial::new(self.rows, other, RUNS));
            }
            return None;
        };
        let seconds = took.as_secs_f64() / bytes.max(1) as f64;
        trial.batches += 1;
        if size == self.rows {
            trial.with_own.push(seconds);
        } else if size == trial.other {
            trial.with_other.push(seconds);
        }
        let is_better = trial.verdict()?;
        if is_better && trial.runs < RUNS_AGAIN {
            *trial = Trial::new(self.rows, trial.other, RUNS_AGAIN);
            return None;
        }
        if is_better {
            self.rows = trial.other;
        } else {
            self.direction = self.direction.reversed();
        }
        self.pause.begin(is_better);
        self.trial = None;
        is_better.then_some(self.rows)
    }

    /// The smallest size that holds so many rows.
    fn size_of(&self, rows: usize) -> usize {
        let mut size = self.largest;
        while size > 1 && rows <= half(size) {
            size = half(size);
        }
        size
    }

    /// The size to try: the one in the direction, or the other one at an end.
    fn neighbour(&mut self) -> Option<usize> {
        let find = |direction| match direction {
            Direction::Smaller => (self.rows > 1).then(|| half(self.rows)),
            // By halving the largest one, since odd sizes cannot be doubled.
            Direction::Larger => (self.rows < self.largest).then(|| {
                let mut size = self.largest;
                while half(size) > self.rows {
                    size = half(size);
                }
                size
            }),
        };
        let found = find(self.direction);
        if found.is_none() {
            self.direction = self.direction.reversed();
        }
        found.or_else(|| find(self.direction))
    }
}

impl Direction {
    fn reversed(self) -> Self {
        match self {
            Self::Smaller => Self::Larger,
            Self::Larger => Self::Smaller,
        }
    }
}

impl Trial {
    fn new(own: usize, other: usize, runs: usize) -> Self {
        Self { other, is_smaller: other < own, with_own: Vec::new(), with_other: Vec::new(), batches: 0, runs }
    }

    /// Batches of the smaller size so far, and of the larger one.
    fn counts(&self) -> (usize, usize) {
        let (own, other) = (self.with_own.len(), self.with_other.len());
        if self.is_smaller { (other, own) } else { (own, other) }
    }

    /// Whether the next batch is to have the other size. Two small ones and a large one take turns: two halves instead of a whole, so
    /// that those who take turns in two batches go on doing so.
    fn wants_other(&self) -> bool {
        let (small, large) = self.counts();
        (small < 2 * (large + 1)) == self.is_smaller
    }

    /// Whether the other size is better; `None` while that is open.
    fn verdict(&mut self) -> Option<bool> {
        let (small, large) = self.counts();
        if large >= self.runs && small >= 2 * self.runs {
            return Some(median(&mut self.with_other) < (1.0 - GAIN) * median(&mut self.with_own));
        }
        (self.batches >= PATIENCE * 3 * self.runs).then_some(false)
    }
}

fn half(size: usize) -> usize {
    size.div_ceil(2)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is in use after so many batches of a model whose row takes `of_row` seconds in a batch of that size, while
    /// `waiting` rows always wait.
    fn settled(aim: &mut Aim, waiting: usize, batches: usize, of_row: impl Fn(usize) -> f64) -> usize {
        for index in 0..batches {
            let rows = aim.rows().min(waiting);
            // Every fifth run is disturbed.
            let disturbed = if index % 5 == 0 { 1.4 } else { 1.0 };
            aim.ran(rows, rows, Duration::from_secs_f64(of_row(rows) * rows as f64 * disturbed));
        }
        aim.rows
    }

    #[test]
    fn the_size_of_most_rows_per_second_is_found_from_the_largest_one() {
        for best in [1, 2, 4, 8, 16, 32, 64] {
            let of_row = |rows: usize| 0.01 * (1.0 + 0.1 * (rows as f64 / best as f64).log2().abs());
            assert_eq!(settled(&mut Aim::at_most(64), 200, 400, of_row), best);
        }
    }

    #[test]
    fn sizes_that_are_no_power_of_two_are_halved_to_one_and_found_again() {
        let mut aim = Aim::at_most(50);
        assert_eq!(settled(&mut aim, 200, 400, |rows| 0.01 + 0.001 * rows as f64), 1);
        assert_eq!(
            settled(&mut aim, 200, 20_000, |rows| 0.01 + 0.1 / rows as f64),
            50,
            "the machine is another one now"
        );
    }

    #[test]
    fn what_wins_little_changes_nothing() {
        let of_row = |rows: usize| 0.01 + 0.0001 * (rows as f64).log2();
        assert_eq!(settled(&mut Aim::at_most(32), 200, 10_000, of_row), 32);
    }

    #[test]
    fn quick_models_and_single_rows_are_left_alone() {
        let mut aim = Aim::at_most(32);
        assert_eq!(settled(&mut aim, 200, 1000, |rows| 1e-7 * rows as f64), 32);
        assert_eq!(settled(&mut aim, 1, 1000, |_| 0.01), 32);
        assert!(aim.trial.is_none());
        assert_eq!(settled(&mut Aim::at_most(1), 200, 1000, |_| 0.01), 1);
    }

    #[test]
    fn trials_that_win_nothing_become_rare() {
        let mut aim = Aim::at_most(32);
        let mut tried = 0;
        for _ in 0..10_000 {
            let rows = aim.rows();
            tried += usize::from(rows < 32);
            aim.ran(rows, rows, Duration::from_secs_f64(0.01 + 0.001 * rows as f64));
        }
        assert_eq!(aim.rows, 32);
        assert!(tried < 100, "{tried} of 10,000 were smaller than they should have been");
    }

    #[test]
    fn a_larger_size_is_not_waited_for_where_too_few_wait() {
        let mut aim = Aim::at_most(32);
        let of_row = |rows: usize| 0.01 * (rows.max(8) as f64 / 8.0).sqrt();
        assert_eq!(settled(&mut aim, 200, 400, of_row), 8);
        assert_eq!(settled(&mut aim, 8, 20_000, of_row), 8);
        assert!(aim.rows() <= 16);
    }
}

//! How many rows a batch should have where more wait than it takes. Pure.
//!
//! Rows share what a run costs whatever its size, so that more of them are better, up to where what they need does not fit into
//! a cache any more: many a model runs more rows per second with fewer than its `max_batch_size`. Where that is depends on the
//! model and the machine, so it is measured while it serves. Sizes are the largest one, halved again and again. Now and then
//! another one is tried, in turn with the size that batches have, so that what disturbs the machine disturbs both. Each size has its
//! turn, since its neighbour may win too little where a distant one wins enough. Who tries and wins nothing tries ever more rarely.
//!
//! A smaller size need only not lose, and a larger one has to win, twice in turn: who comes while a batch runs waits for all of it, and then
//! for his own, so that answers come sooner from smaller ones. Where chance decided, that costs little, and the other size has its turn again.

use std::time::Duration;

use super::pause::Pause;

/// Comparisons in a trial, of which more than half count: one says little.
const RUNS: usize = 7;
/// Batches of a comparison: three of the smaller size, then two of the larger one. The first of each says nothing: while it runs, what was
/// answered before comes back, and that was of the other size.
const STEPS: usize = 5;
/// Which of them is the first larger one.
const LARGE_STEP: usize = 3;
/// A trial has to come about in this many times as many batches as it needs. Where too few wait for the larger size it does not.
const PATIENCE: usize = 4;
/// The part of its time that a larger size has to save, twice in turn: on a restless machine chance wins some.
const GAIN_OF_LARGER: f64 = 0.02;
/// What a batch costs beside its run: to be put together, and to wake who waits for it.
const BESIDES: Duration = Duration::from_micros(50);
/// Batches that could have had another size, until the next trial: at first, and at most. Twice as many where the last one
/// won nothing: trials show in the longest of the answers' times.
const PAUSE: Pause = Pause::new(4, 1 << 12, 2);
/// A trial is lost after so many comparisons where the other size took more time by this part in each of them, and so are those of all
/// sizes beyond it: a trial costs those who wait the more, the worse the other size is.
const HOPELESS_RUNS: usize = 2;
const LOSS: f64 = 0.15;
/// Runs of less time than this are no more than what there is to do about their messages, which larger batches share.
const SHORTEST: Duration = Duration::from_millis(1);

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Aim {
    /// Rows of the largest batch, halved again and again, ascending.
    sizes: Vec<usize>,
    /// Rows of the best one, as far as is known.
    rows: usize,
    /// The size of the last batch. Smaller than `rows` where fewer wait, as when clients that wait for their answers take turns in two
    /// batches.
    last: usize,
    /// Trials that were lost since one was won.
    lost: usize,
    pause: Pause,
    trial: Option<Trial>,
}

/// What came of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Better,
    /// Or not better by enough, or nobody can tell.
    Worse,
    /// By so much that sizes beyond it need not be tried: more rows cost ever less up to some size, and ever more from there on.
    Hopeless,
}

/// Compares the size that batches have with another one.
#[derive(Clone, Debug)]
struct Trial {
    own: usize,
    other: usize,
    /// Batches of the comparison under way, and seconds for each byte of inputs in those of the smaller size that count.
    step: usize,
    small: f64,
    score: Score,
    /// Batches so far, of whatever size.
    batches: usize,
    /// Whether it was won once before.
    is_again: bool,
}

/// Comparisons, each of runs that followed each other, since the speed of a machine changes.
#[derive(Clone, Copy, Debug, Default)]
struct Score {
    /// Where the other size was better by enough.
    won: usize,
    /// Where it was not,
    lost: usize,
    /// and those of them where it was hopeless.
    hopeless: usize,
}

impl Aim {
    /// Of batches of so many rows at most.
    pub(super) fn at_most(largest: usize) -> Self {
        let halved = std::iter::successors(Some(largest), |size| (*size > 1).then(|| size.div_ceil(2)));
        let mut sizes: Vec<usize> = halved.collect();
        sizes.reverse();
        Self { sizes, rows: largest, last: largest, lost: 0, pause: PAUSE, trial: None }
    }

    /// Rows of the next batch at most.
    pub(super) fn rows(&self) -> usize {
        self.trial.as_ref().map_or(self.rows, Trial::rows)
    }

    /// A batch of so many rows, whose inputs have so many bytes, took an engine so long. The size, where that was the last run
    /// that was needed to change it. Times are compared by the byte: rows may be of unequal length.
    pub(super) fn ran(&mut self, rows: usize, bytes: usize, took: Duration) -> Option<usize> {
        let size = self.size_of(rows);
        let Some(trial) = &mut self.trial else {
            let is_usual = std::mem::replace(&mut self.last, size) == size;
            // Those of all who wait, and of the few who came too late for it, may take turns.
            if (is_usual || size == self.rows) && took >= SHORTEST {
                self.pause.pass();
                if self.pause.is_over() {
                    self.trial = self.candidate(size).map(|other| Trial::new(size, other));
                }
            }
            return None;
        };
        trial.ran(size, (took + BESIDES).as_secs_f64() / bytes.max(1) as f64);
        let verdict = trial.verdict()?;
        if verdict == Verdict::Better && !trial.is_enough() {
            *trial = Trial { is_again: true, ..Trial::new(trial.own, trial.other) };
            return None;
        }
        let (own, other) = (trial.own, trial.other);
        self.trial = None;
        if verdict == Verdict::Better {
            (self.rows, self.lost) = (other, 0);
            self.pause.begin(true);
            return Some(other);
        }
        let is_beyond = |size: &&usize| if other < own { **size < other } else { **size > other };
        let beyond = if verdict == Verdict::Hopeless { self.sizes.iter().filter(is_beyond).count() } else { 0 };
        self.lost += 1 + beyond;
        (0..=beyond).for_each(|_| self.pause.begin(false));
        None
    }

    /// The smallest size that holds so many rows.
    fn size_of(&self, rows: usize) -> usize {
        self.sizes.iter().copied().find(|size| *size >= rows).unwrap_or(rows)
    }

    /// What to try where batches have the size `own`: each smaller size in turn, from the next one on, and each larger one, if they
    /// would have more rows if they were let.
    fn candidate(&self, own: usize) -> Option<usize> {
        let smaller = self.sizes.iter().rev().filter(|size| **size < own);
        let larger = self.sizes.iter().filter(|size| **size > own && own == self.rows);
        let all = smaller.chain(larger);
        let turn = self.lost.checked_rem(all.clone().count())?;
        all.copied().nth(turn)
    }
}

impl Trial {
    fn new(own: usize, other: usize) -> Self {
        Self { own, other, step: 0, small: 0.0, score: Score::default(), batches: 0, is_again: false }
    }

    /// Whether one that is won need not be won once more.
    fn is_enough(&self) -> bool {
        self.is_again || self.other < self.own
    }

    /// Rows of the next batch.
    fn rows(&self) -> usize {
        if self.step < LARGE_STEP { self.own.min(self.other) } else { self.own.max(self.other) }
    }

    /// A batch of `size` took so long for each byte.
    fn ran(&mut self, size: usize, seconds: f64) {
        self.batches += 1;
        if size != self.rows() {
            return;
        }
        if (1..LARGE_STEP).contains(&self.step) {
            self.small += seconds / (LARGE_STEP - 1) as f64;
        }
        self.step += 1;
        if self.step == STEPS {
            let ratio = self.small / seconds;
            let (ratio, gain) = if self.other < self.own { (ratio, 0.0) } else { (ratio.recip(), GAIN_OF_LARGER) };
            self.score.add(ratio, gain);
            (self.step, self.small) = (0, 0.0);
        }
    }

    /// What the other size is; `None` while that is open.
    fn verdict(&self) -> Option<Verdict> {
        let is_late = self.batches >= PATIENCE * STEPS * RUNS;
        self.score.verdict().or(is_late.then_some(Verdict::Worse))
    }
}

impl Score {
    /// The other size took `ratio` of the own one's time.
    fn add(&mut self, ratio: f64, gain: f64) {
        let is_won = ratio < 1.0 - gain;
        self.won += usize::from(is_won);
        self.lost += usize::from(!is_won);
        self.hopeless += usize::from(ratio > 1.0 + LOSS);
    }

    /// As soon as those to come cannot change it.
    fn verdict(self) -> Option<Verdict> {
        let Self { won, lost, hopeless } = self;
        if hopeless >= HOPELESS_RUNS && hopeless == won + lost {
            return Some(Verdict::Hopeless);
        }
        match (won > RUNS / 2, lost > RUNS / 2) {
            (true, _) => Some(Verdict::Better),
            (_, true) => Some(Verdict::Worse),
            (false, false) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is in use after so many batches of a model whose row takes `of_row` seconds in a batch of that size, while
    /// `waiting` rows always wait.
    fn settled(aim: &mut Aim, waiting: usize, batches: usize, of_row: impl Fn(usize) -> f64) -> usize {
        for index in 0..batches {
            let rows = aim.rows().min(waiting);
            // Every seventh run is disturbed.
            let disturbed = if index % 7 == 0 { 1.4 } else { 1.0 };
            aim.ran(rows, rows, Duration::from_secs_f64(of_row(rows) * rows as f64 * disturbed));
        }
        aim.rows
    }

    #[test]
    fn the_size_of_most_rows_per_second_is_found_from_the_largest_one() {
        for best in [1, 2, 4, 8, 16, 32, 64] {
            let of_row = |rows: usize| 0.01 * (1.0 + 0.1 * (rows as f64 / best as f64).log2().abs());
            assert_eq!(settled(&mut Aim::at_most(64), 200, 1000, of_row), best);
        }
    }

    #[test]
    fn sizes_that_are_no_power_of_two_are_halved_to_one_and_found_again() {
        let mut aim = Aim::at_most(50);
        assert_eq!(settled(&mut aim, 200, 1000, |rows| 0.01 + 0.001 * rows as f64), 1);
        assert_eq!(
            settled(&mut aim, 200, 20_000, |rows| 0.01 + 0.1 / rows as f64),
            50,
            "the machine is another one now"
        );
    }

    #[test]
    fn a_distant_size_is_found_where_its_neighbours_win_too_little() {
        let of_row = |rows: usize| 0.01 * (1.0 + 0.02 * (rows as f64).log2());
        let found = settled(&mut Aim::at_most(32), 200, 2000, of_row);
        assert!(found <= 2, "{found}");
    }

    #[test]
    fn a_size_is_compared_with_what_runs_where_fewer_wait_than_a_batch_could_have() {
        let of_row = |rows: usize| 0.01 * (rows as f64 / 4.0).max(1.0).powf(0.2);
        let mut aim = Aim::at_most(32);
        assert_eq!(settled(&mut aim, 16, 400, of_row), 4, "two batches of 16 take turns");
        assert_eq!(settled(&mut Aim::at_most(32), 16, 400, |_| 0.01), 32, "nothing is won by another size");
    }

    #[test]
    fn a_size_is_found_where_a_batch_of_most_and_one_of_the_rest_take_turns() {
        let mut aim = Aim::at_most(32);
        for index in 0..1000 {
            let waiting = if index % 2 == 0 { 31 } else { 1 };
            let rows = if aim.rows() < 32 { aim.rows() } else { waiting };
            let of_row = 0.01 * (1.0 + 0.05 * (rows as f64 / 8.0).log2().abs());
            aim.ran(rows, rows, Duration::from_secs_f64(of_row * rows as f64));
        }
        assert_eq!(aim.rows, 8);
    }

    #[test]
    fn it_is_found_on_a_machine_whose_speed_changes_more_than_sizes_differ() {
        for best in [2, 8, 32] {
            let batches = std::cell::Cell::new(0);
            let of_row = |rows: usize| {
                batches.set(batches.get() + 1);
                let machine = if batches.get() / 20 % 2 == 0 { 1.0 } else { 1.35 };
                0.01 * machine * (1.0 + 0.06 * (rows as f64 / f64::from(best)).log2().abs())
            };
            assert_eq!(settled(&mut Aim::at_most(32), 200, 5000, of_row), best as usize);
        }
    }

    /// Numbers from 0 to 1 that look like chance, the same each time.
    fn chance(seed: u64) -> impl FnMut() -> f64 {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 53) as f64
        }
    }

    /// How much more time what is found takes than what would be best, after so many batches on a restless machine: the mean of
    /// many. A doubling away from the `best` size costs `step`, and `waiting` rows always wait.
    fn excess(step: f64, best: f64, waiting: usize, batches: usize) -> f64 {
        const MACHINES: u64 = 40;
        let cost = |rows: usize| 1.0 + step * (rows as f64 / best).log2().abs();
        let machine = |seed| {
            let (mut aim, mut chance, mut speed) = (Aim::at_most(32), chance(seed), 1.0);
            for _ in 0..batches {
                if chance() < 0.05 {
                    speed = if speed > 1.0 { 1.0 } else { 1.35 };
                }
                // About as wide as a normal distribution of 4 percent.
                let noise = 1.0 + 0.08 * (chance() + chance() + chance() - 1.5);
                let disturbed = if chance() < 0.05 { 1.4 } else { 1.0 };
                let rows = aim.rows().min(waiting);
                let took = 0.01 * cost(rows) * rows as f64 * speed * noise * disturbed;
                aim.ran(rows, rows, Duration::from_secs_f64(took));
            }
            cost(aim.rows.min(waiting)) / cost((best as usize).min(waiting)) - 1.0
        };
        (1..=MACHINES).map(machine).sum::<f64>() / MACHINES as f64
    }

    #[test]
    fn on_restless_machines_what_is_found_costs_little_more_than_the_best() {
        for (step, best) in [(0.03, 2.0), (0.06, 2.0), (0.06, 8.0), (0.1, 4.0), (0.06, 32.0), (0.2, 32.0)] {
            for (waiting, batches) in [(200, 200), (200, 5000), (16, 200), (16, 5000)] {
                let excess = excess(step, best, waiting, batches);
                assert!(excess < 0.02, "{step} for a doubling from {best}, {waiting} wait, {batches} ran: {excess}");
            }
        }
    }

    #[test]
    fn what_wins_nothing_changes_nothing() {
        assert_eq!(settled(&mut Aim::at_most(32), 200, 10_000, |_| 0.01), 32);
    }

    #[test]
    fn a_smaller_size_need_not_win_by_as_much_as_a_larger_one() {
        let saved = |part: f64, best: usize| move |rows: usize| if rows == best { 0.01 * (1.0 - part) } else { 0.01 };
        assert_eq!(settled(&mut Aim::at_most(32), 200, 500, saved(0.015, 8)), 8);
        let mut aim = Aim::at_most(32);
        assert_eq!(settled(&mut aim, 200, 500, saved(0.5, 8)), 8);
        assert_eq!(settled(&mut aim, 200, 10_000, saved(0.015, 32)), 8, "it has this already, and answers sooner");
        assert_eq!(settled(&mut aim, 200, 50_000, saved(0.03, 32)), 32);
    }

    #[test]
    fn what_a_batch_costs_beside_its_run_counts() {
        let of_row = |rows: usize| 10e-6 * (1.0 + 0.005 * (rows as f64).log2());
        assert_eq!(settled(&mut Aim::at_most(256), 1000, 2000, of_row), 256);
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
        assert!(tried < 40, "{tried} of 10,000 were smaller than they should have been");
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

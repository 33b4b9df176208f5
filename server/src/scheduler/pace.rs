//! How long what waits will take, from how long batches took lately. Pure.
//!
//! A batch costs something for itself and something for each row. Both are fitted to the latest runs by least squares, older
//! ones counting less and less.

use std::time::Duration;

/// What a run counts of one that came after it.
const MEMORY: f64 = 0.95;
/// Runs are not all alike: what is expected to take so long is granted this much more.
const MARGIN: f64 = 1.25;

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Pace {
    /// Decayed sums over runs: their number, rows, seconds, squares and products.
    runs: f64,
    rows: f64,
    seconds: f64,
    rows_rows: f64,
    rows_seconds: f64,
    /// Rows of a batch that left others behind; `None` before there was one.
    full: Option<f64>,
}

impl Pace {
    /// A batch of so many rows begins, and more waited than it could take.
    pub(super) fn leaves_behind(&mut self, rows: usize) {
        let rows = rows as f64;
        self.full = Some(self.full.map_or(rows, |full| MEMORY.mul_add(full - rows, rows)));
    }

    /// A batch of so many rows took so long.
    pub(super) fn ran(&mut self, rows: usize, took: Duration) {
        let (rows, seconds) = (rows as f64, took.as_secs_f64());
        let add = |sum: &mut f64, value: f64| *sum = MEMORY.mul_add(*sum, value);
        add(&mut self.runs, 1.0);
        add(&mut self.rows, rows);
        add(&mut self.seconds, seconds);
        add(&mut self.rows_rows, rows * rows);
        add(&mut self.rows_seconds, rows * seconds);
    }

    /// Seconds of a batch, and of each row of it.
    fn costs(&self) -> Option<(f64, f64)> {
        if self.runs < 1.0 {
            return None;
        }
        let (rows, seconds) = (self.rows / self.runs, self.seconds / self.runs);
        let spread = self.rows_rows / self.runs - rows * rows;
        // Batches of one size do not show what a row costs. That it costs nothing is the guess that lets more in, and
        // so shows it.
        if spread < 1e-3 * rows * rows {
            return Some((seconds, 0.0));
        }
        let row = ((self.rows_seconds / self.runs - rows * seconds) / spread).clamp(0.0, seconds / rows);
        Some((seconds - row * rows, row))
    }

    /// What a batch costs whatever its size.
    pub(super) fn overhead(&self) -> Duration {
        self.costs().and_then(|(batch, _)| Duration::try_from_secs_f64(batch).ok()).unwrap_or_default()
    }

    /// How long it takes until `rows` rows are run that come behind `ahead` others and one batch that is under way, on
    /// `engines` engines whose batches have `max_rows` rows at most, or those of one request. Zero before anything has run.
    pub(super) fn expect(&self, ahead: usize, rows: usize, max_rows: usize, engines: usize) -> Duration {
        let Some((batch, row)) = self.costs() else { return Duration::ZERO };
        let all = (ahead + rows) as f64;
        // A request may have more rows than a batch of several.
        let full = self.full.unwrap_or(max_rows.max(rows) as f64).max(1.0);
        let queue = ((all / full).ceil() * batch + all * row) / engines.max(1) as f64;
        let under_way = self.seconds / self.runs;
        Duration::try_from_secs_f64((queue + under_way) * MARGIN).unwrap_or(Duration::MAX)
    }
}

/// A batch that takes no longer than it takes to receive a few requests.
pub(super) const QUICK: Duration = Duration::from_micros(200);
/// One that takes no longer than that keeps nobody waiting for long, if nobody else waits for its engine.
const BRIEF: Duration = Duration::from_micros(500);

/// A batch that was expected to be quick and takes as long has kept everybody else on its thread waiting.
pub(super) const DISMAY: Duration = Duration::from_millis(10);
/// Quick batches that make up for the first of these, and for any at most: four times as many for each.
const AMENDS: u32 = 64;
const MOST_AMENDS: u32 = 1 << 16;
/// So many times as many quick batches without another one forgive one of them: every machine stands still now and then, and that is not the
/// model's fault.
const CALM: u32 = 256;

/// One for which the answers of those before it may wait.
pub(super) const SHORT: Duration = Duration::from_millis(3);

/// Which batches are quick enough for a caller to run them, as far as the size of their inputs tells. Pure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quick {
    /// Any batch.
    any: Under,
    /// One behind which nobody waits.
    alone: Under,
    /// One that answers may wait for.
    short: Under,
}

impl Default for Quick {
    fn default() -> Self {
        let under = |limit| Under { limit, bytes: None, amends: 0, last_amends: 0, calm: 0 };
        Self { any: under(QUICK), alone: under(BRIEF), short: under(SHORT) }
    }
}

impl Quick {
    /// A batch with so many bytes of inputs took so long, and whether any of its requests was answered.
    pub(super) fn ran(&mut self, bytes: usize, took: Duration, is_answered: bool) {
        for under in [&mut self.any, &mut self.alone, &mut self.short] {
            // That a run which failed was over soon says nothing of those that do not fail.
            if is_answered || took >= under.limit {
                under.ran(bytes, took);
            }
        }
    }

    /// Whether any batch is; `is_alone` where nobody waits behind it.
    pub(super) fn has_any(&self, is_alone: bool) -> bool {
        self.any.has_any() || (is_alone && self.alone.has_any())
    }

    /// Whether one with so many bytes of inputs will be.
    pub(super) fn expects(&self, bytes: usize, is_alone: bool) -> bool {
        self.any.expects(bytes) || (is_alone && self.alone.expects(bytes))
    }

    /// Whether answers may wait for one with so many bytes of inputs.
    pub(super) fn is_short(&self, bytes: usize) -> bool {
        self.short.expects(bytes)
    }
}

/// Which batches take less than some time.
#[derive(Clone, Copy, Debug)]
struct Under {
    limit: Duration,
    /// Bytes of the largest batch that did, of late.
    bytes: Option<usize>,
    /// Batches that do until that is trusted again.
    amends: u32,
    /// As many as the last dismay took.
    last_amends: u32,
    /// Quick batches since it is trusted.
    calm: u32,
}

impl Under {
    fn ran(&mut self, bytes: usize, took: Duration) {
        if took >= DISMAY && self.bytes.is_some_and(|known| bytes <= known) {
            // What a batch takes depends on more than its size here.
            self.last_amends = self.last_amends.saturating_mul(4).clamp(AMENDS, MOST_AMENDS);
            (self.amends, self.calm) = (self.last_amends, 0);
        } else if took < self.limit && self.amends > 0 {
            self.amends -= 1;
        } else if took < self.limit && self.last_amends > 0 {
            self.calm += 1;
            if self.calm >= CALM * self.last_amends {
                (self.last_amends, self.calm) = (self.last_amends / 4, 0);
            }
        }
        self.bytes = if took < self.limit {
            Some(self.bytes.map_or(bytes, |known| known.max(bytes)))
        } else {
            self.bytes.and_then(|known| Some(known.min(bytes.checked_sub(1)?)))
        };
    }

    fn has_any(&self) -> bool {
        self.bytes.is_some() && self.amends == 0
    }

    fn expects(&self, bytes: usize) -> bool {
        self.amends == 0 && self.bytes.is_some_and(|known| bytes <= known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_larger_than_a_quick_batch_is_expected_to_be_quick_until_it_is_not() {
        let mut quick = Quick::default().any;
        assert!(!quick.has_any() && !quick.expects(0), "nothing is known");
        quick.ran(100, ms(50.0));
        assert!(!quick.expects(100));
        quick.ran(100, ms(0.1));
        quick.ran(40, ms(0.1));
        assert!(quick.expects(100) && !quick.expects(101));
        quick.ran(200, ms(50.0));
        assert!(quick.expects(100), "a larger one says nothing of it");
        quick.ran(60, ms(5.0));
        assert!(quick.expects(59) && !quick.expects(60));
        quick.ran(0, ms(5.0));
        assert!(!quick.has_any());
    }

    #[test]
    fn a_model_that_was_quick_and_is_not_at_the_same_size_has_to_be_it_many_times_again() {
        let mut quick = Quick::default().any;
        for wanted in [AMENDS, 4 * AMENDS] {
            quick.ran(8, ms(0.1));
            quick.ran(8, ms(500.0));
            let mut runs = 0;
            while !quick.expects(8) {
                quick.ran(8, ms(0.1));
                runs += 1;
            }
            assert_eq!(runs, wanted);
        }
        quick.ran(8, ms(1.0));
        quick.ran(8, ms(0.1));
        assert!(quick.expects(8), "a millisecond more is forgiven at once");
    }

    #[test]
    fn a_machine_that_stands_still_once_in_a_long_while_is_forgiven_each_time() {
        let mut quick = Quick::default().any;
        quick.ran(8, ms(0.1));
        for _ in 0..5 {
            quick.ran(8, ms(50.0));
            // The size was forgotten as well, and is known again with the first of these.
            for _ in 0..AMENDS {
                assert!(!quick.expects(8));
                quick.ran(8, ms(0.1));
            }
            assert!(quick.expects(8));
            for _ in 0..CALM * AMENDS {
                quick.ran(8, ms(0.1));
            }
        }
    }

    #[test]
    fn a_batch_behind_which_nobody_waits_may_take_longer() {
        let mut quick = Quick::default();
        quick.ran(100, ms(0.3), true);
        assert!(quick.has_any(true) && quick.expects(100, true));
        assert!(!quick.has_any(false) && !quick.expects(100, false));
        quick.ran(50, ms(0.1), true);
        assert!(quick.expects(50, false) && !quick.expects(100, false) && quick.expects(100, true));
    }

    #[test]
    fn a_run_that_failed_soon_says_nothing_and_one_that_failed_late_does() {
        let mut quick = Quick::default();
        quick.ran(100, ms(0.1), false);
        assert!(!quick.has_any(true));
        quick.ran(100, ms(0.1), true);
        quick.ran(100, ms(0.3), false);
        assert!(!quick.expects(100, false) && quick.expects(100, true));
        quick.ran(100, ms(0.6), false);
        assert!(!quick.expects(100, true));
    }

    fn ms(milliseconds: f64) -> Duration {
        Duration::from_secs_f64(milliseconds / 1000.0)
    }

    fn is_about(found: Duration, wanted: f64) -> bool {
        (found.as_secs_f64() * 1000.0 / MARGIN / wanted - 1.0).abs() < 0.05
    }

    #[test]
    fn nothing_is_expected_of_an_engine_that_has_not_run() {
        assert_eq!(Pace::default().expect(1000, 1, 8, 1), Duration::ZERO);
    }

    #[test]
    fn the_cost_of_a_batch_and_that_of_a_row_are_told_apart() {
        let mut pace = Pace::default();
        for rows in [1, 3, 8, 2, 8, 5, 1, 7] {
            pace.ran(rows, ms(5.0 + 2.0 * rows as f64));
        }
        let under_way = 5.0 + 2.0 * pace.rows / pace.runs;
        let ahead = 2.0 * 5.0 + 16.0 * 2.0;
        assert!(is_about(pace.expect(15, 1, 8, 1), ahead + under_way));
        assert!(is_about(pace.expect(15, 1, 8, 2), ahead / 2.0 + under_way));
    }

    #[test]
    fn batches_of_one_row_are_taken_to_cost_the_same_with_more() {
        let mut pace = Pace::default();
        for _ in 0..100 {
            pace.ran(1, ms(4.0));
        }
        assert!(is_about(pace.expect(7, 1, 8, 1), 8.0), "one batch, and the one under way");
        for _ in 0..100 {
            pace.leaves_behind(1);
        }
        assert!(is_about(pace.expect(7, 1, 8, 1), 9.0 * 4.0), "until batches are seen that take no more");
    }

    #[test]
    fn requests_of_several_rows_are_runs_of_their_own_where_nothing_is_put_together() {
        let mut pace = Pace::default();
        for _ in 0..100 {
            pace.ran(8, ms(100.0));
            pace.leaves_behind(8);
        }
        // One under way and one ahead.
        assert!(is_about(pace.expect(8, 8, 1, 1), 300.0), "{:?}", pace.expect(8, 8, 1, 1));
    }

    #[test]
    fn what_is_long_past_is_forgotten() {
        let mut pace = Pace::default();
        pace.ran(1, ms(10_000.0));
        for _ in 0..300 {
            pace.ran(1, ms(1.0));
        }
        assert!(pace.expect(0, 1, 8, 1) < ms(3.0));
    }
}

//! How long a thread that has run a batch looks out for more: for company for what waits already, or for anybody. Pure.
//!
//! Those who were answered together ask again together, a moment later. If what came meanwhile began at once, alone, they would
//! wait for all of it, and find themselves behind it again the next time: clients that wait for their answers stay in two
//! batches that take turns, although one run would do for both. So a moment, and only where a batch costs something for itself:
//! no longer than that, and than a part of what the last one took.
//!
//! Where nobody waits it does not sleep at once: a core that sleeps between two runs of 10 ms makes the second one 40 to 80 microseconds
//! longer. Who wakes it, once it sleeps, may be the first of those who were answered, for as long as one looks out for them.
//!
//! Nobody can tell whether those who wait are those who were answered, or others who came meanwhile, so that more may follow. That is
//! learnt: as many are expected as came of late ([`Habit`]), and only now and then it is looked out for more.

use std::time::{Duration, Instant};

use super::{pace::QUICK, pause::Pause};

/// Nobody looks out for longer than this part of the last batch's time,
const LONGEST_PART: u32 = 4;
/// nor for longer than this one without anybody coming. Requests of one HTTP/2 connection arrive a piece of each in turn, and are
/// complete nearly all at once, after a while without any.
const GAP_PART: u32 = 16;
/// Nor for longer than this, which is as long as others are kept from a core, too.
const LONGEST_GAP: Duration = Duration::from_millis(25);
/// Nobody looks out for anybody for longer than this.
const LONGEST_WATCH: Duration = Duration::from_micros(500);

/// Times that are remembered.
const REMEMBERED: usize = 8;
/// Times until it is looked out for more than are expected: after it was worth it, and at most. Doubled where it was not. The most is
/// more than a hundred, so that it does not show in the 99th percentile of requests that are alone.
const PAUSE: Pause = Pause::new(4, 256, 2);

/// How many came of late when it was looked out for them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Habit {
    /// How many waited in the end, the latest times.
    latest: [usize; REMEMBERED],
    next: usize,
    /// Until nothing is taken for granted.
    pause: Pause,
}

impl Default for Habit {
    fn default() -> Self {
        Self { latest: [0; REMEMBERED], next: 0, pause: PAUSE.over() }
    }
}

impl Habit {
    /// How many will come at most, as far as is known.
    pub(super) fn expected(&self) -> usize {
        if self.pause.is_over() { usize::MAX } else { self.most() }
    }

    /// So many waited in the end.
    pub(super) fn came(&mut self, waiting: usize) {
        if self.pause.is_over() {
            self.pause.begin(waiting > self.most());
        } else {
            self.pause.pass();
        }
        self.latest[self.next] = waiting;
        self.next = (self.next + 1) % REMEMBERED;
    }

    fn most(&self) -> usize {
        self.latest.into_iter().max().unwrap_or(0)
    }
}

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(super) struct Company {
    /// Requests that the last batch answered.
    answered: usize,
    /// Those who will come at most.
    expected: usize,
    gap: Duration,
    /// When it ends in any case.
    end: Instant,
    /// How long it stays awake for anybody.
    watch_end: Instant,
    /// How many were there at first, how many have been seen since, and when it became so many.
    seen: Option<(usize, usize, Instant)>,
}

impl Company {
    /// Of a thread that has answered so many requests at once at `now`, by a run that `took` so long, `overhead` of it whatever
    /// its size.
    pub(super) fn after(answered: usize, took: Duration, overhead: Duration, now: Instant) -> Self {
        let gap = (took / GAP_PART).min(overhead).min(LONGEST_GAP);
        let watch = if took < QUICK { Duration::ZERO } else { (took / GAP_PART).min(LONGEST_WATCH) };
        let (end, watch_end) = (now + (took / LONGEST_PART).min(overhead), now + watch);
        Self { answered, expected: usize::MAX, gap, end, watch_end, seen: None }
    }

    /// Where no more than so many are likely to come.
    pub(super) fn expecting(self, expected: usize) -> Self {
        Self { expected, ..self }
    }

    /// Whether it was looked out for those who were answered.
    pub(super) fn was_asked(&self) -> bool {
        self.answered > 0 && self.seen.is_some()
    }

    /// Whether those who were answered are still worth to be looked out for at `now`.
    pub(super) fn is_open(&self, now: Instant) -> bool {
        now < self.end
    }

    /// Whether to stay awake at `now` although nobody waits.
    pub(super) fn is_watchful(&self, now: Instant) -> bool {
        now < self.watch_end
    }

    /// Whether more may come to the `waiting` who are there at `now`. The first time they always may: nobody has had the time
    /// to read what arrived during the run.
    pub(super) fn may_come(&mut self, waiting: usize, now: Instant) -> bool {
        let Some((first, seen, since)) = &mut self.seen else {
            self.seen = Some((waiting, waiting, now));
            return true;
        };
        let has_grown = waiting > *seen;
        if has_grown {
            (*seen, *since) = (waiting, now);
        }
        let most = (*first + self.answered).min(self.expected);
        let is_hopeful = waiting < most && now.saturating_duration_since(*since) < self.gap;
        (has_grown || is_hopeful) && self.is_open(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_few_wait_for_the_many_who_were_answered_and_no_longer_than_for_one_who_does_not_come() {
        let start = Instant::now();
        let mut company = Company::after(8, 80 * MS, 20 * MS, start);
        assert!(company.may_come(1, start));
        assert!(company.may_come(1, start + 4 * MS));
        assert!(company.may_come(5, start + 5 * MS), "some came");
        assert!(company.may_come(5, start + 9 * MS));
        assert!(!company.may_come(5, start + 10 * MS));
    }

    /// How long one who came is kept waiting, the most of `times`, and the sum: `others` come a millisecond after it.
    fn kept(habit: &mut Habit, times: u32, others: usize) -> Duration {
        let mut all = Duration::ZERO;
        for _ in 0..times {
            let start = Instant::now();
            let mut company = Company::after(1 + others, 80 * MS, 20 * MS, start).expecting(habit.expected());
            let there = |step: u32| if step < 4 { 1 } else { 1 + others };
            let step = Duration::from_micros(250);
            let steps =
                (0..1000).take_while(|index| company.may_come(there(*index), start + step * *index)).count() as u32;
            habit.came(there(steps));
            all += step * steps;
        }
        all
    }

    #[test]
    fn who_is_always_alone_is_kept_waiting_ever_more_rarely() {
        let mut habit = Habit::default();
        assert!(kept(&mut habit, 1, 0) >= 5 * MS, "nothing is known");
        kept(&mut habit, 500, 0);
        let (times, each) = (512, 5 * MS);
        // One step of a quarter of a millisecond is for what has arrived and was not read yet.
        let read = Duration::from_micros(250) * times;
        assert!(kept(&mut habit, times, 0) <= read + 3 * each);
    }

    #[test]
    fn who_has_company_waits_for_it_and_no_longer_than_until_it_is_there() {
        let mut habit = Habit::default();
        kept(&mut habit, 500, 0);
        kept(&mut habit, 257, 3);
        assert_eq!(habit.most(), 4, "found again, once it was looked out for more");
        // A millisecond until they are there, and a step in which those who came could bring others.
        let (times, with_others) = (100, MS + Duration::from_micros(500));
        assert!(kept(&mut habit, times, 3) <= with_others * times + 10 * 5 * MS);
    }

    #[test]
    fn who_comes_first_after_a_while_is_one_of_those_who_were_answered() {
        let start = Instant::now();
        let mut company = Company::after(4, 80 * MS, 20 * MS, start);
        assert!(!company.was_asked() && company.is_open(start + 10 * MS), "nobody has come");
        assert!(company.may_come(1, start + 10 * MS));
        assert!(company.may_come(2, start + 12 * MS));
        assert!(!company.is_open(start + 20 * MS), "a quarter of the run");
        assert!(!company.may_come(3, start + 20 * MS));
    }

    #[test]
    fn when_all_have_come_back_they_run() {
        let start = Instant::now();
        let mut company = Company::after(4, 80 * MS, 20 * MS, start);
        assert!(company.may_come(4, start), "the other half of those who take turns");
        assert!(company.may_come(7, start));
        assert!(company.may_come(7, start), "one is missing");
        assert!(company.may_come(8, start), "who comes may bring others");
        assert!(!company.may_come(8, start));
    }

    #[test]
    fn a_thread_stays_awake_for_a_moment_after_a_run_that_was_not_quick() {
        let start = Instant::now();
        let after = |took| Company::after(1, took, Duration::ZERO, start);
        let awake = |took, at| after(took).is_watchful(start + at);
        assert!(awake(7 * MS, MS / 3));
        assert!(!awake(7 * MS, MS / 2), "a sixteenth");
        assert!(!awake(100 * MS, MS / 2), "half a millisecond at most");
        assert!(!awake(QUICK / 2, Duration::ZERO));
    }

    #[test]
    fn where_batches_win_nothing_nobody_waits() {
        let start = Instant::now();
        let mut company = Company::after(8, 80 * MS, Duration::ZERO, start);
        assert!(company.may_come(1, start));
        assert!(!company.may_come(1, start));
    }

    #[test]
    fn those_who_come_one_by_one_are_not_waited_for_without_end() {
        let start = Instant::now();
        let mut company = Company::after(100, 4 * MS, 4 * MS, start);
        let step = Duration::from_micros(200);
        let steps = (0..100).take_while(|step_number| {
            let now = start + step * *step_number;
            company.may_come(*step_number as usize / 2, now)
        });
        assert!((4..=6).contains(&steps.count()), "a quarter of the last run");
    }
}

//! The machine's compute, shared by all models.
//!
//! A run holds as many slots as its engine has threads; what finds too few free waits, and the model that has used the
//! least of the machine, counted in slots held over time, goes first (fair queueing by virtual time). So a model of long
//! runs costs one of short runs no more than the rest of the run that it meets, and of a run that takes long no more than
//! [`PATIENCE`]: then both run, and the system shares the cores between them. A claim is charged with what the run before
//! it took as soon as it is made, and set right when its run ends: many instances that claim at once stand one behind the
//! other, not all before everybody else. A model that was away does not save up: it begins where the others are.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Whoever runs for longer than this shares its cores with others. A run may be of minutes, or never end.
const PATIENCE: Duration = Duration::from_millis(100);

/// Slots of the machine. Clones share them.
#[derive(Clone, Debug)]
pub struct Slots(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<Fair>,
}

/// Who is next. Pure.
#[derive(Debug)]
struct Fair {
    total: usize,
    free: usize,
    /// Callers that run something themselves.
    callers: usize,
    /// Runs that hold slots.
    running: Vec<Run>,
    /// Virtual times of those that wait, with their ticket numbers, and what wakes each: only the first has anything to do.
    waiting: BTreeMap<(Duration, u64), Arc<Condvar>>,
    tickets: u64,
    /// The virtual time of whoever was served last: where newcomers begin.
    now: Duration,
}

/// A run that has begun.
#[derive(Debug)]
struct Run {
    ticket: u64,
    since: Instant,
    width: usize,
    /// Whether others have its slots already.
    is_overdue: bool,
}

/// One model's claim on the slots. Clones, one for each of its instances, count together.
#[derive(Clone, Debug)]
pub(super) struct Share {
    slots: Slots,
    /// Slots of a run.
    width: usize,
    used: Arc<Mutex<Used>>,
}

/// What a model has used of the machine.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    /// With what its claims are charged.
    sum: Duration,
    /// What its latest run used.
    run: Duration,
}

/// Slots that are held.
#[derive(Debug)]
pub(super) struct Held<'a> {
    share: &'a Share,
    ticket: u64,
    /// What the claim was charged with.
    charged: Duration,
    since: Instant,
    /// Whether a caller has them.
    is_callers: bool,
}

impl Slots {
    /// As many slots as threads may run at a time, at least 1.
    pub fn new(count: usize) -> Self {
        Self(Arc::new(Inner { state: Mutex::new(Fair::new(count.max(1))) }))
    }

    /// A claim for one more model, whose runs take `threads` threads each.
    pub(super) fn share(&self, threads: usize) -> Share {
        let width = threads.clamp(1, self.lock().total);
        Share { slots: self.clone(), width, used: Arc::default() }
    }

    /// Only this module's few lines run under the lock.
    fn lock(&self) -> MutexGuard<'_, Fair> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// Waits for slots. Short when the machine is not full; no more than the others' runs otherwise.
    pub(super) fn hold(&self) -> Held<'_> {
        let mut state = self.slots.lock();
        let (place, charged) = self.claim(&mut state);
        if !state.try_enter(place, self.width) {
            let woken = Arc::new(Condvar::new());
            state.waiting.insert(place, woken.clone());
            loop {
                let now = Instant::now();
                let next = state.forgive(now);
                if state.try_enter(place, self.width) {
                    break;
                }
                state = if state.is_first(place) {
                    let rest = next.map_or(PATIENCE, |next| next.saturating_duration_since(now));
                    woken.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0
                } else {
                    // Whoever is before it wakes it.
                    woken.wait(state).unwrap_or_else(PoisonError::into_inner)
                };
            }
            // There may be enough left for the next, who looks at the clock from now on.
            state.wake_first();
        }
        self.begin(&mut state, place.1, charged)
    }

    fn begin(&self, state: &mut Fair, ticket: u64, charged: Duration) -> Held<'_> {
        let since = Instant::now();
        state.running.push(Run { ticket, since, width: self.width, is_overdue: false });
        Held { share: self, ticket, charged, since, is_callers: false }
    }

    /// As [`Share::try_hold`], for a caller, if fewer than `most` run something, of all models: whatever they run, it takes a thread
    /// from everybody who is served, and it may take longer than anybody expected.
    pub(super) fn try_hold_here(&self, most: usize) -> Option<Held<'_>> {
        let mut state = self.slots.lock();
        if state.callers >= most {
            return None;
        }
        let mut held = self.try_enter(&mut state)?;
        state.callers += 1;
        held.is_callers = true;
        Some(held)
    }

    /// Slots, if they are free and nobody waits for any.
    pub(super) fn try_hold(&self) -> Option<Held<'_>> {
        self.try_enter(&mut self.slots.lock())
    }

    fn try_enter(&self, state: &mut Fair) -> Option<Held<'_>> {
        if state.free < self.width || !state.waiting.is_empty() {
            return None;
        }
        let (place, charged) = self.claim(state);
        state.try_enter(place, self.width).then(|| self.begin(state, place.1, charged))
    }

    /// Where a claim stands, and what it is charged with.
    fn claim(&self, state: &mut Fair) -> ((Duration, u64), Duration) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        (state.place(&mut used), used.run)
    }
}

impl Fair {
    fn new(total: usize) -> Self {
        let (running, waiting) = (Vec::new(), BTreeMap::new());
        Self { total, free: total, callers: 0, running, waiting, tickets: 0, now: Duration::ZERO }
    }

    /// Where a claim of a model that has used so much of the machine stands.
    fn place(&mut self, used: &mut Used) -> (Duration, u64) {
        let begins = used.sum.max(self.now);
        used.sum = begins + used.run;
        self.tickets += 1;
        (begins, self.tickets)
    }

    /// Takes back `width` slots that were held for so long; what that is of the machine.
    fn leave(&mut self, width: usize, held: Duration) -> Duration {
        self.free += width;
        // Both are small.
        held.mul_f64(width as f64 / self.total as f64)
    }

    /// Takes slots for `place` if they are free and nobody has a better claim.
    fn try_enter(&mut self, place: (Duration, u64), width: usize) -> bool {
        let is_next = self.waiting.first_key_value().is_none_or(|(first, _)| *first >= place);
        if self.free < width || !is_next {
            return false;
        }
        self.waiting.remove(&place);
        self.free -= width;
        self.now = self.now.max(place.0);
        true
    }

    fn is_first(&self, place: (Duration, u64)) -> bool {
        self.waiting.first_key_value().is_some_and(|(first, _)| *first == place)
    }

    fn wake_first(&self) {
        if let Some((_, woken)) = self.waiting.first_key_value() {
            woken.notify_one();
        }
    }

    /// Gives the slots of runs to others that have had them for too long by `now`; when the next one will have.
    fn forgive(&mut self, now: Instant) -> Option<Instant> {
        let mut next = None;
        for run in self.running.iter_mut().filter(|run| !run.is_overdue) {
            let end = run.since + PATIENCE;
            if end <= now {
                run.is_overdue = true;
                self.free += run.width;
            } else {
                next = Some(next.map_or(end, |next: Instant| next.min(end)));
            }
        }
        next
    }

    /// A run ends; whether others have its slots.
    fn end(&mut self, ticket: u64) -> bool {
        let index = self.running.iter().position(|run| run.ticket == ticket);
        index.is_some_and(|index| self.running.swap_remove(index).is_overdue)
    }
}

impl Used {
    /// A run that was charged with one thing took another.
    fn settle(&mut self, charged: Duration, took: Duration) {
        self.sum = (self.sum + took).saturating_sub(charged);
        self.run = took;
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.share.slots.lock();
        state.callers -= usize::from(self.is_callers);
        let is_overdue = state.end(self.ticket);
        let took = state.leave(self.share.width, self.since.elapsed());
        if is_overdue {
            state.free -= self.share.width;
        }
        self.share.used.lock().unwrap_or_else(PoisonError::into_inner).settle(self.charged, took);
        state.wake_first();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_model_that_used_least_goes_first() {
        let mut fair = Fair::new(1);
        assert!(fair.try_enter((seconds(5), 0), 1), "nobody else wants it");
        fair.waiting.extend([(seconds(9), 1), (seconds(6), 2)].map(|place| (place, Arc::default())));
        assert!(!fair.try_enter((seconds(6), 2), 1), "there is no slot");
        fair.free = 1;
        assert!(!fair.try_enter((seconds(9), 1), 1), "another has used less");
        assert!(fair.try_enter((seconds(6), 2), 1));
        assert_eq!(fair.now, seconds(6));
    }

    #[test]
    fn a_slot_comes_back_and_its_time_is_counted() {
        let slots = Slots::new(1);
        let (a, b) = (slots.share(1), slots.share(9));
        let held = a.hold();
        let waiting = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(b.hold()));
            std::thread::sleep(Duration::from_millis(20));
            drop(held);
            waiting.join()
        });
        waiting.unwrap();
        assert!(a.used.lock().unwrap().sum >= Duration::from_millis(20));
        assert_eq!(slots.lock().free, 1);
    }

    #[test]
    fn nobody_waits_for_a_run_that_does_not_end() {
        let slots = Slots::new(2);
        let (endless, quick) = (slots.share(2), slots.share(2));
        let held = endless.hold();
        drop(quick.hold());
        let asked = Instant::now();
        assert_eq!(slots.lock().free, 2, "others have its slots from now on");
        for _ in 0..100 {
            drop(quick.hold());
        }
        assert!(asked.elapsed() < PATIENCE * 50, "only the first one waited");
        drop(held);
        assert_eq!(slots.lock().free, 2);
        assert!(slots.lock().running.is_empty());
    }

    #[test]
    fn no_more_callers_run_something_than_may_whatever_they_run() {
        let slots = Slots::new(8);
        let (one, other) = (slots.share(1), slots.share(1));
        let held = one.try_hold_here(1).expect("nobody runs anything");
        assert!(one.try_hold_here(1).is_none() && other.try_hold_here(1).is_none());
        assert!(other.try_hold_here(2).is_some() && other.try_hold().is_some(), "threads are no callers");
        drop(held);
        assert!(other.try_hold_here(1).is_some());
        assert_eq!(slots.lock().callers, 0);
    }

    /// Model instances that ask again as soon as they have run, on a clock that jumps from one end of a run to the next.
    struct Machine {
        fair: Fair,
        /// By model: the time of a run, its slots, what it has used.
        models: Vec<(u64, usize, Used)>,
        /// When which model's run ends, and what it was charged with.
        running: BTreeSet<(u64, usize, u64, Duration)>,
        /// Whose claim waits, with its place and what it was charged with.
        waiting: Vec<(usize, (Duration, u64), Duration)>,
        clock: u64,
    }

    impl Machine {
        fn new(slots: usize, models: &[(u64, usize)]) -> Self {
            let models = models.iter().map(|(time, width)| (*time, *width, Used::default())).collect();
            Self { fair: Fair::new(slots), models, running: BTreeSet::new(), waiting: Vec::new(), clock: 0 }
        }

        fn ask(&mut self, model: usize) {
            let place = self.fair.place(&mut self.models[model].2);
            self.fair.waiting.insert(place, Arc::default());
            self.waiting.push((model, place, self.models[model].2.run));
            self.enter();
        }

        fn enter(&mut self) {
            while let Some(index) = (0..self.waiting.len()).find(|index| {
                let (model, place, _) = self.waiting[*index];
                self.fair.try_enter(place, self.models[model].1)
            }) {
                let (model, (_, ticket), charged) = self.waiting.remove(index);
                self.running.insert((self.clock + self.models[model].0, model, ticket, charged));
            }
        }

        /// The model whose run ends next.
        fn step(&mut self) -> usize {
            let (clock, model, _, charged) = self.running.pop_first().unwrap();
            self.clock = clock;
            let (time, width, _) = self.models[model];
            let took = self.fair.leave(width, Duration::from_millis(time));
            self.models[model].2.settle(charged, took);
            self.enter();
            model
        }
    }

    proptest::proptest! {
        #[test]
        fn models_that_always_want_more_share_the_machine_evenly(
            slots in 1..5_usize,
            runs in proptest::collection::vec((1..200_u64, 1..5_usize), 2..5),
        ) {
            let runs: Vec<_> = runs.into_iter().map(|(time, width)| (time, width.min(slots))).collect();
            let mut machine = Machine::new(slots, &runs);
            // Instances of each, so that none is away between its runs.
            for model in 0..runs.len() {
                for _ in 0..=slots {
                    machine.ask(model);
                }
            }
            while machine.clock < 100_000 {
                let model = machine.step();
                machine.ask(model);
            }
            let used: Vec<f64> = machine.models.iter().map(|(.., used)| used.sum.as_secs_f64()).collect();
            let (least, most) = used.iter().fold((f64::MAX, 0.0_f64), |(a, b), used| (a.min(*used), b.max(*used)));
            // A run that has begun is not taken back, all slots may hold one, and every instance has a claim.
            let longest = runs.iter().map(|(time, _)| *time as f64 / 1000.0).fold(0.0, f64::max);
            proptest::prop_assert!(most - least <= 3.0 * longest * (slots as f64 + 1.0), "{used:?}");
        }

        #[test]
        fn a_model_of_long_runs_costs_another_no_more_than_the_one_it_meets(
            slots in 1..5_usize, heavy in 50..500_u64, pauses in proptest::collection::vec(0..300_u64, 1..40),
        ) {
            let mut machine = Machine::new(slots, &[(heavy, slots), (1, 1)]);
            for _ in 0..4 {
                machine.ask(0);
            }
            // So that it is known how long its runs are.
            for _ in 0..8 {
                machine.step();
                machine.ask(0);
            }
            for pause in pauses {
                let until = machine.clock + pause;
                while machine.running.first().is_some_and(|(end, ..)| *end <= until) {
                    let model = machine.step();
                    machine.ask(model);
                }
                machine.clock = machine.clock.max(until);
                let asked = machine.clock;
                machine.ask(1);
                while machine.step() != 1 {
                    machine.ask(0);
                }
                proptest::prop_assert!(machine.clock - asked <= heavy + 1, "{} ms", machine.clock - asked);
            }
        }
    }
}

//! The machine's compute, shared by all models.
//!
//! A run holds as many slots as its engine has threads; what finds too few free waits, and the model that has used the least of the
//! machine, counted in time and divided by its weight, goes first (weighted fair queueing by virtual time). A model that
//! was away does not save up: it begins where the others are.

use std::{
    collections::BTreeSet,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Slots of the machine. Clones share them.
#[derive(Clone, Debug)]
pub struct Slots(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<Fair>,
    freed: Condvar,
}

/// Who is next. Pure.
#[derive(Debug)]
struct Fair {
    total: usize,
    free: usize,
    /// Virtual times of those that wait, with their ticket numbers.
    waiting: BTreeSet<(Duration, u64)>,
    tickets: u64,
    /// The virtual time of whoever was served last: where newcomers begin.
    now: Duration,
}

/// One model's claim on the slots. Clones, one for each of its instances, count together.
#[derive(Clone, Debug)]
pub(super) struct Share {
    slots: Slots,
    /// Slots of a run.
    width: usize,
    used: Arc<Mutex<Duration>>,
}

/// Slots that are held.
#[derive(Debug)]
pub(super) struct Held<'a> {
    share: &'a Share,
    since: Instant,
}

impl Slots {
    /// As many slots as threads may run at a time, at least 1.
    pub fn new(count: usize) -> Self {
        let total = count.max(1);
        let state = Fair { total, free: total, waiting: BTreeSet::new(), tickets: 0, now: Duration::ZERO };
        Self(Arc::new(Inner { state: Mutex::new(state), freed: Condvar::new() }))
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
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        *used = (*used).max(state.now);
        let place = (*used, state.tickets);
        drop(used);
        state.tickets += 1;
        if !state.try_enter(place, self.width) {
            state.waiting.insert(place);
            while !state.try_enter(place, self.width) {
                state = self.slots.0.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            // There may be enough left for the next.
            self.slots.0.freed.notify_all();
        }
        Held { share: self, since: Instant::now() }
    }
}

impl Fair {
    /// Takes slots for `place` if they are free and nobody has a better claim.
    fn try_enter(&mut self, place: (Duration, u64), width: usize) -> bool {
        let is_next = self.waiting.first().is_none_or(|first| *first >= place);
        if self.free < width || !is_next {
            return false;
        }
        self.waiting.remove(&place);
        self.free -= width;
        self.now = self.now.max(place.0);
        true
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.share.slots.lock();
        *self.share.used.lock().unwrap_or_else(PoisonError::into_inner) += self.since.elapsed();
        state.free += self.share.width;
        let others_wait = !state.waiting.is_empty();
        drop(state);
        if others_wait {
            self.share.slots.0.freed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_model_that_used_least_goes_first() {
        let mut fair = Fair { total: 1, free: 1, waiting: BTreeSet::new(), tickets: 0, now: Duration::ZERO };
        assert!(fair.try_enter((seconds(5), 0), 1), "nobody else wants it");
        fair.waiting.extend([(seconds(9), 1), (seconds(6), 2)]);
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
        assert!(*a.used.lock().unwrap() >= Duration::from_millis(20));
        assert_eq!(slots.lock().free, 1);
    }
}

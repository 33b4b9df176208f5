//! The bytes of all requests together: taken as they arrive, given back when a request is done.
//!
//! Nobody waits for bytes: requests that each hold a half of themselves would wait for each other for ever. What finds the
//! budget spent is refused at once, and gives back what it held.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::metrics::BudgetMetrics;

/// How many bytes of requests a server holds at most. Clones share what is taken.
#[derive(Clone, Debug)]
pub struct Budget {
    limit: usize,
    /// What is taken is counted by the gauge that shows it.
    metrics: BudgetMetrics,
}

/// As many bytes are held as may be. Trying again later may succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("requests hold {held} bytes of this server's memory and may hold {limit}; try again later")]
pub struct Spent {
    /// Bytes that others hold.
    pub held: usize,
    /// Bytes that all may hold.
    pub limit: usize,
}

impl From<Spent> for tonic::Status {
    fn from(spent: Spent) -> Self {
        Self::resource_exhausted(spent.to_string())
    }
}

/// What one call holds. Clones share it, and the last one gives everything back.
#[derive(Clone, Debug)]
pub struct Tally(Arc<Call>);

#[derive(Debug)]
struct Call {
    budget: Budget,
    held: Mutex<Held>,
    /// Whether its body has been read to the end.
    is_whole: AtomicBool,
}

#[derive(Debug, Default)]
struct Held {
    bytes: usize,
    /// Bytes of the messages that have arrived whole, and that nobody has claimed yet.
    messages: VecDeque<usize>,
}

/// Bytes that are taken until this is dropped, such as those of one message.
#[derive(Debug)]
pub struct Taken {
    budget: Budget,
    bytes: usize,
}

impl Budget {
    /// `limit` bytes for all requests together.
    pub fn new(limit: usize, metrics: BudgetMetrics) -> Self {
        metrics.limit(limit);
        Self { limit, metrics }
    }

    /// Of one call, which holds nothing yet.
    pub fn tally(&self) -> Tally {
        Tally(Arc::new(Call { budget: self.clone(), held: Mutex::default(), is_whole: AtomicBool::new(false) }))
    }

    /// Bytes for as long as they are held, whoever holds them.
    ///
    /// # Errors
    /// [`Spent`].
    pub fn claim(&self, bytes: usize) -> Result<Taken, Spent> {
        self.take(bytes)?;
        Ok(Taken { budget: self.clone(), bytes })
    }

    /// Bytes that are there already, and stay for as long as they are held: also more than there may be, of which others hear.
    pub fn overdraw(&self, bytes: usize) -> Taken {
        self.metrics.take(bytes);
        Taken { budget: self.clone(), bytes }
    }

    /// Bytes that all may hold.
    pub fn limit(&self) -> usize {
        self.limit
    }

    fn take(&self, bytes: usize) -> Result<(), Spent> {
        let held = self.metrics.take(bytes);
        if held.saturating_add(bytes) <= self.limit {
            return Ok(());
        }
        self.metrics.give(bytes);
        Err(self.spent(held))
    }

    fn spent(&self, held: usize) -> Spent {
        self.metrics.refused();
        Spent { held, limit: self.limit }
    }
}

impl Tally {
    /// Takes bytes that have arrived.
    ///
    /// # Errors
    /// [`Spent`]; what was taken before stays until the call ends.
    pub fn take(&self, bytes: usize) -> Result<(), Spent> {
        self.0.budget.take(bytes)?;
        self.lock().bytes += bytes;
        Ok(())
    }

    /// Gives bytes back before the call is done.
    pub fn give(&self, bytes: usize) {
        let mut held = self.lock();
        let bytes = bytes.min(held.bytes);
        held.bytes -= bytes;
        self.0.budget.metrics.give(bytes);
    }

    /// Whether bytes that are announced would be taken now: what cannot end well need not begin.
    ///
    /// # Errors
    /// [`Spent`].
    pub fn foresee(&self, bytes: usize) -> Result<(), Spent> {
        let held = self.0.budget.metrics.held();
        if held.saturating_add(bytes) <= self.0.budget.limit { Ok(()) } else { Err(self.0.budget.spent(held)) }
    }

    /// Whether nothing of it is held, but what its messages hold for themselves.
    pub fn holds_nothing(&self) -> bool {
        self.lock().bytes == 0
    }

    /// The body of the call has been read to its end.
    pub fn end(&self) {
        self.0.is_whole.store(true, Ordering::Relaxed);
    }

    /// Whether it has been.
    pub fn is_whole(&self) -> bool {
        self.0.is_whole.load(Ordering::Relaxed)
    }

    /// A message of so many bytes, which are taken, has arrived whole.
    pub fn end_message(&self, bytes: usize) {
        self.lock().messages.push_back(bytes);
    }

    /// Claims the oldest message that has arrived: its bytes go back with it, not with the call.
    pub fn claim_message(&self) -> Option<Taken> {
        let mut held = self.lock();
        let bytes = held.messages.pop_front()?.min(held.bytes);
        held.bytes -= bytes;
        Some(Taken { budget: self.0.budget.clone(), bytes })
    }

    /// Only this module's few lines run under the lock.
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let held = self.held.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.budget.metrics.give(held.bytes);
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.budget.metrics.give(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::metrics::Metrics;

    fn budget(limit: usize) -> Budget {
        Budget::new(limit, Metrics::new().budget())
    }

    #[test]
    fn what_is_spent_is_refused_and_comes_back_with_the_call() {
        let budget = budget(10);
        let (first, second) = (budget.tally(), budget.tally());
        first.take(6).unwrap();
        assert_eq!(second.foresee(5), Err(Spent { held: 6, limit: 10 }));
        assert_eq!(second.take(5), Err(Spent { held: 6, limit: 10 }));
        second.take(4).unwrap();
        drop(first);
        second.take(6).unwrap();
        second.give(1);
        assert_eq!(budget.metrics.held(), 9);
        drop(second);
        assert_eq!(budget.metrics.held(), 0);
    }

    #[test]
    fn what_is_there_already_is_counted_and_refused_to_others() {
        let budget = budget(10);
        let answer = budget.overdraw(15);
        assert_eq!(budget.claim(1).unwrap_err(), Spent { held: 15, limit: 10 });
        drop(answer);
        assert_eq!(budget.claim(10).unwrap().bytes, 10);
        assert_eq!(budget.metrics.held(), 0);
    }

    #[test]
    fn a_message_gives_its_bytes_back_before_the_stream_ends() {
        let budget = budget(10);
        let stream = budget.tally();
        stream.take(7).unwrap();
        stream.end_message(3);
        let message = stream.claim_message().unwrap();
        assert!(stream.claim_message().is_none(), "the rest of it has not arrived");
        drop(message);
        assert_eq!(budget.metrics.held(), 4);
        drop(stream);
        assert_eq!(budget.metrics.held(), 0);
    }

    proptest! {
        #[test]
        fn no_more_is_ever_held_than_may_be_and_nothing_is_lost(
            steps in prop::collection::vec((0..4_usize, 0..5_usize, 0..40_usize), 1..200)
        ) {
            let budget = budget(100);
            let mut calls: Vec<(Tally, usize)> = (0..4).map(|_| (budget.tally(), 0)).collect();
            let mut messages: Vec<(Taken, usize)> = Vec::new();
            for (call, step, bytes) in steps {
                let all = calls.iter().map(|(_, held)| held).sum::<usize>()
                    + messages.iter().map(|(_, held)| held).sum::<usize>();
                let (tally, held) = &mut calls[call];
                match step {
                    0 | 1 => {
                        let taken = tally.take(bytes);
                        prop_assert_eq!(taken.is_ok(), all + bytes <= 100);
                        if taken.is_ok() {
                            *held += bytes;
                            tally.end_message(bytes);
                        }
                    }
                    2 => if let Some(message) = tally.claim_message() {
                        *held -= message.bytes;
                        let bytes = message.bytes;
                        messages.push((message, bytes));
                    },
                    3 => drop(messages.pop()),
                    _ => calls[call] = (budget.tally(), 0),
                }
                let all = calls.iter().map(|(_, held)| held).sum::<usize>()
                    + messages.iter().map(|(_, held)| held).sum::<usize>();
                prop_assert_eq!(budget.metrics.held(), all);
            }
            drop((calls, messages));
            prop_assert_eq!(budget.metrics.held(), 0);
        }
    }
}

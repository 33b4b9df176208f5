//! Answers in the order of their questions. Pure.

use std::collections::BTreeMap;

/// Holds answers back until all earlier ones are there.
#[derive(Debug)]
pub(super) struct Order<A> {
    given: u64,
    next: u64,
    early: BTreeMap<u64, A>,
}

impl<A> Default for Order<A> {
    fn default() -> Self {
        Self { given: 0, next: 0, early: BTreeMap::new() }
    }
}

impl<A> Order<A> {
    /// The next place. Every place that is given has to be finished, or those after it wait for ever.
    pub(super) fn place(&mut self) -> u64 {
        self.given += 1;
        self.given - 1
    }

    /// The answers that may leave, now that this one is there.
    pub(super) fn finish(&mut self, place: u64, answer: A) -> Vec<A> {
        self.early.insert(place, answer);
        let mut leaving = Vec::new();
        while let Some(answer) = self.early.remove(&self.next) {
            leaving.push(answer);
            self.next += 1;
        }
        leaving
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_leave_in_the_order_of_their_places() {
        let mut order = Order::default();
        let [a, b, c] = [order.place(), order.place(), order.place()];
        assert!(order.finish(b, "b").is_empty() && order.finish(c, "c").is_empty());
        assert_eq!(order.finish(a, "a"), ["a", "b", "c"]);
    }
}

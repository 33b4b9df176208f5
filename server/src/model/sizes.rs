//! How large a model's answers are. Pure.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What a size counts of itself one answer later: larger ones are forgotten after some hundreds.
const FORGOTTEN: usize = 64;

/// Bytes of a row of each output, in the largest answers of late; 0 before there was one.
#[derive(Debug)]
pub(super) struct Sizes(Vec<AtomicUsize>);

impl Sizes {
    pub(super) fn new(outputs: usize) -> Self {
        Self((0..outputs).map(|_| AtomicUsize::new(0)).collect())
    }

    /// A row of an output had so many bytes.
    pub(super) fn note(&self, output: usize, bytes: usize) {
        let Some(size) = self.0.get(output) else { return };
        let known = size.load(Ordering::Relaxed);
        let now = bytes.max(known - known / FORGOTTEN);
        if now != known {
            // What others note meanwhile is as good.
            size.store(now, Ordering::Relaxed);
        }
    }

    /// Bytes of a row of these outputs together.
    pub(super) fn of(&self, outputs: impl Iterator<Item = usize>) -> usize {
        outputs.filter_map(|output| self.0.get(output)).map(|size| size.load(Ordering::Relaxed)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_a_small_output_is_not_taken_for_one_who_asks_for_a_large_one() {
        let sizes = Sizes::new(2);
        sizes.note(0, 1_500_000);
        sizes.note(1, 3_000);
        assert_eq!(sizes.of([1].into_iter()), 3_000);
        assert_eq!(sizes.of(0..2), 1_503_000);
    }

    #[test]
    fn a_large_answer_is_forgotten_after_some_hundreds() {
        let sizes = Sizes::new(1);
        sizes.note(0, 1_000_000);
        sizes.note(0, 100);
        assert!(sizes.of(0..1) > 900_000);
        (0..1000).for_each(|_| sizes.note(0, 100));
        assert!(sizes.of(0..1) < 200);
    }
}

//! A histogram of magnitudes in bounded memory, for values that arrive in batches and in any order.

/// Bins kept; after a doubling at least half of them lie below the largest value, so the resolution is never worse than
/// the 2048 bins that entropy calibration is described with.
const BINS: usize = 4096;

/// Counts of `|x|` over `BINS` equal bins from 0 to a power of two.
///
/// When a larger value arrives the limit doubles and neighbouring bins are added up. Because limits are powers of two,
/// the bins after all values have been seen do not depend on the order in which they came.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    counts: Vec<u64>,
    /// Upper edge of the last bin; `None` until a value other than 0 arrives.
    limit: Option<f32>,
    zeros: u64,
    largest: f32,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BINS], limit: None, zeros: 0, largest: 0.0 }
    }
}

impl Histogram {
    /// Adds finite values.
    pub fn add(&mut self, values: &[f32]) {
        let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        if largest > 0.0 {
            self.cover(largest);
        }
        let Some(limit) = self.limit else {
            self.zeros += values.len() as u64;
            return;
        };
        // Both are powers of two (and in f64 the quotient of any two f32 is normal), so this product is exact.
        let bins_per_unit = BINS as f64 / f64::from(limit);
        for value in values {
            if *value == 0.0 {
                self.zeros += 1;
            } else {
                let bin = (f64::from(value.abs()) * bins_per_unit) as usize;
                self.counts[bin.min(BINS - 1)] += 1;
            }
        }
    }

    /// Counts from 0 up to the bin of the largest value, exact zeros left out.
    pub fn counts(&self) -> &[u64] {
        let used = self.counts.iter().rposition(|&count| count > 0).map_or(0, |last| last + 1);
        &self.counts[..used]
    }

    /// Width of one bin; 0 while only zeros have been seen.
    pub fn bin_width(&self) -> f32 {
        self.limit.map_or(0.0, |limit| limit / BINS as f32)
    }

    /// Largest magnitude seen.
    pub fn largest(&self) -> f32 {
        self.largest
    }

    /// Exact zeros seen.
    pub fn zeros(&self) -> u64 {
        self.zeros
    }

    fn cover(&mut self, largest: f32) {
        self.largest = self.largest.max(largest);
        let mut limit = self.limit.unwrap_or_else(|| power_of_two_above(largest));
        while limit <= largest && limit < f32::MAX / 2.0 {
            for bin in 0..BINS {
                self.counts[bin] = match self.counts.get(2 * bin..2 * bin + 2) {
                    Some(pair) => pair.iter().sum(),
                    None => 0,
                };
            }
            limit *= 2.0;
        }
        self.limit = Some(limit);
    }
}

/// The smallest power of two above `value`, or the largest power of two there is.
fn power_of_two_above(value: f32) -> f32 {
    // Powers of two have an empty mantissa, so keeping the exponent alone rounds down to one.
    let below = f32::from_bits(value.to_bits() & 0x7f80_0000);
    if below == 0.0 { f32::MIN_POSITIVE } else { (below * 2.0).min(2.0_f32.powi(127)) }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "where these tests ask for equality they mean it")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(batches: &[&[f32]]) -> Histogram {
        let mut histogram = Histogram::default();
        for batch in batches {
            histogram.add(batch);
        }
        histogram
    }

    proptest! {
        #[test]
        fn no_value_is_lost_and_order_does_not_matter(
            mut batches in prop::collection::vec(prop::collection::vec(-1e4_f32..1e4, 0..40), 1..8),
        ) {
            let feed = |batches: &[Vec<f32>]| of(&batches.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let forwards = feed(&batches);
            batches.reverse();
            let backwards = feed(&batches);
            prop_assert_eq!(&forwards, &backwards);
            let total: u64 = forwards.counts().iter().sum();
            prop_assert_eq!(total + forwards.zeros(), batches.iter().map(Vec::len).sum::<usize>() as u64);
        }

        #[test]
        fn a_value_lands_in_the_bin_that_contains_it(value in 1e-30_f32..1e30, first in 1e-30_f32..1e30) {
            let histogram = of(&[&[first], &[value]]);
            let bin = (value / histogram.bin_width()) as usize;
            prop_assert!(histogram.counts()[bin] >= 1);
            prop_assert!(histogram.counts().len() >= BINS / 2, "the largest value is in the upper half");
        }
    }

    #[test]
    fn a_larger_value_doubles_the_limit_and_keeps_the_counts() {
        let mut histogram = of(&[&[0.75, 0.25]]);
        assert_eq!(histogram.bin_width(), 1.0 / BINS as f32);
        histogram.add(&[-3.0]);
        assert_eq!(histogram.bin_width(), 4.0 / BINS as f32);
        assert_eq!(histogram.counts()[BINS / 16], 1);
        assert_eq!(histogram.counts()[3 * BINS / 16], 1);
        assert_eq!(histogram.counts()[3 * BINS / 4], 1);
    }

    #[test]
    fn zeros_are_counted_apart() {
        let histogram = of(&[&[0.0, -0.0]]);
        assert_eq!((histogram.zeros(), histogram.counts().len(), histogram.bin_width()), (2, 0, 0.0));
    }

    #[test]
    fn the_largest_and_smallest_numbers_have_a_bin() {
        let histogram = of(&[&[f32::from_bits(1)], &[f32::MAX]]);
        assert_eq!(histogram.counts().iter().sum::<u64>(), 2);
        assert_eq!(histogram.largest(), f32::MAX);
    }
}

//! Entropy calibration: where to cut a range so that what is kept says the most about what was seen.

use crate::histogram::Histogram;

/// The magnitude at which to clip, by least Kullback-Leibler divergence between the clipped distribution and its image on
/// `levels` steps (128 for values of both signs in 8 bits, 256 for one sign).
///
/// The method is the one NVIDIA described for TensorRT (Migacz, GTC 2017). For every candidate of `kept` bins:
/// the reference P is the first `kept` bins with everything beyond added to the last one; the image Q spreads the counts
/// of each of `levels` groups of bins evenly over the bins of the group that are not empty. Exact zeros are left out:
/// they are exact at every threshold, and a spike of them would drown the rest.
///
/// A candidate that piles clipped values onto a bin whose own count is 0 has infinite divergence and cannot win; keeping
/// everything is always finite. Ties go to the wider range.
pub fn entropy_threshold(histogram: &Histogram, levels: usize) -> f32 {
    let counts = histogram.counts();
    if counts.len() <= levels {
        return histogram.largest();
    }
    let sums = Sums::of(counts);
    let mut best = (counts.len(), sums.divergence(counts, counts.len(), levels));
    for kept in (levels..counts.len()).rev() {
        let divergence = sums.divergence(counts, kept, levels);
        if divergence < best.1 {
            best = (kept, divergence);
        }
    }
    if best.0 == counts.len() { histogram.largest() } else { best.0 as f32 * histogram.bin_width() }
}

/// Prefix sums, which make a candidate cost O(levels) instead of O(bins).
struct Sums {
    /// Values in the first `n` bins.
    count: Vec<f64>,
    /// Bins that are not empty among the first `n`.
    filled: Vec<f64>,
    /// Sum of `c * ln c` over the first `n` bins.
    c_ln_c: Vec<f64>,
}

impl Sums {
    fn of(counts: &[u64]) -> Self {
        let prefix = |term: fn(u64) -> f64| {
            let mut sum = 0.0;
            let rest = counts.iter().map(move |&count| {
                sum += term(count);
                sum
            });
            std::iter::once(0.0).chain(rest).collect::<Vec<f64>>()
        };
        Self {
            count: prefix(|count| count as f64),
            filled: prefix(|count| if count > 0 { 1.0 } else { 0.0 }),
            c_ln_c: prefix(|count| x_ln_x(count as f64)),
        }
    }

    /// KL(P || Q) in nats for the first `kept` bins. With S the total and K the kept count, P = p / S and Q = q / K, so
    /// KL = (sum p ln p - sum p ln q) / S + ln(K / S).
    fn divergence(&self, counts: &[u64], kept: usize, levels: usize) -> f64 {
        let total = self.count[counts.len()];
        let inside = self.count[kept];
        let clipped = total - inside;
        let last = counts[kept - 1] as f64;
        if clipped > 0.0 && last == 0.0 {
            return f64::INFINITY;
        }
        let p_ln_p = self.c_ln_c[kept] - x_ln_x(last) + x_ln_x(last + clipped);
        let mut p_ln_q = 0.0;
        for level in 0..levels {
            let (from, to) = (kept * level / levels, kept * (level + 1) / levels);
            let mass = self.count[to] - self.count[from];
            if mass > 0.0 {
                let even = (mass / (self.filled[to] - self.filled[from])).ln();
                let beyond = if level + 1 == levels { clipped } else { 0.0 };
                p_ln_q += (mass + beyond) * even;
            }
        }
        (p_ln_p - p_ln_q) / total + (inside / total).ln()
    }
}

fn x_ln_x(x: f64) -> f64 {
    if x > 0.0 { x * x.ln() } else { 0.0 }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "where these tests ask for equality they mean it")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, bin by bin.
    fn plain_divergence(counts: &[u64], kept: usize, levels: usize) -> f64 {
        let mut p: Vec<f64> = counts[..kept].iter().map(|&count| count as f64).collect();
        let mut q = vec![0.0; kept];
        for level in 0..levels {
            let group = kept * level / levels..kept * (level + 1) / levels;
            let filled = p[group.clone()].iter().filter(|&&count| count > 0.0).count();
            let mass: f64 = p[group.clone()].iter().sum();
            for bin in group {
                q[bin] = if p[bin] > 0.0 { mass / filled as f64 } else { 0.0 };
            }
        }
        p[kept - 1] += counts[kept..].iter().sum::<u64>() as f64;
        let (p_sum, q_sum) = (p.iter().sum::<f64>(), q.iter().sum::<f64>());
        let term = |(p, q): (&f64, &f64)| if *p > 0.0 { p / p_sum * ((p / p_sum) / (q / q_sum)).ln() } else { 0.0 };
        p.iter().zip(&q).map(term).sum()
    }

    proptest! {
        #[test]
        fn prefix_sums_give_the_divergence_of_the_definition(
            counts in prop::collection::vec(prop_oneof![Just(0_u64), 1..1000_u64], 20..80), draw in 0.0..1.0_f64,
        ) {
            prop_assume!(counts.last() != Some(&0) && counts[..8].iter().any(|&count| count > 0));
            let kept = 8 + ((counts.len() - 8) as f64 * draw) as usize;
            let fast = Sums::of(&counts).divergence(&counts, kept, 8);
            let plain = plain_divergence(&counts, kept, 8);
            prop_assert!(fast == plain || (fast - plain).abs() < 1e-9, "{fast} and {plain} at {kept}");
        }
    }

    fn histogram(values: impl IntoIterator<Item = f32>) -> Histogram {
        let mut histogram = Histogram::default();
        histogram.add(&values.into_iter().collect::<Vec<_>>());
        histogram
    }

    /// Quantiles of the standard normal distribution's magnitude, evenly spaced: a sample without noise.
    fn half_normal(n: usize) -> impl Iterator<Item = f32> {
        // |x| of Box-Muller over a grid is deterministic and close enough to the distribution.
        (0..n).map(move |i| {
            let u = (i as f32 + 0.5) / n as f32;
            let v = (i as f32 * 0.618_034).fract();
            ((-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()).abs()
        })
    }

    #[test]
    fn a_uniform_distribution_is_not_clipped() {
        let threshold = entropy_threshold(&histogram((1..=100_000).map(|i| i as f32 / 100_000.0)), 128);
        assert!(threshold > 0.97, "{threshold}");
    }

    #[test]
    fn one_far_outlier_is_clipped() {
        let values = half_normal(100_000).chain([60.0]);
        let threshold = entropy_threshold(&histogram(values), 128);
        assert!((2.5..8.0).contains(&threshold), "{threshold}");
    }

    #[test]
    fn the_tail_of_a_normal_distribution_is_mostly_kept() {
        let threshold = entropy_threshold(&histogram(half_normal(100_000)), 128);
        assert!((2.5..=4.8).contains(&threshold), "{threshold}");
    }

    #[test]
    fn few_distinct_values_keep_the_whole_range() {
        assert_eq!(entropy_threshold(&histogram([3.0; 50]), 128), 3.0);
        assert_eq!(entropy_threshold(&histogram([0.0; 50]), 128), 0.0);
    }

    #[test]
    fn exact_zeros_do_not_move_the_threshold() {
        let plain = histogram(half_normal(20_000));
        let mut spiked = plain.clone();
        spiked.add(&vec![0.0; 1_000_000]);
        assert_eq!(entropy_threshold(&plain, 128), entropy_threshold(&spiked, 128));
    }
}

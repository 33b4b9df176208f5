//! Entropy calibration: where to cut a range so that what is kept says the most about what was seen.

use crate::histogram::Histogram;

/// The magnitude at which to clip, by least Kullback-Leibler divergence between the clipped distribution and its image on
/// the steps of the quantiser. `levels` says how many steps there are from 0 to a threshold: 128 for a symmetric range,
/// more where the other sign needs few.
///
/// The method is the one NVIDIA described for TensorRT (Migacz, GTC 2017). For every candidate of `kept` bins:
/// the reference P is the first `kept` bins with everything beyond added to the last one; the image Q spreads the counts
/// of each of `levels` groups of bins evenly over the bins of the group that are not empty. Exact zeros are left out:
/// they are exact at every threshold, and a spike of them would drown the rest.
///
/// Where values are clipped onto a bin that is empty itself, Q counts it as one value: without that the divergence would be
/// infinite, and the gap before a lone outlier, the best place to cut, could never win. Ties go to the wider range.
///
/// What it cannot know is how much a value matters. It gives up rare large values for the resolution of many small ones,
/// which is wrong after a GELU, where the large ones carry the signal; that is why min-max is the default.
pub fn entropy_threshold(histogram: &Histogram, levels: impl Fn(f32) -> usize) -> f32 {
    let counts = histogram.counts();
    let sums = Sums::of(counts);
    let threshold = |kept: usize| kept as f32 * histogram.bin_width();
    let mut best = (histogram.largest(), f64::INFINITY);
    for kept in (1..=counts.len()).rev() {
        let levels = levels(threshold(kept)).max(1);
        if kept < levels && kept < counts.len() {
            break; // finer than the steps, a histogram can tell nothing
        }
        let divergence = sums.divergence(counts, kept, levels);
        if divergence < best.1 {
            best = (if kept == counts.len() { histogram.largest() } else { threshold(kept) }, divergence);
        }
    }
    best.0
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
        let last = counts[kept - 1] as f64;
        let clipped = total - self.count[kept];
        let stand_in = if clipped > 0.0 && last == 0.0 { 1.0 } else { 0.0 };
        let inside = self.count[kept] + stand_in;
        let p_ln_p = self.c_ln_c[kept] - x_ln_x(last) + x_ln_x(last + clipped);
        let mut p_ln_q = 0.0;
        for level in 0..levels {
            let (from, to) = (kept * level / levels, kept * (level + 1) / levels);
            let (extra, beyond) = if to == kept && from < to { (stand_in, clipped) } else { (0.0, 0.0) };
            let mass = self.count[to] - self.count[from];
            if mass + extra > 0.0 {
                let even = ((mass + extra) / (self.filled[to] - self.filled[from] + extra)).ln();
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
        let clipped = counts[kept..].iter().sum::<u64>() as f64;
        let mut p: Vec<f64> = counts[..kept].iter().map(|&count| count as f64).collect();
        // What Q is made of: the kept counts, and one value in an empty last bin that has something clipped onto it.
        let mut seen = p.clone();
        if clipped > 0.0 && seen[kept - 1] == 0.0 {
            seen[kept - 1] = 1.0;
        }
        p[kept - 1] += clipped;
        let mut q = vec![0.0; kept];
        for level in 0..levels {
            let group = kept * level / levels..kept * (level + 1) / levels;
            let filled = seen[group.clone()].iter().filter(|&&count| count > 0.0).count();
            let mass: f64 = seen[group.clone()].iter().sum();
            for bin in group {
                q[bin] = if seen[bin] > 0.0 { mass / filled as f64 } else { 0.0 };
            }
        }
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
            prop_assert!((fast - plain).abs() < 1e-9, "{fast} and {plain} at {kept}");
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
        let threshold = entropy_threshold(&histogram((1..=100_000).map(|i| i as f32 / 100_000.0)), |_| 128);
        assert!(threshold > 0.97, "{threshold}");
    }

    #[test]
    fn one_far_outlier_is_clipped() {
        let values = half_normal(100_000).chain([60.0]);
        let threshold = entropy_threshold(&histogram(values), |_| 128);
        assert!((2.5..8.0).contains(&threshold), "{threshold}");
    }

    #[test]
    fn the_tail_of_a_normal_distribution_is_mostly_kept() {
        let threshold = entropy_threshold(&histogram(half_normal(100_000)), |_| 128);
        assert!((2.5..=4.8).contains(&threshold), "{threshold}");
    }

    #[test]
    fn few_distinct_values_keep_the_whole_range() {
        assert_eq!(entropy_threshold(&histogram([3.0; 50]), |_| 128), 3.0);
        assert_eq!(entropy_threshold(&histogram([0.0; 50]), |_| 128), 0.0);
    }

    #[test]
    fn exact_zeros_do_not_move_the_threshold() {
        let plain = histogram(half_normal(20_000));
        let mut spiked = plain.clone();
        spiked.add(&vec![0.0; 1_000_000]);
        assert_eq!(entropy_threshold(&plain, |_| 128), entropy_threshold(&spiked, |_| 128));
    }
}

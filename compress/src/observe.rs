//! What calibration remembers of one activation: bounded memory, whatever the number of samples.

use sensorium_api::CalibrationMethod;

use crate::affine::{ActivationType, Affine, Range};
use crate::entropy::entropy_threshold;
use crate::histogram::Histogram;

/// Watches the values of one activation.
#[derive(Clone, Debug)]
pub struct Observer {
    range: Option<Range>,
    /// Only kept when the method needs it.
    histogram: Option<Histogram>,
}

/// A NaN or an infinity among the values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NotFinite(pub f32);

impl Observer {
    /// One that has seen nothing.
    pub fn new(method: CalibrationMethod) -> Self {
        let histogram = match method {
            CalibrationMethod::Minmax => None,
            CalibrationMethod::Entropy => Some(Histogram::default()),
        };
        Self { range: None, histogram }
    }

    /// Adds values.
    /// # Errors
    /// The first value that is not finite; nothing is added then.
    pub fn add(&mut self, values: &[f32]) -> Result<(), NotFinite> {
        if let Some(&value) = values.iter().find(|value| !value.is_finite()) {
            return Err(NotFinite(value));
        }
        for &value in values {
            let range = self.range.get_or_insert(Range { low: value, high: value });
            *range = Range { low: range.low.min(value), high: range.high.max(value) };
        }
        if let Some(histogram) = &mut self.histogram {
            histogram.add(values);
        }
        Ok(())
    }

    /// The range to quantise, or `None` when nothing was seen.
    pub fn range(&self, kind: ActivationType) -> Option<Range> {
        let seen = self.range?;
        let Some(histogram) = &self.histogram else { return Some(seen) };
        let threshold = entropy_threshold(histogram, |threshold| steps(threshold, seen, kind));
        Some(Range { low: seen.low.max(-threshold), high: seen.high.min(threshold) })
    }
}

/// Steps from 0 to `threshold` when `seen` is clipped there: an asymmetric range spends none on a sign that hardly occurs.
fn steps(threshold: f32, seen: Range, kind: ActivationType) -> usize {
    let clipped = Range { low: seen.low.max(-threshold), high: seen.high.min(threshold) };
    (threshold / Affine::activation(clipped, kind).scale).round() as usize
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "where these tests ask for equality they mean it")]
mod tests {
    use super::*;

    const U8: ActivationType = ActivationType::AsymmetricU8;

    #[test]
    fn minmax_is_the_smallest_and_the_largest_over_all_batches() {
        let mut observer = Observer::new(CalibrationMethod::Minmax);
        assert_eq!(observer.range(U8), None);
        for batch in [[3.0, 4.0], [-1.0, 2.0]] {
            observer.add(&batch).unwrap();
        }
        assert_eq!(observer.range(U8), Some(Range { low: -1.0, high: 4.0 }));
    }

    #[test]
    fn entropy_clips_the_far_side_and_keeps_the_near_one() {
        let mut observer = Observer::new(CalibrationMethod::Entropy);
        // A bell (the sum of three waves out of step) from which everything below -0.5 is cut, and one value far out.
        let bell = |i: u32| (1..4).map(|wave| (i as f32 * 0.1 * (wave as f32).sqrt()).sin()).sum::<f32>();
        let bulk: Vec<f32> = (0..100_000).map(|i| bell(i).max(-0.5)).collect();
        observer.add(&bulk).unwrap();
        observer.add(&[40.0]).unwrap();
        let range = observer.range(U8).unwrap();
        assert_eq!(range.low, -0.5);
        assert!((2.0..10.0).contains(&range.high), "{range:?}");
    }

    #[test]
    fn values_that_are_not_finite_are_refused_whole() {
        let mut observer = Observer::new(CalibrationMethod::Minmax);
        assert_eq!(observer.add(&[1.0, f32::INFINITY]), Err(NotFinite(f32::INFINITY)));
        assert!(observer.add(&[f32::NAN]).is_err());
        assert_eq!(observer.range(U8), None);
    }

    #[test]
    fn steps_go_to_the_sign_that_occurs() {
        let gelu = Range { low: -0.17, high: 10.0 };
        assert_eq!(steps(10.0, gelu, U8), 251);
        assert_eq!(steps(0.17, gelu, U8), 128);
        assert_eq!(steps(10.0, gelu, ActivationType::SymmetricI8), 127);
    }
}

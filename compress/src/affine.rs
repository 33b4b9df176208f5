//! The arithmetic of 8-bit quantisation: `real = scale * (integer - zero_point)`.

/// Integer type and rule for activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationType {
    /// Unsigned, zero point anywhere: all 256 steps cover the observed range. What ONNX Runtime's x86 kernels compute.
    AsymmetricU8,
    /// Signed, zero point 0: what TensorRT reads. On x86 ONNX Runtime turns it into unsigned with zero point 128, and only
    /// where a quantised value has one reader.
    SymmetricI8,
}

/// Largest magnitude of a quantised weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightRange {
    /// -127..=127.
    Full,
    /// -64..=64. Two products of a u8 and such a weight add up to at most 2 * 255 * 64 = 32640, so the 16-bit sums that x86
    /// CPUs without VNNI instructions form (`vpmaddubsw`) cannot saturate.
    SevenBit,
}

impl WeightRange {
    /// The largest magnitude.
    pub const fn limit(self) -> i8 {
        match self {
            Self::Full => 127,
            Self::SevenBit => 64,
        }
    }
}

/// Scale and zero point of one tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    /// Real size of one step; positive and normal.
    pub scale: f32,
    /// Integer that stands for the real 0.
    pub zero_point: i32,
    /// Smallest integer.
    pub low: i32,
    /// Largest integer.
    pub high: i32,
}

impl Affine {
    /// The parameters that cover `range` of an activation. The range is widened to contain 0, which is always exact:
    /// padding and ReLU produce zeros, and an offset there would be a bias everywhere.
    pub fn activation(range: Range, kind: ActivationType) -> Self {
        let (low, high) = (range.low.min(0.0), range.high.max(0.0));
        match kind {
            ActivationType::AsymmetricU8 => {
                // In f64: the width of an f32 range may not fit an f32.
                let scale = step((f64::from(high) - f64::from(low)) / 255.0);
                let zero_point = (f64::from(-low) / f64::from(scale)).round().clamp(0.0, 255.0) as i32;
                Self { scale, zero_point, low: 0, high: 255 }
            }
            ActivationType::SymmetricI8 => {
                let scale = step(f64::from(high.max(-low)) / 127.0);
                Self { scale, zero_point: 0, low: -127, high: 127 }
            }
        }
    }

    /// The parameters of a weight channel whose largest magnitude is `magnitude`, with a scale of at least `smallest`.
    pub fn weight(magnitude: f32, smallest: f32, range: WeightRange) -> Self {
        let limit = i32::from(range.limit());
        let scale = step((f64::from(magnitude) / f64::from(limit)).max(f64::from(smallest)));
        Self { scale, zero_point: 0, low: -limit, high: limit }
    }

    /// The nearest integer (ties to even, as `QuantizeLinear`), clamped.
    pub fn quantize(self, real: f32) -> i32 {
        let steps = (real / self.scale).round_ties_even() as i32; // the cast saturates
        steps.saturating_add(self.zero_point).clamp(self.low, self.high)
    }

    /// The real value of an integer.
    pub fn dequantize(self, integer: i32) -> f32 {
        (integer - self.zero_point) as f32 * self.scale
    }
}

/// A scale that engines accept: a tensor of zeros (or of values so small that a step would be subnormal) gets 1, which
/// maps it to exact zeros.
fn step(scale: f64) -> f32 {
    let scale = scale as f32;
    if scale.is_normal() { scale } else { 1.0 }
}

/// Smallest and largest value seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// Smallest value.
    pub low: f32,
    /// Largest value.
    pub high: f32,
}

/// A weight as integers with one scale per channel of `axis`, or one for all of it.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedWeight {
    /// Row-major, in the weight's shape.
    pub values: Vec<i8>,
    /// One per channel.
    pub scales: Vec<f32>,
}

/// Quantises a row-major tensor of shape `dims` with one scale per index of `axis`; with `None`, one for the whole tensor.
/// `smallest` holds the least scale of each channel; a channel it does not name may have any.
pub fn quantize_weight(
    values: &[f32],
    dims: &[usize],
    axis: Option<usize>,
    smallest: &[f32],
    range: WeightRange,
) -> QuantizedWeight {
    let (channels, inner) = match axis {
        Some(axis) => (dims[axis], dims[axis + 1..].iter().product::<usize>().max(1)),
        None => (1, values.len().max(1)),
    };
    let channel = |index: usize| index / inner % channels;
    let mut magnitudes = vec![0.0_f32; channels];
    for (index, value) in values.iter().enumerate() {
        let magnitude = &mut magnitudes[channel(index)];
        *magnitude = magnitude.max(value.abs());
    }
    let smallest = smallest.iter().copied().chain(std::iter::repeat(0.0));
    let affine: Vec<Affine> = magnitudes
        .into_iter()
        .zip(smallest)
        .map(|(magnitude, least)| Affine::weight(magnitude, least, range))
        .collect();
    let integers = values.iter().enumerate().map(|(index, &value)| affine[channel(index)].quantize(value) as i8);
    QuantizedWeight { values: integers.collect(), scales: affine.iter().map(|affine| affine.scale).collect() }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "where these tests ask for equality they mean it")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KINDS: [ActivationType; 2] = [ActivationType::AsymmetricU8, ActivationType::SymmetricI8];

    proptest! {
        #[test]
        fn a_value_in_range_comes_back_within_half_a_step(
            (a, b) in (-1e6_f32..1e6, -1e6_f32..1e6), draw in 0.0_f32..1.0, kind in prop::sample::select(&KINDS),
        ) {
            let range = Range { low: a.min(b), high: a.max(b) };
            let affine = Affine::activation(range, kind);
            let real = range.low + (range.high - range.low) * draw;
            let back = affine.dequantize(affine.quantize(real));
            // One ulp of the largest value on top: the division and the product round too.
            let rounding = a.abs().max(b.abs()) * f32::EPSILON;
            // Rounding the zero point shifts the grid by up to half a step, so that one end may be clamped by as much.
            let clamped = if kind == ActivationType::AsymmetricU8 { affine.scale / 2.0 } else { 0.0 };
            let inside = affine.quantize(real) > affine.low && affine.quantize(real) < affine.high;
            let bound = affine.scale / 2.0 + rounding + if inside { 0.0 } else { clamped };
            prop_assert!((real - back).abs() <= bound, "{real} -> {back}, {affine:?}");
        }

        #[test]
        fn zero_is_exact(a in -1e3_f32..1e3, b in -1e3_f32..1e3, kind in prop::sample::select(&KINDS)) {
            let affine = Affine::activation(Range { low: a.min(b), high: a.max(b) }, kind);
            prop_assert_eq!(affine.dequantize(affine.quantize(0.0)), 0.0);
        }

        #[test]
        fn a_weight_comes_back_within_half_a_step_of_its_channel(
            values in prop::collection::vec(-10.0_f32..10.0, 24), axis in 0_usize..3, seven_bit: bool,
        ) {
            let range = if seven_bit { WeightRange::SevenBit } else { WeightRange::Full };
            let dims = [2, 3, 4];
            let quantized = quantize_weight(&values, &dims, Some(axis), &[], range);
            prop_assert_eq!(quantized.scales.len(), dims[axis]);
            for (index, &value) in values.iter().enumerate() {
                let at = [index / 12, index / 4 % 3, index % 4];
                let scale = quantized.scales[at[axis]];
                let back = f32::from(quantized.values[index]) * scale;
                prop_assert!((value - back).abs() <= scale * 0.5001, "{value} -> {back} at {at:?}");
            }
        }
    }

    #[test]
    fn scales_of_known_weights_are_exact_per_channel() {
        let weight = [0.5, -127.0, 0.0, -1.0, 63.5, 254.0];
        let by_column = quantize_weight(&weight, &[2, 3], Some(1), &[], WeightRange::Full);
        assert_eq!(by_column.scales, [1.0 / 127.0, 1.0, 2.0]);
        assert_eq!(by_column.values, [64, -127, 0, -127, 64, 127]);
        let by_row = quantize_weight(&weight, &[2, 3], Some(0), &[], WeightRange::Full);
        assert_eq!(by_row.scales, [1.0, 2.0]);
        assert_eq!(by_row.values, [0, -127, 0, 0, 32, 127]);
        let whole = quantize_weight(&weight, &[2, 3], None, &[], WeightRange::Full);
        assert_eq!(whole.scales, [2.0]);
    }

    #[test]
    fn seven_bit_weights_cannot_saturate_a_16_bit_pair() {
        let quantized = quantize_weight(&[-3.0, 3.0, 1.0], &[3], None, &[], WeightRange::SevenBit);
        assert_eq!(quantized.values, [-64, 64, 21]);
        assert!(2 * 255 * i32::from(WeightRange::SevenBit.limit()) <= i32::from(i16::MAX));
    }

    #[test]
    fn a_zero_channel_has_scale_one_and_stays_zero() {
        let quantized = quantize_weight(&[0.0, 1.0, 0.0, -1.0], &[2, 2], Some(1), &[], WeightRange::Full);
        assert_eq!(quantized.scales, [1.0, 1.0 / 127.0]);
        assert_eq!(quantized.values, [0, 127, 0, -127]);
    }

    #[test]
    fn a_constant_activation_is_kept() {
        for kind in KINDS {
            for constant in [0.0, 5.0, -5.0, 1e-40] {
                let affine = Affine::activation(Range { low: constant, high: constant }, kind);
                let back = affine.dequantize(affine.quantize(constant));
                assert!((constant - back).abs() <= constant.abs() * 1e-6 + 1e-39, "{constant} -> {back}");
            }
        }
    }

    #[test]
    fn a_range_wider_than_an_f32_can_hold_is_covered() {
        let affine = Affine::activation(Range { low: f32::MIN, high: f32::MAX }, ActivationType::AsymmetricU8);
        assert!(affine.scale.is_finite());
        assert_eq!((affine.quantize(f32::MIN), affine.quantize(f32::MAX)), (0, 255));
    }
}

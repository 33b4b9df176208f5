//! Whether the rows of a batch have nothing to do with each other.
//!
//! A file says that its first size is open, not that it is a batch: a softmax over the first axis, a running sum or a mean of all
//! rows has one, too. Where nobody wrote that requests may be put together, two rows are run alone and together, and have to
//! come out alike.

use std::{
    task::Poll,
    time::{Duration, Instant},
};

use sensorium_artifact::DType;
use sensorium_engine::{Engine, RawTensor, Waiters};

use crate::model::guesses;

/// How much a row may differ, as a part of its length: quantisation on the fly looks at all rows for its scale.
const TOLERANCE: f64 = 0.1;

/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Why requests to this engine cannot be put together; `None` where nothing speaks against it.
pub(super) fn entangled(engine: &mut dyn Engine) -> Option<String> {
    let signature = engine.signature().clone();
    let outputs: Vec<usize> = (0..signature.outputs().len()).collect();
    let until = Instant::now() + LIMIT;
    let mut run = |inputs: &[RawTensor]| {
        let waiters = Waiters { is_strict: true, deadline: Some(until), poll_gone: &mut |_| Poll::Pending };
        engine.run_for(inputs, &outputs, waiters)
    };
    for guess in guesses(&signature) {
        // Sizes of two or more rows are for models that take no single one.
        if Instant::now() >= until || guess.iter().any(|tensor| tensor.row_count() != Some(1)) {
            break;
        }
        let [first, second] = [0, 1].map(|row| guess.iter().map(|tensor| patterned(tensor, row)).collect::<Vec<_>>());
        let (Ok(one), Ok(other)) = (run(&first), run(&second)) else {
            // Not the size that it wants, or not the values.
            continue;
        };
        let joined = first.iter().zip(&second).map(|(first, second)| RawTensor::concat(&[first, second]).ok());
        let joined = joined.collect::<Option<Vec<_>>>()?;
        let together = match run(&joined) {
            Ok(together) => together,
            Err(error) => return Some(format!("two rows fail that it takes one by one: {error}")),
        };
        let names = signature.outputs().iter().map(|spec| spec.name.clone());
        return names.zip(together).zip(one.iter().zip(&other)).find_map(|((name, both), alone)| {
            let alike = both.split([1, 1]).is_some_and(|rows| is_near(&rows[0], alone.0) && is_near(&rows[1], alone.1));
            (!alike).then(|| format!("rows of output `{name}` come out otherwise together than alone"))
        });
    }
    Some("it takes nothing that was tried, so nobody knows".to_owned())
}

/// Other values in each row, of another size and around another middle: what all rows have in common, such as a mean or a largest
/// element, differs from what each has. Integers are 0 and 1, as they may be indices.
fn patterned(zeros: &RawTensor, row: usize) -> RawTensor {
    let noise = |index: usize| (index * 2 + row).wrapping_mul(0x9e37_79b9) % 1024;
    let real = |index: usize| (noise(index) as f32 / 512.0 - 0.75) * [1.0, 3.0][row % 2];
    let bit = |index: usize| u8::from(noise(index) >= 512);
    let (dtype, bytes) = (zeros.dtype(), zeros.data().len());
    let data: Vec<u8> = match dtype {
        DType::Fp32 => (0..bytes / 4).flat_map(|index| real(index).to_le_bytes()).collect(),
        DType::Fp64 => (0..bytes / 8).flat_map(|index| f64::from(real(index)).to_le_bytes()).collect(),
        DType::Fp16 => (0..bytes / 2).flat_map(|index| half::f16::from_f32(real(index)).to_le_bytes()).collect(),
        DType::Bf16 => (0..bytes / 2).flat_map(|index| half::bf16::from_f32(real(index)).to_le_bytes()).collect(),
        DType::Bytes => return zeros.clone(),
        integer => {
            let size = sensorium_engine::element_size(integer).unwrap_or(1);
            // Little-endian: the first byte has the value.
            (0..bytes).map(|at| if at % size == 0 { bit(at / size) } else { 0 }).collect()
        }
    };
    RawTensor::new(dtype, zeros.shape().to_vec(), data.into()).unwrap_or_else(|_| zeros.clone())
}

fn is_near(one: &RawTensor, other: &RawTensor) -> bool {
    if one.shape() != other.shape() || one.dtype() != other.dtype() {
        return false;
    }
    let numbers = |tensor: &RawTensor| -> Option<Vec<f64>> {
        match tensor.dtype() {
            DType::Fp32 => Some(tensor.numbers::<f32>().iter().map(|value| f64::from(*value)).collect()),
            DType::Fp64 => Some(tensor.numbers::<f64>().to_vec()),
            DType::Fp16 => Some(tensor.numbers::<half::f16>().iter().map(|value| value.to_f64()).collect()),
            DType::Bf16 => Some(tensor.numbers::<half::bf16>().iter().map(|value| value.to_f64()).collect()),
            _ => None,
        }
    };
    let (Some(one_values), Some(other_values)) = (numbers(one), numbers(other)) else {
        return one.data() == other.data();
    };
    let (mut difference, mut length) = (0.0, 0.0);
    for (a, b) in one_values.into_iter().zip(other_values) {
        if a.is_finite() && b.is_finite() {
            difference += (a - b) * (a - b);
            length += a * a + b * b;
        } else if a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan()) {
            return false;
        }
    }
    difference <= TOLERANCE * TOLERANCE * length.max(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_near_within_a_tenth_of_their_length() {
        let row =
            |values: &[f32]| RawTensor::from_vec(DType::Fp32, vec![1, values.len() as i64], values.to_vec()).unwrap();
        assert!(is_near(&row(&[1.0, 2.0]), &row(&[1.05, 1.98])));
        assert!(!is_near(&row(&[1.0, 1.0]), &row(&[0.5, 0.5])), "a softmax over two rows");
        assert!(is_near(&row(&[0.0]), &row(&[0.0])));
        assert!(is_near(&row(&[f32::NAN, f32::INFINITY]), &row(&[f32::NAN, f32::INFINITY])));
        assert!(!is_near(&row(&[f32::INFINITY]), &row(&[1.0])));
        assert!(!is_near(&row(&[1.0]), &row(&[1.0, 1.0])));
        let ids = |values: &[i64]| RawTensor::from_vec(DType::Int64, vec![1, 2], values.to_vec()).unwrap();
        assert!(is_near(&ids(&[1, 2]), &ids(&[1, 2])) && !is_near(&ids(&[1, 2]), &ids(&[1, 3])));
    }
}

//! Whether the rows of a batch have nothing to do with each other.
//!
//! A file says that its first size is open, not that it is a batch: a softmax over the first axis, a running sum, a mean of all
//! rows or their order has one, too. Two rows are run alone and together, in either order, and have to come out alike: rows of small values,
//! then of larger ones and of other texts, at the first size that the model takes and at one that is clearly larger.

use std::{
    task::Poll,
    time::{Duration, Instant},
};

use sensorium_artifact::DType;
use sensorium_engine::{Engine, EngineError, RawTensor, Waiters};

use crate::model::guesses;

/// How much a row may differ, as a part of its length: quantisation on the fly looks at all rows for its scale.
const TOLERANCE: f64 = 0.1;

/// How long all of it may take, and how long before a second size is too much: a start waits for it.
const LIMIT: Duration = Duration::from_secs(10);
const LIMIT_FOR_MORE: Duration = Duration::from_secs(1);
/// Sizes at which it is tried, and how many times as many elements the second one has at least.
const SIZES: usize = 2;
const LARGER: usize = 4;

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Rows {
    /// As far as anybody can tell.
    Independent,
    /// With a sentence about what came out otherwise.
    Entangled(String),
    /// The model took nothing that was tried.
    Unknown,
}

/// Whether requests to this engine may be put together. One `on_gpu` is given small values alone: an index beyond a table, which is an
/// error on a processor, takes a GPU from the process.
pub(super) fn rows(engine: &mut dyn Engine, on_gpu: bool) -> Rows {
    let signature = engine.signature().clone();
    let outputs: Vec<usize> = (0..signature.outputs().len()).collect();
    let started = Instant::now();
    let mut run = |inputs: &[RawTensor]| {
        let deadline = Some(started + LIMIT);
        let waiters = Waiters { deadline, poll_gone: &mut |_| Poll::Pending };
        engine.run_for(inputs, &outputs, waiters)
    };
    let values = if on_gpu { &[Values::Small][..] } else { &[Values::Small, Values::Large] };
    let mut taken: Vec<usize> = Vec::new();
    for guess in guesses(&signature) {
        let limit = if taken.is_empty() { LIMIT } else { LIMIT_FOR_MORE };
        // Sizes of two or more rows are for models that take no single one.
        let is_of_rows = guess.iter().any(|tensor| tensor.row_count() != Some(1));
        if taken.len() == SIZES || is_of_rows || started.elapsed() >= limit {
            break;
        }
        let elements: usize = guess.iter().map(elements).sum();
        if taken.last().is_some_and(|before| elements < before * LARGER) {
            continue;
        }
        let (mut tried, mut is_taken) = (Vec::new(), false);
        for values in values {
            let pair = [0, 1].map(|row| guess.iter().map(|zeros| values.row(zeros, row)).collect::<Vec<_>>());
            // Larger values are for what is no real number.
            if tried.contains(&pair) {
                continue;
            }
            match compare(&mut run, &pair) {
                Found::Refused => {}
                Found::Alike => is_taken = true,
                Found::Unlike { output } => {
                    let name = signature.outputs().get(output).map_or("?", |spec| &spec.name);
                    return Rows::Entangled(format!("rows of output `{name}` come out otherwise together than alone"));
                }
                Found::Fails(error) => {
                    return Rows::Entangled(format!("two rows fail that it takes one by one: {error}"));
                }
            }
            tried.push(pair);
        }
        if is_taken {
            taken.push(elements);
        }
    }
    if taken.is_empty() { Rows::Unknown } else { Rows::Independent }
}

/// Elements of one tensor; a text is one.
fn elements(tensor: &RawTensor) -> usize {
    tensor.shape().iter().map(|size| usize::try_from(*size).unwrap_or(0)).product()
}

/// What two rows are together, beside what they are alone.
enum Found {
    /// Not the sizes that the model wants, or not the values.
    Refused,
    Alike,
    /// The index of an output in which they are not.
    Unlike {
        output: usize,
    },
    /// Together it does not take them.
    Fails(EngineError),
}

fn compare(
    run: &mut impl FnMut(&[RawTensor]) -> Result<Vec<RawTensor>, EngineError>,
    pair: &[Vec<RawTensor>; 2],
) -> Found {
    let [first, second] = pair;
    let (Ok(one), Ok(other)) = (run(first), run(second)) else { return Found::Refused };
    for (inputs, alone) in [([first, second], [&one, &other]), ([second, first], [&other, &one])] {
        let joined = inputs[0].iter().zip(inputs[1]).map(|(first, second)| RawTensor::concat(&[first, second]).ok());
        let Some(joined) = joined.collect::<Option<Vec<_>>>() else { return Found::Refused };
        let together = match run(&joined) {
            Ok(together) => together,
            Err(error) => return Found::Fails(error),
        };
        let is_unlike = |(both, alone): (&RawTensor, [&RawTensor; 2])| {
            !both.split([1, 1]).is_some_and(|rows| rows.iter().zip(alone).all(|(row, alone)| is_near(row, alone)))
        };
        let alone = alone[0].iter().zip(alone[1]).map(|(first, second)| [first, second]);
        if let Some(output) = together.iter().zip(alone).position(is_unlike) {
            return Found::Unlike { output };
        }
    }
    Found::Alike
}

/// Which values two rows have. They are others in each, of another size and around another middle: what all rows have in common, such as a
/// mean or a largest element, differs from what each has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Values {
    /// Whole numbers are 0 and 1, as they may be indices, texts are digits.
    Small,
    /// Bytes have their whole range, as in a picture, other whole numbers are at most 3, and texts have one word or more.
    Large,
}

impl Values {
    /// Row 0 or 1, of the type and shape of `zeros`.
    fn row(self, zeros: &RawTensor, row: usize) -> RawTensor {
        let noise = |index: usize| (index * 2 + row).wrapping_mul(0x9e37_79b9) % 1024;
        let real = |index: usize| (noise(index) as f32 / 512.0 - 0.75) * [1.0, 3.0][row];
        // The first one differs between the rows, however few there are.
        let bit = |index: usize| if index == 0 { row as u8 } else { u8::from(noise(index) >= 512) };
        let up_to = |most: usize, index: usize| if index == 0 { most } else { noise(index) % (most + 1) } as u8;
        let whole = |dtype: DType, index: usize| match (self, dtype, row) {
            (Self::Small, ..) | (_, DType::Bool, _) => bit(index),
            (Self::Large, DType::Uint8, 0) => up_to(60, index),
            (Self::Large, DType::Uint8, _) => up_to(250, index),
            (Self::Large, DType::Int8, 0) => up_to(30, index),
            (Self::Large, DType::Int8, _) => up_to(120, index),
            (Self::Large, _, 0) => up_to(1, index),
            (Self::Large, ..) => up_to(3, index),
        };
        let text = || match (self, row) {
            (Self::Small, 0) => "0",
            (Self::Small, _) => "1",
            (Self::Large, 0) => "two",
            (Self::Large, _) => "a text of more words",
        };
        let (dtype, bytes, count) = (zeros.dtype(), zeros.data().len(), elements(zeros));
        let data: Vec<u8> = match dtype {
            DType::Fp32 => (0..count).flat_map(|index| real(index).to_le_bytes()).collect(),
            DType::Fp64 => (0..count).flat_map(|index| f64::from(real(index)).to_le_bytes()).collect(),
            DType::Fp16 => (0..count).flat_map(|index| half::f16::from_f32(real(index)).to_le_bytes()).collect(),
            DType::Bf16 => (0..count).flat_map(|index| half::bf16::from_f32(real(index)).to_le_bytes()).collect(),
            DType::Bytes => {
                let framed = [&(text().len() as u32).to_le_bytes()[..], text().as_bytes()].concat();
                framed.repeat(count)
            }
            dtype => {
                let size = sensorium_engine::element_size(dtype).unwrap_or(1);
                // Little-endian: the first byte has the value.
                (0..bytes).map(|at| if at % size == 0 { whole(dtype, at / size) } else { 0 }).collect()
            }
        };
        RawTensor::new(dtype, zeros.shape().to_vec(), data.into()).unwrap_or_else(|_| zeros.clone())
    }
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
    use sensorium_artifact::TensorSpec;
    use sensorium_engine::Signature;

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

    #[test]
    fn rows_differ_however_few_elements_they_have_and_whatever_their_type() {
        use DType::{Bool, Bytes, Fp16, Fp32, Int8, Int64, Uint8};
        for dtype in [Bool, Bytes, Fp16, Fp32, Int8, Int64, Uint8] {
            for shape in [vec![1], vec![1, 1], vec![1, 5]] {
                let zeros = RawTensor::zeros(dtype, shape).unwrap();
                for values in [Values::Small, Values::Large] {
                    assert_ne!(values.row(&zeros, 0), values.row(&zeros, 1), "{values:?} of {zeros:?}");
                }
            }
        }
    }

    /// An engine of one input that does `run` to it.
    struct Doing(Signature, fn(&RawTensor) -> Result<RawTensor, EngineError>);

    impl Engine for Doing {
        fn signature(&self) -> &Signature {
            &self.0
        }

        fn run_raw(&mut self, inputs: &[RawTensor], _: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
            Ok(vec![self.1(&inputs[0])?])
        }
    }

    fn found(dtype: DType, run: fn(&RawTensor) -> Result<RawTensor, EngineError>) -> Rows {
        let spec = |name: &str| TensorSpec { name: name.to_owned(), dtype, shape: vec![None, None] };
        rows(&mut Doing(Signature::of_manifest(&[spec("x")], &[spec("y")]), run), false)
    }

    fn of(x: &RawTensor, values: Vec<i64>) -> RawTensor {
        RawTensor::from_vec(DType::Int64, x.shape().to_vec(), values).unwrap()
    }

    fn refuse<T>() -> Result<T, EngineError> {
        Err(EngineError::Run { reason: "not this".to_owned() })
    }

    #[test]
    fn what_rows_have_in_common_is_found() {
        assert_eq!(found(DType::Int64, |x| Ok(x.clone())), Rows::Independent);
        let sum = found(DType::Int64, |x| {
            let values = x.numbers::<i64>();
            Ok(of(x, (1..=values.len()).map(|count| values[..count].iter().sum()).collect()))
        });
        assert!(matches!(sum, Rows::Entangled(_)), "a running sum of one number a row");
        let sorted = found(DType::Int64, |x| {
            let mut values = x.numbers::<i64>().to_vec();
            values.sort_unstable();
            Ok(of(x, values))
        });
        assert!(matches!(sorted, Rows::Entangled(_)), "also where the rows were in their order");
        let scaled = found(DType::Uint8, |x| {
            let most = x.data().iter().copied().max().unwrap_or(1).max(1);
            let data: Vec<u8> =
                x.data().iter().map(|value| (u16::from(*value) * 100 / u16::from(most)) as u8).collect();
            Ok(RawTensor::new(DType::Uint8, x.shape().to_vec(), data.into()).unwrap())
        });
        assert!(matches!(scaled, Rows::Entangled(_)), "pictures that share their brightest point");
        let longest = found(DType::Bytes, |x| {
            let longest = x.data().len() as i64 / x.shape().iter().product::<i64>();
            let rows = RawTensor::zeros(DType::Int64, vec![x.shape()[0]]).unwrap();
            Ok(of(&rows, vec![longest; x.shape()[0] as usize]))
        });
        assert!(matches!(longest, Rows::Entangled(_)), "texts that are as long as the longest");
    }

    #[test]
    fn what_is_refused_at_some_values_or_sizes_is_tried_at_others() {
        let of_bits = found(DType::Int64, |x| {
            if x.numbers::<i64>().iter().any(|value| *value > 1) { refuse() } else { Ok(x.clone()) }
        });
        assert_eq!(of_bits, Rows::Independent, "a table of two entries");
        let of_four = found(DType::Int64, |x| if x.shape()[1] == 4 { Ok(x.clone()) } else { refuse() });
        assert_eq!(of_four, Rows::Independent);
        assert_eq!(found(DType::Int64, |_| refuse()), Rows::Unknown);
        let single = found(DType::Int64, |x| if x.shape()[0] == 1 { Ok(x.clone()) } else { refuse() });
        assert!(matches!(single, Rows::Entangled(reason) if reason.contains("one by one")));
    }
}

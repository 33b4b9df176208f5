//! The classification extension: an output's highest values as strings `value:index` or `value:index:label`.

use sensorium_artifact::DType;
use sensorium_engine::RawTensor;

use super::{InvalidRequest, datatype};

/// Strings of an answer at most: each takes several times the memory of its score.
const MOST: usize = 1 << 20;

/// The `count` highest values of each row of `scores`, or of all of it when it is no batch, highest first; of equal ones
/// the first. An output of fewer values gives all of them.
///
/// # Errors
/// [`InvalidRequest::NoClasses`] for types without an order, [`InvalidRequest::TooManyClasses`].
pub(super) fn top<'a>(
    output: &str,
    scores: &RawTensor,
    count: usize,
    is_batched: bool,
    label: impl Fn(usize) -> Option<&'a str>,
) -> Result<RawTensor, InvalidRequest> {
    let ranked = Ranked { tensor: scores, count, is_batched };
    let elements = sensorium_engine::element_size(scores.dtype()).map_or(0, |size| scores.data().len() / size);
    let rows = if is_batched { scores.row_count().unwrap_or(1) } else { 1 };
    let found = elements.min(rows.saturating_mul(count));
    if found > MOST {
        return Err(InvalidRequest::TooManyClasses { output: output.to_owned(), found, most: MOST });
    }
    let (rows, strings) = match scores.dtype() {
        DType::Fp32 => ranked.strings(f32::total_cmp, |value| format!("{value:.6}"), label),
        DType::Fp64 => ranked.strings(f64::total_cmp, |value| format!("{value:.6}"), label),
        DType::Int8 => ranked.strings(i8::cmp, i8::to_string, label),
        DType::Int16 => ranked.strings(i16::cmp, i16::to_string, label),
        DType::Int32 => ranked.strings(i32::cmp, i32::to_string, label),
        DType::Int64 => ranked.strings(i64::cmp, i64::to_string, label),
        DType::Uint8 => ranked.strings(u8::cmp, u8::to_string, label),
        DType::Uint16 => ranked.strings(u16::cmp, u16::to_string, label),
        DType::Uint32 => ranked.strings(u32::cmp, u32::to_string, label),
        DType::Uint64 => ranked.strings(u64::cmp, u64::to_string, label),
        DType::Bool | DType::Fp16 | DType::Bf16 | DType::Bytes => {
            return Err(InvalidRequest::NoClasses {
                output: output.to_owned(),
                datatype: datatype::name(scores.dtype()),
            });
        }
    };
    let classes = (strings.len() / rows.max(1)) as i64;
    let shape = if is_batched { vec![rows as i64, classes] } else { vec![classes] };
    // As many strings as the shape says.
    RawTensor::from_strings(shape, &strings)
        .map_err(|source| InvalidRequest::Tensor { input: output.to_owned(), source })
}

struct Ranked<'a> {
    tensor: &'a RawTensor,
    count: usize,
    is_batched: bool,
}

impl Ranked<'_> {
    /// The number of rows, and the strings of all of them.
    fn strings<'l, T: bytemuck::Pod>(
        &self,
        order: impl Fn(&T, &T) -> std::cmp::Ordering,
        text: impl Fn(&T) -> String,
        label: impl Fn(usize) -> Option<&'l str>,
    ) -> (usize, Vec<String>) {
        let values = self.tensor.numbers::<T>();
        let rows = if self.is_batched { self.tensor.row_count().unwrap_or(1) } else { 1 };
        let width = values.len() / rows.max(1);
        let mut strings = Vec::with_capacity(rows * width.min(self.count));
        for row in values.chunks_exact(width.max(1)) {
            let mut indices: Vec<usize> = (0..row.len()).collect();
            let better = |one: &usize, other: &usize| order(&row[*other], &row[*one]).then(one.cmp(other));
            if self.count < indices.len() {
                // Few of many, most likely: only those need an order.
                indices.select_nth_unstable_by(self.count, better);
                indices.truncate(self.count);
            }
            indices.sort_unstable_by(better);
            for index in indices {
                let value = text(&row[index]);
                strings.push(match label(index) {
                    Some(label) => format!("{value}:{index}:{label}"),
                    None => format!("{value}:{index}"),
                });
            }
        }
        (rows, strings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(tensor: &RawTensor) -> Vec<&str> {
        tensor.strings().map(|string| str::from_utf8(string).unwrap()).collect()
    }

    fn labels(index: usize) -> Option<&'static str> {
        ["cat", "dog"].get(index).copied()
    }

    #[test]
    fn each_row_of_a_batch_is_ranked() {
        let scores = RawTensor::from_vec(DType::Fp32, vec![2, 3], vec![0.1_f32, 0.7, 0.2, 3.0, -1.0, 3.0]).unwrap();
        let top = top("y", &scores, 2, true, labels).unwrap();
        assert_eq!(top.shape(), [2, 2]);
        assert_eq!(strings(&top), ["0.700000:1:dog", "0.200000:2", "3.000000:0:cat", "3.000000:2"]);
    }

    #[test]
    fn without_a_batch_all_values_are_ranked_together_and_there_are_no_more_than_that() {
        let scores = RawTensor::from_vec(DType::Int32, vec![3], vec![5_i32, -2, 9]).unwrap();
        let top = top("y", &scores, usize::MAX, false, |_| None).unwrap();
        assert_eq!(top.shape(), [3]);
        assert_eq!(strings(&top), ["9:2", "5:0", "-2:1"]);
    }

    #[test]
    fn strings_have_no_classes() {
        let texts = RawTensor::from_strings(vec![1], &["a"]).unwrap();
        assert!(matches!(top("y", &texts, 1, true, labels), Err(InvalidRequest::NoClasses { datatype: "BYTES", .. })));
    }
}

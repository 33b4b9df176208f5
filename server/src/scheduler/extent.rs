//! What a request takes of a batch beside its rows: tokens, pixels, samples of sound. Pure.

use bytes::Bytes;
use sensorium_engine::{DType, RawTensor, RawTensorError};

/// How far one request, or a batch, reaches along the axes that requests choose.
///
/// The elements of a row are the product of its sizes, and of several inputs the most: token ids and their mask are
/// the same tokens. A batch with padding is as long as its longest member along every axis.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Extent {
    /// Input and size of each axis, in order; the same axes for all requests of a graph.
    sizes: Vec<(usize, usize)>,
    /// Elements that lie one request behind the other, of the input that has the most.
    flat: usize,
}

impl Extent {
    /// It is this long along the next axis, which is of `input`.
    pub(super) fn reach(&mut self, input: usize, size: usize) {
        self.sizes.push((input, size));
    }

    /// So many elements of it are not padded.
    pub(super) fn lie(&mut self, elements: usize) {
        self.flat = self.flat.max(elements);
    }

    /// The batch of both.
    pub(super) fn add(&mut self, other: &Self) {
        if self.sizes.is_empty() {
            self.sizes.clone_from(&other.sizes);
        }
        for ((_, longest), (_, size)) in self.sizes.iter_mut().zip(&other.sizes) {
            *longest = (*longest).max(*size);
        }
        self.flat = self.flat.saturating_add(other.flat);
    }

    /// As [`Extent::add`].
    pub(super) fn with(&self, other: &Self) -> Self {
        let mut both = self.clone();
        both.add(other);
        both
    }

    /// Elements of `rows` rows.
    pub(super) fn cost(&self, rows: usize) -> usize {
        let inputs = self.sizes.chunk_by(|a, b| a.0 == b.0);
        let of_row = |axes: &[(usize, usize)]| axes.iter().fold(1_usize, |all, (_, size)| all.saturating_mul(*size));
        let row = inputs.map(of_row).max().unwrap_or(usize::from(self.flat == 0));
        rows.saturating_mul(row).saturating_add(self.flat)
    }
}

/// Counts of requests, each summed up from zero, as those of one batch.
///
/// # Errors
/// A type that no counts have.
pub(super) fn sum_up(parts: &[&RawTensor], with_zero: bool) -> Result<RawTensor, RawTensorError> {
    let Some(dtype) = parts.first().map(|part| part.dtype()) else {
        return Err(RawTensorError::Shape { shape: Vec::new() });
    };
    let mut counts: Vec<i64> = if with_zero { vec![0] } else { Vec::new() };
    let mut before = 0;
    for part in parts {
        let own = read_counts(part).unwrap_or_default();
        counts.extend(own.iter().skip(usize::from(with_zero)).map(|count| before + count));
        before += own.last().copied().unwrap_or(0);
    }
    write_counts(dtype, vec![counts.len() as i64], &counts)
}

/// Counts as a tensor of one of the types that they may have.
///
/// # Errors
/// Another type.
pub(crate) fn write_counts(dtype: DType, shape: Vec<i64>, counts: &[i64]) -> Result<RawTensor, RawTensorError> {
    let data: Vec<u8> = match dtype {
        DType::Int64 => counts.iter().flat_map(|count| count.to_le_bytes()).collect(),
        // A message has fewer bytes than 32 bits can count.
        DType::Int32 => counts.iter().flat_map(|count| (*count as i32).to_le_bytes()).collect(),
        DType::Fp32 => counts.iter().flat_map(|count| (*count as f32).to_le_bytes()).collect(),
        // Refused when the model is loaded.
        _ => Vec::new(),
    };
    RawTensor::new(dtype, shape, Bytes::from(data))
}

fn read_counts(tensor: &RawTensor) -> Option<Vec<i64>> {
    match tensor.dtype() {
        DType::Int64 => Some(tensor.numbers::<i64>().into_owned()),
        DType::Int32 => Some(tensor.numbers::<i32>().iter().map(|count| (*count).into()).collect()),
        DType::Fp32 => Some(tensor.numbers::<f32>().iter().map(|count| *count as i64).collect()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(sizes: &[(usize, usize)], flat: usize) -> Extent {
        Extent { sizes: sizes.to_vec(), flat }
    }

    #[test]
    fn a_batch_costs_what_it_has_after_padding() {
        let tokens = |length| extent(&[(0, length), (1, length)], 0);
        assert_eq!(tokens(7).cost(2), 14, "ids and mask are the same tokens");
        assert_eq!(tokens(7).with(&tokens(3)).cost(3), 21);
        let pixels = |height, width| extent(&[(0, height), (0, width)], 0);
        assert_eq!(pixels(10, 1).with(&pixels(1, 10)).cost(2), 200, "as high as the one and as wide as the other");
        assert_eq!(extent(&[], 5).with(&extent(&[], 9)).cost(2), 14, "what is not padded adds up");
        assert_eq!(Extent::default().cost(3), 3, "rows alone count as one each");
        assert_eq!(extent(&[(0, usize::MAX)], 1).cost(2), usize::MAX);
    }

    #[test]
    fn sums_go_on_where_the_request_before_ended() {
        for dtype in [DType::Int32, DType::Int64, DType::Fp32] {
            let counts = |counts: &[i64]| write_counts(dtype, vec![counts.len() as i64], counts).unwrap();
            let joined = sum_up(&[&counts(&[2]), &counts(&[3]), &counts(&[0])], false).unwrap();
            assert_eq!(joined, counts(&[2, 5, 5]));
            let joined = sum_up(&[&counts(&[0, 2]), &counts(&[0, 3])], true).unwrap();
            assert_eq!(joined, counts(&[0, 2, 5]));
        }
    }
}

//! Which requests can stand in one batch, and how unequal ones are made equal. Pure.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use sensorium_engine::{DType, RawTensor, RawTensorError, Signature, element_size};

use super::{
    Work,
    extent::{self, Extent},
    policy::{Follows, Join, Policy},
};

/// The sizes of a graph's inputs that requests decide, beyond the batch.
#[derive(Clone, Debug)]
pub(super) struct Shapes {
    axes: Vec<Axis>,
    /// The bytes that fill up an element of each input; empty where it is not padded.
    fills: Vec<Vec<u8>>,
    /// How inputs are put together that are no rows.
    joins: BTreeMap<usize, Join>,
    /// Per output, the sizes that grow when an input is padded.
    grown: Vec<Vec<Follows>>,
}

#[derive(Clone, Copy, Debug)]
struct Axis {
    input: usize,
    position: usize,
    is_padded: bool,
}

impl Shapes {
    /// The shapes of a graph whose first axis is the batch, where `batches`.
    ///
    /// # Errors
    /// Padding of an input that the graph has not, or that has no elements to fill up with.
    pub(super) fn new(signature: &Signature, batches: bool, policy: &Policy) -> Result<Self, String> {
        let mut fills = vec![Vec::new(); signature.inputs().len()];
        for (name, &value) in policy.padding.iter().flat_map(|padding| &padding.values) {
            let found = signature.inputs().iter().position(|spec| spec.name == *name);
            let index = found.ok_or_else(|| format!("its padding names input `{name}`, which its file has not"))?;
            fills[index] = fill(signature.inputs()[index].dtype, value)
                .ok_or_else(|| format!("its padding fills input `{name}`, whose type has no number {value}"))?;
        }
        let mut axes = Vec::new();
        for (input, spec) in signature.inputs().iter().enumerate() {
            for axis in usize::from(batches)..spec.shape.len() {
                // However long the one that the server makes is, the others fix it.
                let is_made = policy.joins.get(&input).is_some_and(|join| *join != Join::Flat);
                if spec.shape[axis].is_none() && !is_made {
                    axes.push(Axis { input, position: axis, is_padded: !fills[input].is_empty() });
                }
            }
        }
        let padded = |symbol: &str| {
            let followed =
                |axis: &&Axis| axis.is_padded && signature.input_symbol(axis.input, axis.position) == Some(symbol);
            axes.iter().find(followed).map(|axis| (axis.input, axis.position))
        };
        let named = |output: usize| {
            let axes = 1..signature.outputs()[output].shape.len();
            let follows = |axis| {
                let (input, followed) = padded(signature.output_symbol(output, axis)?)?;
                Some(Follows { axis, input, followed })
            };
            axes.filter_map(follows).collect()
        };
        let tried = policy.padding.as_ref().and_then(|padding| padding.follows.clone());
        let grown = tried.unwrap_or_else(|| (0..signature.outputs().len()).map(named).collect());
        Ok(Self { axes, fills, joins: policy.joins.clone(), grown })
    }

    /// Shapes of one matrix whose width requests decide.
    #[cfg(test)]
    pub(super) fn tail(axis: usize) -> Self {
        let axes = vec![Axis { input: 0, position: axis, is_padded: false }];
        Self { axes, fills: vec![Vec::new()], joins: BTreeMap::new(), grown: vec![Vec::new(); 2] }
    }

    /// What has to be equal for two requests to join, and how far this one reaches along the axes that may differ.
    pub(super) fn class(&self, inputs: &[RawTensor]) -> (Vec<i64>, Extent) {
        let mut extent = Extent::default();
        let class = self.axes.iter().map(|axis| {
            let size = inputs[axis.input].shape()[axis.position];
            if !self.joins.contains_key(&axis.input) {
                extent.reach(axis.input, size as usize);
            }
            if axis.is_padded { bucket(size) } else { size }
        });
        let class = class.collect();
        for input in self.joins.iter().filter(|(_, join)| **join == Join::Flat).map(|(input, _)| *input) {
            extent.lie(inputs[input].len());
        }
        (class, extent)
    }

    /// All rows of one input, one after the other, filled up to the longest of them; in `room`, which is used again.
    pub(super) fn join(
        &self,
        input: usize,
        parts: &[&RawTensor],
        room: &mut BytesMut,
    ) -> Result<RawTensor, RawTensorError> {
        match self.joins.get(&input) {
            None | Some(Join::Flat | Join::Listed) => {}
            Some(Join::Summed { with_zero }) => return extent::sum_up(parts, *with_zero),
            Some(Join::Longest) => {
                let longest = parts.iter().max_by_key(|part| part.len()).copied();
                return longest.cloned().ok_or(RawTensorError::Shape { shape: Vec::new() });
            }
        }
        let fill = self.fills[input].as_slice();
        let is_even = parts.windows(2).all(|pair| pair[0].shape().get(1..) == pair[1].shape().get(1..));
        if fill.is_empty() || is_even {
            return RawTensor::concat_in(parts, room);
        }
        let mut shape = parts[0].shape().to_vec();
        for part in &parts[1..] {
            for (longest, size) in shape.iter_mut().zip(part.shape()) {
                *longest = (*longest).max(*size);
            }
        }
        let Some(rows) = RawTensor::rows_of(parts) else { return Err(RawTensorError::Shape { shape }) };
        shape[0] = rows;
        let dtype = parts[0].dtype();
        let Some(elements) = RawTensor::element_count(dtype, &shape) else {
            return Err(RawTensorError::Shape { shape });
        };
        if elements == 0 {
            return RawTensor::new(dtype, shape, Bytes::new());
        }
        room.reserve(elements * fill.len());
        for _ in 0..elements {
            room.extend_from_slice(fill);
        }
        let row = elements / rows as usize * fill.len();
        let mut start = 0;
        for part in parts {
            runs(part.shape(), &shape, fill.len(), |from, to, length| {
                room[start + to..start + to + length].copy_from_slice(&part.data()[from..from + length]);
            });
            start += part.shape()[0] as usize * row;
        }
        RawTensor::new(dtype, shape, room.split().freeze())
    }

    /// A request's rows of output `output` without what padding made of them.
    pub(super) fn trim(&self, output: usize, rows: RawTensor, work: &Work) -> Result<RawTensor, RawTensorError> {
        let mut shape = rows.shape().to_vec();
        for &Follows { axis, input, followed } in &self.grown[output] {
            if let Some(size) = shape.get_mut(axis) {
                *size = (*size).min(work.inputs[input].shape()[followed]);
            }
        }
        if shape == rows.shape() {
            return Ok(rows);
        }
        let Some(size) = element_size(rows.dtype()) else {
            let strings: Vec<&[u8]> = rows.strings().collect();
            let mut kept = Vec::new();
            runs(&shape, rows.shape(), 1, |_, from, length| kept.extend_from_slice(&strings[from..from + length]));
            return RawTensor::from_strings(shape, &kept);
        };
        let elements = RawTensor::element_count(rows.dtype(), &shape).unwrap_or(0);
        let mut data = BytesMut::with_capacity(elements * size);
        runs(&shape, rows.shape(), size, |_, from, length| data.extend_from_slice(&rows.data()[from..from + length]));
        RawTensor::new(rows.dtype(), shape, data.freeze())
    }

    /// Elements of a batch along the axes that may differ: those that mean something, and those that fill it up. `None`
    /// where requests of one batch never differ.
    pub(super) fn padded(&self, works: &[&Work]) -> Option<(usize, usize)> {
        if !self.axes.iter().any(|axis| axis.is_padded) && self.joins.is_empty() {
            return None;
        }
        let (mut useful, mut rows, mut all) = (0_usize, 0, Extent::default());
        for work in works {
            let extent = self.class(&work.inputs).1;
            useful = useful.saturating_add(extent.cost(work.rows));
            rows += work.rows;
            all.add(&extent);
        }
        Some((useful, all.cost(rows).saturating_sub(useful)))
    }

    /// The parts of an output that lies one request behind the other, each in its shape.
    pub(super) fn scatter<'a>(
        tensor: &RawTensor,
        shapes: impl Iterator<Item = &'a Vec<i64>> + Clone,
    ) -> Option<Vec<RawTensor>> {
        let counts = shapes.clone().map(|shape| RawTensor::element_count(tensor.dtype(), shape));
        let flat = tensor.clone().reshaped(vec![tensor.len() as i64]).ok()?;
        let parts = flat.split(counts.collect::<Option<Vec<_>>>()?)?;
        parts.into_iter().zip(shapes).map(|(part, shape)| part.reshaped(shape.clone()).ok()).collect()
    }
}

/// Where the pieces of a small tensor lie in one that is larger along some axes: offset in the small one, offset in the
/// large one, length; in bytes, in the order of the small one. Both are shapes of tensors.
fn runs(small: &[i64], large: &[i64], element: usize, mut each: impl FnMut(usize, usize, usize)) {
    let Some((&last, outer)) = small.split_last() else { return each(0, 0, element) };
    // Without elements the other sizes may be as large as they like.
    if small.contains(&0) {
        return;
    }
    let length = last as usize * element;
    for piece in 0..outer.iter().map(|size| *size as usize).product::<usize>() {
        let (mut rest, mut stride, mut to) = (piece, large[small.len() - 1] as usize, 0);
        for (axis, &size) in outer.iter().enumerate().rev() {
            to += rest % size as usize * stride;
            rest /= size as usize;
            stride *= large[axis] as usize;
        }
        each(piece * length, to * element, length);
    }
}

/// Sizes of one bucket differ by less than half: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... are their upper ends.
fn bucket(size: i64) -> i64 {
    let power = u64::try_from(size).unwrap_or(1).next_power_of_two() as i64;
    if size <= power / 4 * 3 { power / 4 * 3 } else { power }
}

/// A number as the bytes of an element.
fn fill(dtype: DType, value: f64) -> Option<Vec<u8>> {
    let whole = |low: f64, high: f64| (value.fract() == 0.0 && (low..=high).contains(&value)).then_some(value as i64);
    Some(match dtype {
        DType::Fp32 => (value as f32).to_le_bytes().to_vec(),
        DType::Fp64 => value.to_le_bytes().to_vec(),
        DType::Int64 => whole(-9e15, 9e15)?.to_le_bytes().to_vec(),
        DType::Int32 => (whole(-2_147_483_648.0, 2_147_483_647.0)? as i32).to_le_bytes().to_vec(),
        DType::Int16 => (whole(-32768.0, 32767.0)? as i16).to_le_bytes().to_vec(),
        DType::Int8 => (whole(-128.0, 127.0)? as i8).to_le_bytes().to_vec(),
        DType::Uint64 => whole(0.0, 9e15)?.to_le_bytes().to_vec(),
        DType::Uint32 => (whole(0.0, 4_294_967_295.0)? as u32).to_le_bytes().to_vec(),
        DType::Uint16 => (whole(0.0, 65535.0)? as u16).to_le_bytes().to_vec(),
        DType::Uint8 => (whole(0.0, 255.0)? as u8).to_le_bytes().to_vec(),
        DType::Bool => (whole(0.0, 1.0)? as u8).to_le_bytes().to_vec(),
        // Zero has the same bytes in every format; nobody fills with anything else there.
        DType::Fp16 | DType::Bf16 if value == 0.0 => vec![0, 0],
        DType::Fp16 | DType::Bf16 | DType::Bytes => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_waste_less_than_half() {
        assert_eq!([1, 2, 3, 4, 5, 6, 7, 9, 12, 13].map(bucket), [1, 2, 3, 4, 6, 6, 8, 12, 12, 16]);
        for size in 1..5000 {
            assert!(bucket(size) >= size && bucket(size) * 2 < size * 3 + 2, "{size} is in {}", bucket(size));
        }
    }

    #[test]
    fn what_is_padded_lies_where_it_belongs() {
        let mut found = Vec::new();
        runs(&[2, 2], &[2, 3], 4, |from, to, length| found.push((from, to, length)));
        assert_eq!(found, [(0, 0, 8), (8, 12, 8)]);
        found.clear();
        runs(&[1, 1 << 40, 0], &[1, 1 << 41, 0], 4, |from, to, length| found.push((from, to, length)));
        assert_eq!(found, []);
        runs(&[1, 2, 1], &[5, 3, 4], 1, |from, to, length| found.push((from, to, length)));
        assert_eq!(found, [(0, 0, 1), (1, 4, 1)]);
    }

    #[test]
    fn shorter_rows_are_filled_up() {
        let fills = vec![fill(DType::Int32, -1.0).unwrap()];
        let shapes = Shapes { axes: Vec::new(), fills, joins: BTreeMap::new(), grown: Vec::new() };
        let long = RawTensor::from_vec(DType::Int32, vec![1, 3], vec![1_i32, 2, 3]).unwrap();
        let short = RawTensor::from_vec(DType::Int32, vec![2, 1], vec![7_i32, 8]).unwrap();
        let joined = shapes.join(0, &[&long, &short], &mut BytesMut::new()).unwrap();
        assert_eq!(joined.shape(), [3, 3]);
        assert_eq!(*joined.numbers::<i32>(), [1, 2, 3, 7, -1, -1, 8, -1, -1]);
    }

    #[test]
    fn what_padding_added_is_cut_off_texts_too() {
        let grown = vec![vec![Follows { axis: 1, input: 0, followed: 1 }]];
        let shapes = Shapes { axes: Vec::new(), fills: vec![Vec::new()], joins: BTreeMap::new(), grown };
        let input = RawTensor::from_vec(DType::Int32, vec![2, 1], vec![7_i32, 8]).unwrap();
        let work = Work { inputs: vec![input], rows: 2, ..Work::default() };
        let numbers = RawTensor::from_vec(DType::Int32, vec![2, 2], vec![1_i32, 2, 3, 4]).unwrap();
        assert_eq!(*shapes.trim(0, numbers, &work).unwrap().numbers::<i32>(), [1, 3]);
        let texts = RawTensor::from_strings(vec![2, 2, 1], &["a", "-", "long", "-"]).unwrap();
        let kept = RawTensor::from_strings(vec![2, 1, 1], &["a", "long"]).unwrap();
        assert_eq!(shapes.trim(0, texts, &work).unwrap(), kept);
    }

    #[test]
    fn rows_without_elements_join_at_once_or_not_at_all() {
        let fills = vec![fill(DType::Fp32, 0.0).unwrap()];
        let shapes = Shapes {
            axes: Vec::new(),
            fills,
            joins: BTreeMap::new(),
            grown: vec![vec![Follows { axis: 1, input: 0, followed: 1 }]],
        };
        let empty = |size: i64| RawTensor::new(DType::Fp32, vec![1, size, 0], Bytes::new()).unwrap();
        let join = |parts: &[&RawTensor]| shapes.join(0, parts, &mut BytesMut::new());
        let (long, short) = (empty(1 << 40), empty(3));
        let joined = join(&[&long, &short]).unwrap();
        assert_eq!(joined.shape(), [2, 1 << 40, 0]);
        let (huge, other) = (empty((1 << 60) + 1), empty(1 << 60));
        assert!(matches!(join(&[&huge, &other]), Err(RawTensorError::Shape { .. })), "nobody can count that");
        let work = Work { inputs: vec![short.clone()], rows: 1, ..Work::default() };
        assert_eq!(shapes.trim(0, long.clone(), &work).unwrap(), short);
        let own = [long.shape().to_vec(), short.shape().to_vec()];
        assert_eq!(Shapes::scatter(&joined, own.iter()), Some(vec![long, short]));
        let uncounted = vec![1, 1 << 60, 0, 8];
        assert_eq!(Shapes::scatter(&joined, std::iter::once(&uncounted)), None);
    }
}

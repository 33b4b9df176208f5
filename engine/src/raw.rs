//! Tensors as they travel: bytes in the order of the wire, shared instead of copied.

use std::borrow::Cow;

use bytemuck::{AnyBitPattern, NoUninit};
use bytes::{Bytes, BytesMut};
use sensorium_artifact::{DType, TensorSpec};
use sensorium_modality::{Element, Tensor, TensorData};

use crate::signature::{artifact_dtype, dtype_name};

/// A dense tensor whose elements are the bytes that the inference protocol sends: little-endian, row-major, booleans one
/// byte of 0 or 1, each string after its length as a u32. Clones and row ranges share the bytes.
///
/// A value of this type is consistent: its bytes are exactly the elements of its shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawTensor {
    dtype: DType,
    shape: Vec<i64>,
    data: Bytes,
}

/// Why bytes are no tensor, or tensors cannot be put together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RawTensorError {
    /// A dimension below zero, or a product beyond what memory can hold, zeros left out.
    #[error(
        "shape {shape:?} is that of no tensor in memory: a size is negative, or those that are not 0 are too large together"
    )]
    Shape {
        /// The shape.
        shape: Vec<i64>,
    },
    /// More or fewer bytes than the shape has elements.
    #[error("{found} bytes came for shape {shape:?} of {datatype}, which has {expected}")]
    Length {
        /// Bytes given.
        found: usize,
        /// Bytes of the elements.
        expected: usize,
        /// The shape.
        shape: Vec<i64>,
        /// The element type.
        datatype: &'static str,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("element {element} is {value}, a BOOL is 0 or 1")]
    Bool {
        /// Position, row-major.
        element: usize,
        /// The byte.
        value: u8,
    },
    /// A string goes past the end of the bytes.
    #[error(
        "element {element} of {elements} at byte {offset} needs {needed} bytes, {available} are left; a string is its \
         length as a little-endian u32, then its bytes"
    )]
    Truncated {
        /// Position, row-major.
        element: usize,
        /// Elements of the shape.
        elements: usize,
        /// Where the element, or its content, begins.
        offset: usize,
        /// Bytes that it needs there.
        needed: usize,
        /// Bytes that there are.
        available: usize,
    },
    /// Bytes after the last string.
    #[error("{extra} bytes follow after the last of {elements} elements")]
    Trailing {
        /// How many.
        extra: usize,
        /// Elements of the shape.
        elements: usize,
    },
    /// Tensors that share no type or row shape, or have no rows.
    #[error("tensors of {first} and {other} do not join")]
    Unlike {
        /// Type and shape of the first.
        first: String,
        /// Type and shape of the odd one.
        other: String,
    },
}

impl RawTensor {
    /// Takes bytes as a tensor after checking that they are one.
    ///
    /// # Errors
    /// [`RawTensorError`]: the first thing that does not fit.
    pub fn new(dtype: DType, shape: Vec<i64>, data: Bytes) -> Result<Self, RawTensorError> {
        let Some(elements) = Self::element_count(dtype, &shape) else { return Err(RawTensorError::Shape { shape }) };
        match element_size(dtype) {
            None => check_strings(&data, elements)?,
            Some(size) => {
                let expected = elements * size;
                if data.len() != expected {
                    let datatype = dtype_name(dtype);
                    return Err(RawTensorError::Length { found: data.len(), expected, shape, datatype });
                }
                if dtype == DType::Bool
                    && let Some((element, &value)) = data.iter().enumerate().find(|(_, byte)| **byte > 1)
                {
                    return Err(RawTensorError::Bool { element, value });
                }
            }
        }
        Ok(Self { dtype, shape, data })
    }

    /// A tensor of numbers that are in memory already; nothing is copied.
    ///
    /// # Errors
    /// [`RawTensorError`], as [`RawTensor::new`].
    pub fn from_vec<T: NoUninit + Send + Sync>(
        dtype: DType,
        shape: Vec<i64>,
        elements: Vec<T>,
    ) -> Result<Self, RawTensorError> {
        Self::new(dtype, shape, shared(elements))
    }

    /// A tensor of strings.
    ///
    /// # Errors
    /// [`RawTensorError`], as [`RawTensor::new`].
    pub fn from_strings<S: AsRef<[u8]>>(shape: Vec<i64>, strings: &[S]) -> Result<Self, RawTensorError> {
        let mut data = BytesMut::with_capacity(strings.iter().map(|string| string.as_ref().len() + PREFIX).sum());
        for string in strings {
            // A string that a u32 cannot count fits into no message and no model.
            data.extend_from_slice(&(string.as_ref().len() as u32).to_le_bytes());
            data.extend_from_slice(string.as_ref());
        }
        Self::new(DType::Bytes, shape, data.freeze())
    }

    /// Zeros: numbers of value zero, empty strings.
    ///
    /// # Errors
    /// [`RawTensorError::Shape`].
    pub fn zeros(dtype: DType, shape: Vec<i64>) -> Result<Self, RawTensorError> {
        match Self::element_count(dtype, &shape) {
            Some(count) => Self::new(dtype, shape, vec![0; count * least_size(dtype)].into()),
            None => Err(RawTensorError::Shape { shape }),
        }
    }

    /// Zeros of the smallest shape that `spec` takes: sizes that a request chooses are 1, and the first of all, where it is
    /// one of these, is `rows`.
    ///
    /// # Errors
    /// As [`RawTensor::zeros`].
    pub fn smallest(spec: &TensorSpec, rows: i64) -> Result<Self, RawTensorError> {
        let mut shape = smallest_shape(spec);
        if let (Some(first), Some(None)) = (shape.first_mut(), spec.shape.first()) {
            *first = rows;
        }
        Self::zeros(spec.dtype, shape)
    }

    /// Elements of a tensor of this type and shape. `None` where there is no such tensor: a size is negative, or the sizes that are
    /// not 0 come to more bytes than memory can hold. A 0 excuses no others, so that whoever multiplies some sizes of a tensor never
    /// overflows.
    pub fn element_count(dtype: DType, shape: &[i64]) -> Option<usize> {
        let least = least_size(dtype);
        let mut sizes = shape.iter().filter(|size| **size != 0);
        let bytes = sizes.try_fold(least, |bytes, &size| bytes.checked_mul(usize::try_from(size).ok()?));
        let bytes = bytes.filter(|bytes| isize::try_from(*bytes).is_ok())?;
        Some(if shape.contains(&0) { 0 } else { bytes / least })
    }

    /// Bytes of a tensor of numbers of this type and shape. `None` for strings, and where there is no such tensor.
    pub fn byte_count(dtype: DType, shape: &[i64]) -> Option<usize> {
        Some(Self::element_count(dtype, shape)? * element_size(dtype)?)
    }

    /// Rows of all `parts` together. `None` for a scalar, and for more than can be counted: rows without elements cost nothing.
    pub fn rows_of(parts: &[&Self]) -> Option<i64> {
        parts.iter().try_fold(0_i64, |rows, part| rows.checked_add(*part.shape.first()?))
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Size of every axis; none is negative, and no product of some of them and an element's size is beyond `isize::MAX`.
    pub fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// The elements.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Takes the tensor apart.
    pub fn into_parts(self) -> (DType, Vec<i64>, Bytes) {
        (self.dtype, self.shape, self.data)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        Self::element_count(self.dtype, &self.shape).unwrap_or(0)
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Size of the first axis, which is the batch; a scalar has none.
    pub fn row_count(&self) -> Option<usize> {
        self.shape.first().map(|&rows| rows as usize)
    }

    /// The same elements in another shape.
    ///
    /// # Errors
    /// [`RawTensorError::Length`] when the shape has another number of elements; [`RawTensorError::Shape`].
    pub fn reshaped(self, shape: Vec<i64>) -> Result<Self, RawTensorError> {
        match Self::element_count(self.dtype, &shape) {
            None => Err(RawTensorError::Shape { shape }),
            Some(elements) if elements == self.len() => Ok(Self { shape, ..self }),
            Some(elements) => {
                let (found, datatype) = (self.data.len(), dtype_name(self.dtype));
                let expected = elements * element_size(self.dtype).unwrap_or(1);
                Err(RawTensorError::Length { found, expected, shape, datatype })
            }
        }
    }

    /// The numbers as a slice: of the tensor's own memory where that is aligned for them, else of a copy.
    /// The caller picks a type of the size of the elements; with another the slice has fewer or none.
    pub fn numbers<T: AnyBitPattern + NoUninit>(&self) -> Cow<'_, [T]> {
        match bytemuck::try_cast_slice(&self.data) {
            Ok(numbers) => Cow::Borrowed(numbers),
            Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(&self.data)),
        }
    }

    /// The strings of a BYTES tensor, in order; for other types there are none.
    pub fn strings(&self) -> Strings<'_> {
        Strings(if self.dtype == DType::Bytes { &self.data } else { &[] })
    }

    /// Joins tensors along their first axis; all other axes and the types must agree. One tensor alone is not copied.
    ///
    /// # Errors
    /// [`RawTensorError::Unlike`], naming the first two that differ; [`RawTensorError::Shape`] for none at all, and for too many rows.
    pub fn concat(parts: &[&Self]) -> Result<Self, RawTensorError> {
        Self::concat_in(parts, &mut BytesMut::new())
    }

    /// As [`RawTensor::concat`], in memory that is kept: as soon as nobody has the last tensor that was made in `room`, its
    /// memory is used again, so that large batches do not ask the system for new pages each time.
    ///
    /// # Errors
    /// As [`RawTensor::concat`].
    pub fn concat_in(parts: &[&Self], room: &mut BytesMut) -> Result<Self, RawTensorError> {
        let Some((&first, others)) = parts.split_first() else {
            return Err(RawTensorError::Shape { shape: Vec::new() });
        };
        if others.is_empty() {
            return Ok(first.clone());
        }
        for part in others {
            if part.dtype != first.dtype || part.shape.is_empty() || part.shape.get(1..) != first.shape.get(1..) {
                return Err(RawTensorError::Unlike { first: first.to_string(), other: part.to_string() });
            }
        }
        let mut shape = first.shape.clone();
        let Some(rows) = Self::rows_of(parts) else { return Err(RawTensorError::Shape { shape }) };
        shape[0] = rows;
        if Self::element_count(first.dtype, &shape).is_none() {
            return Err(RawTensorError::Shape { shape });
        }
        room.reserve(parts.iter().map(|part| part.data.len()).sum());
        for part in parts {
            room.extend_from_slice(&part.data);
        }
        Ok(Self { dtype: first.dtype, shape, data: room.split().freeze() })
    }

    /// The rows in consecutive groups of `counts`; the opposite of [`RawTensor::concat`]. Nothing is copied.
    /// `None` unless `counts` add up to the rows.
    pub fn split(&self, counts: impl IntoIterator<Item = usize, IntoIter: Clone>) -> Option<Vec<Self>> {
        let (rows, tail) = self.shape.split_first()?;
        let counts = counts.into_iter();
        if counts.clone().try_fold(0, usize::checked_add)? != *rows as usize {
            return None;
        }
        let row_elements = Self::element_count(self.dtype, tail)?;
        let mut strings = self.strings();
        let mut start = 0;
        let part = |count: usize| {
            let length = match element_size(self.dtype) {
                Some(size) => count * row_elements * size,
                None => strings.by_ref().take(count * row_elements).map(|string| string.len() + PREFIX).sum(),
            };
            let data = self.data.slice(start..start + length);
            start += length;
            let shape = std::iter::once(count as i64).chain(tail.iter().copied()).collect();
            Self { dtype: self.dtype, shape, data }
        };
        Some(counts.map(part).collect())
    }

    /// A tensor of its own memory, where it is a small part of something large that it would keep alive.
    #[must_use]
    pub fn detached(&self) -> Self {
        Self { data: Bytes::copy_from_slice(&self.data), shape: self.shape.clone(), dtype: self.dtype }
    }
}

/// Type and shape, such as `FP32[1, 3]`.
impl std::fmt::Display for RawTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{:?}", dtype_name(self.dtype), self.shape)
    }
}

/// Strings of a BYTES tensor.
#[derive(Clone, Debug)]
pub struct Strings<'a>(&'a [u8]);

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (prefix, rest) = self.0.split_first_chunk::<PREFIX>()?;
        let (string, rest) = rest.split_at_checked(u32::from_le_bytes(*prefix) as usize)?;
        self.0 = rest;
        Some(string)
    }
}

/// Bytes of a string's length.
const PREFIX: usize = size_of::<u32>();

/// Bytes of an element; `None` for strings, which have a length each.
pub fn element_size(dtype: DType) -> Option<usize> {
    match dtype {
        DType::Bool | DType::Uint8 | DType::Int8 => Some(1),
        DType::Uint16 | DType::Int16 | DType::Fp16 | DType::Bf16 => Some(2),
        DType::Uint32 | DType::Int32 | DType::Fp32 => Some(4),
        DType::Uint64 | DType::Int64 | DType::Fp64 => Some(8),
        DType::Bytes => None,
    }
}

/// Bytes of an element at least: an empty string is its length alone.
fn least_size(dtype: DType) -> usize {
    element_size(dtype).unwrap_or(PREFIX)
}

/// The smallest shape that `spec` takes: sizes that a request chooses are 1.
pub fn smallest_shape(spec: &TensorSpec) -> Vec<i64> {
    spec.shape.iter().map(|size| size.map_or(1, |size| size as i64)).collect()
}

fn check_strings(data: &[u8], elements: usize) -> Result<(), RawTensorError> {
    let mut rest = data;
    for element in 0..elements {
        let truncated = |needed, rest: &[u8]| RawTensorError::Truncated {
            element,
            elements,
            offset: data.len() - rest.len(),
            needed,
            available: rest.len(),
        };
        let (prefix, after) = rest.split_first_chunk::<PREFIX>().ok_or_else(|| truncated(PREFIX, rest))?;
        let length = u32::from_le_bytes(*prefix) as usize;
        rest = after.split_at_checked(length).ok_or_else(|| truncated(length, after))?.1;
    }
    if rest.is_empty() { Ok(()) } else { Err(RawTensorError::Trailing { extra: rest.len(), elements }) }
}

/// The memory of `elements` as bytes.
pub(crate) fn shared<T: NoUninit + Send + Sync>(elements: Vec<T>) -> Bytes {
    struct Owner<T>(Vec<T>);
    impl<T: NoUninit> AsRef<[u8]> for Owner<T> {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }
    Bytes::from_owner(Owner(elements))
}

/// Shares the memory of numbers; strings are copied once.
impl From<Tensor> for RawTensor {
    fn from(tensor: Tensor) -> Self {
        let dtype = artifact_dtype(tensor.dtype());
        let (shape, data) = tensor.into_parts();
        // A tensor in memory has far fewer than 2^63 of anything, and its shape is that of its elements.
        let shape: Vec<i64> = shape.into_iter().map(|size| size as i64).collect();
        let data = match data {
            TensorData::F32(elements) => shared(elements),
            TensorData::F64(elements) => shared(elements),
            TensorData::I64(elements) => shared(elements),
            TensorData::I32(elements) => shared(elements),
            TensorData::I8(elements) => shared(elements),
            TensorData::U8(elements) => elements.into(),
            TensorData::Bool(elements) => shared(elements),
            TensorData::Bytes(elements) => {
                let mut data = BytesMut::new();
                for element in &elements {
                    data.extend_from_slice(&(element.len() as u32).to_le_bytes());
                    data.extend_from_slice(element);
                }
                data.freeze()
            }
        };
        Self { dtype, shape, data }
    }
}

/// Copies the elements; `None` for a type that typed tensors do not have.
impl TryFrom<RawTensor> for Tensor {
    type Error = DType;

    fn try_from(raw: RawTensor) -> Result<Self, DType> {
        let data = match raw.dtype {
            DType::Fp32 => Element::wrap(raw.numbers::<f32>().into_owned()),
            DType::Fp64 => Element::wrap(raw.numbers::<f64>().into_owned()),
            DType::Int64 => Element::wrap(raw.numbers::<i64>().into_owned()),
            DType::Int32 => Element::wrap(raw.numbers::<i32>().into_owned()),
            DType::Int8 => Element::wrap(raw.numbers::<i8>().into_owned()),
            DType::Uint8 => Element::wrap(raw.data.to_vec()),
            DType::Bool => Element::wrap(raw.data.iter().map(|byte| *byte == 1).collect::<Vec<bool>>()),
            DType::Bytes => Element::wrap(raw.strings().map(<[u8]>::to_vec).collect::<Vec<_>>()),
            other @ (DType::Uint16 | DType::Uint32 | DType::Uint64 | DType::Int16 | DType::Fp16 | DType::Bf16) => {
                return Err(other);
            }
        };
        let shape: Vec<usize> = raw.shape.iter().map(|&size| size as usize).collect();
        Self::new(shape, data).map_err(|_| raw.dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(strings: &[&str]) -> RawTensor {
        RawTensor::from_strings(vec![strings.len() as i64], strings).unwrap()
    }

    #[test]
    fn bytes_that_do_not_fill_the_shape_are_refused() {
        let new = |dtype, shape: &[i64], data: &'static [u8]| RawTensor::new(dtype, shape.to_vec(), data.into());
        assert!(matches!(new(DType::Fp32, &[2], &[0; 7]), Err(RawTensorError::Length { found: 7, expected: 8, .. })));
        assert!(matches!(new(DType::Fp32, &[-1], &[]), Err(RawTensorError::Shape { .. })));
        assert!(matches!(new(DType::Fp32, &[i64::MAX, 4], &[]), Err(RawTensorError::Shape { .. })));
        assert_eq!(new(DType::Bool, &[2], &[1, 2]), Err(RawTensorError::Bool { element: 1, value: 2 }));
        assert!(matches!(new(DType::Bytes, &[1], &[9, 0, 0, 0, 1]), Err(RawTensorError::Truncated { offset: 4, .. })));
        assert!(matches!(new(DType::Bytes, &[i64::MAX / 4], &[1]), Err(RawTensorError::Truncated { element: 0, .. })));
        assert!(matches!(new(DType::Bytes, &[0], &[1]), Err(RawTensorError::Trailing { extra: 1, .. })));
        assert!(new(DType::Fp32, &[], &[0; 4]).is_ok(), "a scalar is one element");
    }

    #[test]
    fn a_size_of_0_excuses_no_sizes_that_overflow() {
        let new = |shape: &[i64]| RawTensor::new(DType::Fp32, shape.to_vec(), Bytes::new());
        for shape in [vec![1, (1 << 62) - 1, 0], vec![0, 1 << 61], vec![1 << 40, 0, 1 << 40], vec![0, -1]] {
            assert_eq!(new(&shape), Err(RawTensorError::Shape { shape }));
        }
        let large = [1, 1 << 60, 0];
        let tensor = new(&large).unwrap();
        assert_eq!((tensor.len(), tensor.is_empty()), (0, true));
        let doubled = vec![0, 1 << 61];
        assert_eq!(tensor.clone().reshaped(doubled.clone()), Err(RawTensorError::Shape { shape: doubled }));
        let joined = RawTensor::concat(&[&tensor, &tensor]);
        assert_eq!(joined, Err(RawTensorError::Shape { shape: vec![2, 1 << 60, 0] }), "together they are too large");
        let rows = RawTensor::zeros(DType::Int8, vec![i64::MAX, 0]).unwrap();
        assert!(matches!(RawTensor::concat(&[&rows, &rows]), Err(RawTensorError::Shape { .. })));
        assert_eq!(rows.split([usize::MAX, usize::MAX]), None);
    }

    #[test]
    fn numbers_at_an_odd_address_read_the_same() {
        let bytes = Bytes::from([0, 0, 0, 128, 63, 0, 0, 0, 64].to_vec());
        let tensor = RawTensor::new(DType::Fp32, vec![2], bytes.slice(1..)).unwrap();
        assert_eq!(*tensor.numbers::<f32>(), [1.0, 2.0]);
    }

    #[test]
    fn splitting_is_the_opposite_of_joining() {
        let (a, b) = (strings(&["a", ""]), strings(&["ccc"]));
        let both = RawTensor::concat(&[&a, &b]).unwrap();
        assert_eq!(both.strings().collect::<Vec<_>>(), [&b"a"[..], b"", b"ccc"]);
        assert_eq!(both.split([2, 1]).unwrap(), [a, b]);
        let numbers = RawTensor::from_vec(DType::Int64, vec![3, 2], vec![1_i64, 2, 3, 4, 5, 6]).unwrap();
        let parts = numbers.split([1, 2]).unwrap();
        assert_eq!((&*parts[1].numbers::<i64>(), parts[1].shape()), (&[3, 4, 5, 6][..], &[2, 2][..]));
        assert_eq!(RawTensor::concat(&[&parts[0], &parts[1]]).unwrap(), numbers);
        assert_eq!(numbers.split([1, 1]), None, "a row would be left");
    }

    #[test]
    fn memory_of_a_join_is_used_again_once_nobody_has_it() {
        let row = RawTensor::from_vec(DType::Int64, vec![1, 2], vec![1_i64, 2]).unwrap();
        let mut room = BytesMut::new();
        let first = RawTensor::concat_in(&[&row, &row], &mut room).unwrap();
        let place = first.data().as_ptr();
        let second = RawTensor::concat_in(&[&row, &row], &mut room).unwrap();
        assert_ne!(second.data().as_ptr(), place, "the first is still there");
        drop((first, second));
        let third = RawTensor::concat_in(&[&row, &row], &mut room).unwrap();
        let place = third.data().as_ptr();
        drop(third);
        let fourth = RawTensor::concat_in(&[&row, &row], &mut room).unwrap();
        assert_eq!((fourth.data().as_ptr(), &*fourth.numbers::<i64>()), (place, &[1, 2, 1, 2][..]));
    }

    #[test]
    fn tensors_of_other_rows_or_types_do_not_join() {
        let row = |dtype, width| RawTensor::zeros(dtype, vec![1, width]).unwrap();
        for other in [row(DType::Fp32, 3), row(DType::Int32, 2), RawTensor::zeros(DType::Fp32, vec![]).unwrap()] {
            let joined = RawTensor::concat(&[&row(DType::Fp32, 2), &other]);
            assert!(matches!(joined, Err(RawTensorError::Unlike { .. })), "{other}");
        }
    }
}

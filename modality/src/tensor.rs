use std::borrow::Borrow;
use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Element type of a [`Tensor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DType {
    /// 32-bit IEEE float.
    F32,
    /// 64-bit IEEE float.
    F64,
    /// 64-bit signed integer.
    I64,
    /// 32-bit signed integer.
    I32,
    /// 8-bit signed integer.
    I8,
    /// 8-bit unsigned integer.
    U8,
    /// Boolean.
    Bool,
    /// A string of bytes per element: text, an encoded image.
    Bytes,
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::I64 => "i64",
            Self::I32 => "i32",
            Self::I8 => "i8",
            Self::U8 => "u8",
            Self::Bool => "bool",
            Self::Bytes => "bytes",
        })
    }
}

/// The elements of a [`Tensor`], last axis fastest.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each variant is named like its `DType`")]
pub enum TensorData {
    F32(Vec<f32>),
    F64(Vec<f64>),
    I64(Vec<i64>),
    I32(Vec<i32>),
    I8(Vec<i8>),
    U8(Vec<u8>),
    Bool(Vec<bool>),
    Bytes(Vec<Vec<u8>>),
}

/// Runs one expression for whichever element type a `TensorData` holds.
macro_rules! for_each_dtype {
    ($data:expr, $elements:ident => $body:expr) => {
        match $data {
            TensorData::F32($elements) => $body,
            TensorData::F64($elements) => $body,
            TensorData::I64($elements) => $body,
            TensorData::I32($elements) => $body,
            TensorData::I8($elements) => $body,
            TensorData::U8($elements) => $body,
            TensorData::Bool($elements) => $body,
            TensorData::Bytes($elements) => $body,
        }
    };
}

impl TensorData {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F64(_) => DType::F64,
            Self::I64(_) => DType::I64,
            Self::I32(_) => DType::I32,
            Self::I8(_) => DType::I8,
            Self::U8(_) => DType::U8,
            Self::Bool(_) => DType::Bool,
            Self::Bytes(_) => DType::Bytes,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        for_each_dtype!(self, elements => elements.len())
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A Rust type that tensors can hold.
pub trait Element: Clone + Sized + sealed::Sealed {
    /// The type's tag.
    const DTYPE: DType;
    /// Wraps elements.
    fn wrap(elements: Vec<Self>) -> TensorData;
    /// The elements, if they are of this type.
    fn unwrap(data: &TensorData) -> Option<&[Self]>;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($variant:ident: $type:ty),*) => {$(
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: DType = DType::$variant;
            fn wrap(elements: Vec<Self>) -> TensorData {
                TensorData::$variant(elements)
            }
            fn unwrap(data: &TensorData) -> Option<&[Self]> {
                match data {
                    TensorData::$variant(elements) => Some(elements),
                    _ => None,
                }
            }
        }
    )*};
}
elements!(F32: f32, F64: f64, I64: i64, I32: i32, I8: i8, U8: u8, Bool: bool, Bytes: Vec<u8>);

/// A dense array in host memory. The product of its shape is always the number of its elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: TensorData,
}

/// Why tensors could not be made or put together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// A shape that its data does not fill.
    #[error("shape {shape:?} does not hold {elements} elements")]
    ShapeMismatch {
        /// The shape given.
        shape: Vec<usize>,
        /// The elements given.
        elements: usize,
    },
    /// Nothing to stack: the result would have no shape or type.
    #[error("there are no tensors to put together")]
    Nothing,
    /// Tensors that must be alike and are not.
    #[error("item {index} is {got_dtype}{got_shape:?}, the first is {first_dtype}{first_shape:?}")]
    Unlike {
        /// Position of the odd one.
        index: usize,
        /// Its element type.
        got_dtype: DType,
        /// Its shape.
        got_shape: Vec<usize>,
        /// Element type of the first.
        first_dtype: DType,
        /// Shape of the first.
        first_shape: Vec<usize>,
    },
    /// Elements are of another type.
    #[error("the tensor holds {got}, not {wanted}")]
    WrongDType {
        /// What was asked for.
        wanted: DType,
        /// What it holds.
        got: DType,
    },
    /// A row that is not there, or a scalar asked for rows.
    #[error("row {row} is out of range for shape {shape:?}")]
    NoSuchRow {
        /// The row, or the end of the range, asked for.
        row: usize,
        /// The shape of the tensor.
        shape: Vec<usize>,
    },
}

impl Tensor {
    /// A tensor of `shape` from elements in row-major order.
    ///
    /// # Errors
    /// [`TensorError::ShapeMismatch`] when the shape's product is not the number of elements.
    pub fn new(shape: impl Into<Vec<usize>>, data: TensorData) -> Result<Self, TensorError> {
        let shape = shape.into();
        let product = shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim));
        if product == Some(data.len()) {
            Ok(Self { shape, data })
        } else {
            Err(TensorError::ShapeMismatch { shape, elements: data.len() })
        }
    }

    /// As [`Tensor::new`], from a plain vector.
    pub fn from_vec<E: Element>(shape: impl Into<Vec<usize>>, elements: Vec<E>) -> Result<Self, TensorError> {
        Self::new(shape, E::wrap(elements))
    }

    /// A vector of strings or encoded media, shape `[N]`.
    pub fn from_bytes<B: Into<Vec<u8>>>(items: impl IntoIterator<Item = B>) -> Self {
        let items: Vec<Vec<u8>> = items.into_iter().map(Into::into).collect();
        Self { shape: vec![items.len()], data: TensorData::Bytes(items) }
    }

    /// Extent of every axis; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// The elements.
    pub fn data(&self) -> &TensorData {
        &self.data
    }

    /// Takes the tensor apart.
    pub fn into_parts(self) -> (Vec<usize>, TensorData) {
        (self.shape, self.data)
    }

    /// The elements as a slice, row-major.
    ///
    /// # Errors
    /// [`TensorError::WrongDType`] when they are of another type.
    pub fn as_slice<E: Element>(&self) -> Result<&[E], TensorError> {
        E::unwrap(&self.data).ok_or(TensorError::WrongDType { wanted: E::DTYPE, got: self.dtype() })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Extent of the first axis, which is the batch; a scalar has no rows.
    pub fn row_count(&self) -> Option<usize> {
        self.shape.first().copied()
    }

    /// Puts tensors of equal shape `[..]` on a new first axis: `[N, ..]`.
    ///
    /// # Errors
    /// [`TensorError::Nothing`] for an empty slice, [`TensorError::Unlike`] naming the first that differs.
    pub fn stack<T: Borrow<Tensor>>(items: &[T]) -> Result<Self, TensorError> {
        let (shape, data) = join(items, |shape| shape)?;
        let shape = std::iter::once(items.len()).chain(shape.iter().copied()).collect();
        Ok(Self { shape, data })
    }

    /// Joins tensors along their first axis; all other axes must agree.
    ///
    /// # Errors
    /// [`TensorError::Nothing`] for an empty slice, [`TensorError::Unlike`] naming the first that differs, and
    /// [`TensorError::NoSuchRow`] for scalars, which have no rows to join.
    pub fn concat<T: Borrow<Tensor>>(parts: &[T]) -> Result<Self, TensorError> {
        let (mut shape, data) = join(parts, |shape| shape.get(1..).unwrap_or_default())?;
        let rows = parts.iter().map(|part| part.borrow().rows_or_error(0)).sum::<Result<usize, _>>()?;
        shape.insert(0, rows);
        Ok(Self { shape, data })
    }

    /// Some consecutive rows, as a copy: `[range.len(), ..]`.
    ///
    /// # Errors
    /// [`TensorError::NoSuchRow`] when the range passes the end or runs backwards, or the tensor is a scalar.
    pub fn rows(&self, range: Range<usize>) -> Result<Self, TensorError> {
        if range.end > self.rows_or_error(range.end)? || range.start > range.end {
            return Err(self.no_such_row(range.end));
        }
        let width = self.row_width();
        let span = range.start * width..range.end * width;
        let mut shape = self.shape.clone();
        shape[0] = range.len();
        let data = for_each_dtype!(&self.data, elements => Element::wrap(elements[span].to_vec()));
        Ok(Self { shape, data })
    }

    /// The rows named, in that order; a row may come more than once.
    ///
    /// # Errors
    /// [`TensorError::NoSuchRow`] naming the first index past the end.
    pub fn select(&self, rows: &[usize]) -> Result<Self, TensorError> {
        let count = self.rows_or_error(0)?;
        if let Some(&row) = rows.iter().find(|&&row| row >= count) {
            return Err(self.no_such_row(row));
        }
        let width = self.row_width();
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        let data = for_each_dtype!(&self.data, elements => gather(elements, rows, width));
        Ok(Self { shape, data })
    }

    /// One row without its batch axis: `[..]`.
    ///
    /// # Errors
    /// [`TensorError::NoSuchRow`] when there are fewer rows.
    pub fn row(&self, index: usize) -> Result<Self, TensorError> {
        let mut row = self.select(&[index])?;
        row.shape.remove(0);
        Ok(row)
    }

    fn row_width(&self) -> usize {
        self.shape[1..].iter().product()
    }

    fn rows_or_error(&self, row: usize) -> Result<usize, TensorError> {
        self.row_count().ok_or_else(|| self.no_such_row(row))
    }

    fn no_such_row(&self, row: usize) -> TensorError {
        TensorError::NoSuchRow { row, shape: self.shape.clone() }
    }
}

/// Elements of all `parts` one after the other, once `common` of every shape is the same, and that common shape.
fn join<T: Borrow<Tensor>>(
    parts: &[T],
    common: impl Fn(&[usize]) -> &[usize],
) -> Result<(Vec<usize>, TensorData), TensorError> {
    let first = parts.first().ok_or(TensorError::Nothing)?.borrow();
    for (index, part) in parts.iter().enumerate() {
        let part = part.borrow();
        let alike = part.dtype() == first.dtype()
            && part.shape.len() == first.shape.len()
            && common(&part.shape) == common(&first.shape);
        if !alike {
            return Err(TensorError::Unlike {
                index,
                got_dtype: part.dtype(),
                got_shape: part.shape.clone(),
                first_dtype: first.dtype(),
                first_shape: first.shape.clone(),
            });
        }
    }
    let data = for_each_dtype!(&first.data, elements => flat(parts, elements));
    Ok((common(&first.shape).to_vec(), data))
}

/// The elements of all `parts`, which are known to be of one type: that of `_of_type`.
fn flat<E: Element, T: Borrow<Tensor>>(parts: &[T], _of_type: &[E]) -> TensorData {
    E::wrap(parts.iter().filter_map(|part| E::unwrap(&part.borrow().data)).flatten().cloned().collect())
}

/// Those rows of `width` elements each.
fn gather<E: Element>(elements: &[E], rows: &[usize], width: usize) -> TensorData {
    E::wrap(rows.iter().flat_map(|row| &elements[row * width..(row + 1) * width]).cloned().collect())
}

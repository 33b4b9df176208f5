use crate::proto::TensorProto;
use crate::{DType, OnnxError};

/// Elements that a shape needs; `None` when a size is negative or the product does not fit.
pub(crate) fn element_count(dims: &[i64]) -> Option<usize> {
    dims.iter().try_fold(1_usize, |count, &dim| count.checked_mul(usize::try_from(dim).ok()?))
}

/// Rust types that a tensor's elements can be read as and written from.
trait Element: Copy {
    const DTYPE: DType;
    fn append(self, bytes: &mut Vec<u8>);
    fn read(bytes: &[u8]) -> Self;
}

macro_rules! element {
    ($type:ty, $dtype:expr) => {
        impl Element for $type {
            const DTYPE: DType = $dtype;
            fn append(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }
            fn read(bytes: &[u8]) -> Self {
                let mut word = [0; size_of::<Self>()];
                word.copy_from_slice(bytes);
                Self::from_le_bytes(word)
            }
        }
    };
}
element!(f32, DType::F32);
element!(i64, DType::I64);
element!(i32, DType::I32);
element!(i8, DType::I8);
element!(u8, DType::U8);

fn tensor<T: Element>(name: &str, dims: &[i64], values: &[T]) -> TensorProto {
    let mut raw_data = Vec::with_capacity(size_of_val(values));
    for value in values {
        value.append(&mut raw_data);
    }
    TensorProto {
        name: name.to_owned(),
        dims: dims.to_vec(),
        data_type: T::DTYPE.code(),
        raw_data,
        ..TensorProto::default()
    }
}

impl TensorProto {
    /// An f32 tensor. Whether `values` fill `dims` is checked with the graph.
    pub fn from_f32(name: &str, dims: &[i64], values: &[f32]) -> Self {
        tensor(name, dims, values)
    }

    /// An i64 tensor. Whether `values` fill `dims` is checked with the graph.
    pub fn from_i64(name: &str, dims: &[i64], values: &[i64]) -> Self {
        tensor(name, dims, values)
    }

    /// An i32 tensor. Whether `values` fill `dims` is checked with the graph.
    pub fn from_i32(name: &str, dims: &[i64], values: &[i32]) -> Self {
        tensor(name, dims, values)
    }

    /// An i8 tensor. Whether `values` fill `dims` is checked with the graph.
    pub fn from_i8(name: &str, dims: &[i64], values: &[i8]) -> Self {
        tensor(name, dims, values)
    }

    /// A u8 tensor. Whether `values` fill `dims` is checked with the graph.
    pub fn from_u8(name: &str, dims: &[i64], values: &[u8]) -> Self {
        tensor(name, dims, values)
    }

    /// A bool tensor. Whether `values` fill `dims` is checked with the graph.
    pub fn from_bool(name: &str, dims: &[i64], values: &[bool]) -> Self {
        let bytes: Vec<u8> = values.iter().map(|&value| u8::from(value)).collect();
        Self { data_type: DType::Bool.code(), ..tensor(name, dims, &bytes) }
    }

    /// Element type, if it is one that Sensorium reads.
    pub fn dtype(&self) -> Option<DType> {
        DType::from_code(self.data_type)
    }

    /// Shape as sizes; negative sizes, which the check refuses, read as 0.
    pub fn shape(&self) -> Vec<usize> {
        self.dims.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect()
    }

    /// Elements of an f32 tensor, row-major.
    /// # Errors
    /// `WrongType`, or `WrongLength` when the data do not fill the shape.
    pub fn f32s(&self) -> Result<Vec<f32>, OnnxError> {
        self.elements(&self.float_data)
    }

    /// Elements of an i64 tensor, row-major.
    /// # Errors
    /// As [`Self::f32s`].
    pub fn i64s(&self) -> Result<Vec<i64>, OnnxError> {
        self.elements(&self.int64_data)
    }

    /// Elements of an i32 tensor, row-major.
    /// # Errors
    /// As [`Self::f32s`].
    pub fn i32s(&self) -> Result<Vec<i32>, OnnxError> {
        self.elements(&self.int32_data)
    }

    /// Elements of an i8 tensor, row-major.
    /// # Errors
    /// As [`Self::f32s`].
    pub fn i8s(&self) -> Result<Vec<i8>, OnnxError> {
        // The format keeps narrow integers one per i32.
        let typed: Vec<i8> = self.int32_data.iter().map(|&value| value as i8).collect();
        self.elements(&typed)
    }

    /// Elements of a u8 tensor, row-major.
    /// # Errors
    /// As [`Self::f32s`].
    pub fn u8s(&self) -> Result<Vec<u8>, OnnxError> {
        let typed: Vec<u8> = self.int32_data.iter().map(|&value| value as u8).collect();
        self.elements(&typed)
    }

    fn elements<T: Element>(&self, typed: &[T]) -> Result<Vec<T>, OnnxError> {
        if self.data_type != T::DTYPE.code() {
            let found = self.dtype().map_or_else(|| format!("data type {}", self.data_type), |found| found.to_string());
            return Err(OnnxError::WrongType { name: self.name.clone(), found, asked: T::DTYPE });
        }
        let values = if self.raw_data.is_empty() {
            typed.to_vec()
        } else {
            self.raw_data.chunks_exact(size_of::<T>()).map(T::read).collect()
        };
        let whole = self.raw_data.len().is_multiple_of(size_of::<T>());
        let expected = element_count(&self.dims).unwrap_or(usize::MAX);
        if values.len() != expected || !whole {
            let (name, dims) = (self.name.clone(), self.dims.clone());
            return Err(OnnxError::WrongLength { name, dims, expected, found: values.len() });
        }
        Ok(values)
    }
}

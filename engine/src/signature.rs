use std::collections::{BTreeMap, HashSet};
use std::fmt;

use sensorium_artifact::{DType as ArtifactDType, TensorSpec};
use sensorium_modality::{DType, Tensor};

use crate::EngineError;

/// What a graph takes and gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    inputs: Vec<Input>,
    outputs: Vec<TensorSpec>,
    input_specs: Vec<TensorSpec>,
}

/// An input with the names of its sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Input {
    name: String,
    dtype: DType,
    shape: Shape,
}

/// A shape as a graph declares it, printed such as `[batch, 3, ?]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape(Vec<Dim>);

/// One axis of a declared shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Dim {
    /// Always this size.
    Fixed(u64),
    /// The request decides; the same wherever this name stands.
    Symbol(String),
    /// The request decides.
    Any,
}

impl Shape {
    pub(crate) fn new(dims: Vec<Dim>) -> Self {
        Self(dims)
    }

    fn sizes(&self) -> Vec<Option<u64>> {
        self.0
            .iter()
            .map(|dim| match dim {
                Dim::Fixed(size) => Some(*size),
                Dim::Symbol(_) | Dim::Any => None,
            })
            .collect()
    }

    /// A size the request decides may be anything but zero: no kernel has work to do for nothing.
    fn accepts(&self, shape: &[usize]) -> bool {
        self.0.len() == shape.len()
            && self.0.iter().zip(shape).all(|(dim, &size)| match dim {
                Dim::Fixed(fixed) => *fixed == size as u64,
                Dim::Symbol(_) | Dim::Any => size > 0,
            })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (axis, dim) in self.0.iter().enumerate() {
            f.write_str(if axis == 0 { "" } else { ", " })?;
            match dim {
                Dim::Fixed(size) => write!(f, "{size}")?,
                Dim::Symbol(symbol) => f.write_str(symbol)?,
                Dim::Any => f.write_str("?")?,
            }
        }
        f.write_str("]")
    }
}

impl Signature {
    pub(crate) fn new(inputs: Vec<(String, DType, Shape)>, outputs: &[(String, DType, Shape)]) -> Self {
        let spec = |(name, dtype, shape): &(String, DType, Shape)| TensorSpec {
            name: name.clone(),
            dtype: artifact_dtype(*dtype),
            shape: shape.sizes(),
        };
        Self {
            input_specs: inputs.iter().map(spec).collect(),
            outputs: outputs.iter().map(spec).collect(),
            inputs: inputs.into_iter().map(|(name, dtype, shape)| Input { name, dtype, shape }).collect(),
        }
    }

    /// What the graph takes, in order.
    pub fn inputs(&self) -> &[TensorSpec] {
        &self.input_specs
    }

    /// What it gives, in order.
    pub fn outputs(&self) -> &[TensorSpec] {
        &self.outputs
    }

    /// Whether `inputs` are what the graph takes: each of its inputs once, with its type and shape, and the same size
    /// wherever two of them share one by name.
    ///
    /// # Errors
    /// The first that is wrong, with what it is and what it must be.
    pub fn validate(&self, inputs: &[(String, Tensor)]) -> Result<(), EngineError> {
        let mut seen = HashSet::new();
        for (name, _) in inputs {
            if !seen.insert(name.as_str()) || !self.inputs.iter().any(|input| input.name == *name) {
                let known = self.inputs.iter().map(|input| input.name.clone()).collect();
                return Err(EngineError::UnknownInput { input: name.clone(), known });
            }
        }
        let mut sizes = BTreeMap::new();
        for wanted in &self.inputs {
            let Some((_, got)) = inputs.iter().find(|(name, _)| *name == wanted.name) else {
                return Err(EngineError::MissingInput {
                    input: wanted.name.clone(),
                    wanted: wanted.dtype,
                    wanted_shape: wanted.shape.clone(),
                });
            };
            if got.dtype() != wanted.dtype || !wanted.shape.accepts(got.shape()) {
                return Err(EngineError::WrongInput {
                    input: wanted.name.clone(),
                    got: got.dtype(),
                    got_shape: got.shape().to_vec(),
                    wanted: wanted.dtype,
                    wanted_shape: wanted.shape.clone(),
                });
            }
            wanted.agree(got.shape(), &mut sizes)?;
        }
        Ok(())
    }

    /// The first difference to what a manifest says about the graph, if there is one. A size that one of them leaves
    /// open is no difference.
    pub(crate) fn difference(&self, inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Option<String> {
        compare("input", &self.input_specs, inputs).or_else(|| compare("output", &self.outputs, outputs))
    }
}

impl Input {
    /// Notes the sizes that `got` gives to names, and compares them with those noted before.
    fn agree<'a>(&'a self, got: &[usize], sizes: &mut BTreeMap<&'a str, (&'a str, usize)>) -> Result<(), EngineError> {
        for (dim, &size) in self.shape.0.iter().zip(got) {
            let Dim::Symbol(symbol) = dim else { continue };
            let &mut (first, first_size) = sizes.entry(symbol).or_insert((&self.name, size));
            if first_size != size {
                return Err(EngineError::SizesDisagree {
                    symbol: symbol.clone(),
                    first: first.to_owned(),
                    first_size,
                    second: self.name.clone(),
                    second_size: size,
                });
            }
        }
        Ok(())
    }
}

fn compare(kind: &str, found: &[TensorSpec], wanted: &[TensorSpec]) -> Option<String> {
    let names = |specs: &[TensorSpec]| specs.iter().map(|spec| spec.name.clone()).collect::<Vec<_>>().join(", ");
    if !found.iter().map(|spec| &spec.name).eq(wanted.iter().map(|spec| &spec.name)) {
        return Some(format!("its {kind}s are {}, the manifest has {}", names(found), names(wanted)));
    }
    found.iter().zip(wanted).find_map(|(found, wanted)| {
        let alike = found.dtype == wanted.dtype
            && found.shape.len() == wanted.shape.len()
            && found
                .shape
                .iter()
                .zip(&wanted.shape)
                .all(|(found, wanted)| found.is_none() || wanted.is_none() || found == wanted);
        (!alike).then(|| {
            format!(
                "{kind} `{}` is {:?}{:?}, the manifest has {:?}{:?}",
                found.name, found.dtype, found.shape, wanted.dtype, wanted.shape
            )
        })
    })
}

/// How a manifest spells a tensor's element type.
pub fn artifact_dtype(dtype: DType) -> ArtifactDType {
    match dtype {
        DType::F32 => ArtifactDType::Fp32,
        DType::F64 => ArtifactDType::Fp64,
        DType::I64 => ArtifactDType::Int64,
        DType::I32 => ArtifactDType::Int32,
        DType::I8 => ArtifactDType::Int8,
        DType::U8 => ArtifactDType::Uint8,
        DType::Bool => ArtifactDType::Bool,
        DType::Bytes => ArtifactDType::Bytes,
    }
}

/// The element type of host tensors that a manifest's stands for; `None` for those that hosts do not hold.
pub fn host_dtype(dtype: ArtifactDType) -> Option<DType> {
    match dtype {
        ArtifactDType::Fp32 => Some(DType::F32),
        ArtifactDType::Fp64 => Some(DType::F64),
        ArtifactDType::Int64 => Some(DType::I64),
        ArtifactDType::Int32 => Some(DType::I32),
        ArtifactDType::Int8 => Some(DType::I8),
        ArtifactDType::Uint8 => Some(DType::U8),
        ArtifactDType::Bool => Some(DType::Bool),
        ArtifactDType::Bytes => Some(DType::Bytes),
        ArtifactDType::Uint16
        | ArtifactDType::Uint32
        | ArtifactDType::Uint64
        | ArtifactDType::Int16
        | ArtifactDType::Fp16
        | ArtifactDType::Bf16 => None,
    }
}

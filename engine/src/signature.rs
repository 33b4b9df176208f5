use std::collections::BTreeMap;
use std::fmt;

use sensorium_artifact::{DType, TensorSpec};
use sensorium_modality::{DType as HostDType, Tensor};

use crate::raw::RawTensor;
use crate::{EngineError, Named};

/// What a graph takes and gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    input_specs: Vec<TensorSpec>,
    output_specs: Vec<TensorSpec>,
}

/// An input or output with the names of its sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Port {
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
    /// The request decides; most likely the same wherever this name stands.
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

    /// A size the request decides may be anything.
    fn accepts(&self, shape: &[i64]) -> bool {
        self.0.len() == shape.len()
            && self.0.iter().zip(shape).all(|(dim, &size)| match dim {
                Dim::Fixed(fixed) => u64::try_from(size) == Ok(*fixed),
                Dim::Symbol(_) | Dim::Any => size >= 0,
            })
    }
}

impl Shape {
    /// The name of an axis whose size a request decides, where it has one.
    fn symbol(&self, axis: usize) -> Option<&str> {
        match self.0.get(axis)? {
            Dim::Symbol(symbol) => Some(symbol),
            Dim::Fixed(_) | Dim::Any => None,
        }
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
    /// From names, types and shapes, in the graph's order.
    pub(crate) fn new(inputs: Vec<(String, DType, Shape)>, outputs: Vec<(String, DType, Shape)>) -> Self {
        let ports = |ports: Vec<(String, DType, Shape)>| -> Vec<Port> {
            ports.into_iter().map(|(name, dtype, shape)| Port { name, dtype, shape }).collect()
        };
        let (inputs, outputs) = (ports(inputs), ports(outputs));
        Self {
            input_specs: inputs.iter().map(Port::spec).collect(),
            output_specs: outputs.iter().map(Port::spec).collect(),
            inputs,
            outputs,
        }
    }

    /// From a manifest, which does not name the sizes that requests decide.
    pub fn of_manifest(inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Self {
        let dim = |size: &Option<u64>| size.map_or(Dim::Any, Dim::Fixed);
        let port = |spec: &TensorSpec| (spec.name.clone(), spec.dtype, Shape(spec.shape.iter().map(dim).collect()));
        Self::new(inputs.iter().map(port).collect(), outputs.iter().map(port).collect())
    }

    /// As it is, with one more input behind the others.
    #[must_use]
    pub fn with_input(&self, spec: TensorSpec) -> Self {
        let mut with = self.clone();
        let dims = spec.shape.iter().map(|size| size.map_or(Dim::Any, Dim::Fixed)).collect();
        with.inputs.push(Port { name: spec.name.clone(), dtype: spec.dtype, shape: Shape(dims) });
        with.input_specs.push(spec);
        with
    }

    /// What the graph takes, in order.
    pub fn inputs(&self) -> &[TensorSpec] {
        &self.input_specs
    }

    /// What it gives, in order.
    pub fn outputs(&self) -> &[TensorSpec] {
        &self.output_specs
    }

    /// The name that the graph gives to a size of input `input` that a request decides, if it has one. Equal names mean
    /// equal sizes.
    pub fn input_symbol(&self, input: usize, axis: usize) -> Option<&str> {
        self.inputs.get(input)?.shape.symbol(axis)
    }

    /// As [`Signature::input_symbol`], of an output.
    pub fn output_symbol(&self, output: usize, axis: usize) -> Option<&str> {
        self.outputs.get(output)?.shape.symbol(axis)
    }

    /// Whether `inputs`, in the graph's order, are what it takes: types and shapes. That names of sizes stand for the same size
    /// everywhere is not asked: they are hints, which exporters also write for sizes that have nothing to do with each other.
    ///
    /// # Errors
    /// [`EngineError::MissingInput`], [`EngineError::WrongInput`].
    pub fn validate(&self, inputs: &[RawTensor]) -> Result<(), EngineError> {
        for (index, wanted) in self.inputs.iter().enumerate() {
            let got = inputs.get(index).ok_or_else(|| wanted.missing())?;
            if got.dtype() != wanted.dtype || !wanted.shape.accepts(got.shape()) {
                return Err(EngineError::WrongInput {
                    input: wanted.name.clone(),
                    got: got.dtype(),
                    got_shape: got.shape().to_vec(),
                    wanted: wanted.dtype,
                    wanted_shape: wanted.shape.clone(),
                });
            }
        }
        Ok(())
    }

    /// What a run on `inputs` that failed with `error` should be told: where two of them disagree about a size that they share by
    /// name, most likely that.
    #[must_use]
    pub fn explain(&self, inputs: &[RawTensor], error: EngineError) -> EngineError {
        let EngineError::Run { .. } = error else { return error };
        let mut sizes = Vec::new();
        let ports = self.inputs.iter().zip(inputs);
        ports.map(|(port, got)| port.agree(got.shape(), &mut sizes)).find_map(Result::err).unwrap_or(error)
    }

    /// Named tensors in the order of the graph's inputs, each of which must come once.
    ///
    /// # Errors
    /// [`EngineError::UnknownInput`], [`EngineError::MissingInput`].
    pub fn place(&self, inputs: Named) -> Result<Vec<RawTensor>, EngineError> {
        let mut named: BTreeMap<String, Tensor> = BTreeMap::new();
        for (name, tensor) in inputs {
            if named.contains_key(&name) || !self.inputs.iter().any(|input| input.name == name) {
                let known = self.inputs.iter().map(|input| input.name.clone()).collect();
                return Err(EngineError::UnknownInput { input: name, known });
            }
            named.insert(name, tensor);
        }
        let take = |input: &Port| named.remove(&input.name).map(RawTensor::from).ok_or_else(|| input.missing());
        self.inputs.iter().map(take).collect()
    }

    /// The first difference to what a manifest says about the graph, if there is one. A size that one of them leaves
    /// open is no difference.
    pub(crate) fn difference(&self, inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Option<String> {
        compare("input", &self.input_specs, inputs).or_else(|| compare("output", &self.output_specs, outputs))
    }
}

impl Port {
    fn spec(&self) -> TensorSpec {
        TensorSpec { name: self.name.clone(), dtype: self.dtype, shape: self.shape.sizes() }
    }

    fn missing(&self) -> EngineError {
        EngineError::MissingInput { input: self.name.clone(), wanted: self.dtype, wanted_shape: self.shape.clone() }
    }

    /// Notes the sizes that `got` gives to names, and compares them with those noted before.
    fn agree<'a>(&'a self, got: &[i64], sizes: &mut Vec<(&'a str, &'a str, i64)>) -> Result<(), EngineError> {
        for (dim, &size) in self.shape.0.iter().zip(got) {
            let Dim::Symbol(symbol) = dim else { continue };
            // A graph has a handful of names: looking through them is faster than hashing them.
            match sizes.iter().find(|(known, ..)| known == symbol) {
                None => sizes.push((symbol, &self.name, size)),
                Some((_, _, first_size)) if *first_size == size => {}
                Some((_, first, first_size)) => {
                    return Err(EngineError::SizesDisagree {
                        symbol: symbol.clone(),
                        first: (*first).to_owned(),
                        first_size: *first_size,
                        second: self.name.clone(),
                        second_size: size,
                    });
                }
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

/// How a manifest spells the element type of a typed tensor.
pub fn artifact_dtype(dtype: HostDType) -> DType {
    match dtype {
        HostDType::F32 => DType::Fp32,
        HostDType::F64 => DType::Fp64,
        HostDType::I64 => DType::Int64,
        HostDType::I32 => DType::Int32,
        HostDType::I8 => DType::Int8,
        HostDType::U8 => DType::Uint8,
        HostDType::Bool => DType::Bool,
        HostDType::Bytes => DType::Bytes,
    }
}

/// The inference protocol's name of an element type, such as `FP32`.
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "BOOL",
        DType::Uint8 => "UINT8",
        DType::Uint16 => "UINT16",
        DType::Uint32 => "UINT32",
        DType::Uint64 => "UINT64",
        DType::Int8 => "INT8",
        DType::Int16 => "INT16",
        DType::Int32 => "INT32",
        DType::Int64 => "INT64",
        DType::Fp16 => "FP16",
        DType::Bf16 => "BF16",
        DType::Fp32 => "FP32",
        DType::Fp64 => "FP64",
        DType::Bytes => "BYTES",
    }
}

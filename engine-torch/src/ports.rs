//! Which input and output of a configuration is which of `forward`. Pure.

use sensorium_engine::{DType, Declared, DeclaredTensor, Signature, TensorSpec, dtype_name};

use crate::ffi::{Argument, ArgumentKind, Returned};

/// Outputs of a result that may have any number of them, at most.
pub(crate) const MOST_OUTPUTS: usize = 256;

/// How tensors of a signature become arguments, and results tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ports {
    pub(crate) signature: Signature,
    /// For each argument of `forward`, the input of the signature that it takes; `None` for what is left out.
    pub(crate) arguments: Vec<Option<usize>>,
    /// For each output of the signature, where it is in the result.
    pub(crate) outputs: Vec<Place>,
}

/// Where a tensor is in the result of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Index(usize),
    Key(String),
}

impl Ports {
    /// Holds what is declared against what the file has, and completes it as far as the file says it.
    ///
    /// # Errors
    /// What is missing or contradicts the file, as a sentence about it.
    pub(crate) fn new(declared: &Declared, arguments: &[Argument], returned: &Returned) -> Result<Self, String> {
        let declared_inputs = if declared.inputs.is_empty() { inputs_of(arguments) } else { declared.inputs.clone() };
        // As in Triton: names none of which means anything to the file stand in its order.
        let known: Vec<_> = arguments.iter().map(|argument| argument.name.as_str()).collect();
        let by_order = declared_inputs.len() <= arguments.len() && stand_in_order(&declared_inputs, &known);
        let mut taken = vec![None; arguments.len()];
        let mut inputs = Vec::with_capacity(declared_inputs.len());
        for (position, input) in declared_inputs.iter().enumerate() {
            let index = if by_order { position } else { argument_index(&input.name, arguments)? };
            if let Some(other) = taken[index].replace(position) {
                let (other, argument) = (&declared_inputs[other].name, &arguments[index].name);
                return Err(format!("its inputs `{other}` and `{}` are both argument `{argument}`", input.name));
            }
            inputs.push(input_spec(input, &arguments[index])?);
        }
        if let Some((argument, _)) =
            arguments.iter().zip(&taken).find(|(argument, taken)| taken.is_none() && !argument.may_lack)
        {
            return Err(format!(
                "its `forward` takes `{}`, a {}, which its configuration leaves out",
                argument.name, argument.declared
            ));
        }
        if let Returned::Other(kind) = returned {
            return Err(no_tensors(kind));
        }
        let declared_outputs =
            if declared.outputs.is_empty() { outputs_of(returned) } else { declared.outputs.clone() };
        if declared_outputs.is_empty() {
            if let Returned::Fixed(_) = returned {
                return Err("its `forward` returns an empty tuple".to_owned());
            }
            return Err(format!(
                "its `forward` returns {}, and its file does not say which outputs that are; write them in config.pbtxt, such \
                 as output {{ name: {:?} data_type: TYPE_FP32 dims: [ -1 ] }}",
                if matches!(returned, Returned::Dict) { "a dict" } else { "a list" },
                if matches!(returned, Returned::Dict) { "KEY" } else { "OUTPUT__0" },
            ));
        }
        let by_order = match returned {
            Returned::Fixed(fields) => {
                let known: Vec<_> = fields.iter().flatten().map(String::as_str).collect();
                declared_outputs.len() <= fields.len() && stand_in_order(&declared_outputs, &known)
            }
            Returned::List => stand_in_order(&declared_outputs, &[]),
            Returned::Dict | Returned::Other(_) => false,
        };
        let place = |(index, output): (usize, &DeclaredTensor)| {
            if by_order { Ok(Place::Index(index)) } else { place(&output.name, returned) }
        };
        let places: Vec<Place> = declared_outputs.iter().enumerate().map(place).collect::<Result<_, _>>()?;
        for (index, found) in places.iter().enumerate() {
            if let Some(other) = places[..index].iter().position(|other| other == found) {
                let [first, second] = [other, index].map(|index| &declared_outputs[index].name);
                return Err(format!("its outputs `{first}` and `{second}` are the same one of `forward`"));
            }
        }
        let outputs = declared_outputs.iter().map(|output| spec("output", output)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { signature: Signature::of_manifest(&inputs, &outputs), arguments: taken, outputs: places })
    }
}

/// The inputs of a file whose configuration names none.
fn inputs_of(arguments: &[Argument]) -> Vec<DeclaredTensor> {
    let needed = arguments.iter().filter(|argument| !argument.may_lack);
    needed.map(|argument| DeclaredTensor { name: argument.name.clone(), ..DeclaredTensor::default() }).collect()
}

/// The outputs of a file whose configuration names none, as far as it says how many there are.
fn outputs_of(returned: &Returned) -> Vec<DeclaredTensor> {
    let Returned::Fixed(fields) = returned else { return Vec::new() };
    let name = |(index, field): (usize, &Option<String>)| field.clone().unwrap_or_else(|| format!("OUTPUT__{index}"));
    fields.iter().enumerate().map(|field| DeclaredTensor { name: name(field), ..DeclaredTensor::default() }).collect()
}

/// Whether none of the names is among those `known` to the file, or has a number.
fn stand_in_order(tensors: &[DeclaredTensor], known: &[&str]) -> bool {
    tensors.iter().all(|tensor| numbered(&tensor.name).is_none() && !known.contains(&tensor.name.as_str()))
}

/// By the argument's name, or by a number behind two underscores.
fn argument_index(name: &str, arguments: &[Argument]) -> Result<usize, String> {
    let found = arguments.iter().position(|argument| argument.name == name);
    found.or_else(|| numbered(name).filter(|index| *index < arguments.len())).ok_or_else(|| {
        let known: Vec<_> = arguments.iter().map(|argument| argument.name.as_str()).collect();
        format!(
            "its configuration has input `{name}`, but `forward` takes {}; call it so, or INPUT__0 for the first, INPUT__1 \
             for the second",
            known.join(", ")
        )
    })
}

fn place(name: &str, returned: &Returned) -> Result<Place, String> {
    let unnumbered =
        || format!("its output `{name}` has no number; call it OUTPUT__0 for the first, OUTPUT__1 for the second");
    match returned {
        Returned::Dict => Ok(Place::Key(name.to_owned())),
        Returned::List => match numbered(name).ok_or_else(unnumbered)? {
            index if index < MOST_OUTPUTS => Ok(Place::Index(index)),
            _ => Err(format!("its configuration has output `{name}`; of a list the first {MOST_OUTPUTS} are given")),
        },
        Returned::Fixed(fields) => {
            let field = fields.iter().position(|field| field.as_deref() == Some(name));
            let index = field.or_else(|| numbered(name)).ok_or_else(unnumbered)?;
            if index < fields.len() {
                Ok(Place::Index(index))
            } else {
                Err(format!("its configuration has output `{name}`, but `forward` returns {}", fields.len()))
            }
        }
        Returned::Other(kind) => Err(no_tensors(kind)),
    }
}

fn no_tensors(kind: &str) -> String {
    format!("its `forward` returns {kind}, which is no tensor and no tuple, list or dict of tensors")
}

/// The number in `INPUT__0`, whatever is before it.
fn numbered(name: &str) -> Option<usize> {
    name.rsplit_once("__")?.1.parse().ok()
}

fn input_spec(input: &DeclaredTensor, argument: &Argument) -> Result<TensorSpec, String> {
    let wrong = |wanted: &str| {
        format!("its input `{}` is argument `{}`, a {}, which {wanted}", input.name, argument.name, argument.declared)
    };
    // A number is a tensor of one element, of its widest type unless the configuration has another.
    let (widest, others): (DType, &[DType]) = match argument.kind {
        ArgumentKind::Tensor if input.dtype == Some(DType::Bytes) => return Err(wrong("has no texts")),
        ArgumentKind::Tensor => return spec("input", input),
        ArgumentKind::Int => (DType::Int64, &[DType::Int32, DType::Uint32, DType::Int16, DType::Uint8, DType::Int8]),
        ArgumentKind::Float => (DType::Fp64, &[DType::Fp32]),
        ArgumentKind::Bool => (DType::Bool, &[]),
        ArgumentKind::Texts => {
            let shape = input.shape.clone().unwrap_or_else(|| vec![None]);
            return match input.dtype {
                None | Some(DType::Bytes) if shape.len() == 1 => {
                    Ok(TensorSpec { name: input.name.clone(), dtype: DType::Bytes, shape })
                }
                _ => Err(wrong("is TYPE_STRING with one size")),
            };
        }
        ArgumentKind::Other => return Err(wrong("no tensor stands for")),
    };
    let dtype = input.dtype.unwrap_or(widest);
    if dtype != widest && !others.contains(&dtype) {
        return Err(wrong(&format!("cannot be {}; {} can", dtype_name(dtype), dtype_name(widest))));
    }
    let shape = input.shape.clone().unwrap_or_else(|| vec![Some(1)]);
    if shape.iter().any(|size| *size != Some(1)) {
        return Err(wrong("has one element for all rows: its dims are [ 1 ], and max_batch_size is 0"));
    }
    Ok(TensorSpec { name: input.name.clone(), dtype, shape })
}

fn spec(kind: &str, tensor: &DeclaredTensor) -> Result<TensorSpec, String> {
    let name = &tensor.name;
    match (tensor.dtype, &tensor.shape) {
        (Some(dtype), Some(shape)) => Ok(TensorSpec { name: name.clone(), dtype, shape: shape.clone() }),
        _ => Err(format!(
            "its file does not say of which type and shape {kind} `{name}` is; write it in config.pbtxt, such as \
             {kind} {{ name: {name:?} data_type: TYPE_FP32 dims: [ -1 ] }}"
        )),
    }
}

//! A model's configuration: what was written, completed and held against what the model's file says. Pure.

use sensorium_artifact::{DType, TensorSpec};
use sensorium_engine::Signature;
use sensorium_proto::inference::{
    DataType, ModelConfig, ModelDynamicBatching, ModelInput, ModelOutput, ModelTensorReshape, ModelVersionPolicy,
    model_config::SchedulingChoice,
    model_sequence_batching::control::Kind,
    model_version_policy::{Latest, PolicyChoice},
};

use super::config::Written;
use crate::model::{Binding, Bound, IDLE, Interface, Ragged, Reshape};

/// A configuration in which nothing is left open.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Complete {
    pub(super) config: ModelConfig,
    pub(super) interface: Interface,
    pub(super) binding: Binding,
    /// Whether nobody wrote that requests are put together, and the server does it because nobody wrote how they run at all.
    pub(super) is_batching_guessed: bool,
}

/// The configuration that an interface stands for; name, platform and backend are left open.
pub(super) fn config(interface: &Interface) -> ModelConfig {
    let max_rows = interface.max_rows.map_or(0, |rows| i32::try_from(rows).unwrap_or(i32::MAX));
    let kept = usize::from(max_rows > 0);
    let input = |spec: &TensorSpec| ModelInput {
        name: spec.name.clone(),
        data_type: data_type(spec.dtype).into(),
        dims: sizes(spec, kept),
        ..ModelInput::default()
    };
    let output = |spec: &TensorSpec| ModelOutput {
        name: spec.name.clone(),
        data_type: data_type(spec.dtype).into(),
        dims: sizes(spec, kept),
        ..ModelOutput::default()
    };
    ModelConfig {
        max_batch_size: max_rows,
        input: interface.inputs.iter().map(input).collect(),
        output: interface.outputs.iter().map(output).collect(),
        ..ModelConfig::default()
    }
}

/// Completes `written` with what the signature of the model's graph says.
///
/// # Errors
/// The first thing in which they contradict each other, as a sentence about the model.
pub(super) fn complete(written: Written, signature: &Signature, default_rows: usize) -> Result<Complete, String> {
    let mut config = written.config;
    if config.model_repository_agents.is_some() {
        return Err(
            "its configuration has model_repository_agents, such as a checksum, which this server has not; leave them \
                    out, or store the model as an artifact, whose digest is checked"
                .to_owned(),
        );
    }
    // Triton puts requests together unasked where it completes what a model takes and gives, and not where all is written.
    let is_open = !written.has_batch_size || config.input.is_empty() || config.output.is_empty();
    config.max_batch_size = batch_size(&config, written.has_batch_size, signature, default_rows)?;
    let kept = usize::from(config.max_batch_size > 0);
    let filled = filled_by_server(&config);

    if config.input.is_empty() {
        let asked = signature.inputs().iter().filter(|spec| !filled.contains(&spec.name.as_str()));
        config.input = asked.map(|spec| ModelInput { name: spec.name.clone(), ..ModelInput::default() }).collect();
    }
    if config.output.is_empty() {
        let hidden: Vec<String> = states(&config).map(|state| state.output_name.clone()).collect();
        let shown = signature.outputs().iter().filter(|spec| !hidden.contains(&spec.name));
        config.output = shown.map(|spec| ModelOutput { name: spec.name.clone(), ..ModelOutput::default() }).collect();
    }

    let filled: Vec<String> = filled_by_server(&config).into_iter().map(str::to_owned).collect();
    let mut interface =
        Interface { max_rows: (kept > 0).then_some(config.max_batch_size as usize), ..Interface::default() };
    let mut binding = Binding { inputs: vec![None; signature.inputs().len()], ..Binding::default() };
    for (position, input) in config.input.iter_mut().enumerate() {
        let (index, spec) = find("input", &input.name, signature.inputs())?;
        let side = Side { kind: "input", spec, kept };
        input.data_type = side.data_type(input.data_type)?.into();
        let reshape = if input.allow_ragged_batch {
            side.flat_dims(&mut input.dims, input.reshape.as_ref())?;
            None
        } else {
            side.dims(&mut input.dims, input.reshape.as_ref(), false)?
        };
        if binding.inputs[index].replace(Bound { index: position, reshape }).is_some() {
            return Err(format!("its configuration has input `{}` twice", input.name));
        }
        interface.inputs.push(interface_spec(spec, &input.dims, kept));
    }
    let scattered: Vec<String> = config.batch_output.iter().flat_map(|output| &output.target_name).cloned().collect();
    for output in &mut config.output {
        let (index, spec) = find("output", &output.name, signature.outputs())?;
        let side = Side { kind: "output", spec, kept };
        output.data_type = side.data_type(output.data_type)?.into();
        let reshape = if scattered.contains(&output.name) {
            side.flat_dims(&mut output.dims, output.reshape.as_ref())?;
            None
        } else {
            side.dims(&mut output.dims, output.reshape.as_ref(), true)?
        };
        binding.outputs.push(Bound { index, reshape });
        interface.outputs.push(interface_spec(spec, &output.dims, kept));
    }
    for (spec, bound) in signature.inputs().iter().zip(&binding.inputs) {
        if bound.is_none() && !filled.contains(&spec.name) {
            return Err(format!("its file has input `{}`, which its configuration leaves out", spec.name));
        }
    }
    check_sequence(&config, signature, kept)?;
    say_defaults(&mut config);
    binding.ragged = Ragged::new(&config, signature)?;
    // What says how requests are put together says that they are.
    let is_meant = !binding.ragged.joins().is_empty()
        || ["padding", "max_batch_elements"].iter().any(|name| config.parameters.contains_key(*name));
    let is_silent = config.max_batch_size > 1 && config.scheduling_choice.is_none();
    if is_silent && (is_open || is_meant) {
        config.scheduling_choice = Some(SchedulingChoice::DynamicBatching(ModelDynamicBatching::default()));
    }
    Ok(Complete { config, interface, binding, is_batching_guessed: is_silent && is_open && !is_meant })
}

/// Writes down what holds where nothing is written, as Triton's configurations do. With a model that iterates, nothing is something else: its
/// readers are waited for longer ([`super::iteration`]).
fn say_defaults(config: &mut ModelConfig) {
    let latest = ModelVersionPolicy { policy_choice: Some(PolicyChoice::Latest(Latest { num_versions: 1 })) };
    config.version_policy.get_or_insert(latest);
    if let Some(SchedulingChoice::SequenceBatching(sequence)) = &mut config.scheduling_choice
        && sequence.max_sequence_idle_microseconds == 0
        && !sequence.iterative_sequence
    {
        sequence.max_sequence_idle_microseconds = IDLE.as_micros() as u64; // a second
    }
}

/// What clients see of a model that has no file: its configuration says all.
///
/// # Errors
/// A type or size that it leaves open.
pub(super) fn written_interface(config: &ModelConfig) -> Result<Interface, String> {
    let kept = usize::from(config.max_batch_size > 0);
    let spec = |kind: &str, name: &str, data_type: i32, dims: &[i64]| {
        let dtype = DataType::try_from(data_type).ok().and_then(dtype);
        let dtype = dtype.ok_or_else(|| format!("its configuration gives {kind} `{name}` no data_type"))?;
        let batch = std::iter::repeat_n(None, kept);
        let shape = batch.chain(dims.iter().map(|&size| u64::try_from(size).ok())).collect();
        Ok(TensorSpec { name: name.to_owned(), dtype, shape })
    };
    let inputs = config.input.iter().map(|input| spec("input", &input.name, input.data_type, &input.dims));
    let outputs = config.output.iter().map(|output| spec("output", &output.name, output.data_type, &output.dims));
    let interface = Interface {
        inputs: inputs.collect::<Result<_, String>>()?,
        outputs: outputs.collect::<Result<_, String>>()?,
        max_rows: (kept > 0).then_some(config.max_batch_size as usize),
    };
    if interface.inputs.is_empty() || interface.outputs.is_empty() {
        return Err("its configuration has no input or no output, which an ensemble must write down".to_owned());
    }
    Ok(interface)
}

/// Inputs that no request has, because the server fills them: what it says of a batch, a sequence's controls and state.
fn filled_by_server(config: &ModelConfig) -> Vec<&str> {
    let made = config.batch_input.iter().flat_map(|input| &input.target_name).map(String::as_str);
    let Some(SchedulingChoice::SequenceBatching(sequence)) = &config.scheduling_choice else { return made.collect() };
    let controls = sequence.control_input.iter().map(|control| control.name.as_str());
    made.chain(controls).chain(sequence.state.iter().map(|state| state.input_name.as_str())).collect()
}

fn states(config: &ModelConfig) -> impl Iterator<Item = &sensorium_proto::inference::model_sequence_batching::State> {
    let sequence = match &config.scheduling_choice {
        Some(SchedulingChoice::SequenceBatching(sequence)) => Some(sequence),
        _ => None,
    };
    sequence.into_iter().flat_map(|sequence| &sequence.state)
}

/// That what is written of the types of states and correlation ids is what the file has. Whoever fills them says what it has not.
fn check_sequence(config: &ModelConfig, signature: &Signature, kept: usize) -> Result<(), String> {
    let Some(SchedulingChoice::SequenceBatching(sequence)) = &config.scheduling_choice else { return Ok(()) };
    let check = |kind, name: &str, written: i32| match signature.inputs().iter().find(|spec| spec.name == name) {
        Some(spec) => Side { kind, spec, kept }.data_type(written).map(drop),
        None => Ok(()),
    };
    for state in &sequence.state {
        let initial = state.initial_state.iter().map(|initial| initial.data_type);
        initial.chain([state.data_type]).try_for_each(|written| check("state", &state.input_name, written))?;
    }
    let ids = sequence.control_input.iter().flat_map(|input| input.control.iter().map(move |own| (input, own)));
    let mut ids = ids.filter(|(_, control)| control.kind() == Kind::ControlSequenceCorrid);
    ids.try_for_each(|(input, control)| check("control_input", &input.name, control.data_type))
}

/// Rows of a batch at most; 0 for a model without a batch axis.
fn batch_size(config: &ModelConfig, written: bool, signature: &Signature, default_rows: usize) -> Result<i32, String> {
    // Outputs that the configuration leaves out are nobody's.
    let is_shown = |spec: &&TensorSpec| config.output.is_empty() || config.output.iter().any(|it| it.name == spec.name);
    let specs = || signature.inputs().iter().chain(signature.outputs().iter().filter(is_shown));
    let fixed = specs().find(|spec| !matches!(spec.shape.first(), Some(None)));
    if config.max_batch_size < 0 {
        return Err(format!("its max_batch_size is {}, it must be at least 0", config.max_batch_size));
    }
    if written {
        return match fixed {
            Some(spec) if config.max_batch_size > 0 => Err(format!(
                "its configuration has max_batch_size {}, but the first size of `{}` in its file is {}, so that it cannot \
                 batch; write max_batch_size: 0, or export it with a dynamic first size",
                config.max_batch_size,
                spec.name,
                spec.shape.first().copied().flatten().map_or("missing".to_owned(), |size| size.to_string()),
            )),
            _ => Ok(config.max_batch_size),
        };
    }
    // Sizes that are written with the batch axis mean a model without one.
    let whole = config.input.iter().any(|input| {
        let spec = signature.inputs().iter().find(|spec| spec.name == input.name);
        input.reshape.is_none()
            && !input.allow_ragged_batch
            && !input.dims.is_empty()
            && spec.is_some_and(|spec| spec.shape.len() == input.dims.len())
    });
    if fixed.is_some() || whole { Ok(0) } else { Ok(i32::try_from(default_rows).unwrap_or(i32::MAX)) }
}

fn find<'a>(kind: &str, name: &str, specs: &'a [TensorSpec]) -> Result<(usize, &'a TensorSpec), String> {
    let found = specs.iter().enumerate().find(|(_, spec)| spec.name == name);
    found.ok_or_else(|| {
        let known: Vec<_> = specs.iter().map(|spec| spec.name.as_str()).collect();
        format!("its configuration has {kind} `{name}`, which its file has not; there it has {}", known.join(", "))
    })
}

/// One tensor of the graph, for the checks that inputs and outputs share.
struct Side<'a> {
    kind: &'static str,
    spec: &'a TensorSpec,
    kept: usize,
}

impl Side<'_> {
    fn data_type(&self, written: i32) -> Result<DataType, String> {
        let found = data_type(self.spec.dtype);
        match DataType::try_from(written) {
            Ok(DataType::TypeInvalid) => Ok(found),
            Ok(written) if written == found => Ok(found),
            written => Err(format!(
                "{} `{}` is {} in its configuration and {} in its file",
                self.kind,
                self.spec.name,
                written.map_or("unknown", |written| written.as_str_name()),
                found.as_str_name(),
            )),
        }
    }

    /// Completes written sizes of a tensor in which requests lie one behind the other: in the graph it has no batch axis,
    /// and may be flat.
    fn flat_dims(&self, dims: &mut Vec<i64>, reshape: Option<&ModelTensorReshape>) -> Result<(), String> {
        let file = sizes(self.spec, 0);
        if dims.is_empty() {
            dims.clone_from(&file);
        }
        if reshape.is_some() {
            return Err(format!("{} `{}` is ragged and has a reshape, which contradict", self.kind, self.spec.name));
        }
        let fits = |(written, file): (&i64, &i64)| written == file || *file < 0 && *written != 0;
        let is_alike = dims.len() == file.len() && dims.iter().zip(&file).all(fits);
        if file.first().is_some_and(|size| *size < 0) && (is_alike || file.len() == 1) {
            return Ok(());
        }
        Err(format!(
            "{} `{}` is ragged and has dims {dims:?} in its configuration and {file:?} in its file, which must be one size \
             that is left open, or the same sizes without a batch before them",
            self.kind, self.spec.name
        ))
    }

    /// Completes written sizes, and says how they become those of the graph.
    fn dims(
        &self,
        dims: &mut Vec<i64>,
        reshape: Option<&ModelTensorReshape>,
        is_output: bool,
    ) -> Result<Option<Reshape>, String> {
        let file = sizes(self.spec, self.kept);
        if file.is_empty() && reshape.is_none() && matches!(dims.as_slice(), [] | [1]) {
            // The protocol's way to say a number.
            *dims = vec![1];
            let (from, to) = if is_output { (file, dims.clone()) } else { (dims.clone(), file) };
            return Ok(Some(Reshape { kept: self.kept, from, to }));
        }
        if dims.is_empty() && reshape.is_none() {
            *dims = file;
            return Ok(None);
        }
        let seen = reshape.map_or(dims.as_slice(), |reshape| &reshape.shape);
        let fits = |(written, file): (&i64, &i64)| written == file || *file < 0 && *written != 0;
        if seen.len() != file.len() || !seen.iter().zip(&file).all(fits) {
            return Err(format!(
                "{} `{}` has {} {seen:?} in its configuration and {file:?} in its file{}",
                self.kind,
                self.spec.name,
                if reshape.is_some() { "reshape" } else { "dims" },
                if self.kept > 0 { " (without the batch)" } else { "" },
            ));
        }
        let Some(reshape) = reshape else { return Ok(None) };
        let variable = |sizes: &[i64]| sizes.iter().filter(|size| **size < 0).count();
        let fixed = |sizes: &[i64]| sizes.iter().filter(|size| **size >= 0).product::<i64>();
        if variable(dims) != variable(&reshape.shape) || fixed(dims) != fixed(&reshape.shape) {
            return Err(format!(
                "{} `{}` has dims {dims:?} and reshape {:?} in its configuration, which have not the same elements",
                self.kind, self.spec.name, reshape.shape
            ));
        }
        let (outside, inside) = (dims.clone(), reshape.shape.clone());
        let (from, to) = if is_output { (inside, outside) } else { (outside, inside) };
        Ok(Some(Reshape { kept: self.kept, from, to }))
    }
}

/// What clients see: the batch axis, then the configuration's sizes.
fn interface_spec(spec: &TensorSpec, dims: &[i64], kept: usize) -> TensorSpec {
    let batch = std::iter::repeat_n(None, kept);
    let shape = batch.chain(dims.iter().map(|&size| u64::try_from(size).ok())).collect();
    TensorSpec { name: spec.name.clone(), dtype: spec.dtype, shape }
}

/// Sizes after the first `kept`, -1 for those that a request decides.
fn sizes(spec: &TensorSpec, kept: usize) -> Vec<i64> {
    spec.shape.iter().skip(kept).map(|size| size.map_or(-1, |size| size as i64)).collect()
}

/// How a configuration spells an element type.
pub(super) fn data_type(dtype: DType) -> DataType {
    match dtype {
        DType::Bool => DataType::TypeBool,
        DType::Uint8 => DataType::TypeUint8,
        DType::Uint16 => DataType::TypeUint16,
        DType::Uint32 => DataType::TypeUint32,
        DType::Uint64 => DataType::TypeUint64,
        DType::Int8 => DataType::TypeInt8,
        DType::Int16 => DataType::TypeInt16,
        DType::Int32 => DataType::TypeInt32,
        DType::Int64 => DataType::TypeInt64,
        DType::Fp16 => DataType::TypeFp16,
        DType::Bf16 => DataType::TypeBf16,
        DType::Fp32 => DataType::TypeFp32,
        DType::Fp64 => DataType::TypeFp64,
        DType::Bytes => DataType::TypeString,
    }
}

/// The element type that a configuration spells; `None` for `TYPE_INVALID`.
pub(super) fn dtype(data_type: DataType) -> Option<DType> {
    Some(match data_type {
        DataType::TypeInvalid => return None,
        DataType::TypeBool => DType::Bool,
        DataType::TypeUint8 => DType::Uint8,
        DataType::TypeUint16 => DType::Uint16,
        DataType::TypeUint32 => DType::Uint32,
        DataType::TypeUint64 => DType::Uint64,
        DataType::TypeInt8 => DType::Int8,
        DataType::TypeInt16 => DType::Int16,
        DataType::TypeInt32 => DType::Int32,
        DataType::TypeInt64 => DType::Int64,
        DataType::TypeFp16 => DType::Fp16,
        DataType::TypeBf16 => DType::Bf16,
        DataType::TypeFp32 => DType::Fp32,
        DataType::TypeFp64 => DType::Fp64,
        DataType::TypeString => DType::Bytes,
    })
}

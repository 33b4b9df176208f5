//! How many engines a model has, how each of them runs, and what they run before anybody asks.

use std::{
    num::NonZeroUsize,
    path::Path,
    time::{Duration, Instant},
};

use sensorium_artifact::TensorSpec;
use sensorium_engine::{DType, Device, Engine, Optimization, Options, RawTensor, Signature};
use sensorium_proto::inference::{
    ModelConfig, ModelInstanceGroup, ModelWarmup,
    model_instance_group::Kind,
    model_warmup::{Input, input::InputDataType},
};
use sensorium_telemetry::error_line;

use super::complete;
use crate::{
    files::{self, inside},
    model::{Binding, guesses},
    scheduler::{Padding, Reopen},
};

/// How long batches are run before anybody asks, at most.
const REHEARSAL: Duration = Duration::from_mins(1);

/// Instances of a model at most: each has a thread, and the model once more.
const MOST_INSTANCES: usize = 1024;

/// How many engines a model has, and how each of them runs: the cores are shared among them unless it says otherwise.
///
/// # Errors
/// An option that makes no sense, as a sentence about the model.
pub(super) fn instances(config: &ModelConfig, server: Options) -> Result<(usize, Options), String> {
    let (mut count, mut device) = (0, None);
    for group in &config.instance_group {
        count += match group.count {
            0 => 1,
            count => usize::try_from(count)
                .map_err(|_| format!("its instance_group has count {count}, it must be at least 1"))?,
        };
        let own = match group.kind() {
            // What is written without a kind.
            Kind::Auto if group.gpus.is_empty() => server.device,
            Kind::Auto | Kind::Gpu => match group.gpus.first().copied().unwrap_or(0) {
                gpu @ 0.. => accelerated(config, gpu),
                gpu => return Err(format!("its instance_group has gpus {gpu}, they are counted from 0")),
            },
            Kind::Cpu | Kind::Model => Device::Cpu,
        };
        if device.replace(own).is_some_and(|other| other != own) {
            return Err("its instance_group has instances on different devices; give it one group".to_owned());
        }
    }
    let count = count.max(1);
    if count > MOST_INSTANCES {
        return Err(format!("its instance_group has {count} instances, it may have {MOST_INSTANCES} at most"));
    }
    let each = NonZeroUsize::new(server.threads.get() / count).unwrap_or(NonZeroUsize::MIN);
    let inter_threads = NonZeroUsize::new(number(config, "inter_op_thread_count")?.unwrap_or(0));
    let is_parallel = flag(config, "execution_mode")?.unwrap_or(false);
    // As Triton's backends of onnxruntime and of PyTorch call it.
    let threads = number(config, "intra_op_thread_count")?.or(number(config, "INTRA_OP_THREAD_COUNT")?);
    let is_plain = flag(config, "DISABLE_OPTIMIZED_EXECUTION")?.unwrap_or(false);
    let level = config.optimization.as_ref().and_then(|optimization| optimization.graph.as_ref());
    Ok((
        count,
        Options {
            // As in onnxruntime, 0 leaves it to the server.
            threads: threads.and_then(NonZeroUsize::new).unwrap_or(each),
            inter_threads: is_parallel.then_some(inter_threads.unwrap_or(each)),
            arena: flag(config, "enable_mem_arena")?.unwrap_or(server.arena),
            memory_pattern: flag(config, "enable_mem_pattern")?.unwrap_or(server.memory_pattern),
            shrink_arena: parameter(config, "memory.enable_memory_arena_shrinkage").is_some() || server.shrink_arena,
            optimization: match level.map_or(0, |graph| graph.level) {
                _ if is_plain => Optimization::Basic,
                ..0 => Optimization::Basic,
                0 => server.optimization,
                1.. => Optimization::Extended,
            },
            device: device.unwrap_or(server.device),
        },
    ))
}

/// Writes down the instances that there are where nothing, or not all, is written of them: as Triton's configurations do, so that tools which
/// search for the best number of instances have one to begin with.
pub(super) fn say_instances(config: &mut ModelConfig, device: Device) {
    if config.instance_group.is_empty() {
        config.instance_group.push(ModelInstanceGroup { name: config.name.clone(), ..ModelInstanceGroup::default() });
    }
    for (index, group) in config.instance_group.iter_mut().enumerate() {
        if group.name.is_empty() {
            group.name = format!("{}_{index}", config.name);
        }
        group.count = group.count.max(1);
        // All of them run there: others were refused.
        group.gpus = device.gpu().into_iter().collect();
        group.set_kind(match (device, group.kind()) {
            (Device::Cpu, Kind::Model) => Kind::Model,
            (Device::Cpu, _) => Kind::Cpu,
            (Device::Cuda(_) | Device::TensorRt(_), _) => Kind::Gpu,
        });
    }
}

/// A GPU, with TensorRT where the configuration names it as an accelerator.
fn accelerated(config: &ModelConfig, gpu: i32) -> Device {
    let accelerators =
        config.optimization.as_ref().and_then(|optimization| optimization.execution_accelerators.as_ref());
    let named = accelerators.into_iter().flat_map(|accelerators| &accelerators.gpu_execution_accelerator);
    let has_tensorrt = named.into_iter().any(|accelerator| accelerator.name == "tensorrt");
    if has_tensorrt { Device::TensorRt(gpu) } else { Device::Cuda(gpu) }
}

/// Inputs that the parameter `padding` lists with the value that the model ignores there, such as
/// `input_ids=0,attention_mask=0`.
///
/// # Errors
/// Text that is no such list.
pub(super) fn padding(config: &ModelConfig) -> Result<Option<Padding>, String> {
    let wrong =
        |text: &str| format!("its parameter padding has {text:?}, it must be such as input_ids=0,attention_mask=0");
    let Some(text) = parameter(config, "padding") else { return Ok(None) };
    let mut padding = Padding::default();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').ok_or_else(|| wrong(part))?;
        padding.values.insert(name.trim().to_owned(), value.trim().parse().map_err(|_| wrong(part))?);
    }
    Ok(Some(padding))
}

/// Elements of a batch at most, along the axes that requests choose and with padding: the parameter `max_batch_elements`;
/// 0 for no bound.
///
/// # Errors
/// Text that is no number.
pub(super) fn max_elements(config: &ModelConfig) -> Result<usize, String> {
    Ok(number(config, "max_batch_elements")?.unwrap_or(0))
}

/// A parameter's text, without space around it.
pub(super) fn parameter<'a>(config: &'a ModelConfig, name: &str) -> Option<&'a str> {
    config.parameters.get(name).map(|parameter| parameter.string_value.trim())
}

/// A parameter that is a whole number.
///
/// # Errors
/// Text that is none.
pub(super) fn number(config: &ModelConfig, name: &str) -> Result<Option<usize>, String> {
    let parse = |text: &str| text.parse().map_err(|_| format!("its parameter {name} is {text:?}, it must be a number"));
    parameter(config, name).map(parse).transpose()
}

fn flag(config: &ModelConfig, name: &str) -> Result<Option<bool>, String> {
    let parse = |text: &str| match text {
        "0" | "false" => Ok(false),
        "1" | "true" => Ok(true),
        _ => Err(format!("its parameter {name} is {text:?}, it must be 0 or 1")),
    };
    parameter(config, name).map(parse).transpose()
}

/// Opens `count` engines side by side, as many at a time as there are cores: reading and optimising a graph takes one core.
///
/// # Errors
/// The first that cannot be opened.
pub(super) fn open(count: usize, reopen: &Reopen) -> Result<Vec<Box<dyn Engine>>, String> {
    side_by_side(vec![(); count], |()| reopen())
}

/// Does the same to all `items` on threads of their own, as many at a time as there are cores; results in their order.
fn side_by_side<I: Send, T: Send>(
    items: Vec<I>,
    work: impl Fn(I) -> Result<T, String> + Sync,
) -> Result<Vec<T>, String> {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let (mut rest, mut done) = (items.into_iter().peekable(), Vec::new());
    while rest.peek().is_some() {
        let some: Vec<I> = rest.by_ref().take(cores).collect();
        let work = &work;
        done.extend(std::thread::scope(|scope| {
            let begin = |item| {
                let thread = std::thread::Builder::new().spawn_scoped(scope, move || work(item));
                thread.map_err(|error| format!("no thread could be started to open it: {error}"))
            };
            let threads: Vec<_> = some.into_iter().map(begin).collect();
            let join = |thread: Result<std::thread::ScopedJoinHandle<'_, Result<T, String>>, String>| {
                thread?.join().unwrap_or_else(|_| Err("opening it panicked".to_owned()))
            };
            threads.into_iter().map(join).collect::<Result<Vec<T>, String>>()
        })?);
    }
    Ok(done)
}

/// Bytes of all samples of a warm-up at most: what a configuration asks for is not to take the memory of all other models.
const LARGEST_WARM_UP: usize = 1 << 30;

/// Runs the samples of `model_warmup` on every engine, so that the first request does not pay for what happens once. Returns
/// the inputs of the first, which are known to be good then.
///
/// # Errors
/// A sample that does not fit the model, or that it fails at.
pub(super) fn warm_up(
    engines: &mut [Box<dyn Engine>],
    config: &ModelConfig,
    binding: &Binding,
    folder: &Path,
) -> Result<Option<Vec<RawTensor>>, String> {
    let (mut samples, mut left) = (Vec::new(), LARGEST_WARM_UP);
    let Some(signature) = engines.first().map(|engine| engine.signature().clone()) else { return Ok(None) };
    // As with Triton, none of a sample is nothing to run.
    let is_whole = |sample: &&ModelWarmup| sample.batch_size > 0 || config.max_batch_size == 0;
    for sample in config.model_warmup.iter().filter(is_whole) {
        let unfit = |reason: String| format!("its model_warmup {:?} {reason}", sample.name);
        let inputs = inputs(sample, config, &signature, binding, folder, &mut left).map_err(unfit)?;
        signature.validate(&inputs).map_err(|error| unfit(error_line(&error)))?;
        samples.push((sample, inputs));
    }
    let outputs: Vec<usize> = (0..signature.outputs().len()).collect();
    let run = |engine: &mut Box<dyn Engine>| {
        for (sample, inputs) in &samples {
            for _ in 0..sample.count.max(1) {
                let ran = engine.run_raw(inputs, &outputs);
                ran.map_err(|error| format!("its model_warmup {:?} {}", sample.name, error_line(&error)))?;
            }
        }
        Ok(())
    };
    side_by_side(engines.iter_mut().collect(), run)?;
    Ok(samples.into_iter().next().map(|(_, inputs)| inputs))
}

/// Runs batches of all sizes in `steps` before anybody asks: an engine on a GPU plans for each when it first comes, and is to find out
/// what it costs to go from one to another. Rows are like `sample`, inputs that are known to be good, or zeros. Where those are not
/// taken, a size is too large, or time runs out, the rest is left to who asks.
pub(super) fn rehearse(engines: &mut [Box<dyn Engine>], sample: Option<&[RawTensor]>, steps: &[usize]) {
    let Some(&least) = steps.first() else { return };
    let until = Instant::now() + REHEARSAL;
    let rehearse = |engine: &mut Box<dyn Engine>| {
        let signature = engine.signature().clone();
        let outputs: Vec<usize> = (0..signature.outputs().len()).collect();
        let mut run = |row: &[RawTensor], rows: usize| {
            if Instant::now() >= until {
                return Err("it took too long".to_owned());
            }
            let batch = row.iter().map(|tensor| RawTensor::concat(&vec![tensor; rows])).collect::<Result<Vec<_>, _>>();
            let batch = batch.map_err(|error| error.to_string())?;
            engine.run_raw(&batch, &outputs).map(drop).map_err(|error| error_line(&error))
        };
        let first_of =
            |tensor: &RawTensor| Some(tensor.split([1, tensor.row_count()?.checked_sub(1)?])?.swap_remove(0));
        let sample = sample.and_then(|sample| sample.iter().map(first_of).collect::<Option<Vec<_>>>());
        let is_one_row = |row: &Vec<RawTensor>| row.iter().all(|tensor| tensor.row_count() == Some(1));
        let mut rows = sample.into_iter().chain(guesses(&signature).filter(is_one_row));
        let Some(row) = rows.find(|row| run(row, least).is_ok()) else { return Ok(()) };
        let mut run = |rows: usize| {
            let ran = run(&row, rows);
            ran.inspect_err(|error| tracing::warn!(rows, error, "larger batches did not run before anybody asked"))
        };
        // A plan is made in the first run, and a module of TorchScript compiled in the second.
        let taken = steps.iter().take_while(|rows| (0..3).all(|_| run(**rows).is_ok())).count();
        let Some(&most) = steps[..taken].last() else { return Ok(()) };
        // There and back, twice; by then engines that are to be several are, and each step has its own.
        let there_and_back = [least, least, most, most].repeat(2);
        let _ = there_and_back.iter().chain(&steps[..taken]).try_for_each(|rows| run(*rows));
        Ok(())
    };
    // None of them fails.
    let _ = side_by_side(engines.iter_mut().collect(), rehearse);
}

fn inputs(
    sample: &ModelWarmup,
    config: &ModelConfig,
    signature: &Signature,
    binding: &Binding,
    folder: &Path,
    left: &mut usize,
) -> Result<Vec<RawTensor>, String> {
    let batch = (config.max_batch_size > 0).then_some(i64::from(sample.batch_size.max(1)));
    if let Some(rows) = batch.filter(|rows| *rows > i64::from(config.max_batch_size)) {
        return Err(format!("has batch_size {rows}, and the model's max_batch_size is {}", config.max_batch_size));
    }
    let mut input = |(spec, bound): (&TensorSpec, &Option<_>)| {
        let Some(input) = sample.inputs.get(&spec.name) else {
            return match bound {
                Some(_) => Err(format!("has no input `{}`", spec.name)),
                // A control or state that the server fills in requests: zeros do here.
                None => RawTensor::smallest(spec, batch.unwrap_or(1)).map_err(|error| error.to_string()),
            };
        };
        tensor(input, spec, batch, folder, left).map_err(|reason| format!("input `{}`: {reason}", spec.name))
    };
    let mut inputs = signature.inputs().iter().zip(&binding.inputs).map(&mut input).collect::<Result<Vec<_>, _>>()?;
    // Sizes are written as clients see them, and go in as the graph has them.
    binding.shape(&mut inputs).map_err(|error| error.to_string())?;
    let completed = binding.ragged.complete(inputs.into_iter().map(Some).collect());
    completed.map(|completed| completed.inputs).map_err(|error| error.to_string())
}

/// `left` are the bytes that all samples together may still have.
fn tensor(
    input: &Input,
    spec: &TensorSpec,
    batch: Option<i64>,
    folder: &Path,
    left: &mut usize,
) -> Result<RawTensor, String> {
    let dtype = complete::dtype(input.data_type()).unwrap_or(spec.dtype);
    let shape: Vec<i64> = batch.into_iter().chain(input.dims.iter().copied()).collect();
    // Strings have their length, at least.
    let element = sensorium_engine::element_size(dtype).unwrap_or(size_of::<u32>());
    let bytes = RawTensor::element_count(dtype, &shape).and_then(|elements| elements.checked_mul(element));
    *left = bytes.and_then(|bytes| left.checked_sub(bytes)).ok_or_else(|| {
        format!("with its sizes {shape:?} the samples come to more than the {LARGEST_WARM_UP} bytes that they may have")
    })?;
    let zeros = RawTensor::zeros(dtype, shape.clone()).map_err(|error| error.to_string())?;
    let data = match &input.input_data_type {
        // The same each time, so that a start is repeatable.
        Some(InputDataType::RandomData(_)) if dtype != DType::Bytes => pattern(zeros.data().len(), dtype),
        None | Some(InputDataType::ZeroData(_) | InputDataType::RandomData(_)) => return Ok(zeros),
        Some(InputDataType::InputDataFile(file)) => {
            // Triton keeps these in a folder of this name.
            let path = inside(&folder.join("warmup"), file)?;
            let bytes = files::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            return of_file(dtype, shape, batch, bytes);
        }
    };
    RawTensor::new(dtype, shape, data.into()).map_err(|error| error.to_string())
}

/// A file has all rows, or as with Triton one that all of them are, and may have more than that.
fn of_file(dtype: DType, shape: Vec<i64>, batch: Option<i64>, mut bytes: Vec<u8>) -> Result<RawTensor, String> {
    let rows = batch.and_then(|rows| usize::try_from(rows).ok()).unwrap_or(1);
    let mut row = shape.clone();
    if batch.is_some() {
        row[0] = 1;
    }
    if dtype == DType::Bytes {
        // Strings say themselves how many there are.
        let whole = RawTensor::new(dtype, shape, bytes.clone().into());
        let repeated = || RawTensor::new(dtype, row, bytes.into()).and_then(|row| RawTensor::concat(&vec![&row; rows]));
        return whole.or_else(|error| repeated().map_err(|_| error)).map_err(|error| error.to_string());
    }
    match (RawTensor::byte_count(dtype, &shape), RawTensor::byte_count(dtype, &row)) {
        (Some(all), _) if bytes.len() >= all => bytes.truncate(all),
        (_, Some(one)) if bytes.len() >= one => {
            bytes.truncate(one);
            bytes = bytes.repeat(rows);
        }
        _ => {}
    }
    RawTensor::new(dtype, shape, bytes.into()).map_err(|error| error.to_string())
}

/// Elements that are small and differ from each other.
fn pattern(bytes: usize, dtype: DType) -> Vec<u8> {
    let spread = |index: usize| (index * 37 % 101) as f32 / 101.0;
    match dtype {
        DType::Fp32 => (0..bytes / 4).flat_map(|index| spread(index).to_le_bytes()).collect(),
        DType::Fp64 => (0..bytes / 8).flat_map(|index| f64::from(spread(index)).to_le_bytes()).collect(),
        // Indices into tables have to be small; 0 and 1 are in most, and are booleans, too.
        DType::Bool | DType::Int8 | DType::Uint8 => (0..bytes).map(|index| (index % 2) as u8).collect(),
        DType::Int16 | DType::Uint16 | DType::Fp16 | DType::Bf16 => vec![0; bytes],
        DType::Int32 | DType::Uint32 => (0..bytes / 4).flat_map(|index| ((index % 2) as u32).to_le_bytes()).collect(),
        DType::Int64 | DType::Uint64 => (0..bytes / 8).flat_map(|index| ((index % 2) as u64).to_le_bytes()).collect(),
        DType::Bytes => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(server: Device, groups: &[(Kind, &[i32])]) -> Result<(usize, Device), String> {
        let group = |(kind, gpus): &(Kind, &[i32])| ModelInstanceGroup {
            kind: (*kind).into(),
            count: 2,
            gpus: gpus.to_vec(),
            ..ModelInstanceGroup::default()
        };
        let config = ModelConfig { instance_group: groups.iter().map(group).collect(), ..ModelConfig::default() };
        let (count, options) = instances(&config, Options { device: server, ..Options::default() })?;
        Ok((count, options.device))
    }

    #[test]
    fn a_group_runs_where_it_says_and_else_where_the_server_does() {
        let server = Device::Cuda(3);
        assert_eq!(device(server, &[]), Ok((1, server)));
        assert_eq!(device(server, &[(Kind::Auto, &[])]), Ok((2, server)));
        assert_eq!(device(server, &[(Kind::Auto, &[1])]), Ok((2, Device::Cuda(1))));
        assert_eq!(device(server, &[(Kind::Cpu, &[])]), Ok((2, Device::Cpu)));
        assert_eq!(device(Device::Cpu, &[(Kind::Gpu, &[])]), Ok((2, Device::Cuda(0))));
        assert_eq!(device(Device::Cpu, &[(Kind::Auto, &[]), (Kind::Cpu, &[])]), Ok((4, Device::Cpu)));
        assert!(device(server, &[(Kind::Auto, &[]), (Kind::Cpu, &[])]).is_err());
        assert!(device(server, &[(Kind::Gpu, &[-1])]).is_err());
    }

    #[test]
    fn the_instances_that_there_are_are_written_down() {
        let group = |name: &str, kind: Kind, count: i32, gpus: &[i32]| ModelInstanceGroup {
            name: name.to_owned(),
            kind: kind.into(),
            count,
            gpus: gpus.to_vec(),
            ..ModelInstanceGroup::default()
        };
        let said = |groups: &[ModelInstanceGroup], device| {
            let mut config =
                ModelConfig { name: "m".to_owned(), instance_group: groups.to_vec(), ..ModelConfig::default() };
            say_instances(&mut config, device);
            config.instance_group
        };
        assert_eq!(said(&[], Device::Cpu), [group("m", Kind::Cpu, 1, &[])]);
        assert_eq!(said(&[], Device::Cuda(1)), [group("m", Kind::Gpu, 1, &[1])]);
        let written = [group("", Kind::Auto, 2, &[]), group("own", Kind::Model, 0, &[])];
        assert_eq!(said(&written, Device::Cpu), [group("m_0", Kind::Cpu, 2, &[]), group("own", Kind::Model, 1, &[])]);
    }
}

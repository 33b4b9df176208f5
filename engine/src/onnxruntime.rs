//! The onnxruntime engine: sessions of the library that is loaded when it is first needed.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::env;
use std::fs::File;
use std::io::{self, Read as _};
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::{AnyBitPattern, NoUninit};
use bytes::Bytes;
use half::{bf16, f16};
use ort::environment::Environment;
use ort::ep::{self, ArbitrarilyConfigurableExecutionProvider as _};
use ort::logging::LogLevel;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{HasSelectedOutputs, OutputSelector, RunOptions, Session, SessionInputValue};
use ort::value::{DynValue, Outlet, PrimitiveTensorElementType, TensorElementType, TensorRef, ValueType};
use sensorium_artifact::DType;
use sensorium_onnx::external_files;

use crate::by_shape::ByShape;
use crate::cuda;
use crate::division;
use crate::engine::{Engine, Waiters};
use crate::error::EngineError;
use crate::opener::Declared;
use crate::options::{Device, Optimization, Options};
use crate::raw::{RawTensor, RawTensorError};
use crate::same_file::SameFile;
use crate::signature::{Dim, Shape, Signature};
use crate::watch::watched;

/// Environment variable with the path of the library; read when it is loaded, and at build time for a default.
const LIBRARY_VARIABLE: &str = "SENSORIUM_ONNXRUNTIME";

/// What the loader looks for when no path is known.
const LIBRARY_NAME: &str = "libonnxruntime.so";

/// The one environment of this process, from the first load until its end.
static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);

/// Loads the library, if that has not happened yet: from the path in `SENSORIUM_ONNXRUNTIME`, else from where it was
/// when this program was built, else by name, as the dynamic loader finds it. Opening a graph calls this; a program
/// may call it at start to fail early.
///
/// # Errors
/// [`EngineError::Library`], which names what was tried and what to do; the next call tries again.
pub fn load() -> Result<(), EngineError> {
    load_from(&library_path())
}

/// As [`load`], from this path.
///
/// # Errors
/// [`EngineError::Library`]; a library that is already loaded stays, whatever the path.
pub fn load_from(path: &Path) -> Result<(), EngineError> {
    environment(path).map(|_| ())
}

fn library_path() -> PathBuf {
    if let Some(path) = env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty()) {
        return path.into();
    }
    match option_env!("SENSORIUM_ONNXRUNTIME").map(Path::new) {
        Some(built_with) if built_with.exists() => built_with.to_owned(),
        _ => LIBRARY_NAME.into(),
    }
}

fn environment(path: &Path) -> Result<Environment, EngineError> {
    let mut current = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(environment) = &*current {
        return Ok(environment.clone());
    }
    let builder = ort::init_from(path).map_err(|error| EngineError::Library {
        path: path.to_owned(),
        reason: error.to_string(),
        minimum_minor: ort::MINOR_VERSION,
    })?;
    let environment = builder.with_name("sensorium").with_telemetry(false).build().map_err(setup)?;
    // The binding asks for everything and filters later, which would cost a formatted line per operator and run. Errors come as such, too.
    environment.set_log_level(LogLevel::Fatal);
    division::forgive();
    tracing::debug!(path = %path.display(), "onnxruntime loaded");
    *current = Some(environment.clone());
    Ok(environment)
}

/// Opens an ONNX file as an engine that is quick at inputs of varied shapes, also on a GPU. `declared` says how CUDA runs it.
///
/// # Errors
/// As [`OnnxRuntime::open`].
pub(crate) fn open(path: &Path, options: Options, declared: &Declared) -> Result<Box<dyn Engine>, EngineError> {
    if options.device.gpu().is_none() {
        return Ok(Box::new(OnnxRuntime::open_declared(path, options, declared)?));
    }
    let (path, declared, file) = (path.to_owned(), declared.clone(), SameFile::at(path));
    let open = move || {
        file.check()?;
        let engine = OnnxRuntime::open_declared(&path, options, &declared)?;
        file.check()?;
        Ok(Box::new(engine) as Box<dyn Engine>)
    };
    Ok(Box::new(ByShape::new(open)?))
}

/// A graph in onnxruntime.
#[derive(Debug)]
pub struct OnnxRuntime {
    session: Session,
    signature: Signature,
    shrink_arena: bool,
    device: Device,
    /// Whether it has been said that it divides what has no quotient.
    is_told: bool,
}

impl OnnxRuntime {
    /// Opens an ONNX file.
    ///
    /// # Errors
    /// [`EngineError::Library`], or an error that names the file.
    pub fn open(path: &Path, options: Options) -> Result<Self, EngineError> {
        Self::open_declared(path, options, &Declared::default())
    }

    /// The same, of a model whose configuration says more: how CUDA runs it.
    fn open_declared(path: &Path, options: Options, declared: &Declared) -> Result<Self, EngineError> {
        let origin = path.display().to_string();
        Self::commit(&origin, options, declared, |builder| {
            for (name, content) in external(path).map_err(ort::Error::new)? {
                *builder = builder.clone().with_external_initializer_file_in_memory(name, content)?;
            }
            builder.commit_from_file(path)
        })
        .map_err(|error| match error {
            EngineError::Open { origin, reason } if reason.to_lowercase().contains("protobuf") => {
                EngineError::Open { origin, reason: format!("{reason} {}", what_it_is(path)) }
            }
            error => error,
        })
    }

    /// Opens a graph from the bytes of an ONNX file; `name` stands for it in errors.
    ///
    /// # Errors
    /// [`EngineError::Library`], or an error that has `name`.
    pub fn open_bytes(name: &str, bytes: &[u8], options: Options) -> Result<Self, EngineError> {
        Self::commit(name, options, &Declared::default(), |builder| builder.commit_from_memory(bytes))
    }

    fn commit(
        origin: &str,
        options: Options,
        declared: &Declared,
        commit: impl FnOnce(&mut SessionBuilder) -> ort::Result<Session>,
    ) -> Result<Self, EngineError> {
        let environment = environment(&library_path())?;
        let cuda = match options.device.gpu() {
            None => BTreeMap::new(),
            Some(_) => {
                cuda::options(declared).map_err(|reason| EngineError::Open { origin: origin.to_owned(), reason })?
            }
        };
        let mut builder = configure(&environment, options, &cuda).map_err(|error| match options.device.gpu() {
            None => setup(error),
            Some(_) => EngineError::Setup {
                reason: format!(
                    "{}; {} needs a GPU, an onnxruntime that can use it (SENSORIUM_ONNXRUNTIME), and the libraries that this wants, or write \
                     instance_group {{ kind: KIND_CPU }}",
                    error.message(),
                    options.device
                ),
            },
        })?;
        let session = commit(&mut builder)
            .map_err(|error| EngineError::Open { origin: origin.to_owned(), reason: error.message().to_owned() })?;
        let read =
            |outlets: &[Outlet]| outlets.iter().map(|outlet| tensor_of(origin, outlet)).collect::<Result<Vec<_>, _>>();
        let signature = Signature::new(read(session.inputs())?, read(session.outputs())?);
        Ok(Self {
            session,
            signature,
            // Without an arena there is none to shrink, which onnxruntime would refuse at each run.
            shrink_arena: options.shrink_arena && options.arena,
            device: options.device,
            is_told: false,
        })
    }
}

/// A file beside a model: its name there, and what is in it.
type External = (String, Arc<[u8]>);

/// What lies beside the model at `path` in files of its own. onnxruntime would map these, and serve what somebody writes into them later; one
/// that is cut off meanwhile would end the process.
fn external(path: &Path) -> Result<Vec<External>, String> {
    let folder = folder_of(path);
    let read = |name: String| {
        let path = folder.join(&name);
        match read_shared(&path) {
            Ok(content) => Ok((name, content)),
            Err(error) => Err(format!("the file of its weights, {}: {error}", path.display())),
        }
    };
    names_beside(path).map(read).collect()
}

/// The files beside the one at `path` that it names, if it is ONNX.
pub(crate) fn beside(path: &Path) -> Vec<PathBuf> {
    names_beside(path).map(|name| folder_of(path).join(name)).collect()
}

fn names_beside(path: &Path) -> impl Iterator<Item = String> {
    // Most models are a file alone, which may be large.
    let is_alone = std::fs::read_dir(folder_of(path)).is_ok_and(|entries| entries.count() < 2);
    // One that cannot be read is for onnxruntime to say.
    let model = (!is_alone).then(|| std::fs::read(path).ok()).flatten().unwrap_or_default();
    let is_inside = |name: &String| Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    external_files(&model).into_iter().filter(is_inside)
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

/// What a file is that is no graph, as a sentence.
fn what_it_is(path: &Path) -> &'static str {
    const MOST: u64 = 64; // enough to see it
    let mut head = Vec::new();
    // One that cannot be read has been told before.
    let _ = File::open(path).and_then(|file| file.take(MOST).read_to_end(&mut head));
    let text = head.trim_ascii_start();
    match () {
        () if head.is_empty() => "The file is empty.",
        () if text.starts_with(b"version https://git-lfs") => {
            "It is a pointer of Git LFS: fetch the file itself (git lfs pull)."
        }
        () if text.starts_with(b"<") => {
            "It is a page of HTML or XML, which a download may give in the place of a file."
        }
        () if head.starts_with(b"PK") => {
            "It is an archive, as TorchScript is: name it model.pt, and run sensorium-server-torch."
        }
        () => "It is no ONNX, or was cut off.",
    }
}

/// A file, read to where it stays: it may be large.
fn read_shared(path: &Path) -> io::Result<Arc<[u8]>> {
    let mut file = File::open(path)?;
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut content: Arc<[u8]> = std::iter::repeat_n(0, length).collect();
    if let Some(content) = Arc::get_mut(&mut content) {
        file.read_exact(content)?;
    }
    Ok(content)
}

fn configure(
    environment: &Environment,
    options: Options,
    cuda_options: &BTreeMap<String, String>,
) -> ort::Result<SessionBuilder> {
    let level = match options.optimization {
        Optimization::Basic => GraphOptimizationLevel::Level1,
        Optimization::Extended => GraphOptimizationLevel::Level2,
        Optimization::All => GraphOptimizationLevel::All,
    };
    let builder = Session::builder(environment)?
        .with_log_level(LogLevel::Error)?
        .with_optimization_level(level)?
        .with_intra_threads(options.threads.get())?
        .with_parallel_execution(options.inter_threads.is_some())?
        .with_inter_threads(options.inter_threads.map_or(1, NonZeroUsize::get))?
        .with_memory_pattern(options.memory_pattern)?
        // Threads that wait for work sleep: beside other engines on the same cores, spinning takes their time.
        .with_intra_op_spinning(false)?
        .with_inter_op_spinning(false)?;
    // A device that was asked for and is not there is an error, not a reason to run a hundred times slower.
    let cuda = |device| {
        let set = |cuda: ep::CUDA, (name, value): (&String, &String)| cuda.with_arbitrary_config(name, value);
        cuda_options.iter().fold(ep::CUDA::default(), set).with_device_id(device).build().error_on_failure()
    };
    let mut providers = match options.device {
        Device::Cpu => Vec::new(),
        Device::Cuda(device) => vec![cuda(device)],
        Device::TensorRt(device) => {
            vec![ep::TensorRT::default().with_device_id(device).build().error_on_failure(), cuda(device)]
        }
    };
    providers.push(ep::CPU::default().with_arena_allocator(options.arena).build());
    Ok(builder.with_execution_providers(providers)?)
}

impl Engine for OnnxRuntime {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run_raw(&mut self, inputs: &[RawTensor], outputs: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
        let options = self.options_for(outputs)?;
        self.run_by(&options, inputs, outputs)
    }

    fn run_for(
        &mut self,
        inputs: &[RawTensor],
        outputs: &[usize],
        waiters: Waiters<'_>,
    ) -> Result<Vec<RawTensor>, EngineError> {
        let options = self.options_for(outputs)?;
        let end = || options.terminate().is_ok();
        let (found, is_cut) = watched(waiters, &end, || self.run_by(&options, inputs, outputs));
        // It may have come to its end all the same, or have been the last that this GPU ran.
        found.map_err(|error| match error {
            EngineError::DeviceLost { .. } => error,
            _ if is_cut => EngineError::CutShort,
            error => error,
        })
    }

    fn runs_on_any_thread(&self) -> bool {
        // On a GPU, onnxruntime has handles for each thread that calls it.
        self.device.gpu().is_none()
    }
}

impl OnnxRuntime {
    /// Of a run that gives these outputs.
    fn options_for(&self, outputs: &[usize]) -> Result<RunOptions<HasSelectedOutputs>, EngineError> {
        let selected = names(&self.signature, outputs).fold(OutputSelector::no_default(), OutputSelector::with);
        let mut options = RunOptions::new().map_err(failed)?;
        if self.shrink_arena {
            let arenas = self.device.gpu().map_or("cpu:0".to_owned(), |index| format!("cpu:0;gpu:{index}"));
            options.set("memory.enable_memory_arena_shrinkage", arenas).map_err(failed)?;
        }
        Ok(options.with_outputs(selected))
    }

    /// Runs the graph as `options` say, of which it is to give at least `outputs`.
    fn run_by(
        &mut self,
        options: &RunOptions<HasSelectedOutputs>,
        inputs: &[RawTensor],
        outputs: &[usize],
    ) -> Result<Vec<RawTensor>, EngineError> {
        // They live until the outputs are taken, which may be inputs that the graph passes through.
        let mut copies: Vec<Option<DynValue>> = inputs.iter().map(|_| None).collect();
        let mut values = Vec::with_capacity(inputs.len());
        for ((spec, tensor), copy) in self.signature.inputs().iter().zip(inputs).zip(&mut copies) {
            values.push((Cow::Borrowed(spec.name.as_str()), to_value(&spec.name, tensor, copy)?));
        }
        let forgiven = division::forgiven();
        let mut found = self.session.run_with_options(values, options).map_err(|error| {
            let reason = error.message().to_owned();
            let is_lost = self.device.gpu().is_some() && is_of_a_lost_device(&reason);
            if is_lost { EngineError::DeviceLost { reason } } else { EngineError::Run { reason } }
        })?;
        if division::forgiven() != forgiven && !self.is_told {
            // Another model's run beside this one may have done it.
            self.is_told = true;
            let outputs = self.signature.outputs().iter().map(|output| &*output.name).collect::<Vec<_>>();
            tracing::warn!(
                ?outputs,
                "an integer was divided by zero, or the smallest one by -1, while a model ran: its result is 0, or the dividend"
            );
        }
        let has_copies = copies.iter().any(Option::is_some);
        let is_lent =
            |start: *const u8| has_copies || inputs.iter().any(|tensor| tensor.data().as_ptr_range().contains(&start));
        let take = |name: &str| match found.remove(name) {
            Some(value) => from_value(value, &is_lent),
            None => Err(EngineError::Run { reason: format!("output `{name}` was not computed") }),
        };
        names(&self.signature, outputs).map(take).collect()
    }
}

fn names<'a>(signature: &'a Signature, outputs: &'a [usize]) -> impl Iterator<Item = &'a str> {
    outputs.iter().filter_map(|&index| Some(signature.outputs().get(index)?.name.as_str()))
}

/// A view of the tensor's own memory; only strings and what lies at an odd address are copied, into `copy`.
fn to_value<'a>(
    name: &str,
    tensor: &'a RawTensor,
    copy: &'a mut Option<DynValue>,
) -> Result<SessionInputValue<'a>, EngineError> {
    Ok(match tensor.dtype() {
        DType::Fp32 => view::<f32>(tensor, copy)?,
        DType::Fp64 => view::<f64>(tensor, copy)?,
        DType::Fp16 => view::<f16>(tensor, copy)?,
        DType::Bf16 => view::<bf16>(tensor, copy)?,
        DType::Int64 => view::<i64>(tensor, copy)?,
        DType::Int32 => view::<i32>(tensor, copy)?,
        DType::Int16 => view::<i16>(tensor, copy)?,
        DType::Int8 => view::<i8>(tensor, copy)?,
        DType::Uint64 => view::<u64>(tensor, copy)?,
        DType::Uint32 => view::<u32>(tensor, copy)?,
        DType::Uint16 => view::<u16>(tensor, copy)?,
        DType::Uint8 => view::<u8>(tensor, copy)?,
        DType::Bool => {
            let elements: &[bool] = bytemuck::checked::try_cast_slice(tensor.data())
                .map_err(|_| EngineError::Run { reason: format!("input `{name}` has a boolean that is not 0 or 1") })?;
            TensorRef::from_array_view((tensor.shape(), elements)).map_err(failed)?.into()
        }
        DType::Bytes => {
            let text = |(index, bytes): (usize, &[u8])| {
                let unfit = || EngineError::NotUtf8 { input: name.to_owned(), index };
                // The engine takes strings as C has them, which end at the first zero.
                String::from_utf8(bytes.to_vec()).ok().filter(|text| !text.contains('\0')).ok_or_else(unfit)
            };
            let texts = tensor.strings().enumerate().map(text).collect::<Result<Vec<String>, _>>()?;
            let texts = ort::value::Tensor::from_string_array((tensor.shape(), texts.as_slice())).map_err(failed)?;
            (&*copy.insert(texts.into_dyn())).into()
        }
    })
}

fn view<'a, T>(tensor: &'a RawTensor, copy: &'a mut Option<DynValue>) -> Result<SessionInputValue<'a>, EngineError>
where
    T: PrimitiveTensorElementType + AnyBitPattern + NoUninit + std::fmt::Debug,
{
    Ok(match tensor.numbers::<T>() {
        Cow::Borrowed(elements) => TensorRef::from_array_view((tensor.shape(), elements)).map_err(failed)?.into(),
        Cow::Owned(elements) => {
            let elements = (tensor.shape(), elements.into_boxed_slice());
            let elements = ort::value::Tensor::from_array(elements).map_err(failed)?;
            (&*copy.insert(elements.into_dyn())).into()
        }
    })
}

/// Takes the engine's own memory. Strings are copied, and what is an input that the graph passes through: that memory
/// `is_lent`, and may have another request's tensor in it when this one's answer is sent.
fn from_value(value: DynValue, is_lent: &impl Fn(*const u8) -> bool) -> Result<RawTensor, EngineError> {
    let unfit = |error: RawTensorError| EngineError::Run { reason: error.to_string() };
    let found = match value.dtype() {
        ValueType::Tensor { ty, shape, .. } => element_type(*ty).map(|dtype| (dtype, shape.to_vec())),
        _ => None,
    };
    let Some((dtype, shape)) = found else {
        return Err(EngineError::Run { reason: format!("an output is {:?}", value.dtype()) });
    };
    let data = match dtype {
        DType::Fp32 => Output::<f32>::share(value, is_lent)?,
        DType::Fp64 => Output::<f64>::share(value, is_lent)?,
        DType::Fp16 => Output::<f16>::share(value, is_lent)?,
        DType::Bf16 => Output::<bf16>::share(value, is_lent)?,
        DType::Int64 => Output::<i64>::share(value, is_lent)?,
        DType::Int32 => Output::<i32>::share(value, is_lent)?,
        DType::Int16 => Output::<i16>::share(value, is_lent)?,
        DType::Int8 => Output::<i8>::share(value, is_lent)?,
        DType::Uint64 => Output::<u64>::share(value, is_lent)?,
        DType::Uint32 => Output::<u32>::share(value, is_lent)?,
        DType::Uint16 => Output::<u16>::share(value, is_lent)?,
        DType::Uint8 => Output::<u8>::share(value, is_lent)?,
        DType::Bool => Output::<bool>::share(value, is_lent)?,
        DType::Bytes => {
            let (_, texts) = value.try_extract_strings().map_err(failed)?;
            return RawTensor::from_strings(shape, &texts).map_err(unfit);
        }
    };
    RawTensor::new(dtype, shape, data).map_err(unfit)
}

/// An output that stays in the engine's memory until nobody reads it any more.
struct Output<T> {
    value: DynValue,
    element: PhantomData<T>,
}

impl<T: PrimitiveTensorElementType + NoUninit + Send> Output<T> {
    fn share(value: DynValue, is_lent: &impl Fn(*const u8) -> bool) -> Result<Bytes, EngineError> {
        // What `as_ref` does, where an error can be told.
        let (_, elements) = value.try_extract_tensor::<T>().map_err(failed)?;
        if is_lent(elements.as_ptr().cast()) {
            return Ok(Bytes::copy_from_slice(bytemuck::cast_slice(elements)));
        }
        Ok(Bytes::from_owner(Self { value, element: PhantomData }))
    }
}

impl<T: PrimitiveTensorElementType + NoUninit> AsRef<[u8]> for Output<T> {
    fn as_ref(&self) -> &[u8] {
        self.value.try_extract_tensor::<T>().map_or(&[], |(_, elements)| bytemuck::cast_slice(elements))
    }
}

fn tensor_of(origin: &str, outlet: &Outlet) -> Result<(String, DType, Shape), EngineError> {
    let unsupported = || {
        let found = outlet.dtype().to_string();
        // What converters of scikit-learn's classifiers add unasked.
        let advice = if found.contains("Map<") { " (convert the model with zipmap: False)" } else { "" };
        EngineError::UnsupportedType {
            origin: origin.to_owned(),
            tensor: outlet.name().to_owned(),
            found: format!("{found}{advice}"),
        }
    };
    let ValueType::Tensor { ty, shape, dimension_symbols } = outlet.dtype() else { return Err(unsupported()) };
    let dtype = element_type(*ty).ok_or_else(unsupported)?;
    let dims = shape.iter().zip(dimension_symbols.iter()).map(|(&size, symbol)| match u64::try_from(size) {
        Ok(size) => Dim::Fixed(size),
        Err(_) if symbol.is_empty() => Dim::Any,
        Err(_) => Dim::Symbol(symbol.clone()),
    });
    Ok((outlet.name().to_owned(), dtype, Shape::new(dims.collect())))
}

fn element_type(found: TensorElementType) -> Option<DType> {
    Some(match found {
        TensorElementType::Float32 => DType::Fp32,
        TensorElementType::Float64 => DType::Fp64,
        TensorElementType::Float16 => DType::Fp16,
        TensorElementType::Bfloat16 => DType::Bf16,
        TensorElementType::Int64 => DType::Int64,
        TensorElementType::Int32 => DType::Int32,
        TensorElementType::Int16 => DType::Int16,
        TensorElementType::Int8 => DType::Int8,
        TensorElementType::Uint64 => DType::Uint64,
        TensorElementType::Uint32 => DType::Uint32,
        TensorElementType::Uint16 => DType::Uint16,
        TensorElementType::Uint8 => DType::Uint8,
        TensorElementType::Bool => DType::Bool,
        TensorElementType::String => DType::Bytes,
        _ => return None,
    })
}

#[expect(clippy::needless_pass_by_value, reason = "it is an argument of `map_err`")]
fn setup<R>(error: ort::Error<R>) -> EngineError {
    EngineError::Setup { reason: error.message().to_owned() }
}

#[expect(clippy::needless_pass_by_value, reason = "it is an argument of `map_err`")]
fn failed<R>(error: ort::Error<R>) -> EngineError {
    EngineError::Run { reason: error.message().to_owned() }
}

/// Whether this is what onnxruntime says of an error of CUDA after which, as the documentation of its run-time library says, "the
/// process must be terminated and relaunched".
fn is_of_a_lost_device(said: &str) -> bool {
    let code = said.split_once("CUDA failure ").and_then(|(_, rest)| {
        let (code, _) = rest.split_once(|other: char| !other.is_ascii_digit())?;
        code.parse::<u32>().ok()
    });
    // Memory that cannot be corrected; an illegal address, a timeout, a context destroyed, an assertion; what kernels do wrong.
    code.is_some_and(|code| matches!(code, 214 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 810 | 911))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_lost_by_errors_that_stay_and_not_by_those_that_pass() {
        let said = |code: u32| format!("Non-zero status code: CUDA failure {code}: what it is ; GPU=0 ; expr=...");
        for (code, is_lost) in
            [(700, true), (710, true), (719, true), (214, true), (2, false), (701, false), (705, false)]
        {
            assert_eq!(is_of_a_lost_device(&said(code)), is_lost, "{code}");
        }
        assert!(!is_of_a_lost_device("CUDA failure "));
        assert!(!is_of_a_lost_device("input 700 is missing"));
    }
}

//! The onnxruntime engine: CPU sessions of the library that is loaded when it is first needed.

use std::borrow::Cow;
use std::env;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::builder::SessionBuilder;
use ort::session::{OutputSelector, RunOptions, Session, SessionInputValue};
use ort::value::{DynValue, Outlet, TensorElementType, TensorRef, ValueType};
use sensorium_modality::{DType, Element, Tensor, TensorData};

use crate::EngineError;
use crate::engine::{Engine, Named};
use crate::signature::{Dim, Shape, Signature};

/// Environment variable with the path of the library; read when it is loaded, and at build time for a default.
const LIBRARY_VARIABLE: &str = "SENSORIUM_ONNXRUNTIME";

/// What the loader looks for when no path is known.
const LIBRARY_NAME: &str = "libonnxruntime.so";

/// The one environment of this process, from the first load until its end.
static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);

/// How a graph is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Threads that share the work inside one operator, the caller's included. More make one run faster and, on a
    /// loaded server, all runs together slower: there, more engines with one thread each do better.
    pub threads: NonZeroUsize,
}

impl Default for Options {
    /// One thread.
    fn default() -> Self {
        Self { threads: NonZeroUsize::MIN }
    }
}

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
    // The binding asks for everything and filters later, which would cost a formatted line per operator and run.
    environment.set_log_level(LogLevel::Error);
    tracing::debug!(path = %path.display(), "onnxruntime loaded");
    *current = Some(environment.clone());
    Ok(environment)
}

/// A graph in onnxruntime, on the CPU.
#[derive(Debug)]
pub struct OnnxRuntime {
    session: Session,
    signature: Signature,
}

impl OnnxRuntime {
    /// Opens an ONNX file.
    ///
    /// # Errors
    /// [`EngineError::Library`], or an error that names the file.
    pub fn open(path: &Path, options: Options) -> Result<Self, EngineError> {
        Self::commit(&path.display().to_string(), options, |builder| builder.commit_from_file(path))
    }

    /// Opens a graph from the bytes of an ONNX file; `name` stands for it in errors.
    ///
    /// # Errors
    /// [`EngineError::Library`], or an error that has `name`.
    pub fn open_bytes(name: &str, bytes: &[u8], options: Options) -> Result<Self, EngineError> {
        Self::commit(name, options, |builder| builder.commit_from_memory(bytes))
    }

    fn commit(
        origin: &str,
        options: Options,
        commit: impl FnOnce(&mut SessionBuilder) -> ort::Result<Session>,
    ) -> Result<Self, EngineError> {
        let environment = environment(&library_path())?;
        let mut builder = configure(&environment, options).map_err(setup)?;
        let session = commit(&mut builder)
            .map_err(|error| EngineError::Open { origin: origin.to_owned(), reason: error.message().to_owned() })?;
        let read =
            |outlets: &[Outlet]| outlets.iter().map(|outlet| declared(origin, outlet)).collect::<Result<Vec<_>, _>>();
        let signature = Signature::new(read(session.inputs())?, &read(session.outputs())?);
        Ok(Self { session, signature })
    }
}

fn configure(environment: &Environment, options: Options) -> ort::Result<SessionBuilder> {
    Ok(Session::builder(environment)?
        .with_log_level(LogLevel::Error)?
        .with_intra_threads(options.threads.get())?
        .with_inter_threads(1)?
        // Threads that wait for work sleep: beside other engines on the same cores, spinning takes their time.
        .with_intra_op_spinning(false)?
        .with_inter_op_spinning(false)?)
}

impl Engine for OnnxRuntime {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run(&mut self, inputs: Named, outputs: &[String]) -> Result<Named, EngineError> {
        self.signature.validate(&inputs)?;
        let outputs = self.outputs_wanted(outputs)?;
        let mut values: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = Vec::with_capacity(inputs.len());
        for (name, tensor) in &inputs {
            values.push((Cow::Borrowed(name.as_str()), to_value(name, tensor)?));
        }
        let selected = outputs.iter().fold(OutputSelector::no_default(), OutputSelector::with);
        let options = RunOptions::new().map_err(failed)?.with_outputs(selected);
        let found = self.session.run_with_options(values, &options).map_err(failed)?;
        outputs
            .into_iter()
            .map(|name| {
                let value = found
                    .get(&name)
                    .ok_or_else(|| EngineError::Run { reason: format!("output `{name}` was not computed") })?;
                let tensor = from_value(value)?;
                Ok((name, tensor))
            })
            .collect()
    }
}

impl OnnxRuntime {
    fn outputs_wanted(&self, wanted: &[String]) -> Result<Vec<String>, EngineError> {
        let known: Vec<String> = self.signature.outputs().iter().map(|output| output.name.clone()).collect();
        if wanted.is_empty() {
            return Ok(known);
        }
        match wanted.iter().find(|output| !known.contains(output)) {
            Some(output) => Err(EngineError::UnknownOutput { output: output.clone(), known }),
            None => Ok(wanted.to_vec()),
        }
    }
}

/// A view of the tensor's own memory; only strings are copied.
fn to_value<'a>(name: &str, tensor: &'a Tensor) -> Result<SessionInputValue<'a>, EngineError> {
    let shape = tensor.shape();
    Ok(match tensor.data() {
        TensorData::F32(elements) => view(shape, elements)?,
        TensorData::F64(elements) => view(shape, elements)?,
        TensorData::I64(elements) => view(shape, elements)?,
        TensorData::I32(elements) => view(shape, elements)?,
        TensorData::I8(elements) => view(shape, elements)?,
        TensorData::U8(elements) => view(shape, elements)?,
        TensorData::Bool(elements) => view(shape, elements)?,
        TensorData::Bytes(elements) => {
            let texts = elements
                .iter()
                .enumerate()
                .map(|(index, bytes)| {
                    String::from_utf8(bytes.clone()).map_err(|_| EngineError::NotUtf8 { input: name.to_owned(), index })
                })
                .collect::<Result<Vec<String>, _>>()?;
            ort::value::Tensor::from_string_array((shape, texts.as_slice())).map_err(failed)?.into()
        }
    })
}

fn view<'a, T>(shape: &'a [usize], elements: &'a [T]) -> Result<SessionInputValue<'a>, EngineError>
where
    T: ort::value::PrimitiveTensorElementType + Clone + std::fmt::Debug + 'static,
{
    Ok(TensorRef::from_array_view((shape, elements)).map_err(failed)?.into())
}

fn from_value(value: &DynValue) -> Result<Tensor, EngineError> {
    fn copy<T: Element + ort::value::PrimitiveTensorElementType>(
        value: &DynValue,
    ) -> Result<(Vec<usize>, TensorData), EngineError> {
        let (shape, elements) = value.try_extract_tensor::<T>().map_err(failed)?;
        Ok((sizes(shape), T::wrap(elements.to_vec())))
    }
    let dtype = match value.dtype() {
        ValueType::Tensor { ty, .. } => element_type(*ty),
        _ => None,
    };
    let (shape, data) = match dtype {
        Some(DType::F32) => copy::<f32>(value)?,
        Some(DType::F64) => copy::<f64>(value)?,
        Some(DType::I64) => copy::<i64>(value)?,
        Some(DType::I32) => copy::<i32>(value)?,
        Some(DType::I8) => copy::<i8>(value)?,
        Some(DType::U8) => copy::<u8>(value)?,
        Some(DType::Bool) => copy::<bool>(value)?,
        Some(DType::Bytes) => {
            let (shape, texts) = value.try_extract_strings().map_err(failed)?;
            (sizes(shape), TensorData::Bytes(texts.into_iter().map(String::into_bytes).collect()))
        }
        None => return Err(EngineError::Run { reason: format!("an output is {:?}", value.dtype()) }),
    };
    Tensor::new(shape, data).map_err(|error| EngineError::Run { reason: error.to_string() })
}

fn sizes(shape: &[i64]) -> Vec<usize> {
    shape.iter().map(|&size| usize::try_from(size).unwrap_or(0)).collect()
}

fn declared(origin: &str, outlet: &Outlet) -> Result<(String, DType, Shape), EngineError> {
    let unsupported = || EngineError::UnsupportedType {
        origin: origin.to_owned(),
        tensor: outlet.name().to_owned(),
        found: outlet.dtype().to_string(),
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
        TensorElementType::Float32 => DType::F32,
        TensorElementType::Float64 => DType::F64,
        TensorElementType::Int64 => DType::I64,
        TensorElementType::Int32 => DType::I32,
        TensorElementType::Int8 => DType::I8,
        TensorElementType::Uint8 => DType::U8,
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

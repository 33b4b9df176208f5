use std::path::Path;

use sensorium_engine::{
    Declared, Engine, EngineError, Optimization, Options, RESET_METHOD, RawTensor, Signature, dtype_name,
};

use crate::ffi::{self, Failure, Module, Output, Returned};
use crate::message::{brief, unreadable};
use crate::ports::{MOST_OUTPUTS, Place, Ports};

/// A TorchScript module, open.
#[derive(Debug)]
pub struct TorchScript {
    module: Module,
    /// Where it is, unless on the processor.
    gpu: Option<i32>,
    ports: Ports,
    threads: usize,
    /// Whether the graph is rewritten for the shapes that come.
    optimize: bool,
    reset_method: Option<String>,
    /// Outputs that a run may give.
    capacity: usize,
}

impl TorchScript {
    /// Opens a file that `torch.jit.save` wrote. `declared` says what the file leaves open: the types and shapes of
    /// tensors, and the names of outputs; without any inputs or outputs they are those of the file.
    ///
    /// # Errors
    /// [`EngineError::Open`], with what is missing; [`EngineError::Setup`] for a GPU that cannot be used.
    pub fn open(path: &Path, options: Options, declared: &Declared) -> Result<Self, EngineError> {
        // TensorRT runs nothing of TorchScript, and CUDA what that cannot run.
        let gpu = options.device.gpu();
        if let Some(index) = gpu {
            ffi::need_gpu(index).map_err(|said| EngineError::Setup { reason: without_gpu(&said) })?;
        }
        let unfit = |reason| EngineError::Open { origin: path.display().to_string(), reason };
        let module = Module::load(path, gpu).map_err(|said| unfit(unreadable(&said)))?;
        let returned = module.returned();
        let ports = Ports::new(declared, &module.arguments(), &returned).map_err(unfit)?;
        let reset_method = declared.parameters.get(RESET_METHOD).cloned();
        if let Some(method) = reset_method.as_ref().filter(|method| !module.has_method(method)) {
            return Err(unfit(format!(
                "its parameter {RESET_METHOD} names `{method}`, and the file has no method of that name that takes nothing"
            )));
        }
        let capacity = match &returned {
            Returned::Fixed(fields) => fields.len(),
            Returned::List | Returned::Dict | Returned::Other(_) => MOST_OUTPUTS,
        };
        let optimize = options.optimization != Optimization::Basic;
        Ok(Self { module, gpu, ports, threads: options.threads.get(), optimize, reset_method, capacity })
    }
}

impl Engine for TorchScript {
    fn signature(&self) -> &Signature {
        &self.ports.signature
    }

    fn run_raw(&mut self, inputs: &[RawTensor], outputs: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
        let argument = |input: &Option<usize>| input.and_then(|input| inputs.get(input));
        let arguments: Vec<_> = self.ports.arguments.iter().map(argument).collect();
        let found = self.module.run(&arguments, self.threads, self.optimize, self.capacity);
        let mut found: Vec<Option<Output>> = found.map_err(failed)?.into_iter().map(Some).collect();
        let output = |&wanted: &usize| {
            let spec = &self.ports.signature.outputs()[wanted];
            let is_it = |(index, output): (usize, &Option<Output>)| match &self.ports.outputs[wanted] {
                Place::Index(place) => index == *place,
                Place::Key(key) => output.as_ref().is_some_and(|output| output.name().as_ref() == Some(key)),
            };
            let position = found.iter().enumerate().position(is_it);
            let given = position.and_then(|position| found[position].take());
            let given = given.ok_or_else(|| run(format!("it gave no output `{}` this time", spec.name)))?;
            let tensor = given.into_tensor().map_err(run)?;
            if tensor.dtype() != spec.dtype {
                return Err(run(format!(
                    "it gave output `{}` as {}, its configuration says {}",
                    spec.name,
                    dtype_name(tensor.dtype()),
                    dtype_name(spec.dtype)
                )));
            }
            let fits = |(size, declared): (&i64, &Option<u64>)| {
                declared.is_none_or(|declared| u64::try_from(*size) == Ok(declared))
            };
            if tensor.shape().len() != spec.shape.len() || !tensor.shape().iter().zip(&spec.shape).all(fits) {
                return Err(run(format!(
                    "it gave output `{}` with shape {:?}, its configuration says {}",
                    spec.name,
                    tensor.shape(),
                    shape_text(&spec.shape)
                )));
            }
            Ok(tensor)
        };
        outputs.iter().map(output).collect()
    }

    fn runs_on_any_thread(&self) -> bool {
        // With more, each thread that calls has a pool of its own; and for a GPU, libraries have handles for each.
        self.threads == 1 && self.gpu.is_none()
    }

    fn keeps_state(&self) -> bool {
        // What a method does to its module is code.
        true
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        match &self.reset_method {
            Some(method) => self.module.call(method, self.threads, self.optimize).map_err(failed),
            None => Ok(()),
        }
    }
}

fn without_gpu(said: &str) -> String {
    format!(
        "TorchScript cannot use the GPU here: {}; it needs the whole of libtorch, with its CUDA libraries, and a GPU, or write instance_group {{ kind: KIND_CPU }}",
        brief(said)
    )
}

fn failed(failure: Failure) -> EngineError {
    match failure {
        Failure::Run(said) => run(brief(&said)),
        Failure::DeviceLost(said) => EngineError::DeviceLost { reason: brief(&said) },
    }
}

fn run(reason: String) -> EngineError {
    EngineError::Run { reason }
}

fn shape_text(shape: &[Option<u64>]) -> String {
    let sizes: Vec<_> = shape.iter().map(|size| size.map_or("-1".to_owned(), |size| size.to_string())).collect();
    format!("[{}]", sizes.join(", "))
}

/// Threads that libtorch's operators use on the thread that asks.
pub fn thread_count() -> usize {
    ffi::threads()
}

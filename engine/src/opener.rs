//! What opens a model's file: the engines that a program has, and those that another one has.

use std::collections::BTreeMap;
use std::path::Path;

use sensorium_artifact::DType;

use crate::engine::Engine;
use crate::options::Options;
use crate::{EngineError, onnxruntime};

/// An engine by the names of its models. Programs are given a list of them: which libraries a program links is decided
/// where it is put together and nowhere else.
#[derive(Clone, Copy, Debug)]
pub struct Opener {
    /// As configurations name it: `backend`.
    pub backend: &'static str,
    /// As older configurations name it: `platform`.
    pub platform: &'static str,
    /// The file of a version, unless its configuration names another.
    pub file: &'static str,
    /// Opens such a file.
    pub open: Open,
}

/// Opens the file of a model as an engine: how it runs, and what its configuration says that the file may leave open.
pub type Open = fn(&Path, Options, &Declared) -> Result<Box<dyn Engine>, EngineError>;

/// Parameter of a configuration: the method that makes a module forget what it keeps from run to run ([`Engine::reset`]).
pub const RESET_METHOD: &str = "reset_method";

/// What a model's configuration says about its graph, for files that do not say it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Declared {
    /// Inputs, those included that the server fills.
    pub inputs: Vec<DeclaredTensor>,
    /// Outputs, those included that the server keeps.
    pub outputs: Vec<DeclaredTensor>,
    /// Parameters of the configuration.
    pub parameters: BTreeMap<String, String>,
    /// Parameters of its accelerator `cuda`: options of onnxruntime's CUDA provider.
    pub cuda: BTreeMap<String, String>,
}

/// A tensor as far as a configuration describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeclaredTensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Option<DType>,
    /// Its sizes as the graph has them, the batch included; `None` for those that a request decides.
    pub shape: Option<Vec<Option<u64>>>,
}

/// An engine that another program of this project has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    /// As configurations name it.
    pub backend: &'static str,
    /// As older configurations name it.
    pub platform: &'static str,
    /// The file of a version.
    pub file: &'static str,
    /// The program that has it.
    pub program: &'static str,
}

/// The engines that some program has, whatever this one links.
pub const ELSEWHERE: &[Elsewhere] = &[Elsewhere {
    backend: "pytorch",
    platform: "pytorch_libtorch",
    file: "model.pt",
    program: "sensorium-server-torch",
}];

impl Opener {
    /// ONNX models, by onnxruntime.
    pub const ONNXRUNTIME: Self =
        Self { backend: "onnxruntime", platform: "onnxruntime_onnx", file: "model.onnx", open: onnxruntime::open };
}

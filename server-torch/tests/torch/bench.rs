//! A repository of TorchScript to test with.

use std::{fs, ops::Deref};

use sensorium_engine_torch::{Attribute, OPENER, compile};
pub(crate) use sensorium_server::fixture::{f32s, infer, named};
use sensorium_server::{
    error::InferError,
    fixture,
    model::{NamedTensor, Request, Sequence, SequenceId},
    repository::{Openers, Registry},
};

/// A folder with models, some of which are compiled here.
pub(crate) struct Bench(fixture::Bench);

impl Deref for Bench {
    type Target = fixture::Bench;

    fn deref(&self) -> &fixture::Bench {
        &self.0
    }
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self(fixture::Bench::new())
    }

    /// Compiles a model's first version.
    pub(crate) fn compile(&self, model: &str, source: &str, attributes: &[(&str, Attribute<'_>)]) -> &Self {
        let folder = self.path().join(model).join("1");
        fs::create_dir_all(&folder).unwrap();
        compile(source, attributes, &folder.join("model.pt")).unwrap();
        self
    }

    pub(crate) async fn open(&self) -> Registry {
        self.open_with(Openers::with(&[OPENER])).await
    }
}

pub(crate) fn request(inputs: Vec<NamedTensor>) -> Request {
    Request { inputs, ..Request::default() }
}

/// A step of a sequence.
pub(crate) fn step(id: u64, start: bool, end: bool, inputs: Vec<NamedTensor>) -> Request {
    Request { sequence: Some(Sequence { id: SequenceId::Number(id), start, end }), ..request(inputs) }
}

/// The numbers of a model's first output.
pub(crate) async fn answer(registry: &Registry, model: &str, request: Request) -> Result<Vec<f32>, InferError> {
    Ok(infer(registry, model, request).await?.outputs[0].tensor.numbers().into_owned())
}

/// Why the only model of a repository is not ready.
pub(crate) fn reason(registry: &Registry) -> String {
    registry.index(false).remove(0).reason
}

/// An error with all its causes.
pub(crate) fn said(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

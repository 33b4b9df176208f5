//! A repository to test with.

use std::{fs, num::NonZeroUsize, path::Path, time::Duration};

use sensorium_artifact::Volumes;
use sensorium_engine::{DType, Options, RawTensor};
use sensorium_engine_torch::{Attribute, OPENER, compile};
use sensorium_modality::Limits;
use sensorium_server::{
    error::InferError,
    metrics::Metrics,
    model::{NamedTensor, Request, Response, ResponseCache, Sequence, SequenceId},
    pool::CpuPool,
    repository::{GraphPlaces, Openers, Opening, Registry, RepositoryConfig},
    scheduler::{Batching, Slots},
    security::Outgoing,
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// A folder with models.
pub(crate) struct Bench(TempDir);

impl Bench {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file of a model, such as `config.pbtxt`.
    pub(crate) fn write(&self, model: &str, file: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.path().join(model).join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        self
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

    pub(crate) async fn open_with(&self, openers: Openers) -> Registry {
        let repositories = vec![self.path().to_str().unwrap().to_owned()];
        let config = RepositoryConfig { repositories, ..RepositoryConfig::default() };
        Registry::open(config, opening(openers)).await.unwrap()
    }
}

fn opening(openers: Openers) -> Opening {
    Opening {
        volumes: Volumes::default(),
        cache: std::env::temp_dir(),
        engine: Options { threads: NonZeroUsize::MIN, ..Options::default() },
        openers,
        graphs: GraphPlaces::default(),
        outgoing: Outgoing::default(),
        batching: Batching { max_rows: 32, max_waiting_rows: 1024, max_delay: Duration::ZERO },
        slots: Slots::new(2),
        responses: ResponseCache::new(1 << 20),
        limits: Limits::default(),
        pool: CpuPool::new(1, 16),
        metrics: Metrics::new(),
        lost: CancellationToken::new(),
    }
}

/// A tensor of numbers.
pub(crate) fn f32s(shape: &[i64], values: &[f32]) -> RawTensor {
    RawTensor::from_vec(DType::Fp32, shape.to_vec(), values.to_vec()).unwrap()
}

pub(crate) fn named(name: &str, tensor: RawTensor) -> NamedTensor {
    NamedTensor { name: name.to_owned(), tensor }
}

pub(crate) fn request(inputs: Vec<NamedTensor>) -> Request {
    Request { inputs, ..Request::default() }
}

/// A step of a sequence.
pub(crate) fn step(id: u64, start: bool, end: bool, inputs: Vec<NamedTensor>) -> Request {
    Request { sequence: Some(Sequence { id: SequenceId::Number(id), start, end }), ..request(inputs) }
}

pub(crate) async fn infer(registry: &Registry, model: &str, request: Request) -> Result<Response, InferError> {
    registry.model(model, "")?.infer(request).await
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

//! A repository of models in a folder of its own, opened in this process: for tests of what serves models (cargo feature
//! `fixture`).
//!
//! ```
//! use sensorium_server::{fixture::Bench, repository::Openers};
//!
//! # let runtime = tokio::runtime::Runtime::new().unwrap();
//! let bench = Bench::new();
//! bench.write("m", "1/model.onnx", "no graph");
//! let registry = runtime.block_on(bench.open_with(Openers::default()));
//! assert!(!registry.ready("m", ""));
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot set its bench up has failed, and says where")]

use std::{fs, num::NonZeroUsize, path::Path, time::Duration};

use sensorium_artifact::Volumes;
use sensorium_engine::{DType, Options, RawTensor};
use sensorium_modality::Limits;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::{
    error::InferError,
    metrics::Metrics,
    model::{NamedTensor, Request, Response, ResponseCache},
    pool::CpuPool,
    repository::{ControlMode, GraphPlaces, Openers, Opening, Registry, RepositoryConfig},
    scheduler::{Batching, Slots},
    security::Outgoing,
};

/// A folder with models. It goes with this.
#[derive(Debug)]
pub struct Bench(TempDir);

impl Bench {
    /// An empty one.
    #[expect(clippy::new_without_default, reason = "a default does not make folders")]
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file of a model, such as `1/model.onnx`.
    pub fn write(&self, model: &str, file: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.path().join(model).join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        self
    }

    /// Opens the models as they are loaded in `mode`, those in `load` at the start.
    pub async fn open(&self, mode: ControlMode, load: &[&str]) -> Registry {
        let load = load.iter().map(|name| (*name).to_owned()).collect();
        self.registry(RepositoryConfig { mode, load, ..RepositoryConfig::default() }, Openers::default()).await
    }

    /// Opens all models, once.
    pub async fn open_all(&self) -> Registry {
        self.open_with(Openers::default()).await
    }

    /// Opens all models with these engines, once.
    pub async fn open_with(&self, openers: Openers) -> Registry {
        self.registry(RepositoryConfig::default(), openers).await
    }

    async fn registry(&self, config: RepositoryConfig, openers: Openers) -> Registry {
        let repositories = vec![self.path().to_str().unwrap().to_owned()];
        Registry::open(RepositoryConfig { repositories, ..config }, opening(openers)).await.unwrap()
    }
}

/// What a server of one core would open models with.
pub(crate) fn opening(openers: Openers) -> Opening {
    Opening {
        volumes: Volumes::default(),
        cache: std::env::temp_dir(),
        engine: Options { threads: NonZeroUsize::MIN, ..Options::default() },
        openers,
        graphs: GraphPlaces::default(),
        outgoing: Outgoing::default(),
        max_message_bytes: usize::MAX,
        batching: Batching { max_rows: 32, max_waiting_rows: 1024, max_delay: Duration::ZERO },
        slots: Slots::new(1),
        responses: ResponseCache::new(1 << 20),
        limits: Limits::default(),
        pool: CpuPool::new(1, 16, 1 << 30),
        metrics: Metrics::new(),
        lost: CancellationToken::new(),
    }
}

/// A tensor of numbers.
pub fn f32s(shape: &[i64], values: &[f32]) -> RawTensor {
    RawTensor::from_vec(DType::Fp32, shape.to_vec(), values.to_vec()).unwrap()
}

/// A tensor as the input of this name.
pub fn named(name: &str, tensor: RawTensor) -> NamedTensor {
    NamedTensor { name: name.to_owned(), tensor }
}

/// Asks the newest version of a model.
///
/// # Errors
/// What a client would be told.
pub async fn infer(registry: &Registry, model: &str, request: Request) -> Result<Response, InferError> {
    registry.model(model, "")?.infer(request).await
}

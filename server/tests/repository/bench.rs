//! A repository to test with, and tiny models to put into it.

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use sensorium_artifact::Volumes;
use sensorium_engine::{DType, Options, RawTensor};
use sensorium_modality::Limits;
use sensorium_onnx::{DType as OnnxDType, Dim, GraphBuilder};
use sensorium_server::{
    error::InferError,
    metrics::Metrics,
    model::{NamedTensor, Request, Response, ResponseCache},
    pool::CpuPool,
    repository::{ControlMode, GraphPlaces, IndexEntry, Openers, Opening, Registry, RepositoryConfig},
    scheduler::{Batching, Slots},
    security::Outgoing,
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

const BATCH: Dim<'static> = Dim::Symbol("batch");

/// `y = x * factor`, over rows of `width` numbers, or of any where it is `None`.
pub(crate) fn scale(factor: f32, width: Option<i64>) -> Vec<u8> {
    let width = width.map_or(Dim::Symbol("length"), Dim::Fixed);
    let mut graph = GraphBuilder::new("scale");
    let x = graph.input("x", OnnxDType::F32, &[BATCH, width]);
    let factor = graph.scalar_f32(factor);
    let y = graph.node("Mul", &[&x, &factor], vec![]);
    graph.output("y", &y, OnnxDType::F32, &[BATCH, width]);
    graph.finish(20).unwrap().to_bytes()
}

/// `y = x * factor` over exactly three numbers: a model that cannot batch.
pub(crate) fn scale_three(factor: f32) -> Vec<u8> {
    let mut graph = GraphBuilder::new("scale_three");
    let x = graph.input("x", OnnxDType::F32, &[Dim::Fixed(3)]);
    let factor = graph.scalar_f32(factor);
    let y = graph.node("Mul", &[&x, &factor], vec![]);
    graph.output("y", &y, OnnxDType::F32, &[Dim::Fixed(3)]);
    graph.finish(20).unwrap().to_bytes()
}

/// A folder with models.
pub(crate) struct Bench {
    folder: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file of a model, such as `1/model.onnx`.
    pub(crate) fn write(&self, model: &str, file: &str, content: impl AsRef<[u8]>) -> &Self {
        let path: PathBuf = self.path().join(model).join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        self
    }

    pub(crate) async fn open(&self, mode: ControlMode, load: &[&str]) -> Registry {
        let config = RepositoryConfig {
            repositories: vec![self.path().to_str().unwrap().to_owned()],
            mode,
            load: load.iter().map(|name| (*name).to_owned()).collect(),
            ..RepositoryConfig::default()
        };
        Registry::open(config, opening()).await.unwrap()
    }

    /// Opens all models, once.
    pub(crate) async fn open_all(&self) -> Registry {
        self.open(ControlMode::None, &[]).await
    }
}

fn opening() -> Opening {
    Opening {
        volumes: Volumes::default(),
        cache: std::env::temp_dir(),
        engine: Options { threads: NonZeroUsize::MIN, ..Options::default() },
        openers: Openers::default(),
        graphs: GraphPlaces::default(),
        outgoing: Outgoing::default(),
        batching: Batching { max_rows: 32, max_waiting_rows: 1024, max_delay: Duration::ZERO },
        slots: Slots::new(1),
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

/// A request with one input, `x`.
pub(crate) fn request(tensor: RawTensor) -> Request {
    Request { inputs: vec![NamedTensor { name: "x".to_owned(), tensor }], ..Request::default() }
}

pub(crate) async fn infer(registry: &Registry, model: &str, request: Request) -> Result<Response, InferError> {
    registry.model(model, "")?.infer(request).await
}

/// The numbers of the only output of a model for one input, `x`.
pub(crate) async fn answer(registry: &Registry, model: &str, shape: &[i64], values: &[f32]) -> Vec<f32> {
    let response = infer(registry, model, request(f32s(shape, values))).await.unwrap();
    response.outputs[0].tensor.numbers().into_owned()
}

/// The index as lines: name, version, state, reason.
pub(crate) fn index(registry: &Registry) -> Vec<String> {
    let line = |IndexEntry { name, version, state, reason }: IndexEntry| {
        format!("{name} {version} {} {reason}", state.as_str()).trim_end().to_owned()
    };
    registry.index(false).into_iter().map(line).collect()
}

/// Polls until `holds`, and fails after a while.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !holds().await {
        assert!(started.elapsed() < Duration::from_secs(30), "{what}: not within 30 s");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

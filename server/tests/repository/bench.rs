//! Tiny models, and what is asked of them.

use std::time::{Duration, Instant};

use sensorium_artifact::{Store, Volumes};
use sensorium_engine::{RawTensor, fixture};
use sensorium_onnx::{DType as OnnxDType, Dim, GraphBuilder};
pub(crate) use sensorium_server::fixture::{Bench, f32s, infer, named};
use sensorium_server::{
    model::Request,
    repository::{IndexEntry, Registry},
};

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

/// Writes the tiny artifact into folders of models, such as `tiny/1`.
pub(crate) async fn write_artifact(bench: &Bench, folders: &[&str]) {
    let stored = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("file://{}", stored.path().display()), &Volumes::default()).unwrap();
    let artifact = fixture::commit(&store, "tiny").await.unwrap();
    let files = store.fetch(&artifact, stored.path()).await.unwrap();
    for file in artifact.manifest.files.iter().map(|file| file.path.as_str()).chain(["manifest.json"]) {
        for folder in folders {
            bench.write(folder, file, std::fs::read(files.join(file)).unwrap());
        }
    }
}

/// A request with one input, `x`.
pub(crate) fn request(tensor: RawTensor) -> Request {
    Request { inputs: vec![named("x", tensor)], ..Request::default() }
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

//! From an artifact in a store to models that answer.
//!
//! An artifact gives several models: each of its graphs as `NAME.GRAPH`, which takes tensors, and, where it answers
//! questions, the whole of it as `NAME`, which takes encoded images and texts.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use sensorium_artifact::{Digest, MANIFEST_FILE, Manifest, Store};
use sensorium_engine::{Engine, Pipeline, PipelineError, SameFile, Signature, open_graph};
use sensorium_proto::inference::{ModelConfig, ModelDynamicBatching, model_config::SchedulingChoice};
use sensorium_telemetry::error_line;
use tempfile::TempDir;

use super::{LoadError, Loaded, ModelSource, Opening, complete, engines, remote};
use crate::{
    files,
    model::{Binding, Graph, Interface, ModelVersion, Multimodal, Runs, Statistics},
    scheduler::{Policy, Reopen, Scheduler, Setup, Slots},
};

/// The version of an artifact that comes from a store: there, artifacts are told apart by digest.
const VERSION: u64 = 1;

/// Fetches, verifies and opens an artifact.
///
/// # Errors
/// [`LoadError`].
pub(super) async fn load(source: &ModelSource, opening: &Opening) -> Result<Loaded, LoadError> {
    let failed = |error| LoadError::Artifact { name: source.name.clone(), source: Box::new(error) };
    let store = Store::open(&source.store, &opening.volumes).map_err(failed)?;
    let artifact = store.resolve(&source.artifact).await.map_err(failed)?;
    let folder = store.fetch(&artifact, &opening.cache).await.map_err(failed)?;
    let opened = {
        let (name, opening, artifact) = (source.name.clone(), opening.clone(), artifact.clone());
        // Opening a graph reads and optimises it: seconds of CPU for a large one.
        tokio::task::spawn_blocking(move || {
            let folder = Folder { path: folder, _kept: None };
            open(&name, VERSION, &folder, &artifact.digest, &artifact.manifest, &opening)
        })
        .await
    };
    let cut_short = |error| LoadError::Thread { name: source.name.clone(), source: std::io::Error::other(error) };
    let loaded = opened.map_err(cut_short)??;
    tracing::info!(model = source.name, artifact = %artifact.digest, bytes = artifact.manifest.total_bytes(), "opened");
    Ok(loaded)
}

/// Whether a version's folder holds an artifact.
pub(super) fn is_artifact(folder: &Path) -> bool {
    folder.join(MANIFEST_FILE).is_file()
}

/// Verifies and opens an artifact that lies in a version's folder. Blocks.
///
/// # Errors
/// The first thing that is not what the manifest says, as a sentence about the model.
pub(super) fn open_folder(
    name: &str,
    version: u64,
    folder: &Path,
    own: Option<Arc<TempDir>>,
    opening: &Opening,
) -> Result<Loaded, String> {
    let path = folder.join(MANIFEST_FILE);
    let bytes = files::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let manifest = Manifest::from_slice(&path.display().to_string(), &bytes).map_err(|error| error_line(&error))?;
    for file in &manifest.files {
        let (digest, _) = Digest::of_file(&folder.join(&file.path))
            .map_err(|error| format!("its file {} cannot be read: {error}", file.path))?;
        if digest != file.digest {
            return Err(format!("its file {} is not the one that its manifest names", file.path));
        }
    }
    open(name, version, &Folder { path: folder.to_owned(), _kept: own }, &Digest::of(&bytes), &manifest, opening)
        .map_err(|error| error_line(&error))
}

/// Where an artifact's files are.
#[derive(Clone)]
struct Folder {
    path: PathBuf,
    /// A folder that is there for as long as somebody may open something in it.
    _kept: Option<Arc<TempDir>>,
}

/// Opens the graphs of an artifact whose files are in `folder`, all as the same version.
fn open(
    name: &str,
    version: u64,
    folder: &Folder,
    digest: &Digest,
    manifest: &Manifest,
    opening: &Opening,
) -> Result<Loaded, LoadError> {
    let failed = |source| LoadError::Open { name: name.to_owned(), source: Box::new(source) };
    opening.graphs.check(name, manifest)?;
    let mut loaded = Loaded::default();
    let mut graphs = BTreeMap::new();
    for graph in manifest.graphs.iter().filter(|graph| opening.graphs.is_served(&graph.name)) {
        let model = format!("{name}.{}", graph.name);
        let addresses = opening.graphs.addresses(&graph.name);
        let engines = if addresses.is_empty() {
            here(folder, graph, opening).map_err(failed)?
        } else {
            elsewhere(&model, graph, digest, addresses, opening)
        };
        let model = open_one(&model, version, engines, opening)
            .map_err(|source| LoadError::Thread { name: name.to_owned(), source })?
            .of_artifact(digest.to_string());
        if let [opened] = model.graphs() {
            graphs.insert(graph.name.clone(), opened.clone());
        }
        loaded.versions.push(model);
    }
    // What answers questions needs all graphs.
    if !opening.graphs.are_all_served() {
        return Ok(loaded);
    }
    if manifest.pipeline.is_some() {
        let pipeline = Pipeline::new(&folder.path, manifest, opening.limits).map_err(failed)?;
        let (digest, pool) = (digest.to_string(), opening.pool.clone());
        let max_rows = opening.batching.max_rows;
        let served = opening.metrics.served(name, &version.to_string());
        let multimodal = Multimodal::new((name.to_owned(), version), digest, pipeline, graphs, pool, max_rows);
        let multimodal = Arc::new(multimodal.in_metrics(served));
        if let Some(interface) = multimodal.interface() {
            let config = ModelConfig {
                name: name.to_owned(),
                platform: "sensorium_multimodal".to_owned(),
                ..complete::config(&interface)
            };
            let runs = Runs::Multimodal(multimodal.clone());
            let model = ModelVersion::new(version.to_string(), config, interface, multimodal.statistics(), runs);
            loaded.versions.push(model.of_artifact(multimodal.digest().to_owned()));
        }
        loaded.multimodal.insert(version, multimodal);
    }
    Ok(loaded)
}

/// What runs a graph, here or elsewhere.
struct Engines {
    signature: Signature,
    all: Vec<Box<dyn Engine>>,
    reopen: Option<Reopen>,
    slots: Slots,
    /// Threads of each, as far as they compute here.
    threads: usize,
    /// Whether they run on a GPU of this machine.
    on_gpu: bool,
}

/// One engine of this process.
fn here(folder: &Folder, graph: &sensorium_artifact::Graph, opening: &Opening) -> Result<Engines, PipelineError> {
    let same = SameFile::at(&folder.path.join(&graph.file));
    let engine = open_graph(&folder.path, graph, opening.engine)?;
    let reopen: Reopen = {
        let (folder, graph, options) = (folder.clone(), graph.clone(), opening.engine);
        Arc::new(move || {
            // The whole of it: a closure captures no more than the fields that it names.
            let Folder { path, _kept } = &folder;
            let is_same = || same.check().map_err(|error| error_line(&error));
            is_same()?;
            let engine = open_graph(path, &graph, options).map_err(|error| error_line(&error))?;
            is_same().map(|()| engine)
        })
    };
    let on_gpu = opening.engine.device.gpu().is_some();
    Ok(Engines {
        signature: engine.signature().clone(),
        all: vec![engine],
        reopen: Some(reopen),
        // A run on a GPU takes none of the processor's.
        slots: if on_gpu { Slots::new(1) } else { opening.slots.clone() },
        threads: if on_gpu { 1 } else { opening.engine.threads.get() },
        on_gpu,
    })
}

/// As many calls of another server as may be under way.
fn elsewhere(
    model: &str,
    graph: &sensorium_artifact::Graph,
    digest: &Digest,
    addresses: Vec<String>,
    opening: &Opening,
) -> Engines {
    let signature = Signature::of_manifest(&graph.inputs, &graph.outputs);
    let calls = remote::open(model, signature.clone(), digest.to_string(), addresses, opening);
    // A call waits and computes nothing.
    let slots = Slots::new(calls.len());
    let all = calls.into_iter().map(|call| Box::new(call) as Box<dyn Engine>).collect();
    Engines { signature, all, reopen: None, slots, threads: 1, on_gpu: false }
}

/// One graph as a model of its own.
fn open_one(name: &str, version: u64, engines: Engines, opening: &Opening) -> std::io::Result<ModelVersion> {
    let Engines { signature, mut all, reopen, slots, threads, on_gpu } = engines;
    let mut batching = opening.batching;
    // A graph exported for one batch size takes exactly that.
    if let Some(rows) = signature.inputs().iter().find_map(|input| input.shape.first().copied().flatten()) {
        batching.max_rows = usize::try_from(rows).unwrap_or(usize::MAX);
    }
    let interface = Interface {
        inputs: signature.inputs().to_vec(),
        outputs: signature.outputs().to_vec(),
        max_rows: Some(batching.max_rows),
    };
    let config = ModelConfig {
        name: name.to_owned(),
        platform: "onnxruntime_onnx".to_owned(),
        backend: "onnxruntime".to_owned(),
        scheduling_choice: Some(SchedulingChoice::DynamicBatching(ModelDynamicBatching::default())),
        ..complete::config(&interface)
    };
    let binding = Binding::identity(signature.inputs().len(), signature.outputs().len());
    let mut policy = Policy::of_server(batching);
    if on_gpu {
        policy = policy.in_steps();
        engines::rehearse(&mut all, None, &policy.steps);
    }
    let statistics = Arc::new(Statistics::default());
    let setup = Setup {
        graph: name.to_owned(),
        engines: all,
        reopen,
        policy,
        batches: true,
        slots,
        threads,
        metrics: opening.metrics.graph(name, &version.to_string()),
        statistics: statistics.clone(),
        lost: opening.lost.clone(),
    };
    let scheduler = Scheduler::start(setup, &signature).map_err(std::io::Error::other)?;
    let runs = Runs::Graph(Graph::new(name.to_owned(), signature, scheduler, None), binding);
    let model = ModelVersion::new(version.to_string(), config, interface, statistics, runs);
    Ok(model.in_metrics(opening.metrics.served(name, &version.to_string())))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use sensorium_artifact::Volumes;
    use sensorium_engine::fixture;

    use super::*;
    use crate::{fixture::opening, repository::Openers};

    #[tokio::test]
    async fn files_that_came_with_a_request_are_there_for_as_long_as_an_engine_may_be_opened_again() {
        let own = Arc::new(tempfile::tempdir().unwrap());
        let store = Store::open(&format!("file://{}", own.path().display()), &Volumes::default()).unwrap();
        let artifact = fixture::commit(&store, "tiny").await.unwrap();
        let files = store.fetch(&artifact, own.path()).await.unwrap();
        let loaded = open_folder("tiny", 1, &files, Some(own), &opening(Openers::default())).unwrap();
        assert!(loaded.versions.len() > 1 && files.is_dir(), "nobody else keeps them");
        drop(loaded);
        let dropped = Instant::now();
        while files.exists() {
            assert!(dropped.elapsed() < Duration::from_secs(20), "they are left behind");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

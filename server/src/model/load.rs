//! From an artifact in a store to models that answer.

use std::{collections::BTreeMap, path::PathBuf, str::FromStr, sync::Arc};

use sensorium_artifact::{Artifact, ArtifactError, Graph, Store, Volumes};
use sensorium_engine::{Engine as _, Options, Pipeline, PipelineError, open_graph};
use sensorium_modality::Limits;
use tokio_util::sync::CancellationToken;

use super::{GraphModel, Model, Multimodal, Repository, Runs};
use crate::{
    metrics::Metrics,
    pool::CpuPool,
    scheduler::{Batching, Scheduler},
};

/// Which artifact to serve, and under which name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSource {
    /// What clients call it.
    pub name: String,
    /// URI of the store.
    pub store: String,
    /// Name or digest of the artifact in the store.
    pub artifact: String,
}

/// Text that is not `NAME=URI`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a model to serve: {reason}; write NAME=STORE/ARTIFACT, such as vqa=pvc://artifacts/vqa-int8")]
pub struct SourceError {
    value: String,
    reason: &'static str,
}

impl FromStr for ModelSource {
    type Err = SourceError;

    /// `NAME=STORE/ARTIFACT`, or `NAME=STORE/objects/HEX`, which is how an artifact's own URI ends.
    fn from_str(value: &str) -> Result<Self, SourceError> {
        let refused = |reason| SourceError { value: value.to_owned(), reason };
        let (name, uri) = value.split_once('=').ok_or_else(|| refused("it has no `=`"))?;
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
            return Err(refused("the name needs letters, digits, `-`, `_` and `.`"));
        }
        let (store, last) = uri.rsplit_once('/').ok_or_else(|| refused("the URI has no `/`"))?;
        if last.is_empty() || store.ends_with('/') || !store.contains("://") {
            return Err(refused("the URI has no store before the artifact"));
        }
        let (store, artifact) = match store.strip_suffix("/objects") {
            Some(store) => (store, format!("sha256:{last}")),
            None => (store, last.to_owned()),
        };
        Ok(Self { name: name.to_owned(), store: store.to_owned(), artifact })
    }
}

/// How models are opened: everything but which ones.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Where claims are mounted.
    pub volumes: Volumes,
    /// Where artifacts of remote stores are kept.
    pub cache: PathBuf,
    /// Threads of each engine.
    pub engine: Options,
    /// How requests are put together.
    pub batching: Batching,
    /// What is accepted of media and texts.
    pub limits: Limits,
    /// Where they are prepared.
    pub pool: CpuPool,
    /// Where everything is counted.
    pub metrics: Metrics,
    /// Cancelled when an engine's thread dies.
    pub lost: CancellationToken,
}

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Two models of one name.
    #[error("model {name:?} is given twice; give each a name of its own")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// The artifact cannot be read.
    #[error("model {name:?} could not be read")]
    Artifact {
        /// The model.
        name: String,
        /// Why.
        source: Box<ArtifactError>,
    },
    /// Its graphs cannot be run.
    #[error("model {name:?} could not be opened")]
    Open {
        /// The model.
        name: String,
        /// Why.
        source: Box<PipelineError>,
    },
    /// A thread could not be started, or died while it opened the model.
    #[error("no thread could be started for model {name:?}, or it died")]
    Thread {
        /// The model.
        name: String,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// Fetches, verifies and opens all models.
///
/// # Errors
/// [`LoadError`] for the first that cannot be served.
pub async fn load(sources: &[ModelSource], opening: &Opening) -> Result<Repository, LoadError> {
    let mut repository = Repository::default();
    for source in sources {
        let failed = |error| LoadError::Artifact { name: source.name.clone(), source: Box::new(error) };
        let store = Store::open(&source.store, &opening.volumes).map_err(failed)?;
        let artifact = store.resolve(&source.artifact).await.map_err(failed)?;
        let folder = store.fetch(&artifact, &opening.cache).await.map_err(failed)?;
        let opened = {
            let (name, opening, artifact) = (source.name.clone(), opening.clone(), artifact.clone());
            // Opening a graph reads and optimises it: seconds of CPU for a large one.
            tokio::task::spawn_blocking(move || open(&name, &folder, &artifact, &opening)).await
        };
        let cut_short = |error| LoadError::Thread { name: source.name.clone(), source: std::io::Error::other(error) };
        let opened = opened.map_err(cut_short)??;
        repository.add(&source.name, opened)?;
        tracing::info!(model = source.name, artifact = %artifact.digest, bytes = artifact.manifest.total_bytes(), "opened");
    }
    Ok(repository)
}

/// One artifact's graphs, by their names in it, and its pipeline.
struct Opened {
    graphs: BTreeMap<String, Arc<GraphModel>>,
    multimodal: Option<Multimodal>,
    max_rows: usize,
}

fn open(name: &str, folder: &std::path::Path, artifact: &Artifact, opening: &Opening) -> Result<Opened, LoadError> {
    let failed = |source| LoadError::Open { name: name.to_owned(), source: Box::new(source) };
    let mut graphs = BTreeMap::new();
    for graph in &artifact.manifest.graphs {
        let model = open_one(name, folder, graph, opening)?;
        graphs.insert(graph.name.clone(), Arc::new(model));
    }
    let max_rows = opening.batching.max_rows;
    let multimodal = if artifact.manifest.pipeline.is_some() {
        let pipeline = Pipeline::new(folder, &artifact.manifest, opening.limits).map_err(failed)?;
        let digest = artifact.digest.to_string();
        let pool = opening.pool.clone();
        Some(Multimodal::new(name.to_owned(), digest, pipeline, graphs.clone(), pool, max_rows))
    } else {
        None
    };
    Ok(Opened { graphs, multimodal, max_rows })
}

fn open_one(name: &str, folder: &std::path::Path, graph: &Graph, opening: &Opening) -> Result<GraphModel, LoadError> {
    let engine = open_graph(folder, graph, opening.engine)
        .map_err(|source| LoadError::Open { name: name.to_owned(), source: Box::new(source) })?;
    let signature = engine.signature().clone();
    let full_name = format!("{name}.{}", graph.name);
    let metrics = opening.metrics.graph(&full_name);
    let mut batching = opening.batching;
    // A graph exported for one batch size takes exactly that.
    if let Some(rows) = signature.inputs().iter().find_map(|input| input.shape.first().copied().flatten()) {
        batching.max_rows = usize::try_from(rows).unwrap_or(usize::MAX);
    }
    let scheduler = Scheduler::start(full_name.clone(), Box::new(engine), batching, metrics, opening.lost.clone())
        .map_err(|source| LoadError::Thread { name: name.to_owned(), source })?;
    Ok(GraphModel { name: full_name, signature, scheduler, max_rows: batching.max_rows })
}

impl Repository {
    fn add(&mut self, name: &str, opened: Opened) -> Result<(), LoadError> {
        for graph in opened.graphs.into_values() {
            let model = Model {
                inputs: graph.signature.inputs().to_vec(),
                outputs: graph.signature.outputs().to_vec(),
                max_rows: graph.max_rows,
                platform: "onnxruntime_onnx",
                runs: Runs::Graph(graph.clone()),
            };
            self.insert(graph.name.clone(), model)?;
            self.graphs.push(graph);
        }
        let Some(multimodal) = opened.multimodal.map(Arc::new) else { return Ok(()) };
        if let Some((inputs, outputs)) = multimodal.signature() {
            let runs = Runs::Multimodal(multimodal.clone());
            let model = Model { inputs, outputs, max_rows: opened.max_rows, platform: "sensorium_multimodal", runs };
            self.insert(name.to_owned(), model)?;
        }
        match self.multimodal.insert(name.to_owned(), multimodal) {
            None => Ok(()),
            Some(_) => Err(LoadError::Duplicate { name: name.to_owned() }),
        }
    }

    fn insert(&mut self, name: String, model: Model) -> Result<(), LoadError> {
        if self.models.contains_key(&name) {
            return Err(LoadError::Duplicate { name });
        }
        self.models.insert(name, model);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_name_a_store_and_an_artifact() {
        let source = |name: &str, store: &str, artifact: &str| {
            Ok(ModelSource { name: name.to_owned(), store: store.to_owned(), artifact: artifact.to_owned() })
        };
        assert_eq!("vqa=pvc://artifacts/vqa-int8".parse(), source("vqa", "pvc://artifacts", "vqa-int8"));
        assert_eq!("a=s3://b/c/d".parse(), source("a", "s3://b/c", "d"));
        assert_eq!("a=file:///s/objects/00ff".parse(), source("a", "file:///s", "sha256:00ff"));
    }

    #[test]
    fn a_source_that_lacks_something_is_refused_with_the_form_it_needs() {
        for value in ["vqa", "=pvc://a/b", "a b=pvc://a/b", "vqa=pvc://a", "vqa=pvc://a/", "vqa=b", "vqa=a/b"] {
            let error = value.parse::<ModelSource>().unwrap_err();
            assert!(error.to_string().contains("NAME=STORE/ARTIFACT"), "{error}");
        }
    }
}

//! The models that are served, by name.
//!
//! An artifact gives several: each of its graphs as `NAME.GRAPH`, which takes tensors, and, where it answers questions,
//! the whole of it as `NAME`, which takes encoded images and texts. All of them are called in the same way.

mod load;
mod multimodal;
mod probe;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use sensorium_artifact::TensorSpec;
use sensorium_engine::{Named, Signature};

pub use self::{
    load::{LoadError, ModelSource, Opening, load},
    multimodal::{Item, Multimodal, Task},
};
use crate::{
    error::InferError,
    metrics::VERSION,
    scheduler::{Scheduler, Work},
    wire::excerpt,
};

/// A graph with its signature and its engine.
#[derive(Debug)]
pub struct GraphModel {
    name: String,
    signature: Signature,
    scheduler: Scheduler,
    max_rows: usize,
}

impl GraphModel {
    /// Runs `work` in a batch.
    async fn run(&self, work: Work) -> Result<Named, InferError> {
        // What contradicts itself across inputs must not meet other requests in a batch.
        self.signature.validate(&work.inputs).map_err(|source| InferError::engine(&self.name, source))?;
        Ok(self.scheduler.run(work).await?)
    }

    /// As a runner calls it: all outputs.
    async fn run_all(&self, inputs: Named) -> Result<Named, InferError> {
        let rows = inputs.first().and_then(|(_, tensor)| tensor.row_count()).unwrap_or(1);
        let outputs = self.signature.outputs().iter().map(|spec| spec.name.clone()).collect();
        self.run(Work { inputs, rows, outputs }).await
    }

    /// Runs one row of zeros, unless the engine has proven itself in the last `age`.
    pub async fn probe(&self, age: Duration) -> Result<(), InferError> {
        if self.scheduler.last_success().is_some_and(|ago| ago < age) {
            return Ok(());
        }
        self.run_all(probe::inputs(&self.signature)).await.map(drop)
    }

    /// Its name, `MODEL.GRAPH`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Time since the engine last ran without failing.
    pub fn last_success(&self) -> Option<Duration> {
        self.scheduler.last_success()
    }
}

/// Something that can be called with tensors.
#[derive(Clone, Debug)]
pub struct Model {
    /// What it takes; the first dimension of each input is the batch.
    pub inputs: Vec<TensorSpec>,
    /// What it gives.
    pub outputs: Vec<TensorSpec>,
    /// Rows that it takes at once.
    pub max_rows: usize,
    /// What runs it, in Triton's words.
    pub platform: &'static str,
    runs: Runs,
}

#[derive(Clone, Debug)]
enum Runs {
    Graph(Arc<GraphModel>),
    Multimodal(Arc<Multimodal>),
}

impl Model {
    /// Runs work that was decoded for this model.
    ///
    /// # Errors
    /// [`InferError`].
    pub async fn infer(&self, work: Work) -> Result<Named, InferError> {
        match &self.runs {
            Runs::Graph(graph) => graph.run(work).await,
            Runs::Multimodal(multimodal) => multimodal.infer(work).await,
        }
    }
}

/// All models of a server. Built once, then shared.
#[derive(Debug, Default)]
pub struct Repository {
    models: BTreeMap<String, Model>,
    multimodal: BTreeMap<String, Arc<Multimodal>>,
    graphs: Vec<Arc<GraphModel>>,
}

impl Repository {
    /// The model called `name`; `version` may be empty.
    ///
    /// # Errors
    /// [`InferError::UnknownModel`], [`InferError::UnknownVersion`].
    pub fn model(&self, name: &str, version: &str) -> Result<&Model, InferError> {
        let model = self.models.get(name).ok_or_else(|| unknown(name, self.models.keys()))?;
        if !version.is_empty() && version != VERSION {
            let (model, version) = (name.to_owned(), excerpt(version));
            return Err(InferError::UnknownVersion { model, version, known: VERSION });
        }
        Ok(model)
    }

    /// The model called `name`, for typed parts.
    ///
    /// # Errors
    /// [`InferError::UnknownModel`].
    pub fn multimodal(&self, name: &str) -> Result<&Arc<Multimodal>, InferError> {
        self.multimodal.get(name).ok_or_else(|| unknown(name, self.multimodal.keys()))
    }

    /// Every graph, for health and for the end.
    pub fn graphs(&self) -> &[Arc<GraphModel>] {
        &self.graphs
    }

    /// Names of all models, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.models.keys().map(String::as_str)
    }

    /// Lets every engine finish what waits, and closes it.
    pub async fn stop(&self) {
        for graph in &self.graphs {
            graph.scheduler.stop().await;
        }
    }
}

fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a String>) -> InferError {
    InferError::UnknownModel { model: excerpt(name), known: known.cloned().collect() }
}

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use sensorium_artifact::{Graph, Manifest};
use sensorium_modality::{Limits, Tensor};

use super::{GraphRunner, Pipeline, VqaAnswer};
use crate::engine::{Engine, Named};
use crate::error::{EngineError, PipelineError};
use crate::onnxruntime;
use crate::opener::Declared;
use crate::options::Options;

/// Opens one graph of an artifact and makes sure that it is what the manifest says.
///
/// # Errors
/// [`PipelineError::Engine`] and [`PipelineError::SignatureMismatch`], which name the graph.
pub fn open_graph(artifact_dir: &Path, graph: &Graph, options: Options) -> Result<Box<dyn Engine>, PipelineError> {
    let engine = onnxruntime::open(&artifact_dir.join(&graph.file), options, &Declared::default())
        .map_err(|source| PipelineError::Engine { graph: graph.name.clone(), source })?;
    match engine.signature().difference(&graph.inputs, &graph.outputs) {
        Some(reason) => Err(PipelineError::SignatureMismatch { graph: graph.name.clone(), reason }),
        None => Ok(engine),
    }
}

/// A pipeline whose graphs run in this process, on the thread that calls. For evaluation and tools; calls from several
/// threads take turns at each graph.
pub struct LocalPipeline {
    pipeline: Pipeline,
    graphs: LocalGraphs,
}

/// Open graphs by name.
struct LocalGraphs(BTreeMap<String, Mutex<Box<dyn Engine>>>);

impl LocalPipeline {
    /// Opens all graphs of the artifact whose files are in `artifact_dir`, with no more than the default limits on
    /// what is accepted.
    ///
    /// # Errors
    /// As [`Pipeline::new`] and [`open_graph`].
    pub fn open(artifact_dir: &Path, manifest: &Manifest, options: Options) -> Result<Self, PipelineError> {
        let pipeline = Pipeline::new(artifact_dir, manifest, Limits::default())?;
        let open = |graph: &Graph| Ok((graph.name.clone(), Mutex::new(open_graph(artifact_dir, graph, options)?)));
        let graphs = LocalGraphs(pipeline.graphs().map(open).collect::<Result<_, PipelineError>>()?);
        Ok(Self { pipeline, graphs })
    }

    /// The pipeline itself, for its pieces.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// Answers one question about each image, as one batch. An image that comes several times is decoded and encoded
    /// once.
    ///
    /// # Errors
    /// The first item that is refused; a graph that fails; a model without a VQA head; an empty batch.
    pub fn vqa(&self, questions: &[(&[u8], &str)]) -> Result<Vec<VqaAnswer>, PipelineError> {
        let mut images: Vec<&[u8]> = Vec::new();
        let mut position_of: HashMap<&[u8], usize> = HashMap::new();
        let mut image_of_question = Vec::with_capacity(questions.len());
        for (image, _) in questions {
            let position = *position_of.entry(image).or_insert_with(|| {
                images.push(image);
                images.len() - 1
            });
            image_of_question.push(position);
        }
        let images = self.rows("image", images)?;
        let texts = self.rows("text", questions.iter().map(|(_, question)| question.as_bytes()))?;
        immediate(async {
            let image = self.pipeline.encode(&self.graphs, "image", images).await?;
            let text = self.pipeline.encode(&self.graphs, "text", texts).await?;
            self.pipeline.answer(&self.graphs, text, image.select(&image_of_question)?).await
        })
    }

    /// Embeds items of one modality in the space that all of the model's modalities share: f32 `[N, E]`.
    ///
    /// # Errors
    /// The first item that is refused; a graph that fails; a model without a contrastive head; an empty batch.
    pub fn embed(&self, modality: &str, items: &[&[u8]]) -> Result<Tensor, PipelineError> {
        let rows = self.rows(modality, items.iter().copied())?;
        let encoded = immediate(self.pipeline.encode(&self.graphs, modality, rows))?;
        encoded.embedding().cloned().ok_or(PipelineError::NoSuchTask { task: "contrastive" })
    }

    fn rows<'a>(&self, modality: &str, items: impl IntoIterator<Item = &'a [u8]>) -> Result<Tensor, PipelineError> {
        let rows = items.into_iter().map(|item| self.pipeline.prepare(modality, item));
        Ok(Tensor::stack(&rows.collect::<Result<Vec<_>, _>>()?)?)
    }
}

impl GraphRunner for LocalPipeline {
    type Error = PipelineError;

    async fn run(&self, graph: &str, inputs: Named) -> Result<Named, PipelineError> {
        self.graphs.run(graph, inputs).await
    }
}

impl GraphRunner for LocalGraphs {
    type Error = PipelineError;

    async fn run(&self, graph: &str, inputs: Named) -> Result<Named, PipelineError> {
        let engine = self.0.get(graph).ok_or_else(|| PipelineError::NotAPipeline {
            artifact: "in this process".to_owned(),
            reason: format!("there is no graph `{graph}`"),
        })?;
        // An engine keeps nothing between runs, so one that panicked under another caller is as good as new.
        let mut engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
        engine.run(inputs, &[]).map_err(|source: EngineError| PipelineError::Engine { graph: graph.to_owned(), source })
    }
}

/// Runs a future over [`LocalGraphs`], which never waits: the first poll finishes it.
fn immediate<T>(future: impl Future<Output = Result<T, PipelineError>>) -> Result<T, PipelineError> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("local graphs answer in the call that asks"),
    }
}

//! A whole artifact as one model: parts go in, answers come out.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use bytes::Bytes;
use sensorium_artifact::{DType, TensorSpec};
use sensorium_engine::{GraphRunner, Named, Pipeline, PipelineError, RawTensor, VqaAnswer, VqaInput};
use sensorium_modality::Tensor;

use super::{Counted, Failure, Fitted, Graph, Interface, Statistics, Timings};
use crate::{
    error::{InferError, PartsError},
    metrics::Served,
    pool::{CpuPool, Room},
    wire::excerpt,
};

const IMAGE: &str = "image";
const TEXT: &str = "text";
const ANSWER: &str = "answer";
const SCORE: &str = "score";

/// What a model can be asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Answer a question about an image.
    Vqa,
    /// Embed each part in the space that all modalities share.
    Embed,
}

impl Task {
    /// The word in requests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vqa => "vqa",
            Self::Embed => "embed",
        }
    }
}

/// One part of a request: bytes of a modality.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// "text" or "image".
    pub modality: &'static str,
    /// UTF-8, or an encoded image.
    pub bytes: Bytes,
}

/// An artifact's pipeline over its graphs' batchers.
#[derive(Debug)]
pub struct Multimodal {
    name: String,
    version: u64,
    digest: String,
    pipeline: Arc<Pipeline>,
    graphs: Graphs,
    pool: CpuPool,
    max_rows: usize,
    /// Of the model of tensors that it is, too.
    statistics: Arc<Statistics>,
    /// Its series are shown while it is here.
    _served: Option<Arc<Served>>,
}

/// The graphs of one artifact, by their names in it.
type Graphs = BTreeMap<String, Arc<Graph>>;

/// What runs the graphs for one request.
struct Runner<'a> {
    graphs: &'a Graphs,
    /// When its caller stops waiting.
    deadline: Option<Instant>,
}

impl GraphRunner for Runner<'_> {
    type Error = InferError;

    async fn run(&self, graph: &str, inputs: Named) -> Result<Named, InferError> {
        let graph = self.graphs.get(graph).ok_or_else(|| PipelineError::BadOutput {
            graph: graph.to_owned(),
            output: "every output".to_owned(),
            reason: "is missing: the artifact has no such graph".to_owned(),
        })?;
        graph.run_named(inputs, self.deadline).await
    }
}

impl Multimodal {
    pub(crate) fn new(
        (name, version): (String, u64),
        digest: String,
        pipeline: Pipeline,
        graphs: BTreeMap<String, Arc<Graph>>,
        pool: CpuPool,
        max_rows: usize,
    ) -> Self {
        let (pipeline, statistics) = (Arc::new(pipeline), Arc::default());
        Self { name, version, digest, pipeline, graphs, pool, max_rows, statistics, _served: None }
    }

    /// Shown in the metrics as one that is served.
    pub(crate) fn in_metrics(self, served: Arc<Served>) -> Self {
        Self { _served: Some(served), ..self }
    }

    /// Which version of the model it is.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// What it has done, as a model of tensors and as this.
    pub(crate) fn statistics(&self) -> Arc<Statistics> {
        self.statistics.clone()
    }

    /// Counts what becomes of a request of so many rows.
    pub(crate) async fn counted<T>(
        &self,
        rows: usize,
        answer: impl Future<Output = Result<T, InferError>>,
    ) -> Result<T, InferError> {
        let started = Instant::now();
        let mut counted = Counted { statistics: &self.statistics, started, failed: Some(Failure::Canceled) };
        let answer = counted.note(answer.await)?;
        counted.failed = None;
        let took = started.elapsed();
        self.statistics.composed();
        self.statistics.succeeded(took, rows, &Timings { compute_infer: took, ..Timings::default() });
        Ok(answer)
    }

    /// Digest of the artifact.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What it can do, best known first.
    pub fn tasks(&self) -> Vec<Task> {
        let spec = self.pipeline.spec();
        let vqa = spec.vqa_answers().map(|_| Task::Vqa);
        let embed = spec.contrastive_dim().map(|_| Task::Embed);
        vqa.into_iter().chain(embed).collect()
    }

    /// The task of that name; the first of [`Multimodal::tasks`] for the empty name.
    ///
    /// # Errors
    /// [`PartsError::UnknownTask`].
    pub fn task(&self, name: &str) -> Result<Task, PartsError> {
        let tasks = self.tasks();
        let found = tasks.iter().copied().find(|task| name.is_empty() || task.as_str() == name);
        found.ok_or_else(|| PartsError::UnknownTask {
            model: self.name.clone(),
            task: excerpt(name),
            known: tasks.into_iter().map(Task::as_str).collect(),
        })
    }

    fn runner(&self, deadline: Option<Instant>) -> Runner<'_> {
        Runner { graphs: &self.graphs, deadline }
    }

    /// Answers one question: one image and one text, in any order. What is not answered by `deadline` need not be.
    ///
    /// # Errors
    /// [`InferError::Parts`] for other parts, [`InferError::Pipeline`] for one that is refused, or what the engines say.
    pub async fn answer(&self, items: Vec<Item>, deadline: Option<Instant>) -> Result<VqaAnswer, InferError> {
        let (image, text) = image_and_text(items)?;
        let mut answers = self.vqa(vec![image], vec![text], deadline).await?;
        answers.pop().ok_or_else(|| no_row(ANSWER))
    }

    /// Embeds each item: rows of `E` values, in order.
    ///
    /// # Errors
    /// As [`Multimodal::answer`].
    pub async fn embed(&self, items: Vec<Item>, deadline: Option<Instant>) -> Result<Vec<Vec<f32>>, InferError> {
        if items.is_empty() || items.len() > self.max_rows {
            return Err(PartsError::Count { task: Task::Embed.as_str(), found: items.len(), max: self.max_rows }.into());
        }
        let modalities: Vec<&'static str> = items.iter().map(|item| item.modality).collect();
        let place = self.pool.enter()?;
        let mut rows = Vec::with_capacity(items.len());
        for (row, Item { modality, bytes }) in items.into_iter().enumerate() {
            let pipeline = self.pipeline.clone();
            rows.push(place.run(move |room| prepare(&pipeline, room, modality, row, &bytes)).await??);
        }
        drop(place);
        let mut embeddings = vec![Vec::new(); rows.len()];
        for modality in [IMAGE, TEXT] {
            let places: Vec<usize> = (0..rows.len()).filter(|&place| modalities[place] == modality).collect();
            if places.is_empty() {
                continue;
            }
            let batch: Vec<&Tensor> = places.iter().map(|&place| &rows[place]).collect();
            let batch = Tensor::stack(&batch).map_err(PipelineError::from)?;
            let encoded = self.pipeline.encode(&self.runner(deadline), modality, batch).await?;
            let vectors = encoded.embedding().ok_or(PipelineError::NoSuchTask { task: "contrastive" })?;
            for (row, place) in places.into_iter().enumerate() {
                let vector = vectors.row(row).map_err(PipelineError::from)?;
                embeddings[place] = vector.as_slice::<f32>().map_err(PipelineError::from)?.to_vec();
            }
        }
        Ok(embeddings)
    }

    /// What it takes and gives as a model of tensors, where it answers questions.
    pub(crate) fn interface(&self) -> Option<Interface> {
        self.pipeline.spec().vqa_answers()?;
        let column = |name: &str, dtype| TensorSpec { name: name.to_owned(), dtype, shape: vec![None] };
        Some(Interface {
            inputs: vec![column(IMAGE, DType::Bytes), column(TEXT, DType::Bytes)],
            outputs: vec![column(ANSWER, DType::Bytes), column(SCORE, DType::Fp32)],
            max_rows: Some(self.max_rows),
        })
    }

    /// Runs a request that fits [`Multimodal::interface`].
    pub(super) async fn infer(
        &self,
        request: &Fitted,
        deadline: Option<Instant>,
    ) -> Result<Vec<RawTensor>, InferError> {
        let column = |input: usize, name| match request.inputs.get(input) {
            Some(tensor) => Ok(tensor.strings().map(|item| tensor.data().slice_ref(item)).collect()),
            None => Err(no_row(name)),
        };
        let (images, texts): (Vec<Bytes>, Vec<Bytes>) = (column(0, IMAGE)?, column(1, TEXT)?);
        let answers = self.vqa(images, texts, deadline).await?;
        let shape = vec![answers.len() as i64];
        let output = |&output: &usize| {
            let tensor = if output == 0 {
                let texts: Vec<&str> = answers.iter().map(|answer| answer.answer.as_str()).collect();
                RawTensor::from_strings(shape.clone(), &texts)
            } else {
                RawTensor::from_vec(DType::Fp32, shape.clone(), answers.iter().map(|answer| answer.score).collect())
            };
            tensor.map_err(|_| no_row(ANSWER))
        };
        request.outputs.iter().map(output).collect()
    }

    /// Answers question `i` about image `i`.
    async fn vqa(
        &self,
        images: Vec<Bytes>,
        texts: Vec<Bytes>,
        deadline: Option<Instant>,
    ) -> Result<Vec<VqaAnswer>, InferError> {
        let place = self.pool.enter()?;
        let mut prepared = Vec::with_capacity(images.len());
        for (row, (image, text)) in images.into_iter().zip(texts).enumerate() {
            let pipeline = self.pipeline.clone();
            let pair = place.run(move |room| {
                // Text first: it is the cheaper one to refuse.
                let text = prepare(&pipeline, room, TEXT, row, &text)?;
                Ok::<_, InferError>(VqaInput { image: prepare(&pipeline, room, IMAGE, row, &image)?, text })
            });
            prepared.push(pair.await??);
        }
        drop(place);
        self.pipeline.vqa(&self.runner(deadline), &prepared).await
    }
}

/// Prepares one row, once there is room for what that takes.
fn prepare(
    pipeline: &Pipeline,
    room: &Room,
    input: &'static str,
    row: usize,
    item: &[u8],
) -> Result<Tensor, InferError> {
    let prepared = pipeline.open(input, item).and_then(|opened| {
        let _taken = room.take(opened.memory());
        Ok(opened.process()?)
    });
    prepared.map_err(|source| InferError::Item { input, row, source: Box::new(source) })
}

fn image_and_text(items: Vec<Item>) -> Result<(Bytes, Bytes), PartsError> {
    let task = Task::Vqa.as_str();
    let (mut image, mut text) = (None, None);
    for (part, item) in items.into_iter().enumerate() {
        let place = if item.modality == IMAGE { &mut image } else { &mut text };
        if place.replace(item.bytes).is_some() {
            return Err(PartsError::Extra { task, modality: item.modality, part });
        }
    }
    let image = image.ok_or(PartsError::Missing { task, modality: IMAGE })?;
    let text = text.ok_or(PartsError::Missing { task, modality: TEXT })?;
    Ok((image, text))
}

fn no_row(name: &str) -> InferError {
    InferError::from(PipelineError::BadOutput {
        graph: "fusion".to_owned(),
        output: name.to_owned(),
        reason: "has no rows".to_owned(),
    })
}

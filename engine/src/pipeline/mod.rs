//! From an image and a question to an answer, over graphs that somebody else runs.

mod answer;
mod local;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;

use futures::future::try_join;
use sensorium_artifact::{Graph, Manifest, TensorSpec};
use sensorium_modality::{DType, Limits, Opened, PipelineSpec, Registry, Tensor};

pub use answer::{VqaAnswer, rank_answers};
pub use local::{LocalPipeline, open_graph};

use crate::engine::Named;
use crate::error::PipelineError;
use crate::signature::artifact_dtype;

const FUSION: &str = "fusion";
const LOGITS: &str = "logits";

/// Whoever runs graphs: in this process, behind a batcher, on another machine.
pub trait GraphRunner: Sync {
    /// What a run fails with.
    type Error: From<PipelineError> + Send;

    /// Runs the graph called `graph` once and returns all its outputs.
    fn run(&self, graph: &str, inputs: Named) -> impl Future<Output = Result<Named, Self::Error>> + Send;
}

/// What a multimodal artifact does with its inputs: which preparation, which graphs, in which order, and what comes out.
/// It holds no engine and keeps no state between calls.
#[derive(Clone, Debug)]
pub struct Pipeline {
    spec: PipelineSpec,
    registry: Registry,
    graphs: BTreeMap<String, Graph>,
}

/// An image and a question, ready for the graphs.
#[derive(Clone, Debug, PartialEq)]
pub struct VqaInput {
    /// One row of the image encoder's input, f32 `[3, size, size]`.
    pub image: Tensor,
    /// One row of the text encoder's input, i64 `[max_length]`.
    pub text: Tensor,
}

/// What an encoder made of `N` rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded {
    /// By output name: always `{modality}_features`, often `{modality}_mask`, sometimes `{modality}_embedding`.
    outputs: BTreeMap<String, Tensor>,
    modality: &'static str,
}

impl Encoded {
    /// A sequence of vectors per row, f32 `[N, L, D]`.
    pub fn features(&self) -> Option<&Tensor> {
        self.outputs.get(&format!("{}_features", self.modality))
    }

    /// One vector per row in the space that all modalities share, f32 `[N, E]`, where the model was trained for it.
    pub fn embedding(&self) -> Option<&Tensor> {
        self.outputs.get(&format!("{}_embedding", self.modality))
    }

    /// The rows named, in that order; a row may come more than once.
    ///
    /// # Errors
    /// A row past the end.
    pub fn select(&self, rows: &[usize]) -> Result<Self, PipelineError> {
        let select = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.select(rows)?));
        let outputs = self.outputs.iter().map(select).collect::<Result<_, PipelineError>>()?;
        Ok(Self { outputs, modality: self.modality })
    }
}

impl Pipeline {
    /// Reads what `manifest` says about its pipeline, and the processors' files from `artifact_dir`, where the
    /// artifact's files are.
    ///
    /// # Errors
    /// A manifest without a pipeline, one whose graphs do not fit together or do not fit the tasks, or a processor
    /// that cannot be set up.
    pub fn new(artifact_dir: &Path, manifest: &Manifest, limits: Limits) -> Result<Self, PipelineError> {
        let not_a_pipeline = |reason: String| PipelineError::NotAPipeline { artifact: manifest.name.clone(), reason };
        let spec =
            manifest.pipeline.clone().ok_or_else(|| not_a_pipeline("its manifest has no `pipeline`".to_owned()))?;
        let spec: PipelineSpec = serde_json::from_value(spec).map_err(|error| not_a_pipeline(error.to_string()))?;
        // Whatever else lies there, or elsewhere, is not what was verified.
        let is_listed = |path: &str| manifest.files.iter().any(|file| file.path == path);
        if let Some(text) = spec.text.as_ref().filter(|text| !is_listed(&text.tokenizer)) {
            return Err(not_a_pipeline(format!("its tokenizer {:?} is none of its files", text.tokenizer)));
        }
        let registry = Registry::from_spec(&spec, artifact_dir, limits)?;
        let graphs = manifest.graphs.iter().map(|graph| (graph.name.clone(), graph.clone())).collect();
        let pipeline = Self { spec, registry, graphs };
        pipeline.validate().map_err(not_a_pipeline)?;
        Ok(pipeline)
    }

    /// How the model's inputs were prepared and what its outputs mean.
    pub fn spec(&self) -> &PipelineSpec {
        &self.spec
    }

    /// The modalities it reads.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The graphs it runs, by name.
    pub fn graphs(&self) -> impl Iterator<Item = &Graph> {
        self.graphs.values()
    }

    /// Every encoder takes what its modality prepares, the fusion graph takes what the encoders give, and there is a
    /// logit for each answer. What fits here cannot fail for its names or types in the middle of a request.
    fn validate(&self) -> Result<(), String> {
        let mut given: Vec<&TensorSpec> = Vec::new();
        for modality in self.registry.iter() {
            let name = encoder(modality.name());
            let graph = self.graphs.get(&name).ok_or_else(|| format!("there is no graph `{name}`"))?;
            match graph.inputs.as_slice() {
                [input] if input.name == modality.input_name() => {}
                inputs => return Err(format!("graph `{name}` takes {}, not {}", names(inputs), modality.input_name())),
            }
            let features = format!("{}_features", modality.name());
            if !graph.outputs.iter().any(|output| output.name == features) {
                return Err(format!("graph `{name}` gives {}, not {features}", names(&graph.outputs)));
            }
            given.extend(&graph.outputs);
        }
        if let Some(dim) = self.spec.contrastive_dim() {
            for modality in self.registry.iter() {
                let wanted = format!("{}_embedding", modality.name());
                let found = given.iter().find(|spec| spec.name == wanted);
                if found.is_none_or(|spec| spec.shape.last() != Some(&Some(dim as u64))) {
                    return Err(format!("output `{wanted}` must be there with {dim} values per row"));
                }
            }
        }
        let Some(answers) = self.spec.vqa_answers() else { return Ok(()) };
        let fusion = self.graphs.get(FUSION).ok_or_else(|| format!("there is no graph `{FUSION}`"))?;
        for input in &fusion.inputs {
            if !given.iter().any(|spec| spec.name == input.name && spec.dtype == input.dtype) {
                return Err(format!("no encoder gives `{}`, which graph `{FUSION}` takes", input.name));
            }
        }
        let logits = TensorSpec {
            name: LOGITS.to_owned(),
            dtype: artifact_dtype(DType::F32),
            shape: vec![None, Some(answers.len() as u64)],
        };
        if fusion.outputs != [logits] || answers.is_empty() {
            return Err(format!(
                "graph `{FUSION}` must give only `{LOGITS}`, one for each of {} answers",
                answers.len()
            ));
        }
        Ok(())
    }

    /// Prepares an image and a question: decoding, resizing, tokenising. CPU work of a millisecond or so.
    ///
    /// # Errors
    /// [`PipelineError::Modality`] for an item that is refused.
    pub fn prepare_vqa(&self, image: &[u8], question: &str) -> Result<VqaInput, PipelineError> {
        Ok(VqaInput { image: self.prepare("image", image)?, text: self.prepare("text", question.as_bytes())? })
    }

    /// Prepares one item of any modality: a row of its encoder's input.
    ///
    /// # Errors
    /// [`PipelineError::Modality`] for an item that is refused, or a modality that this model does not read.
    pub fn prepare(&self, modality: &str, item: &[u8]) -> Result<Tensor, PipelineError> {
        Ok(self.registry.get(modality)?.process(item)?)
    }

    /// The first half of [`Pipeline::prepare`]: what that will take, before it is done.
    ///
    /// # Errors
    /// As there.
    pub fn open<'a>(&'a self, modality: &str, item: &'a [u8]) -> Result<Opened<'a>, PipelineError> {
        Ok(self.registry.get(modality)?.open(item)?)
    }

    /// Encodes prepared rows of one modality, `[N, ..]`.
    ///
    /// # Errors
    /// What `runner` fails with, or a modality that this model does not read.
    pub async fn encode<R: GraphRunner>(&self, runner: &R, modality: &str, rows: Tensor) -> Result<Encoded, R::Error> {
        let modality = self.registry.get(modality).map_err(PipelineError::from)?;
        let inputs = vec![(modality.input_name().to_owned(), rows)];
        let outputs = runner.run(&encoder(modality.name()), inputs).await?;
        Ok(Encoded { outputs: outputs.into_iter().collect(), modality: modality.name() })
    }

    /// Reads row `i` of every encoded modality together: f32 logits `[N, answers]`.
    ///
    /// # Errors
    /// What `runner` fails with, or [`PipelineError::BadOutput`] when something that the fusion graph reads is missing.
    pub async fn fuse<R: GraphRunner>(&self, runner: &R, encoded: &[Encoded]) -> Result<Tensor, R::Error> {
        let graph = self.graphs.get(FUSION).ok_or(PipelineError::NoSuchTask { task: "VQA" })?;
        let mut inputs = Named::with_capacity(graph.inputs.len());
        for TensorSpec { name, .. } in &graph.inputs {
            let tensor = encoded.iter().find_map(|encoded| encoded.outputs.get(name));
            let tensor = tensor.ok_or_else(|| missing("the encoders", name))?;
            inputs.push((name.clone(), tensor.clone()));
        }
        let outputs = runner.run(FUSION, inputs).await?;
        let logits = outputs.into_iter().find(|(name, _)| name == LOGITS);
        Ok(logits.ok_or_else(|| missing(FUSION, LOGITS))?.1)
    }

    /// Answers questions, one per input. All run as one batch: both encoders at the same time where the runner can,
    /// then the fusion graph.
    ///
    /// # Errors
    /// What `runner` fails with; a model without a VQA head.
    pub async fn vqa<R: GraphRunner>(&self, runner: &R, batch: &[VqaInput]) -> Result<Vec<VqaAnswer>, R::Error> {
        let images: Vec<&Tensor> = batch.iter().map(|input| &input.image).collect();
        let texts: Vec<&Tensor> = batch.iter().map(|input| &input.text).collect();
        let images = Tensor::stack(&images).map_err(PipelineError::from)?;
        let texts = Tensor::stack(&texts).map_err(PipelineError::from)?;
        let (text, image) = try_join(self.encode(runner, "text", texts), self.encode(runner, "image", images)).await?;
        self.answer(runner, text, image).await
    }

    /// Answers questions from what the encoders made of them and of their images, row by row.
    ///
    /// # Errors
    /// As [`Pipeline::vqa`].
    pub async fn answer<R: GraphRunner>(
        &self,
        runner: &R,
        text: Encoded,
        image: Encoded,
    ) -> Result<Vec<VqaAnswer>, R::Error> {
        let answers = self.spec.vqa_answers().ok_or(PipelineError::NoSuchTask { task: "VQA" })?;
        let logits = self.fuse(runner, &[text, image]).await?;
        Ok(rank_answers(&logits, answers)?)
    }
}

fn encoder(modality: &str) -> String {
    format!("{modality}_encoder")
}

fn names(specs: &[TensorSpec]) -> String {
    specs.iter().map(|spec| spec.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn missing(graph: &str, output: &str) -> PipelineError {
    PipelineError::BadOutput { graph: graph.to_owned(), output: output.to_owned(), reason: "is missing".to_owned() }
}

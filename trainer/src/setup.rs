//! From a job's spec to everything a run works with: data, vocabulary, network, starting weights.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sensorium_api::run::RunConfig;
use sensorium_api::{Architecture, ModelSource, TaskType, TrainingJobSpec};
use sensorium_artifact::{Digest, Store, Volumes, validate_name};
use sensorium_data::Dataset;
use sensorium_modality::{
    ImageConfig, ImageProcessor, PipelineSpec, Resize, TaskHead, TextConfig, TextProcessor, TextSpec,
};
use sensorium_model::{FusionConfig, Network, NetworkConfig, StemLayer, Task, Weights, import, initialise};
use sensorium_onnx::{DType, Model};

use crate::batch::{self, Preparation};
use crate::checkpoint::Checkpoints;
use crate::error::TrainError;
use crate::stop::Stop;

/// Where an artifact keeps its tokenizer.
pub const TOKENIZER_FILE: &str = "processor/tokenizer.json";
/// Where an artifact keeps the shape of its network, which a run that starts from it needs.
pub const NETWORK_FILE: &str = "network.json";

/// What a run works with.
pub struct Setup {
    /// Blocks and paths.
    pub network: Network,
    /// Where training starts from.
    pub weights: Weights,
    /// The artifact that `weights` come from, if they do.
    pub parent: Option<Digest>,
    /// Shared with the loader.
    pub preparation: Arc<Preparation>,
    /// What is learned from.
    pub train: Arc<Dataset>,
    /// What is never learned from.
    pub evaluation: Arc<Dataset>,
    /// Answers in the order of their classes.
    pub answers: Vec<String>,
    /// Tasks with their weights; those of weight zero are left out.
    pub tasks: Vec<(Task, f64)>,
    /// Where the history and the evaluation go, and the checkpoints below it.
    pub folder: PathBuf,
    /// Of this job with this spec.
    pub checkpoints: Checkpoints,
}

/// Reads the file that `--config` names.
///
/// # Errors
/// When it is not there or not a training job's.
pub fn read_config(path: &Path) -> Result<RunConfig<TrainingJobSpec>, TrainError> {
    let refused = |reason: String| TrainError::Config { path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| refused(error.to_string()))
}

impl Setup {
    /// Opens the data and builds the network.
    ///
    /// # Errors
    /// Names the field of the spec that can't be met; [`TrainError::Stopped`] where somebody asked for that meanwhile.
    pub async fn new(config: &RunConfig<TrainingJobSpec>, volumes: &Volumes, stop: &Stop) -> Result<Self, TrainError> {
        let spec = &config.spec;
        // Where it all goes to, before hours go by.
        Store::open(&spec.output.store, volumes)?;
        validate_name(&spec.output.artifact)?;
        let train = batch::open("spec.data.train", &volumes.local_path(&spec.data.train)?)?;
        let evaluation = batch::open("spec.data.evaluation", &volumes.local_path(&spec.data.evaluation)?)?;
        let tasks: Vec<(Task, f64)> = spec
            .tasks
            .iter()
            .filter(|task| task.weight > 0.0)
            .map(|task| (if task.type_ == TaskType::Vqa { Task::Vqa } else { Task::Contrastive }, task.weight))
            .collect();
        let has = |wanted: Task| tasks.iter().any(|(task, _)| *task == wanted);
        let answers = if has(Task::Vqa) { train.answers().to_vec() } else { Vec::new() };
        let lacks = |field, data: &str, what: &str, task: &str| TrainError::Spec {
            field,
            reason: format!("{data} {what}, which the {task} task needs"),
        };
        for (field, uri, data) in [
            ("spec.data.train", &spec.data.train, &train),
            ("spec.data.evaluation", &spec.data.evaluation, &evaluation),
        ] {
            if has(Task::Vqa) && data.question_count() == 0 {
                return Err(lacks(field, uri, "has no questions", "vqa"));
            }
            if has(Task::Contrastive) && data.index().captions == 0 {
                return Err(lacks(field, uri, "has no captions", "contrastive"));
            }
        }
        if has(Task::Vqa) && answers.is_empty() {
            return Err(lacks("spec.data.train", &spec.data.train, "lists no answers", "vqa"));
        }
        let uri = spec.checkpoint.uri.clone().unwrap_or_else(|| config.job.checkpoint_uri());
        let folder = volumes.local_path(&uri)?;
        let checkpoints = Checkpoints::new(&folder, &config.spec_hash, spec.checkpoint.keep);
        let started = match &spec.model {
            ModelSource::Architecture(architecture) => {
                let max_length = architecture.text.max_length as usize;
                let text = vocabulary(&checkpoints, &train, TextConfig { max_length }, has(Task::Contrastive), stop)?;
                Started::anew(architecture, text, &answers, spec.training.seed)?
            }
            ModelSource::Artifact(name) => Started::from_artifact(name, spec, volumes, &answers).await?,
        };
        let Started { network, weights, text, parent, answers } = started;
        let inputs = format!("{} {answers:?} {parent:?}", train.digest());
        let checkpoints = checkpoints.of(&Digest::of(inputs.as_bytes()));
        for (task, _) in &tasks {
            if network.path(*task).is_empty() {
                let reason = format!("the model has no head for {task:?}");
                return Err(TrainError::Spec { field: "spec.tasks", reason });
            }
        }
        let image = ImageProcessor::new(image_config(&network))?;
        let classes: HashMap<String, i64> =
            answers.iter().enumerate().map(|(class, answer)| (answer.clone(), class as i64)).collect();
        let preparation = Arc::new(Preparation { image, text, answers: classes });
        preparation.check("spec.data.evaluation", &evaluation, has(Task::Contrastive), stop)?;
        let (train, evaluation) = (Arc::new(train), Arc::new(evaluation));
        Ok(Self { network, weights, parent, preparation, train, evaluation, answers, tasks, folder, checkpoints })
    }

    /// The weight of `task`, if the job has it.
    pub fn weight(&self, task: Task) -> Option<f64> {
        self.tasks.iter().find_map(|(known, weight)| (*known == task).then_some(*weight))
    }

    /// What the artifact's readers need to know about inputs and outputs.
    pub fn pipeline(&self) -> PipelineSpec {
        let config = self.network.config();
        let mut tasks = Vec::new();
        if config.answers.is_some() {
            tasks.push(TaskHead::Vqa { answers: self.answers.clone() });
        }
        if let Some(dim) = config.embedding_dim {
            tasks.push(TaskHead::Contrastive { dim: dim as usize });
        }
        let text = TextSpec { tokenizer: TOKENIZER_FILE.to_owned(), config: self.preparation.text.config() };
        PipelineSpec { text: Some(text), image: Some(*self.preparation.image.config()), tasks }
    }
}

struct Started {
    network: Network,
    weights: Weights,
    text: TextProcessor,
    parent: Option<Digest>,
    /// Those that the network has classes for, also where the job has no questions.
    answers: Vec<String>,
}

impl Started {
    /// Fresh weights.
    fn anew(
        architecture: &Architecture,
        text: TextProcessor,
        answers: &[String],
        seed: u64,
    ) -> Result<Self, TrainError> {
        let classes = (!answers.is_empty()).then_some(answers.len() as i64);
        let network = Network::new(network_config(architecture, text.vocabulary_size() as i64, classes))?;
        let weights = initialise(&network, seed);
        Ok(Self { network, weights, text, parent: None, answers: answers.to_vec() })
    }

    /// The weights, shape and vocabulary of an artifact.
    async fn from_artifact(
        name: &str,
        spec: &TrainingJobSpec,
        volumes: &Volumes,
        answers: &[String],
    ) -> Result<Self, TrainError> {
        let refused = |reason: String| TrainError::Spec { field: "spec.model.artifact", reason };
        let store = Store::open(&spec.output.store, volumes)?;
        let artifact = store.resolve(name).await?;
        let cache = tempfile::tempdir().map_err(|error| refused(error.to_string()))?;
        let folder = store.fetch(&artifact, cache.path()).await?;
        let bytes = std::fs::read(folder.join(NETWORK_FILE)).map_err(|error| {
            refused(format!("{name} can't be trained further, its {NETWORK_FILE} is missing ({error})"))
        })?;
        let config: NetworkConfig =
            serde_json::from_slice(&bytes).map_err(|error| refused(format!("{name}: {NETWORK_FILE}: {error}")))?;
        let parsed: Option<PipelineSpec> = artifact
            .manifest
            .pipeline
            .clone()
            .map(serde_json::from_value)
            .transpose()
            .map_err(|error| refused(format!("{name}: {error}")))?;
        if let Some(found) = parsed.as_ref().and_then(PipelineSpec::vqa_answers)
            && !answers.is_empty()
            && found != answers
        {
            return Err(refused(format!("{name} knows {} answers, but not those of spec.data.train", found.len())));
        }
        let known = parsed.as_ref().and_then(PipelineSpec::vqa_answers).unwrap_or(answers).to_vec();
        let text = TextConfig { max_length: config.text.max_length as usize };
        let text = TextProcessor::load(&folder.join(TOKENIZER_FILE), text)?;
        let network = Network::new(config)?;
        let mut graphs = Vec::new();
        for graph in &artifact.manifest.graphs {
            let model = Model::load(&folder.join(&graph.file)).map_err(|error| refused(format!("{name}: {error}")))?;
            graphs.push(model);
        }
        check_exact(name, &network, &graphs)?;
        let weights = import(&network, &graphs, &initialise(&network, spec.training.seed))?;
        Ok(Self { network, weights, text, parent: Some(artifact.digest), answers: known })
    }
}

/// Refuses an artifact that went through compression. It has the shape of the network that it was made from, and yet there
/// is no way back from its integers to the weights.
fn check_exact(name: &str, network: &Network, graphs: &[Model]) -> Result<(), TrainError> {
    let parameters =
        network.blocks().iter().flat_map(|block| block.params().iter().map(move |spec| block.full_name(spec)));
    let mut tensors = parameters.filter_map(|parameter| graphs.iter().find_map(|graph| graph.initializer(&parameter)));
    match tensors.find(|tensor| tensor.dtype() != Some(DType::F32)) {
        None => Ok(()),
        Some(rounded) => Err(TrainError::Spec {
            field: "spec.model.artifact",
            reason: format!(
                "{name} can't be trained further, compression has rounded its weights ({} for one); name the artifact that \
                 it was compressed from",
                rounded.name
            ),
        }),
    }
}

/// The vocabulary of the training data. It takes reading all of it, so it is kept beside the checkpoints for a run that
/// goes on from one.
fn vocabulary(
    checkpoints: &Checkpoints,
    train: &Dataset,
    config: TextConfig,
    contrastive: bool,
    stop: &Stop,
) -> Result<TextProcessor, TrainError> {
    let kept = checkpoints.vocabulary(train.digest());
    // Not there, or half-written by another rank or a killed process: then it is made again, and the same.
    if let Ok(text) = TextProcessor::load(&kept, config) {
        return Ok(text);
    }
    let mut texts = BTreeSet::new();
    for sample in train.samples() {
        stop.check()?;
        let sample = sample?;
        texts.extend(sample.questions.into_iter().map(|pair| pair.question));
        texts.extend(sample.caption.filter(|_| contrastive));
    }
    let text = TextProcessor::train(&texts, config)?;
    // A disk that refuses it will be reported by the first checkpoint; the run itself has what it needs.
    if let Some(folder) = kept.parent()
        && std::fs::create_dir_all(folder).is_ok()
        && let Err(error) = text.save(&kept)
    {
        tracing::warn!(error = &error as &dyn std::error::Error, "could not keep the vocabulary");
    }
    Ok(text)
}

fn network_config(architecture: &Architecture, vocabulary: i64, answers: Option<i64>) -> NetworkConfig {
    let Architecture { width, text, image, fusion, embedding_dim } = architecture;
    NetworkConfig {
        width: i64::from(*width),
        text: sensorium_model::TextConfig {
            vocabulary,
            max_length: i64::from(text.max_length),
            width: i64::from(text.width),
            layers: text.layers as usize,
            heads: i64::from(text.heads),
            mlp_ratio: i64::from(text.mlp_ratio),
        },
        image: sensorium_model::ImageConfig {
            size: i64::from(image.size),
            stem: image
                .stem
                .iter()
                .map(|layer| StemLayer {
                    channels: i64::from(layer.channels),
                    kernel: i64::from(layer.kernel),
                    stride: i64::from(layer.stride),
                    padding: i64::from(layer.padding),
                })
                .collect(),
            width: i64::from(image.width),
            layers: image.layers as usize,
            heads: i64::from(image.heads),
            mlp_ratio: i64::from(image.mlp_ratio),
        },
        fusion: FusionConfig {
            layers: fusion.layers as usize,
            heads: i64::from(fusion.heads),
            mlp_ratio: i64::from(fusion.mlp_ratio),
        },
        answers,
        embedding_dim: embedding_dim.map(i64::from),
    }
}

/// Bytes to `-1..=1`: `x / 127.5 - 1`.
fn image_config(network: &Network) -> ImageConfig {
    ImageConfig { size: network.config().image.size as u32, mean: [0.5; 3], std: [0.5; 3], resize: Resize::Exact }
}

#[cfg(test)]
pub(crate) mod tests {
    use sensorium_model::export;
    use sensorium_onnx::TensorProto;

    use super::*;

    /// With heads for both tasks, and as small as they come.
    pub(crate) fn small() -> Network {
        let stem = vec![StemLayer { channels: 4, kernel: 4, stride: 4, padding: 0 }];
        let (layers, heads, mlp_ratio) = (1, 1, 1);
        let config = NetworkConfig {
            width: 4,
            text: sensorium_model::TextConfig { vocabulary: 5, max_length: 3, width: 4, layers, heads, mlp_ratio },
            image: sensorium_model::ImageConfig { size: 8, stem, width: 4, layers, heads, mlp_ratio },
            fusion: FusionConfig { layers, heads, mlp_ratio },
            answers: Some(2),
            embedding_dim: Some(2),
        };
        Network::new(config).unwrap()
    }

    /// The graph with one of its tensors in integers, as compression leaves it.
    fn round(graph: Model, name: &str) -> Model {
        let mut proto = graph.into_proto();
        for tensor in proto.graph.iter_mut().flat_map(|graph| &mut graph.initializer).filter(|it| it.name == name) {
            let dims = tensor.dims.clone();
            *tensor = TensorProto::from_i8(name, &dims, &vec![1; dims.iter().product::<i64>() as usize]);
        }
        Model::try_from(proto).unwrap()
    }

    #[test]
    fn an_artifact_that_was_compressed_is_refused_with_the_reason() {
        let network = small();
        let exported = export(&network, &initialise(&network, 1)).unwrap();
        let graphs: Vec<Model> = exported.graphs.into_iter().map(|(_, graph)| graph).collect();
        check_exact("vqa", &network, &graphs).unwrap();
        let block = &network.blocks()[0];
        let name = block.full_name(&block.params()[0]);
        let graphs: Vec<Model> = graphs.into_iter().map(|graph| round(graph, &name)).collect();
        let error = check_exact("vqa", &network, &graphs).unwrap_err();
        assert!(error.is_users(), "starting it again would not help");
        assert!(error.to_string().contains("vqa can't be trained further"), "{error}");
        assert!(error.to_string().contains(&name), "{error}");
    }
}

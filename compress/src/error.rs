use sensorium_artifact::ArtifactError;
use sensorium_data::DataError;
use sensorium_engine::{EngineError, PipelineError};
use sensorium_modality::ModalityError;
use sensorium_onnx::OnnxError;

/// Why a compression job could not be done. A candidate that its gate refused is not an error: it is a result.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// The store or a storage URI.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// Calibration or held-out data could not be read.
    #[error("data set {uri}")]
    Data {
        /// As the job names it.
        uri: String,
        /// Why.
        source: DataError,
    },
    /// A data set has no question to ask.
    #[error("data set {uri} has no questions; the job needs some to measure with")]
    NoQuestions {
        /// As the job names it.
        uri: String,
    },
    /// No held-out question has an answer that the model can give, so that every model would score 0.
    #[error("data set {uri} asks nothing that the model can answer (it knows {}); is it another task's?", known.join(", "))]
    ForeignData {
        /// As the job names it.
        uri: String,
        /// The model's answers.
        known: Vec<String>,
    },
    /// An `exclude` entry names nothing, most likely by a slip.
    #[error("exclude entry {entry:?} names nothing; it can be a graph or GRAPH/WEIGHT: {}", known.join(", "))]
    UnknownExclude {
        /// The entry.
        entry: String,
        /// What it could be.
        known: Vec<String>,
    },
    /// No graph has anything left to quantise.
    #[error("artifact {artifact} has no constant f32 weights to quantise (or `exclude` names them all)")]
    NothingToQuantize {
        /// Name of the source.
        artifact: String,
    },
    /// A weight or an activation is NaN or infinite: the source model is broken.
    #[error("{value} in graph {graph} is {found}, which cannot be quantised; the source model needs training again")]
    NotFinite {
        /// The graph.
        graph: String,
        /// The weight or activation.
        value: String,
        /// What was found in it.
        found: f32,
    },
    /// Calibration never saw an activation that is to be quantised.
    #[error("activation {value} of graph {graph} was not calibrated")]
    NoRange {
        /// The graph.
        graph: String,
        /// The activation.
        value: String,
    },
    /// A plan names a constant that the graph does not have: it was made for another graph.
    #[error("graph {graph} has no constant {name}")]
    NoConstant {
        /// The graph.
        graph: String,
        /// The constant.
        name: String,
    },
    /// A graph could not be read, rewritten or saved.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// A graph could not be opened or run.
    #[error("graph {graph}")]
    Engine {
        /// The graph.
        graph: String,
        /// Why.
        source: EngineError,
    },
    /// The model could not answer.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// A file of the source could not be copied.
    #[error("could not copy {path} of the source artifact")]
    Copy {
        /// Path inside the artifact.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The machinery for asynchronous storage, or a temporary folder, could not be set up.
    #[error("could not set up the job")]
    Setup(#[source] std::io::Error),
    /// The job was asked to stop. Nothing was written.
    #[error("the job was cancelled before it was done")]
    Cancelled,
}

impl CompressError {
    /// Whether the job itself, or what it names, is at fault: running it again unchanged ends the same way.
    pub fn is_users(&self) -> bool {
        match self {
            Self::NoQuestions { .. }
            | Self::ForeignData { .. }
            | Self::UnknownExclude { .. }
            | Self::NothingToQuantize { .. }
            | Self::NotFinite { .. } => true,
            Self::Artifact(error) => error.is_users(),
            Self::Data { source, .. } => is_no_data_set(source),
            Self::Pipeline(error) => is_no_model_for_it(error),
            Self::NoRange { .. }
            | Self::NoConstant { .. }
            | Self::Onnx(_)
            | Self::Engine { .. }
            | Self::Copy { .. }
            | Self::Setup(_)
            | Self::Cancelled => false,
        }
    }
}

/// Whether what the job names is no data set, or none for this program. A disk that does not answer may do so later.
fn is_no_data_set(error: &DataError) -> bool {
    matches!(error, DataError::NotADataset { .. } | DataError::InvalidIndex { .. } | DataError::UnknownSchema { .. })
}

/// Whether the source can't do what it is asked, however often.
fn is_no_model_for_it(error: &PipelineError) -> bool {
    match error {
        PipelineError::NotAPipeline { .. } | PipelineError::NoSuchTask { .. } => true,
        // A disk that does not give a file may do so later.
        PipelineError::Modality(error) => !matches!(error, ModalityError::File { .. }),
        PipelineError::SignatureMismatch { .. }
        | PipelineError::BadOutput { .. }
        | PipelineError::Tensor(_)
        | PipelineError::Engine { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_source_that_can_never_answer_is_the_users() {
        let (artifact, reason) = ("vqa".to_owned(), "its manifest has no `pipeline`".to_owned());
        for error in [
            PipelineError::NotAPipeline { artifact, reason },
            PipelineError::NoSuchTask { task: "VQA" },
            PipelineError::Modality(ModalityError::NoTokens),
        ] {
            assert!(CompressError::from(error).is_users());
        }
    }

    #[test]
    fn a_data_set_that_is_none_is_the_users() {
        let data = |source| CompressError::Data { uri: "pvc://datasets/vqa".to_owned(), source };
        let (path, reason) = ("index.json".into(), "it is empty".to_owned());
        assert!(data(DataError::NotADataset { folder: "vqa".into() }).is_users());
        assert!(data(DataError::InvalidIndex { path, reason }).is_users());
        assert!(data(DataError::UnknownSchema { path: "index.json".into(), found: 2, supported: 1 }).is_users());
    }

    #[test]
    fn a_disk_that_does_not_answer_is_not() {
        let source = || io::Error::from(io::ErrorKind::TimedOut);
        let (action, path) = ("read", "tokenizer.json".into());
        let file = PipelineError::Modality(ModalityError::File { action, path, source: source() });
        assert!(!CompressError::from(file).is_users());
        let sample = DataError::Io { action: "read", path: "shard-00000.tar".into(), source: source() };
        assert!(!CompressError::Data { uri: "pvc://datasets/vqa".to_owned(), source: sample }.is_users());
    }
}

//! Why models are not loaded.

use sensorium_artifact::ArtifactError;
use sensorium_engine::PipelineError;

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Two models of one name.
    #[error("model {name:?} is given twice; give each a name of its own")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A repository cannot be read.
    #[error("the model repository {path} could not be read")]
    Repository {
        /// The folder.
        path: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A repository elsewhere cannot be read, or is nowhere.
    #[error("the model repository {path} could not be fetched")]
    Remote {
        /// Its URI.
        path: String,
        /// Why.
        source: Box<ArtifactError>,
    },
    /// The artifact cannot be read.
    #[error("model {name:?} could not be read")]
    Artifact {
        /// The model.
        name: String,
        /// Why.
        source: Box<ArtifactError>,
    },
    /// A graph that was named is not in the artifact.
    #[error("model {name:?} has no graph {graph:?}; it has {}", known.join(", "))]
    UnknownGraph {
        /// The model.
        name: String,
        /// As it was named.
        graph: String,
        /// Those it has.
        known: Vec<String>,
    },
    /// Its graphs cannot be run.
    #[error("model {name:?} could not be opened")]
    Open {
        /// The model.
        name: String,
        /// Why.
        source: Box<PipelineError>,
    },
    /// Nothing that its engines were given ran.
    #[error("model {name:?} runs nothing: {reason}")]
    Unproven {
        /// The model.
        name: String,
        /// What an engine said.
        reason: String,
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

impl LoadError {
    /// What is wrong with the repository at `uri`.
    pub(super) fn remote(uri: &str, source: ArtifactError) -> Self {
        Self::Remote { path: uri.to_owned(), source: Box::new(source) }
    }
}

/// Why a client's wish to load or unload a model was not granted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The server chooses its models itself.
    #[error(
        "models cannot be loaded or unloaded by request while the server runs with model control mode {mode:?}; start it \
         with --model-control-mode=explicit"
    )]
    Forbidden {
        /// The mode it runs with.
        mode: &'static str,
    },
    /// No repository has such a model.
    #[error("there is no model {name:?} in any repository of this server")]
    NotFound {
        /// As the request names it.
        name: String,
    },
    /// The parameters make no sense.
    #[error("model {name:?} cannot be loaded as asked: {reason}")]
    Parameters {
        /// The model.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// It was tried, and failed; what was loaded before still is.
    #[error("failed to load {name:?}: {reason}")]
    Failed {
        /// The model.
        name: String,
        /// Why.
        reason: String,
    },
}

//! Why a volume cannot be had. The kubelet shows it among the pod's events, so it never has more of what a store said than
//! its own words: a pod could name any address as a store, and read there what answers.

use object_store::Error as Remote;
use sensorium_artifact::ArtifactError;
use tonic::{Code, Status};

/// Why a volume cannot be had; each says what would help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The volume's attributes make no sense.
    #[error("{0}")]
    Invalid(String),
    /// The pod's credentials do not let it read the artifact.
    #[error("{0}")]
    Denied(String),
    /// There is no such artifact.
    #[error("{0}")]
    Missing(String),
    /// There is no room for it on this node.
    #[error("{0}")]
    Full(String),
    /// What is stored is not what its digest says.
    #[error("{0}")]
    Damaged(String),
    /// The store does not answer, or not as one.
    #[error("{0}")]
    Store(String),
    /// The node itself is at fault.
    #[error("{0}")]
    Node(String),
}

impl Failure {
    /// The node's file system said no.
    pub(crate) fn io(action: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::Node(format!("could not {action} {} on the node: {error}", path.display()))
    }
}

impl From<&Failure> for Status {
    fn from(failure: &Failure) -> Self {
        let code = match failure {
            Failure::Invalid(_) => Code::InvalidArgument,
            Failure::Denied(_) => Code::PermissionDenied,
            Failure::Missing(_) => Code::NotFound,
            Failure::Full(_) => Code::ResourceExhausted,
            Failure::Damaged(_) => Code::DataLoss,
            Failure::Store(_) => Code::Unavailable,
            Failure::Node(_) => Code::Internal,
        };
        Self::new(code, failure.to_string())
    }
}

impl From<ArtifactError> for Failure {
    fn from(error: ArtifactError) -> Self {
        match &error {
            ArtifactError::Remote { action, uri, error: source } => {
                let (action, uri) = (*action, uri.as_str());
                match source {
                    Remote::PermissionDenied { .. } | Remote::Unauthenticated { .. } => {
                        Self::Denied(format!("the pod's credentials do not let it {action} {uri}"))
                    }
                    Remote::NotFound { .. } => Self::Missing(format!("there is no {uri}")),
                    other => {
                        tracing::warn!(action, uri, error = %other, "the store did not answer as one");
                        Self::Store(format!(
                            "could not {action} {uri}: the store did not answer as one; the log of the node cache on this \
                             node says more"
                        ))
                    }
                }
            }
            // The names that a store has are nothing for an event.
            ArtifactError::NotFound { reference, store, .. } => {
                Self::Missing(format!("there is no artifact {reference} in {store}"))
            }
            ArtifactError::NoSpace { .. } => Self::Full("the disk of the node's cache is full".to_owned()),
            ArtifactError::Corrupt { .. }
            | ArtifactError::InvalidManifest { .. }
            | ArtifactError::UnknownSchema { .. }
            | ArtifactError::InvalidPath { .. } => Self::Damaged(error.to_string()),
            ArtifactError::InvalidUri { .. }
            | ArtifactError::InvalidVolume { .. }
            | ArtifactError::UnknownClaim { .. }
            | ArtifactError::NotLocal { .. }
            | ArtifactError::InvalidName { .. }
            | ArtifactError::InvalidDigest { .. } => Self::Invalid(error.to_string()),
            ArtifactError::AlreadyExists { .. } | ArtifactError::Io { .. } | ArtifactError::Cancelled => {
                let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
                Self::Node(format!("{error}{}", source.unwrap_or_default()))
            }
        }
    }
}

//! The gRPC services: from a message to a model and back.

mod inference;
mod multimodal;
mod observe;
mod unsupported;

use std::sync::Arc;

use tokio::sync::watch;

use crate::{metrics::Metrics, model::Repository};

/// Implements every service of this server. Clones share everything.
#[derive(Clone, Debug)]
pub struct Service {
    repository: Arc<Repository>,
    metrics: Metrics,
    ready: watch::Receiver<bool>,
}

impl Service {
    /// Answers from `repository`; `ready` is what health says.
    pub fn new(repository: Arc<Repository>, metrics: Metrics, ready: watch::Receiver<bool>) -> Self {
        Self { repository, metrics, ready }
    }
}

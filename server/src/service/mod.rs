//! What this server does for its clients, whichever way they ask: each operation once, from the message of the protocol
//! to the message of the answer. gRPC calls it in [`grpc`], REST in [`crate::rest`].

mod call;
mod grpc;
mod health;
mod infer;
mod iterate;
mod metadata;
mod multimodal;
mod observe;
mod replies;
mod repository;
mod settings;
mod shared_memory;

use std::sync::{Arc, OnceLock};

use sensorium_proto::{codec, inference::ModelInferRequest};
use sensorium_telemetry::{LogControl, TraceControl};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

pub use call::Call;
pub(crate) use grpc::NO_CUDA_MEMORY;
pub(crate) use iterate::mark;

use crate::{
    budget::{Budget, Spent, Taken},
    metrics::Metrics,
    model::ModelVersion,
    repository::Registry,
    shared_memory::SharedMemory,
};

/// Implements every service of this server. Clones share everything.
#[derive(Clone, Debug)]
pub struct Service {
    repository: Arc<OnceLock<Registry>>,
    metrics: Metrics,
    ready: watch::Receiver<bool>,
    memory: SharedMemory,
    budget: Budget,
    logs: LogControl,
    traces: TraceControl,
    /// Inferences that have begun: the drain waits for them.
    running: TaskTracker,
    /// Cancelled when streams of requests are to end.
    draining: CancellationToken,
    /// Cancelled when those that iterate must not go on.
    cut_short: CancellationToken,
}

impl Service {
    /// Without models yet; `ready` is what health says, and answers take their part of `budget`.
    pub fn new(
        metrics: Metrics,
        ready: watch::Receiver<bool>,
        memory: SharedMemory,
        budget: Budget,
        logs: LogControl,
        traces: TraceControl,
    ) -> Self {
        let (repository, running) = (Arc::default(), TaskTracker::new());
        let (draining, cut_short) = (CancellationToken::new(), CancellationToken::new());
        Self { repository, metrics, ready, memory, budget, logs, traces, running, draining, cut_short }
    }

    /// Answers from `repository` from now on. The first one stays.
    pub fn open(&self, repository: Registry) {
        // A second repository would be a mistake of the program, and the first goes on answering.
        let _ = self.repository.set(repository);
    }

    /// Bytes that a request is about to take beyond those that have arrived.
    ///
    /// # Errors
    /// [`Spent`].
    pub(crate) fn claim(&self, bytes: usize) -> Result<Option<Taken>, Spent> {
        if bytes == 0 { Ok(None) } else { self.budget.claim(bytes).map(Some) }
    }

    /// Claims what a request that was decoded takes beyond its bytes on the wire.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED.
    fn claim_growth(&self, request: &ModelInferRequest) -> Result<Option<Taken>, Status> {
        Ok(self.claim(codec::grown(request))?)
    }

    /// Ends streams of requests as soon as nothing happens on them.
    pub fn end_streams(&self) {
        self.draining.cancel();
    }

    /// Refuses inferences from now on, and returns when those that had begun are answered.
    pub async fn drain(&self) {
        self.running.close();
        self.running.wait().await;
    }

    /// Ends the requests that iterate, after the response that they are at, with words: a drain is about to end, and would
    /// cut them off without any.
    pub fn cut_short(&self) {
        self.cut_short.cancel();
    }

    /// Whether everything is ready, as health says.
    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// A model, for those who need to know it to read a request.
    pub(crate) fn model(&self, name: &str, version: &str) -> Result<Arc<ModelVersion>, Status> {
        self.repository()?.model(name, version).map_err(|error| error.into_status(name))
    }

    /// The models.
    ///
    /// # Errors
    /// UNAVAILABLE while they are being loaded.
    fn repository(&self) -> Result<&Registry, Status> {
        self.repository.get().ok_or_else(|| Status::unavailable("the server is loading its models; try again soon"))
    }
}

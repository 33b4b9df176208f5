//! One graph, its queue and the thread that owns its engine.
//!
//! ```text
//! run() -> admit: a place in the queue, or "full" at once -> batch: join waiting requests -> run: the engine's thread -> split
//! ```
//!
//! While an engine is idle nobody waits: a request that finds it so runs alone at once, and what arrives meanwhile forms
//! the next batch. A request that its caller gives up (cancelled, deadline passed) leaves the queue in that moment and
//! never reaches the engine.

mod admit;
mod batch;
mod run;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use sensorium_engine::{Engine, EngineError, RawTensor};
use tokio_util::sync::CancellationToken;

use self::admit::Queue;
use crate::{metrics::GraphMetrics, model::{Statistics, Timings}};

/// What to run: tensors that fit the engine's signature.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// In the order of the signature; the first dimension of each is the batch.
    pub inputs: Vec<RawTensor>,
    /// That dimension.
    pub rows: usize,
    /// Indices of the signature's outputs to return.
    pub outputs: Vec<usize>,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// In the order of [`Work::outputs`].
    pub outputs: Vec<RawTensor>,
    /// Where the time went.
    pub timings: Timings,
}

impl Work {
    /// Whether rows of both can stand in one batch: everything but the first dimension is the same.
    fn joins(&self, other: &Self) -> bool {
        self.inputs.len() == other.inputs.len()
            && self.inputs.iter().zip(&other.inputs).all(|(tensor, other)| {
                tensor.dtype() == other.dtype()
                    && !tensor.shape().is_empty()
                    && tensor.shape().get(1..) == other.shape().get(1..)
            })
    }
}

/// How requests are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// Rows of the largest batch.
    pub max_rows: usize,
    /// Rows that may wait. Each holds its tensors in memory, and at the end of the line its caller waits for all of
    /// them to be run: raise it for bursts, lower it to refuse early.
    pub max_waiting_rows: usize,
    /// How long the oldest request waits for company after the engine was busy; see [`Scheduler::start`].
    pub max_delay: Duration,
}

/// Why work was not run, or failed.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// The queue is full. Trying again later may succeed.
    #[error("the queue of {graph:?} is full: {waiting} rows wait and {limit} may; try again later")]
    Overloaded {
        /// The graph.
        graph: String,
        /// Rows that wait.
        waiting: usize,
        /// Rows that may.
        limit: usize,
    },
    /// The scheduler ended, or its engine's thread died.
    #[error("{graph:?} is not running any more")]
    Stopped {
        /// The graph.
        graph: String,
    },
    /// The engine refused the work or failed at it.
    #[error("{graph:?} failed")]
    Engine {
        /// The graph.
        graph: String,
        /// Why.
        source: Box<EngineError>,
    },
    /// The engine's outputs do not belong to the rows that it was given.
    #[error("{graph:?} gave outputs that do not fit its {rows} rows")]
    Outputs {
        /// The graph.
        graph: String,
        /// Rows of the batch.
        rows: usize,
    },
}

/// Handle of one graph's queue. Dropping it lets the engine's thread finish what waits, and end.
#[derive(Debug)]
pub struct Scheduler {
    queue: Arc<Queue>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Scheduler {
    /// Starts the thread that owns `engine`. `lost` is cancelled when that thread ends although nobody stopped it.
    ///
    /// An idle engine runs whatever arrives at once. After a run it takes all that has arrived meanwhile, up to
    /// `max_rows`; if that fills no batch, it waits until the oldest request is `max_delay` old.
    ///
    /// # Errors
    /// The system's, when it gives no thread.
    pub fn start(
        graph: String,
        engine: Box<dyn Engine>,
        batching: Batching,
        metrics: GraphMetrics,
        statistics: Arc<Statistics>,
        lost: CancellationToken,
    ) -> std::io::Result<Self> {
        let queue = Arc::new(Queue::new(graph, batching, metrics, statistics));
        let thread = {
            let queue = queue.clone();
            // Linux cuts thread names at 15 bytes.
            std::thread::Builder::new().name("engine".to_owned()).spawn(move || run::serve(engine, &queue, lost))?
        };
        Ok(Self { queue, thread: Mutex::new(Some(thread)) })
    }

    /// Runs `work`, alone or in a batch with others: the outputs are those of its own rows. Dropping the future takes
    /// the work out of the queue; a run that has begun goes on, and its result is dropped.
    ///
    /// # Errors
    /// [`ScheduleError`].
    pub async fn run(&self, work: Work) -> Result<Done, ScheduleError> {
        let (answer, _place) = self.queue.admit(work)?;
        answer.await.unwrap_or_else(|_| Err(ScheduleError::Stopped { graph: self.queue.graph.clone() }))
    }

    /// Time since the engine last ran something without failing; `None` before it did.
    pub fn last_success(&self) -> Option<Duration> {
        self.queue.last_success().map(|at| Instant::now().saturating_duration_since(at))
    }

    /// Admits nothing from now on, runs what waits, and returns when the engine is closed.
    pub async fn stop(&self) {
        self.queue.close();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic of the engine's thread has been reported through `lost`; there is nothing to add.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.queue.close();
    }
}

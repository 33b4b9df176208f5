//! One graph, its line of requests, its engines and those who run them.
//!
//! ```text
//! run() -> admit: a place in the line, or "full" at once -> line: who runs next, with whom -> serve: a thread, or the caller
//!       -> run: join, engine, split
//! ```
//!
//! [`line`] decides and knows neither threads nor clocks ([`aim`] tells it how large batches should be); [`admit`] shares it; [`serve`] and [`run`] act on it. A request that its
//! caller gives up (cancelled, deadline passed) leaves the line in that moment and never reaches an engine.

mod admit;
mod aim;
mod company;
mod extent;
mod line;
#[cfg(test)]
mod line_tests;
mod order;
mod outbox;
mod pace;
mod pause;
mod policy;
mod run;
mod serve;
mod shape;
mod slots;
mod state;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use sensorium_engine::{Engine, EngineError, RawTensor, Signature};
use tokio_util::sync::CancellationToken;

pub(crate) use self::extent::write_counts;
use self::{
    admit::{Admitted, Queue},
    run::Runner,
    serve::{Server, Turn},
    shape::Shapes,
};
pub use self::{
    policy::{Delay, Follows, Join, Padding, Policy, QueuePolicy},
    slots::Slots,
};
use crate::{
    metrics::{Elsewhere, GraphMetrics},
    model::{Statistics, Timings},
};

/// How long a probe may take: whoever asks waits no longer, and its run is cut short.
pub(crate) const LONGEST_PROBE: Duration = Duration::from_secs(10);

/// What to run: tensors that fit the engine's signature.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Work {
    /// In the order of the signature; the first dimension of each is the batch, where the model batches.
    pub inputs: Vec<RawTensor>,
    /// That dimension.
    pub rows: usize,
    /// Indices of the signature's outputs to return.
    pub outputs: Vec<usize>,
    /// Outputs of the graph whose first axis is not the batch, with the shape of this work's part of them.
    pub scattered: Vec<(usize, Vec<i64>)>,
    /// 1 is served first; 0 is the model's default.
    pub priority: u64,
    /// How long it may wait, where the policy lets requests say so.
    pub timeout: Option<Duration>,
    /// When its caller stops waiting.
    pub deadline: Option<Instant>,
    /// Since when it waits, where it has waited for something else before.
    pub since: Option<Instant>,
    /// Whether the server itself asks, to see that the engine runs: such work runs alone and counts nowhere.
    pub is_probe: bool,
}

impl Work {
    /// Bytes of its inputs.
    fn bytes(&self) -> usize {
        self.inputs.iter().map(|input| input.data().len()).sum()
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// In the order of [`Work::outputs`].
    pub outputs: Vec<RawTensor>,
    /// Where the time went.
    pub timings: Timings,
}

/// How requests are put together where a model does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// Rows of the largest batch.
    pub max_rows: usize,
    /// Rows that may wait. Each holds its tensors in memory, and at the end of the line its caller waits for all of
    /// them to be run: raise it for bursts, lower it to refuse early.
    pub max_waiting_rows: usize,
    /// How long the oldest request waits for company after an engine was busy; an idle engine never waits.
    pub max_delay: Duration,
}

/// Why work was not run, or failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ScheduleError {
    /// As much waits as the server lets. Trying again later may succeed.
    #[error("the queue of {graph:?} is full: {waiting} rows wait and {limit} may; try again later")]
    Overloaded {
        /// The graph.
        graph: String,
        /// Rows that wait.
        waiting: usize,
        /// Rows that may.
        limit: usize,
    },
    /// What waits will not be done before its caller stops waiting. Trying again later may succeed.
    #[error("{graph:?} would answer in about {expected:?}, after the deadline of the request; try again later")]
    TooLate {
        /// The graph.
        graph: String,
        /// How long it would take.
        expected: Duration,
    },
    /// As many wait as the model's queue policy lets. Trying again later may succeed.
    #[error("{graph:?}: Exceeds maximum queue size {limit}")]
    QueueFull {
        /// The graph.
        graph: String,
        /// Requests that may wait on its level.
        limit: usize,
    },
    /// It waited for longer than the model's queue policy lets.
    #[error("{graph:?}: Request timeout expired")]
    TimedOut {
        /// The graph.
        graph: String,
    },
    /// Its caller does not wait any more.
    #[error("the deadline of the request passed before {graph:?} had answered")]
    DeadlineExceeded {
        /// The graph.
        graph: String,
    },
    /// The scheduler ended, or its engine died.
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

impl ScheduleError {
    /// Whether the engine is not there for anybody, so that other work would have the same answer.
    pub(crate) fn is_everybodys(&self) -> bool {
        use EngineError::{DeviceLost, Unavailable};
        matches!(self, Self::Engine { source, .. } if matches!(**source, Unavailable { .. } | DeviceLost { .. }))
    }

    /// Whether nothing but another process can run this work.
    fn is_device_lost(&self) -> bool {
        matches!(self, Self::Engine { source, .. } if matches!(**source, EngineError::DeviceLost { .. }))
    }

    /// Whether each member of a batch that ended so would end so by itself, too, or must not be tried again.
    fn is_of_the_whole_batch(&self) -> bool {
        let is_spoilt = matches!(self, Self::Engine { source, .. } if matches!(**source, EngineError::Spoilt { .. }));
        is_spoilt || self.is_everybodys() || matches!(self, Self::DeadlineExceeded { .. })
    }
}

/// Makes an engine anew after one has died.
pub type Reopen = Arc<dyn Fn() -> Result<Box<dyn Engine>, String> + Send + Sync>;

/// Everything that a scheduler is made of.
pub struct Setup {
    /// The graph's name, for messages.
    pub graph: String,
    /// Its engines, each of which gets a thread.
    pub engines: Vec<Box<dyn Engine>>,
    /// What replaces an engine that died; without it the death of the last one is final.
    pub reopen: Option<Reopen>,
    /// How requests wait and are put together.
    pub policy: Policy,
    /// Whether the first axis of every tensor is the batch.
    pub batches: bool,
    /// What all models of the machine share.
    pub slots: Slots,
    /// Threads of each engine.
    pub threads: usize,
    /// Where it counts.
    pub metrics: GraphMetrics,
    /// Where it counts, too.
    pub statistics: Arc<Statistics>,
    /// Cancelled when the last engine's thread ends although nobody stopped it.
    pub lost: CancellationToken,
}

/// Handle of one graph's queue. Dropping it lets the engines' threads finish what waits, and end.
#[derive(Debug)]
pub struct Scheduler {
    runner: Arc<Runner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Scheduler {
    /// Starts a thread for each of the engines, which are all of one signature.
    ///
    /// # Errors
    /// Padding that the graph cannot have; the system's, when it gives no thread.
    pub fn start(setup: Setup, signature: &Signature) -> Result<Self, String> {
        let shapes = Shapes::new(signature, setup.batches, &setup.policy)?;
        Self::start_with(setup, shapes).map_err(|error| format!("no thread could be started: {error}"))
    }

    fn start_with(setup: Setup, shapes: Shapes) -> std::io::Result<Self> {
        let Setup { graph, engines, reopen, policy, slots, threads, metrics, statistics, lost, batches: _ } = setup;
        let threads_wanted = engines.len();
        let queue = Arc::new(Queue::new(graph, policy, shapes, metrics, statistics, engines));
        let runner = Arc::new(Runner { queue, share: slots.share(threads), lost, never_fills: AtomicBool::new(false) });
        let alive = Arc::new(());
        // If one thread cannot be started, dropping this ends those that were.
        let scheduler = Self { runner: runner.clone(), threads: Mutex::default() };
        for _ in 0..threads_wanted {
            let server = Server { runner: runner.clone(), reopen: reopen.clone(), alive: alive.clone() };
            // Linux cuts thread names at 15 bytes.
            let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || server.serve())?;
            scheduler.lock().push(thread);
        }
        Ok(scheduler)
    }

    /// Runs `work`, alone or in a batch with others: the outputs are those of its own rows. Dropping the future takes
    /// the work out of the line; a run that has begun goes on, and its result is dropped.
    ///
    /// # Errors
    /// [`ScheduleError`].
    pub async fn run(&self, work: Work) -> Result<Done, ScheduleError> {
        let deadline = work.deadline;
        let Admitted { mut answer, mut place, is_promised } = self.runner.queue.admit(work)?;
        if is_promised {
            // Beside this future, which has to see its deadline also where the run takes longer than anybody expected.
            Turn::spawn(&self.runner);
        }
        let graph = || self.runner.queue.graph.clone();
        let mut outcome = None;
        if let Some(timeout) = place.timeout.filter(|timeout| deadline.is_none_or(|deadline| *timeout < deadline)) {
            outcome = tokio::time::timeout_at(timeout.into(), &mut answer).await.ok();
            if outcome.is_none() && place.withdraw() {
                self.runner.queue.metrics.abandoned();
                return Err(ScheduleError::TimedOut { graph: graph() });
            }
        }
        let outcome = match (outcome, deadline) {
            (Some(outcome), _) => outcome,
            (None, None) => answer.await,
            (None, Some(deadline)) => tokio::time::timeout_at(deadline.into(), answer)
                .await
                .map_err(|_| ScheduleError::DeadlineExceeded { graph: graph() })?,
        };
        place.leave();
        outcome.unwrap_or_else(|_| Err(ScheduleError::Stopped { graph: graph() }))
    }

    /// One more waits for this graph, before it comes to its queue, until this is dropped.
    pub(crate) fn waits(&self) -> Elsewhere<'_> {
        self.runner.queue.waiting.more(1)
    }

    /// Time since an engine last ran something without failing; `None` before one did.
    pub fn last_success(&self) -> Option<Duration> {
        self.runner.queue.last_success().map(|at| Instant::now().saturating_duration_since(at))
    }

    /// Takes it for granted that the engine runs, for whoever knows by other means.
    pub fn note_success(&self) {
        self.runner.queue.note_success();
    }

    /// Admits nothing from now on, runs what waits, and returns when the engines are closed.
    pub async fn stop(&self) {
        self.runner.queue.close();
        let threads = std::mem::take(&mut *self.lock());
        for thread in threads {
            // A panic of the engine's thread has been reported; there is nothing to add.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.runner.queue.close();
    }
}

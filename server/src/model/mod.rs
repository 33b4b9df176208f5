//! Models as clients call them: tensors in, tensors out, whatever runs behind.

mod binding;
mod cache;
mod ensemble;
mod fit;
mod graph;
mod iteration;
mod multimodal;
mod ragged;
mod request;
mod sequence;
mod sizes;
mod statistics;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use sensorium_artifact::TensorSpec;
use sensorium_engine::RawTensor;
use sensorium_proto::inference::{ModelConfig, ModelStatistics, model_config::SchedulingChoice};
use tonic::Code;

pub(crate) use self::sequence::{IDLE, Seated, Stateful};
pub(crate) use self::{
    binding::{Binding, Bound, Reshape},
    ensemble::{Ensemble, Find},
    graph::guesses,
    iteration::{Bounds, Iteration},
    ragged::{Completed, Ragged},
};
pub use self::{
    cache::ResponseCache,
    fit::{Fitted, Interface},
    graph::Graph,
    iteration::Steps,
    multimodal::{Item, Multimodal, Task},
    request::{NamedTensor, Parameter, Request, Response, Sequence, SequenceId, Timings},
    sequence::{SequenceError, Sequences},
    statistics::{Failure, Responded, Statistics},
};
use self::{ensemble::Entering, sequence::Turn, sizes::Sizes};
use crate::{
    error::InferError,
    metrics::{Counts, GraphMetrics, Served},
    scheduler::{ScheduleError, Work},
};

/// One version of a model, loaded and ready to be called.
#[derive(Debug)]
pub struct ModelVersion {
    name: String,
    version: String,
    config: ModelConfig,
    interface: Interface,
    statistics: Arc<Statistics>,
    /// Names of classes, by output.
    labels: BTreeMap<String, Vec<String>>,
    /// Digest of the artifact that it is, or is part of.
    artifact: Option<String>,
    /// Where answers are kept, if the model's configuration wants them to be.
    cache: Option<(ResponseCache, GraphMetrics)>,
    /// Its series are shown while it is here.
    _served: Option<Arc<Served>>,
    /// Which load of which model this is, among all of the process.
    load: u64,
    sizes: Sizes,
    runs: Runs,
}

/// Parameter of a request: the digest of the artifact that it is meant for. A model of another one, or of none, refuses it.
pub const ARTIFACT_DIGEST: &str = "artifact_digest";

/// Outputs in the order in which they were asked for, and where the time went.
type Answer = (Vec<RawTensor>, Timings);

/// What runs a model.
#[derive(Clone, Debug)]
pub(crate) enum Runs {
    Graph(Arc<Graph>, Binding),
    /// One graph, or one for each instance where sequences sit in them.
    Sequence(Vec<Arc<Graph>>, Binding, Arc<Sequences>),
    /// Any number of times for one request.
    Iteration(Arc<Iteration>),
    Multimodal(Arc<Multimodal>),
    Ensemble(Arc<Ensemble>),
}

/// What a request has of a model from the moment of its coming on, before its tensors are there.
#[derive(Debug)]
enum Entered {
    /// Nothing but a place in a queue, later.
    Plainly,
    /// Its place in its sequence.
    InSequence(Box<Turn>),
    /// What it has of the models that are called for it, in the order in which they run.
    ByStep(Vec<Entering>),
}

impl ModelVersion {
    /// A version whose work `runs` does; `statistics` are those that its scheduler counts into.
    pub(crate) fn new(
        version: String,
        config: ModelConfig,
        interface: Interface,
        statistics: Arc<Statistics>,
        runs: Runs,
    ) -> Self {
        static LOADS: AtomicU64 = AtomicU64::new(0);
        let load = LOADS.fetch_add(1, Ordering::Relaxed);
        let (labels, artifact, cache, served) = (BTreeMap::new(), None, None, None);
        let (name, sizes) = (config.name.clone(), Sizes::new(interface.outputs.len()));
        Self {
            name,
            version,
            config,
            interface,
            statistics,
            labels,
            artifact,
            cache,
            _served: served,
            load,
            sizes,
            runs,
        }
    }

    /// Shown in the metrics as one that is served.
    pub(crate) fn in_metrics(self, served: Arc<Served>) -> Self {
        Self { _served: Some(served), ..self }
    }

    /// With names for the classes of some outputs.
    pub(crate) fn with_labels(self, labels: BTreeMap<String, Vec<String>>) -> Self {
        Self { labels, ..self }
    }

    /// As part of the artifact with this digest.
    pub(crate) fn of_artifact(self, digest: String) -> Self {
        Self { artifact: Some(digest), ..self }
    }

    /// With answers kept in `cache`, where the configuration wants them to be, and while they depend on the request alone.
    pub(crate) fn with_cache(self, cache: &ResponseCache, metrics: impl FnOnce() -> GraphMetrics) -> Self {
        let wanted = self.config.response_cache.is_some_and(|cache| cache.enable);
        Self { cache: wanted.then(|| (cache.clone(), metrics())), ..self }
    }

    /// Which load of which model the answer to a request that has entered depends on: of this one, and of those that are called for
    /// it. `None` where it depends on more, such as the requests before.
    fn loads(&self, entered: &Entered) -> Option<Vec<u64>> {
        let mut loads = Vec::new();
        self.add_loads(entered, &mut loads)?;
        Some(loads)
    }

    fn add_loads(&self, entered: &Entered, loads: &mut Vec<u64>) -> Option<()> {
        if !loads.contains(&self.load) {
            loads.push(self.load);
        }
        match entered {
            Entered::Plainly => matches!(self.runs, Runs::Graph(..) | Runs::Multimodal(_)).then_some(()),
            Entered::InSequence(_) => None,
            Entered::ByStep(steps) => steps.iter().try_for_each(|step| step.model.add_loads(&step.entered, loads)),
        }
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which version of it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// What runs it, in Triton's words.
    pub fn platform(&self) -> &str {
        &self.config.platform
    }

    /// What it takes; where it batches, the first size of each is the batch.
    pub fn inputs(&self) -> &[TensorSpec] {
        &self.interface.inputs
    }

    /// What it gives.
    pub fn outputs(&self) -> &[TensorSpec] {
        &self.interface.outputs
    }

    /// What a request is held against.
    pub fn interface(&self) -> &Interface {
        &self.interface
    }

    /// Its configuration, complete.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Digest of the artifact that it is, or is part of.
    pub fn artifact(&self) -> Option<&str> {
        self.artifact.as_deref()
    }

    /// The name of class `index` of an output, where the configuration names a file of labels.
    pub fn label(&self, output: &str, index: usize) -> Option<&str> {
        self.labels.get(output)?.get(index).map(String::as_str).filter(|label| !label.is_empty())
    }

    /// Whether a request may have to wait for what comes behind it, as the end of a sequence.
    pub(crate) fn has_sequences(&self) -> bool {
        match &self.runs {
            Runs::Sequence(..) => true,
            Runs::Ensemble(ensemble) => ensemble.has_sequences(),
            Runs::Graph(..) | Runs::Iteration(_) | Runs::Multimodal(_) => false,
        }
    }

    /// Whether a request may have any number of answers, so that only a stream can carry them.
    pub fn is_decoupled(&self) -> bool {
        self.config.model_transaction_policy.is_some_and(|policy| policy.decoupled)
    }

    /// Names of the models that it is made of, where it is an ensemble, each with its version where that matters.
    pub(crate) fn steps(&self) -> BTreeSet<(&str, Option<u64>)> {
        match &self.config.scheduling_choice {
            Some(SchedulingChoice::EnsembleScheduling(ensembling)) => Ensemble::models(ensembling),
            _ => BTreeSet::new(),
        }
    }

    /// That the models that it is made of still fit together.
    ///
    /// # Errors
    /// A sentence about the model.
    pub(crate) fn check_steps(&self) -> Result<(), String> {
        match &self.runs {
            Runs::Ensemble(ensemble) => ensemble.check(&self.interface, self.config.max_batch_size),
            _ => Ok(()),
        }
    }

    /// The graphs that it is: one, or one for each instance.
    pub(crate) fn graphs(&self) -> &[Arc<Graph>] {
        match &self.runs {
            Runs::Graph(graph, _) => std::slice::from_ref(graph),
            Runs::Sequence(graphs, ..) => graphs,
            Runs::Iteration(iteration) => iteration.graphs(),
            Runs::Multimodal(_) | Runs::Ensemble(_) => &[],
        }
    }

    /// Answers one request. Dropping the future takes the request back: it leaves its queue in that moment.
    ///
    /// # Errors
    /// [`InferError`], which says whose fault it is.
    pub fn infer(&self, request: Request) -> impl Future<Output = Result<Response, InferError>> + Send + '_ {
        self.answer(request, None)
    }

    /// As [`ModelVersion::infer`], of a request that may have entered.
    async fn answer(&self, mut request: Request, entered: Option<Entered>) -> Result<Response, InferError> {
        let canceled = Some(Failure::Canceled);
        let mut counted = Counted { statistics: &self.statistics, started: Instant::now(), failed: canceled };
        counted.note(self.check_artifact(&request))?;
        let inputs = std::mem::take(&mut request.inputs);
        let fitted = counted.note(self.interface.fit(inputs, &request.outputs))?;
        let entered = match entered {
            Some(entered) => entered,
            None => counted.note(self.enter_fitted(&fitted, &request))?,
        };
        let (rows, wanted) = (fitted.rows, fitted.outputs.clone());
        let cache = self.cache.as_ref().and_then(|(cache, metrics)| Some((cache, metrics, self.loads(&entered)?)));
        let (outputs, timings) = match cache {
            Some((cache, metrics, loads)) => {
                let answer = Box::pin(self.run_once((cache, metrics), &loads, fitted, &request, entered)).await;
                counted.note(answer)?
            }
            None => counted.note(self.run(fitted, &request, entered).await)?,
        };
        counted.failed = None;
        for (output, tensor) in wanted.iter().zip(&outputs) {
            self.sizes.note(*output, tensor.data().len() / rows.max(1));
        }
        self.statistics.succeeded(counted.started.elapsed(), rows, &timings);
        let named = wanted.into_iter().zip(outputs);
        let named = named.map(|(output, tensor)| NamedTensor { name: self.outputs()[output].name.clone(), tensor });
        Ok(Response { outputs: named.collect(), timings })
    }

    /// Takes what a request for these outputs has of this model from now on.
    fn enter(
        &self,
        outputs: &mut dyn Iterator<Item = &str>,
        rows: usize,
        request: &Request,
    ) -> Result<Entered, InferError> {
        match &self.runs {
            Runs::Sequence(_, _, sequences) => {
                Ok(Entered::InSequence(Box::new(sequences.enter(request.sequence.as_ref(), rows)?)))
            }
            Runs::Ensemble(ensemble) => Ok(Entered::ByStep(ensemble.enter(outputs, request)?)),
            Runs::Graph(..) | Runs::Iteration(_) | Runs::Multimodal(_) => Ok(Entered::Plainly),
        }
    }

    fn enter_fitted(&self, fitted: &Fitted, request: &Request) -> Result<Entered, InferError> {
        /// One request after the other: of two that go through the same sequence models, each could have the seat that the other waits for.
        static ENTERING: Mutex<()> = Mutex::new(());
        let is_ensemble = matches!(self.runs, Runs::Ensemble(_));
        let _entering = is_ensemble.then(|| ENTERING.lock().unwrap_or_else(PoisonError::into_inner));
        let mut outputs = fitted.outputs.iter().map(|&output| self.outputs()[output].name.as_str());
        self.enter(&mut outputs, fitted.rows, request)
    }

    /// Bytes of the answer to a request, by the largest of its outputs of late; 0 before there was one.
    pub(crate) fn expected_answer(&self, request: &Request) -> usize {
        let first = request.inputs.first().filter(|_| self.interface.max_rows.is_some());
        let rows = first.and_then(|input| input.tensor.row_count()).unwrap_or(1);
        // More of them are refused later on.
        let rows = rows.min(self.interface.max_rows.unwrap_or(rows));
        let is_wanted = |spec: &TensorSpec| request.outputs.is_empty() || request.outputs.contains(&spec.name);
        let outputs = self.outputs().iter().enumerate().filter(|(_, spec)| is_wanted(spec)).map(|(index, _)| index);
        self.sizes.of(outputs).saturating_mul(rows)
    }

    fn check_artifact(&self, request: &Request) -> Result<(), InferError> {
        let Some(Parameter::Text(wanted)) = request.parameters.get(ARTIFACT_DIGEST) else { return Ok(()) };
        if self.artifact.as_ref() == Some(wanted) {
            return Ok(());
        }
        let served = self.artifact.clone().unwrap_or_else(|| "(none)".to_owned());
        Err(InferError::OtherArtifact { model: self.name.clone(), served, wanted: wanted.clone() })
    }

    /// Runs a request whose answer nobody knows.
    async fn run_once(
        &self,
        (cache, metrics): (&ResponseCache, &GraphMetrics),
        loads: &[u64],
        fitted: Fitted,
        request: &Request,
        entered: Entered,
    ) -> Result<Answer, InferError> {
        let started = Instant::now();
        let entered = Mutex::new(Some(entered));
        // How long it took, and what it took it with, unless it failed.
        let ran: Mutex<Option<(Option<Timings>, Duration)>> = Mutex::default();
        let key = cache::key(loads, &fitted, &request.parameters);
        let found = cache.find(&key).await;
        let looked = started.elapsed();
        if let Some(outputs) = found {
            metrics.cache(true);
            cache.looked(true, looked);
            return Ok((outputs, Timings { cache_hit: true, ..Timings::default() }));
        }
        let run = async || {
            let began = Instant::now();
            let first = entered.lock().unwrap_or_else(PoisonError::into_inner).take();
            // Once more where it was given up for others.
            let entered = first.map_or_else(|| self.enter_fitted(&fitted, request), Ok)?;
            let answer = self.run(fitted.clone(), request, entered).await;
            let timings = answer.as_ref().ok().map(|(_, timings)| *timings);
            *ran.lock().unwrap_or_else(PoisonError::into_inner) = Some((timings, began.elapsed()));
            answer.map(|(outputs, _)| outputs)
        };
        let outputs = cache.answer(key, run).await;
        let ran = ran.into_inner().unwrap_or_else(PoisonError::into_inner);
        // Whoever waited for another's run has found its answer, and waited.
        let waited = started.elapsed().saturating_sub(looked);
        metrics.cache(ran.is_none());
        cache.looked(ran.is_none(), looked);
        if let Some((_, took)) = &ran {
            let kept = waited.saturating_sub(*took);
            cache.kept(kept);
            self.statistics.missed(looked + kept);
        }
        let hit = Timings { cache_hit: true, queue: waited, ..Timings::default() };
        Ok((outputs?, ran.and_then(|(timings, _)| timings).unwrap_or(hit)))
    }

    /// What is rare or slow is boxed, so that the common request does not carry room for it.
    async fn run(&self, fitted: Fitted, request: &Request, entered: Entered) -> Result<Answer, InferError> {
        let Request { priority, timeout, deadline, .. } = *request;
        let unfit = |source| InferError::reshape(&self.name, source);
        let started = Instant::now();
        match (&self.runs, entered) {
            (Runs::Graph(graph, binding), _) => {
                let Fitted { inputs, rows, outputs: wanted } = fitted;
                let (inputs, outputs) = binding.bind(inputs, &wanted).map_err(unfit)?;
                let Completed { inputs, scattered } = binding.ragged.complete(inputs).map_err(unfit)?;
                let work = Work { inputs, rows, outputs, scattered, priority, timeout, deadline, ..Work::default() };
                let done = graph.run(work).await?;
                Ok((binding.unbind(&wanted, done.outputs).map_err(unfit)?, done.timings))
            }
            (Runs::Sequence(graphs, binding, sequences), Entered::InSequence(turn)) => {
                let Fitted { inputs, rows, outputs: wanted } = fitted;
                Sequences::check_rows(rows)?;
                let (inputs, mut outputs) = binding.bind(inputs, &wanted).map_err(unfit)?;
                let begun = turn.begin(inputs);
                // It is in no queue yet, and waits all the same.
                let waiting = graphs.first().map(|graph| graph.waits());
                let (step, inputs) = match timeout {
                    Some(timeout) => tokio::time::timeout(timeout, begun)
                        .await
                        .map_err(|_| ScheduleError::TimedOut { graph: self.name.clone() })??,
                    None => begun.await?,
                };
                drop(waiting);
                let stopped = || ScheduleError::Stopped { graph: self.name.clone() };
                let graph = graphs.get(step.instance).ok_or_else(stopped)?;
                outputs.extend_from_slice(sequences.state_outputs());
                let since = Some(started);
                let work = Work { inputs, rows, outputs, priority, timeout, deadline, since, ..Work::default() };
                let mut done = graph.run(work).await?;
                step.finish(&done.outputs.split_off(wanted.len()));
                Ok((binding.unbind(&wanted, done.outputs).map_err(unfit)?, done.timings))
            }
            (Runs::Ensemble(ensemble), Entered::ByStep(steps)) => {
                let answer = Box::pin(ensemble.infer(fitted, request, steps)).await?;
                self.statistics.composed();
                Ok(answer)
            }
            (Runs::Multimodal(multimodal), _) => {
                let outputs = Box::pin(multimodal.infer(&fitted, deadline)).await?;
                self.statistics.composed();
                Ok((outputs, Timings { compute_infer: started.elapsed(), ..Timings::default() }))
            }
            // What iterates is for those who take several responses; [`ModelVersion::enter`] gives the others what they take.
            (Runs::Iteration(_) | Runs::Sequence(..) | Runs::Ensemble(_), _) => {
                Err(InferError::Decoupled { model: self.name.clone() })
            }
        }
    }

    /// What it has done since it was loaded.
    pub fn statistics(&self) -> ModelStatistics {
        self.statistics.report(&self.name, &self.version)
    }

    /// The same, with what the metrics tell beside that.
    pub(crate) fn counts(&self) -> Counts {
        Counts { statistics: self.statistics(), failures: self.statistics.failures() }
    }

    /// Counts a request that was refused before it came here.
    pub(crate) fn refused(&self, code: Code) {
        self.statistics.failed(Duration::ZERO, code.into());
    }

    /// Runs what waits and gives the engine's memory back.
    pub async fn stop(&self) {
        for graph in self.graphs() {
            graph.stop().await;
        }
    }
}

/// Counts a failure unless the request was answered: also of one whose caller leaves, which is dropped in the middle.
struct Counted<'a> {
    statistics: &'a Statistics,
    started: Instant,
    /// What it counts when it is dropped.
    failed: Option<Failure>,
}

impl Counted<'_> {
    fn note<T, E: Into<InferError>>(&mut self, result: Result<T, E>) -> Result<T, InferError> {
        result.map_err(Into::into).inspect_err(|error| self.failed = Some(error.code().into()))
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        if let Some(why) = self.failed {
            self.statistics.failed(self.started.elapsed(), why);
        }
    }
}

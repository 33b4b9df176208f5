//! Models that are made of other models: a graph of steps whose tensors are handed over without a copy.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use sensorium_artifact::TensorSpec;
use sensorium_engine::{RawTensor, dtype_name};
use sensorium_proto::inference::{ModelConfig, ModelEnsembling};
use sensorium_telemetry::{error_line, step_span};
use tracing::Instrument as _;

use super::{Entered, Fitted, Interface, ModelVersion, NamedTensor, Request, Response, Timings};
use crate::{error::InferError, spans};

/// Finds the model of a step when a request comes, so that a step's model may be loaded again under the ensemble.
pub(crate) type Find = Arc<dyn Fn(&str, &str) -> Result<Arc<ModelVersion>, InferError> + Send + Sync>;

/// A step of an ensemble that a request has entered.
#[derive(Debug)]
pub(super) struct Entering {
    /// Which step.
    index: usize,
    pub(super) model: Arc<ModelVersion>,
    pub(super) entered: Entered,
}

/// A step that runs.
type Call<'a> = BoxFuture<'a, Result<(&'a Step, Response), InferError>>;

/// The steps of an ensemble.
pub(crate) struct Ensemble {
    name: String,
    steps: Vec<Step>,
    /// Indices of the steps in an order in which they can run.
    order: Vec<usize>,
    /// Names of the tensors that clients send and get, in the order of the interface.
    inputs: Vec<String>,
    outputs: Vec<String>,
    /// How many sizes each of the outputs has.
    ranks: Vec<usize>,
    /// Whether any of its models had sequences when it was loaded.
    has_sequences: bool,
    find: Find,
}

/// One call of a model.
#[derive(Clone, Debug)]
struct Step {
    model: String,
    /// Empty for the newest.
    version: String,
    /// Input of the model, tensor of the ensemble.
    inputs: Vec<(String, String)>,
    /// Output of the model, tensor of the ensemble.
    outputs: Vec<(String, String)>,
}

impl std::fmt::Debug for Ensemble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ensemble").field("name", &self.name).field("steps", &self.steps).finish_non_exhaustive()
    }
}

impl Ensemble {
    /// Names of the models that an ensemble calls, each with its version where that is not the newest.
    pub(crate) fn models(ensembling: &ModelEnsembling) -> BTreeSet<(&str, Option<u64>)> {
        let steps = ensembling.step.iter();
        steps.map(|step| (step.model_name.as_str(), pinned(step.model_version))).collect()
    }

    /// An ensemble whose models are all loaded.
    ///
    /// # Errors
    /// The first thing that does not fit together, as a sentence about the model.
    pub(crate) fn new(
        config: &ModelConfig,
        ensembling: &ModelEnsembling,
        interface: &Interface,
        find: Find,
    ) -> Result<Self, String> {
        let steps: Vec<Step> = ensembling.step.iter().map(Step::from).collect();
        if steps.is_empty() {
            return Err("its ensemble_scheduling has no step".to_owned());
        }
        let order = check(&steps, interface, config.max_batch_size, &find)?;
        let is_of_sequences = |step: &Step| find(&step.model, &step.version).is_ok_and(|model| model.has_sequences());
        let has_sequences = steps.iter().any(is_of_sequences);
        let names = |specs: &[TensorSpec]| specs.iter().map(|spec| spec.name.clone()).collect();
        Ok(Self {
            name: config.name.clone(),
            steps,
            order,
            inputs: names(&interface.inputs),
            outputs: names(&interface.outputs),
            ranks: interface.outputs.iter().map(|spec| spec.shape.len()).collect(),
            has_sequences,
            find,
        })
    }

    pub(super) fn has_sequences(&self) -> bool {
        self.has_sequences
    }

    /// That its steps still fit together, as the models are now.
    ///
    /// # Errors
    /// As [`Ensemble::new`].
    pub(super) fn check(&self, interface: &Interface, max_batch_size: i32) -> Result<(), String> {
        check(&self.steps, interface, max_batch_size, &self.find).map(drop)
    }

    /// The models of the steps that `outputs` need, as they are now. They answer this request whatever becomes of them meanwhile, and it
    /// stands in the sequences of those that have any from now on: a step ends when it likes, and requests would come to the next one in
    /// another order. Steps are entered in the order in which they run, so that none waits in a sequence for one that waits for its tensors.
    ///
    /// # Errors
    /// Of the first step that cannot be called.
    pub(super) fn enter<'a>(
        &self,
        outputs: impl Iterator<Item = &'a str>,
        request: &Request,
    ) -> Result<Vec<Entering>, InferError> {
        let needed = self.needed(outputs.collect());
        let enter = |&index: &usize| {
            let step = &self.steps[index];
            let entering = || {
                let model = (self.find)(&step.model, &step.version)?;
                // Of its tensors nothing is known yet.
                let wanted: Vec<&str> = step.outputs.iter().map(|(output, _)| output.as_str()).collect();
                let entered = model.enter(&mut wanted.into_iter(), 1, request)?;
                Ok(Entering { index, model, entered })
            };
            entering().map_err(|source| self.failed(index, source))
        };
        self.order.iter().filter(|&&index| needed[index]).map(enter).collect()
    }

    /// Runs every step that was entered, as soon as its tensors are there. `request` has what the client said beside its tensors.
    pub(super) async fn infer(
        &self,
        fitted: Fitted,
        request: &Request,
        mut waiting: Vec<Entering>,
    ) -> Result<(Vec<RawTensor>, Timings), InferError> {
        let mut tensors: BTreeMap<&str, RawTensor> =
            self.inputs.iter().map(String::as_str).zip(fitted.inputs).collect();
        let mut running: FuturesUnordered<Call<'_>> = FuturesUnordered::new();
        let mut timings = Timings::default();
        loop {
            let ready = waiting.extract_if(.., |step| {
                self.steps[step.index].inputs.iter().all(|(_, tensor)| tensors.contains_key(tensor.as_str()))
            });
            for step in ready {
                let call = self.steps[step.index].request(&step.model, &tensors, request);
                running.push(self.call(step, call));
            }
            let Some(done) = running.next().await else { break };
            let (step, response) = done?;
            timings += Timings { cache_hit: false, ..response.timings };
            for (NamedTensor { tensor, .. }, (_, name)) in response.outputs.into_iter().zip(&step.outputs) {
                tensors.insert(name, tensor);
            }
        }
        let output = |&output: &usize| {
            let (name, rank) = (self.outputs[output].as_str(), self.ranks[output]);
            let missing = || InferError::Ensemble { model: self.name.clone(), tensor: name.to_owned() };
            tensors.remove(name).map(|tensor| with_rank(tensor, rank)).ok_or_else(missing)
        };
        Ok((fitted.outputs.iter().map(output).collect::<Result<_, _>>()?, timings))
    }

    /// Boxed, because a step may be an ensemble, too.
    fn call(&self, Entering { index, model, entered }: Entering, request: Request) -> Call<'_> {
        // Within the span of the request, if it has one.
        let span = step_span(model.name(), model.version());
        let own = span.clone();
        let call = async move {
            let answer = model.answer(request, Some(entered)).await;
            match &answer {
                Ok(response) => {
                    spans::answered(&own);
                    spans::timed(&own, &response.timings);
                }
                Err(error) => spans::failed(&own, error.code(), &error_line(error)),
            }
            Ok((&self.steps[index], answer.map_err(|source| self.failed(index, source))?))
        };
        Box::pin(call.instrument(span))
    }

    fn failed(&self, index: usize, source: InferError) -> InferError {
        InferError::Step { step: self.steps[index].place(index), source: Box::new(source) }
    }

    /// For each step, whether one of these tensors is not made without it.
    fn needed<'a>(&'a self, mut tensors: BTreeSet<&'a str>) -> Vec<bool> {
        let mut needed: Vec<bool> = vec![false; self.steps.len()];
        // Each round finds at least one more step, or is the last.
        while let Some(index) = (0..self.steps.len()).find(|&index| {
            !needed[index] && self.steps[index].outputs.iter().any(|(_, tensor)| tensors.contains(tensor.as_str()))
        }) {
            needed[index] = true;
            tensors.extend(self.steps[index].inputs.iter().map(|(_, tensor)| tensor.as_str()));
        }
        needed
    }
}

impl Step {
    /// Which one it is, for messages.
    fn place(&self, index: usize) -> String {
        format!("step {} ({})", index + 1, self.model)
    }

    fn request(&self, model: &ModelVersion, tensors: &BTreeMap<&str, RawTensor>, request: &Request) -> Request {
        let input = |(name, tensor): &(String, String)| {
            let tensor = tensors.get(tensor.as_str())?.clone();
            let spec = model.inputs().iter().find(|spec| spec.name == *name);
            let rank = spec.map_or(tensor.shape().len(), |spec| spec.shape.len());
            Some(NamedTensor { name: name.clone(), tensor: with_rank(tensor, rank) })
        };
        Request {
            id: request.id.clone(),
            inputs: self.inputs.iter().filter_map(input).collect(),
            outputs: self.outputs.iter().map(|(output, _)| output.clone()).collect(),
            priority: request.priority,
            timeout: request.timeout,
            deadline: request.deadline,
            sequence: request.sequence.clone(),
            parameters: request.parameters.clone(),
        }
    }
}

impl From<&sensorium_proto::inference::model_ensembling::Step> for Step {
    fn from(step: &sensorium_proto::inference::model_ensembling::Step) -> Self {
        let sorted = |map: &std::collections::HashMap<String, String>| {
            map.iter()
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect::<BTreeMap<_, _>>()
                .into_iter()
                .collect()
        };
        Self {
            model: step.model_name.clone(),
            version: pinned(step.model_version).map(|version| version.to_string()).unwrap_or_default(),
            inputs: sorted(&step.input_map),
            outputs: sorted(&step.output_map),
        }
    }
}

/// The version that a step names: -1, and 0 for a field that is left out, stand for the newest.
fn pinned(version: i64) -> Option<u64> {
    u64::try_from(version).ok().filter(|version| *version > 0)
}

/// A tensor between models of which one batches and the other does not: a row has a batch of one before its sizes where it has one more
/// of them. Anything else is as it is, and refused by who gets it.
fn with_rank(tensor: RawTensor, rank: usize) -> RawTensor {
    let shape = match tensor.shape() {
        shape if shape.len() + 1 == rank => [&[1], shape].concat(),
        [1, shape @ ..] if shape.len() == rank => shape.to_vec(),
        _ => return tensor,
    };
    tensor.clone().reshaped(shape).unwrap_or(tensor)
}

/// Where a tensor of the ensemble comes from, for messages, and what it is.
struct Origin {
    from: String,
    spec: TensorSpec,
    /// Whether its first size is a batch.
    batches: bool,
}

/// Walks through the steps in an order in which they can run, which is returned.
fn check(steps: &[Step], interface: &Interface, max_batch_size: i32, find: &Find) -> Result<Vec<usize>, String> {
    let mut order = Vec::with_capacity(steps.len());
    let mut origins: BTreeMap<String, Origin> = BTreeMap::new();
    let batches = interface.max_rows.is_some();
    for spec in &interface.inputs {
        let from = format!("input `{}` of the ensemble", spec.name);
        origins.insert(spec.name.clone(), Origin { from, spec: spec.clone(), batches });
    }
    let makers: BTreeSet<&str> =
        steps.iter().flat_map(|step| &step.outputs).map(|(_, tensor)| tensor.as_str()).collect();
    let mut waiting: Vec<(usize, &Step)> = steps.iter().enumerate().collect();
    while !waiting.is_empty() {
        let is_ready = |step: &Step| step.inputs.iter().all(|(_, tensor)| origins.contains_key(tensor));
        let Some(position) = waiting.iter().position(|(_, step)| is_ready(step)) else {
            let is_unknown = |tensor: &str| !origins.contains_key(tensor) && !makers.contains(tensor);
            let needs = |(index, step): &(usize, &Step)| {
                let (input, tensor) = step.inputs.iter().find(|(_, tensor)| is_unknown(tensor))?;
                Some(format!("input `{input}` of its {} needs tensor `{tensor}`", step.place(*index)))
            };
            if let Some(needs) = waiting.iter().find_map(needs) {
                let known: Vec<_> = origins.keys().map(String::as_str).chain(makers).collect();
                return Err(format!("{needs}, which is no input and no step gives; there are {}", known.join(", ")));
            }
            let models: Vec<_> = waiting.iter().map(|(_, step)| step.model.as_str()).collect();
            return Err(format!("its steps wait for each other in a circle: {}", models.join(", ")));
        };
        let (index, step) = waiting.remove(position);
        check_step(index, step, &mut origins, max_batch_size, find)?;
        order.push(index);
    }
    for spec in &interface.outputs {
        let origin =
            origins.get(&spec.name).ok_or_else(|| format!("its output `{}` is given by no step", spec.name))?;
        compare(&format!("its output `{}`", spec.name), spec, (batches, max_batch_size), origin)?;
    }
    Ok(order)
}

fn check_step(
    index: usize,
    step: &Step,
    origins: &mut BTreeMap<String, Origin>,
    max_batch_size: i32,
    find: &Find,
) -> Result<(), String> {
    let place = step.place(index);
    let model = find(&step.model, &step.version).map_err(|error| format!("its {place} cannot be called: {error}"))?;
    if model.iterates() {
        return Err(format!(
            "its {place} answers a request with several responses (iterative_sequence), and a step gives one; make it of \
             models that do not iterate, and let clients call that one by itself"
        ));
    }
    let allowed = model.config().max_batch_size;
    if max_batch_size > allowed && allowed > 0 {
        return Err(format!("its max_batch_size is {max_batch_size}, its {place} takes {allowed} rows at most"));
    }
    for (input, tensor) in &step.inputs {
        let spec = model.inputs().iter().find(|spec| spec.name == *input);
        let spec = spec.ok_or_else(|| {
            format!("its {place} maps input `{input}`, which that model has not; it has {}", names(model.inputs()))
        })?;
        compare(&format!("input `{input}` of its {place}"), spec, (allowed > 0, max_batch_size), &origins[tensor])?;
    }
    if let Some(spec) = model.inputs().iter().find(|spec| !step.inputs.iter().any(|(input, _)| *input == spec.name)) {
        return Err(format!("its {place} does not map input `{}`", spec.name));
    }
    for (output, tensor) in &step.outputs {
        let spec = model.outputs().iter().find(|spec| spec.name == *output);
        let spec = spec.ok_or_else(|| {
            format!("its {place} maps output `{output}`, which that model has not; it has {}", names(model.outputs()))
        })?;
        let origin = Origin { from: format!("output `{output}` of {place}"), spec: spec.clone(), batches: allowed > 0 };
        if let Some(first) = origins.insert(tensor.clone(), origin) {
            return Err(format!("its tensor `{tensor}` comes from {} and from {place}", first.from));
        }
    }
    Ok(())
}

/// That a tensor is what is `wanted`, by a model that batches or does not, in an ensemble of so many rows at most.
fn compare(
    what: &str,
    wanted: &TensorSpec,
    (batches, max_batch_size): (bool, i32),
    origin: &Origin,
) -> Result<(), String> {
    let given = &origin.spec;
    let fits = |(a, b): (&Option<u64>, &Option<u64>)| a.is_none() || b.is_none() || a == b;
    let alike = |a: &[Option<u64>], b: &[Option<u64>]| a.len() == b.len() && a.iter().zip(b).all(fits);
    let is_shape_right = alike(&wanted.shape, &given.shape)
        // A row goes from one to the other, where there is no more than one.
        || match (origin.batches, batches) {
            (false, true) => wanted.shape.split_first().is_some_and(|(_, row)| alike(row, &given.shape)),
            (true, false) if max_batch_size <= 1 => given.shape.split_first().is_some_and(|(_, row)| alike(&wanted.shape, row)),
            _ => false,
        };
    if wanted.dtype == given.dtype && is_shape_right {
        return Ok(());
    }
    let text = |spec: &TensorSpec| {
        let sizes = spec.shape.iter().map(|size| size.map_or_else(|| "-1".to_owned(), |size| size.to_string()));
        format!("{} [{}]", dtype_name(spec.dtype), sizes.collect::<Vec<_>>().join(", "))
    };
    Err(format!("{what} is {}, but {} is {}", text(wanted), origin.from, text(given)))
}

fn names(specs: &[TensorSpec]) -> String {
    specs.iter().map(|spec| spec.name.as_str()).collect::<Vec<_>>().join(", ")
}

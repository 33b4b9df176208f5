//! The training loop.

use std::collections::BTreeMap;
use std::time::Instant;

use sensorium_api::TrainingJobSpec;
use sensorium_api::run::{Evaluation, HistoryPoint, RunConfig};
use sensorium_dist::{ProcessGroup, ReduceOp};
use sensorium_model::{Acts, Slot, Task};
use tch::Tensor;

use crate::batch::{Batch, BatchPlan, Loader};
use crate::checkpoint::TrainingState;
use crate::error::TrainError;
use crate::evaluate;
use crate::exchange::Exchange;
use crate::executor::{Executor, Memory};
use crate::flat::Parameters;
use crate::history::History;
use crate::optimizer::{AdamW, learning_rate};
use crate::progress::Reporter;
use crate::setup::Setup;
use crate::stop::Stop;
use crate::task;

/// Images that an evaluation in the middle of a run looks at; the last one takes them all.
const EVALUATION_SAMPLE: usize = 200;
/// Images among which recall is measured.
const RECALL_POOL: usize = 500;

/// What a finished run has to show.
#[derive(Debug)]
pub struct Trained {
    /// The last step's parameters; on every rank.
    pub weights: sensorium_model::Weights,
    /// Of the last step, on all held-out data.
    pub metrics: BTreeMap<String, f64>,
    /// Time spent on steps and evaluations, in this process and those it went on from.
    pub seconds: f64,
}

/// One rank's run.
pub struct Run<'a> {
    config: &'a RunConfig<TrainingJobSpec>,
    setup: &'a Setup,
    group: &'a ProcessGroup,
    reporter: &'a Reporter,
    stop: &'a Stop,
    parameters: Parameters,
    optimizer: AdamW,
    /// Time spent training before this process started.
    seconds_before: f64,
    started: Instant,
}

impl<'a> Run<'a> {
    /// Lays out parameters; [`Run::train`] does the work. The number of ranks need not be that of an earlier process whose
    /// checkpoint this run goes on from: state is kept whole, and the batch is divided anew.
    ///
    /// # Errors
    /// When the batch can't be divided by the number of ranks, or the starting weights do not fit the network.
    pub fn new(
        config: &'a RunConfig<TrainingJobSpec>,
        setup: &'a Setup,
        group: &'a ProcessGroup,
        reporter: &'a Reporter,
        stop: &'a Stop,
    ) -> Result<Self, TrainError> {
        let (images, ranks) = (config.spec.training.batch.images, group.size());
        if images % ranks != 0 {
            let reason = format!("{images} images can't be shared out evenly over {ranks} processes");
            return Err(TrainError::Spec { field: "spec.training.batch.images", reason });
        }
        let parameters = Parameters::new(&setup.network, &setup.weights)?;
        let trained = setup.tasks.iter().flat_map(|(task, _)| setup.network.path(*task)).collect();
        let optimizer = AdamW::new(config.spec.training.optimizer.clone(), &parameters, trained)?;
        let (seconds_before, started) = (0.0, Instant::now());
        Ok(Self { config, setup, group, reporter, stop, parameters, optimizer, seconds_before, started })
    }

    /// Trains to the last step, from the newest checkpoint if there is one, and evaluates on all held-out data.
    ///
    /// # Errors
    /// [`TrainError::Stopped`] after a stop was asked for and the state saved; otherwise what went wrong.
    pub fn train(mut self) -> Result<Trained, TrainError> {
        let spec = &self.config.spec.training;
        let first = self.resume()?;
        let plan = BatchPlan {
            seed: spec.seed,
            images: spec.batch.images as usize,
            questions_per_image: self.setup.weight(Task::Vqa).map(|_| spec.batch.questions_per_image as usize),
            captions: self.setup.weight(Task::Contrastive).is_some(),
            horizontal_flip: spec.augment.horizontal_flip,
            shard: (self.group.rank(), self.group.size()),
        };
        let (train, preparation) = (self.setup.train.clone(), self.setup.preparation.clone());
        let loader = Loader::start(train, preparation, plan, first..spec.steps)?;
        let mut history = History::open(&self.setup.folder, first, spec.steps, self.group.rank() == 0);
        self.reporter.update(|progress| {
            "training".clone_into(&mut progress.state);
            progress.steps = spec.steps;
            progress.step = first;
        });
        self.started = Instant::now();
        let mut pace = Pace::start();
        for step in first..spec.steps {
            let _span = tracing::info_span!("step", step).entered();
            let rate = learning_rate(&spec.optimizer, step, spec.steps);
            let (loss, stop) = self.losses(&loader.next()?, step)?;
            let grad_norm = self.optimizer.clip(&self.parameters)?;
            if !grad_norm.is_finite() {
                return Err(TrainError::NotFinite { step: step + 1, what: "gradient's norm", value: grad_norm });
            }
            self.optimizer.step(&self.parameters, step, rate)?;
            let done = step + 1;
            let last = done == spec.steps;
            let per_step = pace.step();
            let accuracy = match spec.evaluate_every_steps {
                Some(every) if done % every == 0 && !last => self.accuracy(EVALUATION_SAMPLE)?.map(|it| it.accuracy),
                _ => None,
            };
            self.reporter.update(|progress| {
                "training".clone_into(&mut progress.state);
                progress.step = done;
                progress.loss = Some(loss);
                progress.accuracy = accuracy.or(progress.accuracy);
                progress.samples_per_second = Some(f64::from(spec.batch.images) / per_step);
                progress.eta_seconds = Some(per_step * (spec.steps - done) as f64);
            });
            let seconds = self.seconds();
            history.note(HistoryPoint { step: done, loss, learning_rate: rate, grad_norm, accuracy, seconds });
            let mut unsaved = None;
            if stop || last || done % self.config.spec.checkpoint.every_steps == 0 {
                history.save();
                unsaved = self.checkpoint(done)?;
            }
            if stop && !last {
                return Err(TrainError::Stopped { step: done, unsaved });
            }
        }
        self.finish(&mut history)
    }

    /// Forward, backward and the exchange of gradients for one batch. Returns the weighted loss over all ranks, and
    /// whether any rank was asked to stop: all of them hear of it at the same step.
    fn losses(&self, batch: &Batch, step: u64) -> Result<(f64, bool), TrainError> {
        let network = &self.setup.network;
        let memory =
            if self.config.spec.training.activation_checkpointing { Memory::Recompute } else { Memory::KeepGraphs };
        let executor = Executor::new(network, &self.parameters, memory);
        self.parameters.zero_gradients()?;
        // How many more tasks will add to each block's gradient: at zero it is whole and can be sent.
        let mut pending = vec![0u32; network.blocks().len()];
        let paths: Vec<_> =
            self.setup.tasks.iter().map(|(task, weight)| (*task, *weight, network.path(*task))).collect();
        for block in paths.iter().flat_map(|(_, _, path)| path) {
            pending[*block] += 1;
        }
        let mut exchange = Exchange::new(self.group, &self.parameters);
        let mut total = 0.0;
        for (task, weight, path) in &paths {
            let mut acts = Acts::from([(Slot::Pixels, batch.pixels.shallow_clone())]);
            match (task, &batch.questions, &batch.captions) {
                (Task::Vqa, Some(questions), _) => {
                    acts.insert(Slot::TextIds, questions.ids.shallow_clone());
                    acts.insert(Slot::ImageIndex, questions.image_index.shallow_clone());
                }
                (Task::Contrastive, _, Some(captions)) => {
                    acts.insert(Slot::TextIds, captions.ids.shallow_clone());
                }
                _ => return Err(TrainError::MissingInput { block: format!("{task:?}"), slot: Slot::TextIds }),
            }
            let (acts, tape) = executor.forward(path, acts)?;
            let found = match (task, &batch.questions, &batch.captions) {
                (Task::Vqa, Some(questions), _) => task::vqa(&acts, &questions.targets, *weight)?,
                (_, _, Some(captions)) => task::contrastive(&acts, &captions.present, self.group, *weight)?,
                _ => return Err(TrainError::MissingInput { block: format!("{task:?}"), slot: Slot::TextIds }),
            };
            total += weight * found.loss;
            executor.backward(tape, found.gradients, |block| {
                pending[block] -= 1;
                if pending[block] == 0 { exchange.add(block) } else { Ok(()) }
            })?;
        }
        let asked = if self.stop.is_requested() { 1.0 } else { 0.0 };
        let shared = Tensor::f_from_slice(&[total, asked])?;
        let told = self.group.all_reduce(&shared, ReduceOp::Avg)?;
        exchange.finish()?;
        told.wait()?;
        let (loss, asked) = (shared.f_double_value(&[0])?, shared.f_double_value(&[1])?);
        if !loss.is_finite() {
            return Err(TrainError::NotFinite { step: step + 1, what: "loss", value: loss });
        }
        Ok((loss, asked > 0.0))
    }

    /// Goes on from the newest whole checkpoint. Rank 0 reads it and the others get it from there, so that all agree even
    /// if they see different disks. Returns the steps that are done.
    fn resume(&mut self) -> Result<u64, TrainError> {
        let found = if self.group.rank() == 0 { self.setup.checkpoints.newest()? } else { None };
        let (step, seconds) = found.as_ref().map_or((0, 0.0), |state| (state.step, state.seconds));
        let own = self.setup.checkpoints.inputs();
        let cursor = Tensor::f_from_slice(&[step as f64, seconds, own])?;
        self.group.broadcast(&cursor, 0)?.wait()?;
        let step = cursor.f_double_value(&[0])? as u64;
        self.seconds_before = cursor.f_double_value(&[1])?;
        if cursor.f_double_value(&[2])?.to_bits() != own.to_bits() {
            let reason = format!(
                "rank {} finds other data, or another model to begin with, there than rank 0",
                self.group.rank()
            );
            return Err(TrainError::Spec { field: "spec.data.train", reason });
        }
        if step == 0 {
            return Ok(0);
        }
        if let Some(state) = &found {
            for (block, (mean, square)) in self.parameters.blocks().iter().zip(self.optimizer.moments()) {
                block.fill(block.values(), &state.values)?;
                block.fill(mean, &state.mean)?;
                block.fill(square, &state.square)?;
            }
        }
        for (block, (mean, square)) in self.parameters.blocks().iter().zip(self.optimizer.moments()) {
            for buffer in [block.values(), mean, square] {
                self.group.broadcast(buffer, 0)?.wait()?;
            }
        }
        tracing::info!(step, "going on from a checkpoint");
        self.reporter.update(|progress| progress.resumed_from = Some(step));
        Ok(step)
    }

    /// Rank 0 writes; a failure is told, and not fatal, because training that goes on can save again later.
    fn checkpoint(&self, step: u64) -> Result<Option<String>, TrainError> {
        if self.group.rank() != 0 {
            return Ok(None);
        }
        let _span = tracing::info_span!("checkpoint", step).entered();
        let mut state = TrainingState {
            step,
            seconds: self.seconds(),
            values: self.parameters.weights()?,
            mean: BTreeMap::new(),
            square: BTreeMap::new(),
        };
        for (block, (mean, square)) in self.parameters.blocks().iter().zip(self.optimizer.moments()) {
            block.unflatten(mean, &mut state.mean)?;
            block.unflatten(square, &mut state.square)?;
        }
        match self.setup.checkpoints.save(&state) {
            Ok(path) => {
                tracing::info!(step, path = %path.display(), "saved a checkpoint");
                self.reporter.update(|progress| progress.message = None);
                Ok(None)
            }
            Err(error) => {
                tracing::error!(step, error = &error as &dyn std::error::Error, "could not save a checkpoint");
                self.reporter.checkpoint_failed();
                let message = format!("could not save the checkpoint of step {step}: {error}");
                self.reporter.update(|progress| progress.message = Some(message));
                Ok(Some(error.to_string()))
            }
        }
    }

    fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }

    /// The VQA evaluation on at most `limit` images; none without that task.
    fn accuracy(&self, limit: usize) -> Result<Option<Evaluation>, TrainError> {
        if self.setup.weight(Task::Vqa).is_none() {
            return Ok(None);
        }
        let _span = tracing::info_span!("evaluate").entered();
        self.reporter.update(|progress| "evaluating".clone_into(&mut progress.state));
        let Setup { network, preparation, evaluation, answers, .. } = self.setup;
        let executor = Executor::new(network, &self.parameters, Memory::KeepGraphs);
        evaluate::vqa(&executor, network, preparation, evaluation, limit, self.group, answers).map(Some)
    }

    /// The last evaluation, on all held-out data.
    fn finish(&self, history: &mut History) -> Result<Trained, TrainError> {
        let mut metrics = BTreeMap::new();
        if let Some(evaluation) = self.accuracy(usize::MAX)? {
            metrics.insert("vqa_accuracy".to_owned(), evaluation.accuracy);
            self.reporter.update(|progress| progress.accuracy = Some(evaluation.accuracy));
            history.finish(&evaluation);
        }
        if self.setup.weight(Task::Contrastive).is_some() {
            let Setup { network, preparation, evaluation, .. } = self.setup;
            let executor = Executor::new(network, &self.parameters, Memory::KeepGraphs);
            let recall = evaluate::recall_at_1(&executor, network, preparation, evaluation, RECALL_POOL)?;
            metrics.insert("contrastive_recall_at_1".to_owned(), recall);
        }
        Ok(Trained { weights: self.parameters.weights()?, metrics, seconds: self.seconds() })
    }
}

/// How long a step takes, over the last seconds.
struct Pace {
    since: Instant,
    steps: u32,
    last: f64,
}

impl Pace {
    const WINDOW_SECONDS: f64 = 5.0;

    fn start() -> Self {
        Self { since: Instant::now(), steps: 0, last: 0.0 }
    }

    /// Notes a step; seconds per step of the last full window, or of the first while it fills.
    fn step(&mut self) -> f64 {
        self.steps += 1;
        let elapsed = self.since.elapsed().as_secs_f64();
        let mean = elapsed / f64::from(self.steps);
        if elapsed >= Self::WINDOW_SECONDS {
            *self = Self { since: Instant::now(), steps: 0, last: mean };
        }
        if self.last > 0.0 { self.last } else { mean }
    }
}

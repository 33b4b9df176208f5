//! From a model's folder to versions that answer.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use bytes::Bytes;
use sensorium_artifact::TensorSpec;
use sensorium_engine::{Engine, RESET_METHOD, RawTensor, SameFile};
use sensorium_proto::inference::{ModelConfig, ModelEnsembling, ModelOutput, model_config::SchedulingChoice};
use sensorium_telemetry::error_line;

use super::{
    LoadParameters, Loaded, Opening,
    apart::{self, Rows},
    artifact,
    complete::{self, Complete},
    config::{self, Written},
    engines,
    folder::{Folder, fingerprint},
    iteration, lengths, openers,
};
use crate::{
    files::{self, inside},
    model::{Ensemble, Find, Graph, Iteration, ModelVersion, Runs, Seated, Sequences, Stateful, Statistics},
    scheduler::{Policy, Reopen, Scheduler, Setup, Slots},
};

/// A model's folder and configuration, read and not yet opened.
#[derive(Debug)]
pub(super) struct Found {
    folder: Folder,
    written: Written,
    /// Files that came with a request.
    own: Option<Arc<tempfile::TempDir>>,
    /// Of the folder before it was read, where nothing came with a request: what changes meanwhile is another.
    fingerprint: Option<u64>,
}

impl Found {
    /// Reads what there is at `path`, or what came with a request instead.
    ///
    /// # Errors
    /// Why it is no model.
    pub(super) fn read(name: &str, path: &Path, parameters: &LoadParameters) -> Result<Self, String> {
        let own = if parameters.files.is_empty() { None } else { Some(Arc::new(materialise(&parameters.files)?)) };
        let path = own.as_ref().map_or(path, |own| own.path());
        let is_as_it_is = *parameters == LoadParameters::default();
        let fingerprint = is_as_it_is.then(|| fingerprint(path).ok()).flatten();
        let folder =
            Folder::read(path).map_err(|error| format!("its folder {} cannot be read: {error}", path.display()))?;
        let written = match (&parameters.config, &folder.config) {
            (Some(json), _) => {
                config::from_json(json).map_err(|error| format!("the configuration in the request: {error}"))?
            }
            (None, Some(text)) => config::from_text(text).map_err(|error| format!("config.pbtxt, {error}"))?,
            (None, None) => Written::default(),
        };
        if !written.config.name.is_empty() && written.config.name != name {
            return Err(format!(
                "its configuration calls it {:?}; the name is that of the folder",
                written.config.name
            ));
        }
        Ok(Self { folder, written, own, fingerprint })
    }

    /// The steps, where the model is made of others.
    pub(super) fn ensembling(&self) -> Option<&ModelEnsembling> {
        match &self.written.config.scheduling_choice {
            Some(SchedulingChoice::EnsembleScheduling(ensembling)) => Some(ensembling),
            _ => None,
        }
    }

    /// Opens the versions that the configuration chooses. Blocks: seconds of CPU for a large model.
    ///
    /// # Errors
    /// Why there is no version to open. A version that fails is in [`Loaded::failed`].
    pub(super) fn open(&self, name: &str, opening: &Opening, find: &Find) -> Result<Loaded, String> {
        let mut versions = self.folder.chosen(&self.written.config)?;
        if versions.is_empty() && self.ensembling().is_some() {
            // Nothing of an ensemble lies in a version's folder.
            versions.insert(1, self.folder.path.clone());
        }
        if versions.is_empty() {
            let file = opening.openers.model_file(&self.folder.path);
            let advice = file.map_or(String::new(), |file| format!("; it has {file}: move it to 1/"));
            return Err(format!("it has no folder of a version, such as 1{advice}"));
        }
        let mut loaded = Loaded { fingerprint: self.fingerprint, ..Loaded::default() };
        for (version, path) in versions {
            if artifact::is_artifact(&path) {
                match artifact::open_folder(name, version, &path, self.own.clone(), opening) {
                    Ok(found) => {
                        loaded.versions.extend(found.versions);
                        loaded.multimodal.extend(found.multimodal);
                    }
                    Err(reason) => drop(loaded.failed.insert(version, reason)),
                }
                continue;
            }
            let written = self.written.clone();
            let opened = match self.ensembling() {
                Some(ensembling) => {
                    open_ensemble(name, version, written, ensembling, find.clone()).map(|model| (model, None))
                }
                None => open_version(name, version, &path, written, self.own.clone(), opening),
            };
            let labelled = |(model, remark): (ModelVersion, _)| {
                Ok((model.with_labels(labels(&self.folder.path, &self.written.config)?), remark))
            };
            match opened.and_then(labelled) {
                Ok((model, remark)) => {
                    loaded.remarks.extend(remark.map(|remark| (version, remark)));
                    let (metrics, served) = (&opening.metrics, version.to_string());
                    let cached = model.with_cache(&opening.responses, || metrics.graph(name, &served));
                    loaded.versions.push(cached.in_metrics(metrics.served(name, &served)));
                }
                Err(reason) => {
                    loaded.failed.insert(version, reason);
                }
            }
        }
        Ok(loaded)
    }
}

fn open_ensemble(
    name: &str,
    version: u64,
    written: Written,
    ensembling: &ModelEnsembling,
    find: Find,
) -> Result<ModelVersion, String> {
    let mut config = written.config;
    name.clone_into(&mut config.name);
    "ensemble".clone_into(&mut config.platform);
    let interface = complete::written_interface(&config)?;
    let ensemble = Ensemble::new(&config, ensembling, &interface, find)?;
    let runs = Runs::Ensemble(Arc::new(ensemble));
    Ok(ModelVersion::new(version.to_string(), config, interface, Arc::default(), runs))
}

/// Names of classes by output: one a line in the file that the configuration names.
fn labels(folder: &Path, config: &ModelConfig) -> Result<BTreeMap<String, Vec<String>>, String> {
    let read = |output: &ModelOutput| {
        let path = inside(folder, &output.label_filename).map_err(|reason| format!("its labels: {reason}"))?;
        let text = files::read_text(&path).map_err(|error| format!("its labels {}: {error}", path.display()))?;
        Ok((output.name.clone(), text.lines().map(|line| line.trim().to_owned()).collect()))
    };
    config.output.iter().filter(|output| !output.label_filename.is_empty()).map(read).collect()
}

/// Files that came with a request, as a folder.
fn materialise(files: &BTreeMap<String, Bytes>) -> Result<tempfile::TempDir, String> {
    let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
    for (path, content) in files {
        let target =
            inside(folder.path(), path).map_err(|reason| format!("a file that came with the request: {reason}"))?;
        let written = target.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&target, content));
        written.map_err(|error| format!("the file {path:?} cannot be kept: {error}"))?;
    }
    Ok(folder)
}

fn open_version(
    name: &str,
    version: u64,
    path: &Path,
    written: Written,
    own: Option<Arc<tempfile::TempDir>>,
    opening: &Opening,
) -> Result<(ModelVersion, Option<String>), String> {
    let opener = opening.openers.find(&written.config, path)?;
    let file = match written.config.default_model_filename.as_str() {
        "" => opener.file,
        chosen => chosen,
    };
    let mut file = inside(path, file).map_err(|reason| format!("its default_model_filename: {reason}"))?;
    // A model with files of its own beside it may be a folder.
    if file.is_dir() {
        file = file.join(opener.file);
    }
    if !file.exists() {
        return Err(opening.openers.lacks(path, &file.strip_prefix(path).unwrap_or(&file).display().to_string()));
    }
    let (count, options) = engines::instances(&written.config, opening.engine)?;
    let reopen: Reopen = {
        let (file, declared, same) = (file.clone(), openers::declared(&written.config), SameFile::at(&file));
        Arc::new(move || {
            // An engine that died is opened again from the same file, so that stays.
            let _kept = &own;
            let open = || {
                same.check()?;
                let engine = (opener.open)(&file, options, &declared)?;
                same.check().map(|()| engine)
            };
            open().map_err(|error| error_line(&error))
        })
    };
    let mut engines = engines::open(count, &reopen)?;
    let signature = engines[0].signature().clone();
    let on_gpu = options.device.gpu().is_some();
    let complete = complete::complete(written.clone(), &signature, opening.batching.max_rows)?;
    let (complete, remark) = hold_apart(complete, written, engines[0].as_mut(), on_gpu);
    if let Some(remark) = &remark {
        tracing::warn!(model = name, version, remark);
    }
    let Complete { mut config, interface, binding, is_batching_guessed: _ } = complete;
    name.clone_into(&mut config.name);
    opener.platform.clone_into(&mut config.platform);
    opener.backend.clone_into(&mut config.backend);
    if config.default_model_filename.is_empty() {
        opener.file.clone_into(&mut config.default_model_filename);
    }
    engines::say_instances(&mut config, options.device);
    config.optimization.get_or_insert_default();
    let folder = path.parent().unwrap_or(path);
    let sample = engines::warm_up(&mut engines, &config, &binding, folder)?;
    let mut policy = Policy::of_model(&config, opening.batching)?;
    policy.padding = engines::padding(&config)?;
    if let Some(padding) = policy.padding.as_mut().filter(|_| binding.ragged.joins().is_empty()) {
        // What a sequence keeps goes into its next run: padding in it would be somebody else's.
        let state = match &config.scheduling_choice {
            Some(SchedulingChoice::SequenceBatching(sequence)) => &sequence.state[..],
            _ => &[],
        };
        let of_state = |output: &TensorSpec| state.iter().any(|state| state.output_name == output.name);
        let kept =
            signature.outputs().iter().enumerate().filter(|(_, output)| of_state(output)).map(|(index, _)| index);
        let shown: Vec<usize> = binding.outputs.iter().map(|bound| bound.index).chain(kept).collect();
        padding.follows = lengths::follows(engines[0].as_mut(), padding, &shown)?;
    }
    if config.parameters.contains_key(RESET_METHOD) && interface.max_rows.is_some_and(|rows| rows > 1) {
        return Err(format!(
            "its parameter {RESET_METHOD} forgets all rows of an instance at once; write max_batch_size: 0, and as many \
             instances as sequences shall be under way"
        ));
    }
    policy.max_elements = engines::max_elements(&config)?;
    policy.joins = binding.ragged.joins();
    // What a sequence keeps is a row of the batch, and what is ragged no rows at all. Who bounds elements has other sizes that vary.
    let is_of_rows = policy.joins.is_empty()
        && config.batch_output.is_empty()
        && policy.max_elements == 0
        && !matches!(&config.scheduling_choice, Some(SchedulingChoice::SequenceBatching(_)));
    if on_gpu && is_of_rows {
        policy = policy.in_steps();
        engines::rehearse(&mut engines, sample.as_deref(), &policy.steps);
    }
    let bounds = iteration::bounds(&config, &signature)?;
    let sample = sample.or_else(|| binding.ragged.sample(&interface, &signature));
    let statistics = Arc::new(Statistics::default());
    let sequences = match &config.scheduling_choice {
        Some(SchedulingChoice::SequenceBatching(sequence)) => {
            let keeps_state = engines.iter().any(|engine| engine.keeps_state());
            policy.runs_once = keeps_state;
            Some(Sequences::new(name, sequence, &signature, count, interface.max_rows, keeps_state, folder)?)
        }
        _ => None,
    };
    let start = |engines: Vec<Box<dyn Engine>>, reopen: Reopen| {
        let signature = engines.first().map_or(&signature, |engine| engine.signature()).clone();
        let setup = Setup {
            graph: name.to_owned(),
            engines,
            reopen: Some(reopen),
            policy: policy.clone(),
            batches: interface.max_rows.is_some(),
            // A run on a GPU takes none of the processor's.
            slots: if on_gpu { Slots::new(count) } else { opening.slots.clone() },
            threads: if on_gpu { 1 } else { options.threads.get() },
            metrics: opening.metrics.graph(name, &version.to_string()),
            statistics: statistics.clone(),
            lost: opening.lost.clone(),
        };
        let scheduler = Scheduler::start(setup, &signature)?;
        let mut sample = sample.clone();
        // Seats bring an input of their own, in which zeros mean that nobody sits there.
        if let Some(sample) = &mut sample {
            sample.extend(signature.inputs().get(sample.len()).and_then(|seat| RawTensor::smallest(seat, 1).ok()));
        }
        Ok::<_, String>(Graph::new(name.to_owned(), signature, scheduler, sample))
    };
    let runs = match sequences {
        Some(sequences) => {
            let rows = interface.max_rows.unwrap_or(1);
            let graphs = if sequences.stays() {
                let own = engines_of_their_own(engines, &reopen, &sequences, rows);
                own.map(|(engine, reopen)| start(vec![engine], reopen)).collect::<Result<_, _>>()?
            } else {
                vec![start(engines, reopen)?]
            };
            if let Some(bounds) = bounds {
                Runs::Iteration(Arc::new(Iteration::new(graphs, binding, sequences, bounds)))
            } else {
                sequences.watch();
                Runs::Sequence(graphs, binding, sequences)
            }
        }
        None => Runs::Graph(start(engines, reopen)?, binding),
    };
    tracing::info!(model = name, version, path = %file.display(), "opened");
    Ok((ModelVersion::new(version.to_string(), config, interface, statistics, runs), remark))
}

/// The configuration of a model that has an axis for batches, where its rows have nothing to do with each other; and what is to be known of
/// it otherwise. Who wrote that requests are put together hears of it, and has them put together.
fn hold_apart(
    complete: Complete,
    written: Written,
    engine: &mut dyn Engine,
    on_gpu: bool,
) -> (Complete, Option<String>) {
    let is_guessed = complete.is_batching_guessed;
    let batches = matches!(complete.config.scheduling_choice, Some(SchedulingChoice::DynamicBatching(_)));
    // A size that is new costs a GPU a second, and what is ragged has no rows.
    let is_plain = batches
        && complete.interface.max_rows.is_some_and(|rows| rows > 1)
        && complete.binding.ragged.joins().is_empty();
    if !is_plain || (on_gpu && !is_guessed) {
        return (complete, None);
    }
    let alone = |complete: Complete| Complete {
        config: ModelConfig { scheduling_choice: None, ..complete.config },
        ..complete
    };
    match (apart::rows(engine, on_gpu), is_guessed) {
        (Rows::Independent, _) | (Rows::Unknown, false) => (complete, None),
        (Rows::Unknown, true) => {
            let remark = "its requests run one by one: it takes nothing that was tried, so nobody knows whether its rows have to do with each \
                          other; write dynamic_batching { } if they have not";
            (alone(complete), Some(remark.to_owned()))
        }
        (Rows::Entangled(reason), false) => {
            let remark = format!(
                "{reason}: with dynamic_batching, as its configuration says, an answer depends on whose requests are run with it; write \
                 max_batch_size: 0 unless that is meant"
            );
            (complete, Some(remark))
        }
        (Rows::Entangled(reason), true) => {
            // Where sizes are written, these may leave a batch out.
            let whole = if written.has_batch_size {
                None
            } else {
                complete::complete(written.whole(), engine.signature(), 0).ok()
            };
            let rows = if whole.is_some() { ", and its first size is taken for no batch" } else { "" };
            let remark = format!(
                "its requests run one by one{rows}: {reason}; write max_batch_size and dynamic_batching {{ }} if they may be put together"
            );
            (whole.unwrap_or_else(|| alone(complete)), Some(remark))
        }
    }
}

/// Engines with which sequences stay: each with what replaces it.
fn engines_of_their_own(
    engines: Vec<Box<dyn Engine>>,
    reopen: &Reopen,
    sequences: &Arc<Sequences>,
    rows: usize,
) -> impl Iterator<Item = (Box<dyn Engine>, Reopen)> {
    let own = move |(instance, engine): (usize, Box<dyn Engine>)| {
        let room = sequences.room(instance, rows);
        let fit = move |engine: Box<dyn Engine>| -> Box<dyn Engine> {
            let engine = if engine.keeps_state() { Box::new(Stateful(engine)) } else { engine };
            match &room {
                Some(room) => Box::new(Seated::new(engine, room.clone())),
                None => engine,
            }
        };
        let (fit, reopen) = (Arc::new(fit), reopen.clone());
        (fit(engine), Arc::new(move || reopen().map(&*fit)) as Reopen)
    };
    engines.into_iter().enumerate().map(own)
}

//! The models of a server: which there are, in which state, and how they come and go.

mod apart;
mod artifact;
mod complete;
mod config;
mod control;
mod engines;
mod error;
mod folder;
mod iteration;
mod lengths;
mod openers;
mod peers;
mod place;
mod poll;
mod prove;
mod remote;
mod source;
mod triton;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use bytes::Bytes;
use sensorium_artifact::Volumes;
use sensorium_engine::Options;
use sensorium_modality::Limits;
use sensorium_proto::inference::ModelStatistics;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::place::Place;
pub use self::{
    error::{ControlError, LoadError},
    openers::Openers,
    remote::{GraphPlaces, RemoteGraph, RemoteGraphError},
    source::{ModelSource, SourceError},
};
use crate::{
    error::InferError,
    metrics::{Counted, Metrics},
    model::{Graph, ModelVersion, Multimodal, ResponseCache},
    pool::CpuPool,
    scheduler::{Batching, Slots},
    security::Outgoing,
    wire::excerpt,
};

/// Which models a server has.
#[derive(Clone, Debug, Default)]
pub struct RepositoryConfig {
    /// Artifacts, each under a name of its own.
    pub models: Vec<ModelSource>,
    /// Folders in Triton's layout, as a path, `file://`, `pvc://`, or an `s3://` prefix.
    pub repositories: Vec<String>,
    /// Who decides which models of the repositories are loaded.
    pub mode: ControlMode,
    /// In explicit mode, the models to load at start; `*` for all.
    pub load: Vec<String>,
}

/// Who decides which models of the repositories are loaded, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ControlMode {
    /// All of them, once, at start.
    #[default]
    None,
    /// Clients, by `RepositoryModelLoad` and `RepositoryModelUnload`.
    Explicit,
    /// The repositories: whatever is in them, looked at this often.
    Poll(Duration),
}

impl ControlMode {
    /// As the flag spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Explicit => "explicit",
            Self::Poll(_) => "poll",
        }
    }
}

/// How models are opened: everything but which ones.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Where claims are mounted.
    pub volumes: Volumes,
    /// Where artifacts and models of remote stores are kept.
    pub cache: PathBuf,
    /// Threads of each engine.
    pub engine: Options,
    /// The engines that there are.
    pub openers: Openers,
    /// Which graphs of artifacts are served, and which of them run elsewhere.
    pub graphs: GraphPlaces,
    /// How those that run elsewhere are called.
    pub outgoing: Outgoing,
    /// Bytes of a message at most, also of one to them: they are told the same.
    pub max_message_bytes: usize,
    /// How requests are put together, where a model does not say.
    pub batching: Batching,
    /// The machine's compute, shared by all models.
    pub slots: Slots,
    /// Answers of models that want them kept.
    pub responses: ResponseCache,
    /// What is accepted of media and texts.
    pub limits: Limits,
    /// Where they are prepared.
    pub pool: CpuPool,
    /// Where everything is counted.
    pub metrics: Metrics,
    /// Cancelled when an engine's thread dies.
    pub lost: CancellationToken,
}

/// How a client wants a model loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadParameters {
    /// A configuration, as JSON, instead of the repository's.
    pub config: Option<String>,
    /// The model's files by path, such as `1/model.onnx`, instead of the repository's.
    pub files: BTreeMap<String, Bytes>,
}

/// One line of the repository's index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// The model.
    pub name: String,
    /// Which version; empty where none could be read.
    pub version: String,
    /// What it is doing.
    pub state: State,
    /// Why it is not ready.
    pub reason: String,
}

/// What a model version is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It is in a repository, and nobody asked for it.
    #[default]
    Unknown,
    /// It is being opened.
    Loading,
    /// It answers.
    Ready,
    /// It takes no requests any more and finishes those it has.
    Unloading,
    /// It could not be loaded, or was unloaded.
    Unavailable,
}

impl State {
    /// The protocol's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "",
            Self::Loading => "LOADING",
            Self::Ready => "READY",
            Self::Unloading => "UNLOADING",
            Self::Unavailable => "UNAVAILABLE",
        }
    }
}

/// The models of a server. Clones share them.
#[derive(Clone, Debug)]
pub struct Registry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: RepositoryConfig,
    /// `config.repositories`, as places.
    places: Vec<Place>,
    opening: Opening,
    models: RwLock<Models>,
    /// Held while models come or go, so that one change happens at a time.
    changing: tokio::sync::Mutex<()>,
    /// Ends what runs beside requests when the last handle goes.
    background: CancellationToken,
    /// Models that are gone, until their last requests and their engines have ended.
    retiring: TaskTracker,
}

/// Read for every request, written when a model comes or goes.
#[derive(Debug, Default)]
struct Models {
    by_name: BTreeMap<String, Entry>,
    multimodal: BTreeMap<String, Arc<Multimodal>>,
}

impl Models {
    /// What the model `name` was loaded from, or all that was loaded from `name`, which need not be a model itself.
    fn unit_of(&self, name: &str) -> Option<String> {
        let own = self.by_name.get(name).map(|entry| entry.unit.clone());
        own.or_else(|| self.of_unit(name).next().map(|_| name.to_owned()))
    }

    /// What was loaded from `unit` is there for itself.
    fn want(&mut self, unit: &str) {
        self.by_name.values_mut().filter(|entry| entry.unit == unit).for_each(|entry| entry.is_wanted = true);
    }

    /// Whether anybody asked for something of `unit` by name, and what is of it.
    fn unit(&self, unit: &str) -> (bool, BTreeSet<String>) {
        let entries = || self.by_name.iter().filter(|(_, entry)| entry.unit == unit);
        (entries().any(|(_, entry)| entry.is_wanted), entries().map(|(name, _)| name.clone()).collect())
    }

    /// What was loaded from `unit`.
    fn of_unit(&self, unit: &str) -> impl Iterator<Item = &Arc<ModelVersion>> {
        let entries = self.by_name.values().filter(move |entry| entry.unit == unit);
        entries.flat_map(|entry| entry.versions.values()).filter_map(|slot| slot.model.as_ref())
    }

    /// A model below `model` that is not loaded any more, in words; none where it is no ensemble.
    fn missing(&self, model: &ModelVersion) -> Option<String> {
        let mut seen = model.steps();
        let mut rest: Vec<(&str, Option<u64>)> = seen.iter().copied().collect();
        while let Some((step, pinned)) = rest.pop() {
            let slots = self.by_name.get(step).into_iter().flat_map(|entry| entry.versions.iter().rev());
            let mut wanted = slots.filter(|(version, _)| pinned.is_none_or(|pinned| pinned == **version));
            let Some(model) = wanted.find_map(|(_, slot)| slot.model.as_ref().filter(|_| slot.unfit.is_none())) else {
                let version = pinned.map_or(String::new(), |pinned| format!(" version {pinned}"));
                return Some(format!("{step:?}{version}"));
            };
            rest.extend(model.steps().into_iter().filter(|step| seen.insert(*step)));
        }
        None
    }
}

/// One model.
#[derive(Debug, Default)]
struct Entry {
    /// What it was loaded from: an artifact gives several models, which come and go together.
    unit: String,
    /// Whether it was loaded for itself, not only for an ensemble.
    is_wanted: bool,
    /// What its folder was like when it was loaded from that as it is.
    fingerprint: Option<u64>,
    versions: BTreeMap<u64, Slot>,
}

impl Entry {
    /// Whether another unit may have the name: nothing of this one is loaded.
    fn is_free(&self) -> bool {
        self.versions.values().all(|slot| slot.model.is_none())
    }
}

/// One version of a model.
#[derive(Debug, Default)]
struct Slot {
    state: State,
    reason: String,
    model: Option<Arc<ModelVersion>>,
    /// Why it cannot answer although it is loaded: the models that it is made of were replaced by others.
    unfit: Option<String>,
}

/// What came of loading one unit.
#[derive(Debug, Default)]
struct Loaded {
    versions: Vec<ModelVersion>,
    /// What takes typed parts, by version; the newest speaks for all, as they come without one.
    multimodal: BTreeMap<u64, Arc<Multimodal>>,
    /// What is to be known of versions that serve all the same, such as that nobody knows whether they run.
    remarks: BTreeMap<u64, String>,
    /// Versions that could not be opened, with the reason.
    failed: BTreeMap<u64, String>,
    /// What their folder was like, where they are what is in it.
    fingerprint: Option<u64>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.background.cancel();
    }
}

impl Registry {
    /// The version `version` of model `name`, or the newest that is ready for the empty version.
    ///
    /// # Errors
    /// [`InferError::UnknownModel`], [`InferError::UnknownVersion`], [`InferError::NotReady`].
    pub fn model(&self, name: &str, version: &str) -> Result<Arc<ModelVersion>, InferError> {
        let models = self.read();
        let Some(entry) = models.by_name.get(name) else {
            return Err(unknown(name, models.by_name.keys()));
        };
        let slot = if version.is_empty() {
            let ready = entry.versions.values().rev().find(|slot| slot.model.is_some());
            ready.or_else(|| entry.versions.values().next_back())
        } else {
            let number = version.parse::<u64>();
            let number =
                number.map_err(|_| InferError::NoVersion { model: name.to_owned(), version: excerpt(version) })?;
            entry.versions.get(&number)
        };
        match slot {
            None => Err(InferError::UnknownVersion {
                model: name.to_owned(),
                version: excerpt(version),
                known: entry.versions.keys().map(u64::to_string).collect(),
            }),
            Some(Slot { unfit: Some(reason), .. }) => {
                Err(InferError::NotReady { model: name.to_owned(), reason: reason.clone() })
            }
            Some(Slot { model: Some(model), .. }) => Ok(model.clone()),
            Some(Slot { reason, state, .. }) => Err(InferError::NotReady {
                model: name.to_owned(),
                reason: if reason.is_empty() { state.as_str().to_lowercase() } else { reason.clone() },
            }),
        }
    }

    /// The model called `name`, for typed parts.
    ///
    /// # Errors
    /// [`InferError::UnknownModel`], [`InferError::NotReady`], [`InferError::TakesTensors`].
    pub fn multimodal(&self, name: &str) -> Result<Arc<Multimodal>, InferError> {
        if let Some(found) = self.read().multimodal.get(name) {
            return Ok(found.clone());
        }
        self.model(name, "")?;
        Err(InferError::TakesTensors { model: name.to_owned() })
    }

    /// Versions of a model that are ready, oldest first.
    pub fn versions(&self, name: &str) -> Vec<String> {
        let models = self.read();
        let versions = models.by_name.get(name).into_iter().flat_map(|entry| &entry.versions);
        versions.filter(|(_, slot)| slot.model.is_some()).map(|(version, _)| version.to_string()).collect()
    }

    /// Whether what is loaded under this name is made of other models.
    fn is_ensemble(&self, name: &str) -> bool {
        self.model(name, "").is_ok_and(|model| !model.steps().is_empty())
    }

    /// Whether a request for this version, or any for the empty one, would be admitted, by an ensemble also by those that it is
    /// made of.
    pub fn ready(&self, name: &str, version: &str) -> bool {
        self.model(name, version).is_ok_and(|model| self.read().missing(&model).is_none())
    }

    /// Statistics of every version that is ready: of all models for the empty name, of all versions for the empty one.
    ///
    /// # Errors
    /// As [`Registry::model`].
    pub fn statistics(&self, name: &str, version: &str) -> Result<Vec<ModelStatistics>, InferError> {
        if !name.is_empty() && !version.is_empty() {
            return Ok(vec![self.model(name, version)?.statistics()]);
        }
        if !name.is_empty() {
            self.model(name, version)?;
        }
        let models = self.loaded();
        Ok(models
            .iter()
            .filter(|model| name.is_empty() || model.name() == name)
            .map(|model| model.statistics())
            .collect())
    }

    /// What every version that is ready has counted, and the response cache.
    pub(crate) fn counted(&self) -> Counted {
        Counted {
            models: self.loaded().iter().map(|model| model.counts()).collect(),
            cache: self.0.opening.responses.counts(),
            ..Counted::default()
        }
    }

    /// Every model version there is, or those that are ready. A model that lies in a repository and that nobody asked for
    /// is there, too.
    pub fn index(&self, ready_only: bool) -> Vec<IndexEntry> {
        let models = self.read();
        let mut entries = Vec::new();
        for (name, entry) in &models.by_name {
            entries.extend(entry.versions.iter().map(|(version, slot)| {
                let missing = slot.model.as_ref().and_then(|model| models.missing(model));
                let (state, reason) = match (missing, &slot.unfit) {
                    (Some(step), _) => (State::Unavailable, format!("it needs model {step}, which is not ready")),
                    (None, Some(unfit)) => (State::Unavailable, unfit.clone()),
                    (None, None) => (slot.state, slot.reason.clone()),
                };
                // Version 0 stands for a model that could not be read so far as to know its versions.
                let version = if *version == 0 { String::new() } else { version.to_string() };
                IndexEntry { name: name.clone(), version, state, reason }
            }));
        }
        if ready_only {
            entries.retain(|entry| entry.state == State::Ready);
            return entries;
        }
        let known: BTreeSet<String> = models.by_name.keys().cloned().collect();
        drop(models);
        // A repository that cannot be read at the moment takes nothing from what is loaded.
        for name in self.look().unwrap_or_default().into_keys().filter(|name| !known.contains(name)) {
            entries.push(IndexEntry { name, version: String::new(), state: State::Unknown, reason: String::new() });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries
    }

    /// Every graph with an engine, for health.
    pub fn graphs(&self) -> Vec<Arc<Graph>> {
        self.loaded().iter().flat_map(|model| model.graphs().to_vec()).collect()
    }

    /// Names of all models that are ready, sorted.
    pub fn names(&self) -> Vec<String> {
        let names: BTreeSet<String> = self.loaded().iter().map(|model| model.name().to_owned()).collect();
        names.into_iter().collect()
    }

    fn loaded(&self) -> Vec<Arc<ModelVersion>> {
        let models = self.read();
        let slots = models.by_name.values().flat_map(|entry| entry.versions.values());
        slots.filter_map(|slot| slot.model.clone()).collect()
    }

    /// Only assignments run under the lock, so a panic elsewhere leaves it whole.
    fn read(&self) -> RwLockReadGuard<'_, Models> {
        self.0.models.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Models> {
        self.0.models.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a String>) -> InferError {
    InferError::UnknownModel { model: excerpt(name), known: known.cloned().collect() }
}

//! How models come and go.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
    time::Duration,
};

use sensorium_telemetry::error_line;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    ControlError, ControlMode, LoadError, LoadParameters, Loaded, ModelSource, Opening, Place, Registry,
    RepositoryConfig, Slot, State, artifact, folder, place::Still, poll, triton::Found,
};
use crate::{
    error::InferError,
    model::{Ensemble, Find, Graph, ModelVersion},
};

/// Ensembles in each other at most: a call of one goes as deep.
const MAX_NESTING: usize = 16;

/// Models that come together.
#[derive(Debug, Default)]
struct Course {
    to_come: BTreeSet<String>,
    /// Those of them that are there, and what they needed.
    brought: BTreeSet<String>,
    /// Those of these of which a version is not there.
    partly: BTreeSet<String>,
}

/// Where a unit of models comes from.
#[derive(Clone, Debug)]
enum Origin {
    Artifact(ModelSource),
    Folder(PathBuf),
}

impl Registry {
    /// Loads what is to be served from the start. A model of a repository that fails is in the index with its reason.
    ///
    /// # Errors
    /// [`LoadError`] for the first artifact that cannot be served, or a repository that cannot be read.
    pub async fn open(config: RepositoryConfig, opening: Opening) -> Result<Self, LoadError> {
        let places = config.repositories.iter().map(|repository| {
            Place::parse(repository, &opening).map_err(|source| LoadError::remote(repository, source))
        });
        let places = places.collect::<Result<_, _>>()?;
        let registry = Self(Arc::new(super::Inner {
            config,
            places,
            opening,
            models: RwLock::default(),
            changing: tokio::sync::Mutex::default(),
            background: CancellationToken::new(),
            retiring: TaskTracker::new(),
        }));
        let changing = registry.0.changing.lock().await;
        for source in &registry.0.config.models {
            let mut loaded = artifact::load(source, &registry.0.opening).await?;
            loaded.prove(true).await;
            if let Some(reason) = loaded.failed.values().next() {
                return Err(LoadError::Unproven { name: source.name.clone(), reason: reason.clone() });
            }
            registry.install(&source.name, loaded).map_err(|name| LoadError::Duplicate { name })?;
            registry.write().want(&source.name);
        }
        if let Err(error) = registry.refresh().await {
            // Who polls asks again soon, and serves until then what was fetched before.
            let is_asked_again = matches!(registry.0.config.mode, ControlMode::Poll(_));
            if !is_asked_again || registry.look().map_or(true, |found| found.is_empty()) {
                return Err(error);
            }
            tracing::warn!(error = error_line(&error), "the models are as they were fetched before");
        }
        let found = registry.look()?;
        registry.warn_of_hidden(&found);
        let wanted = match registry.0.config.mode {
            ControlMode::None | ControlMode::Poll(_) => found.keys().cloned().collect(),
            ControlMode::Explicit if registry.0.config.load.iter().any(|name| name == "*") => {
                found.keys().cloned().collect()
            }
            ControlMode::Explicit => registry.0.config.load.clone(),
        };
        // As they were before they were opened: what changes meanwhile is another.
        let watched = match registry.0.config.mode {
            ControlMode::Poll(interval) => {
                let whole = found.into_iter().filter(|(name, path)| registry.missing(name, path).is_none());
                Some((interval, poll::fingerprints(whole.collect())))
            }
            ControlMode::None | ControlMode::Explicit => None,
        };
        registry.bring_all(wanted).await;
        drop(changing);
        if let Some((interval, found)) = watched {
            poll::spawn(&registry, interval, found);
        }
        Ok(registry)
    }

    /// The models of the repositories, by name; the first repository that has one wins.
    ///
    /// # Errors
    /// [`LoadError::Repository`].
    pub(super) fn look(&self) -> Result<BTreeMap<String, PathBuf>, LoadError> {
        let mut found = BTreeMap::new();
        for place in &self.0.places {
            let failed = |source| LoadError::Repository { path: place.path().display().to_string(), source };
            for (name, folder) in place.models().map_err(failed)? {
                found.entry(name).or_insert(folder);
            }
        }
        found.retain(|name, _| self.artifact(name).is_none());
        Ok(found)
    }

    /// The artifact that is served under this name.
    pub(super) fn artifact(&self, name: &str) -> Option<&ModelSource> {
        self.0.config.models.iter().find(|source| source.name == name)
    }

    /// Says which folders of models nobody can ask, as `found`, or an artifact, has their name.
    fn warn_of_hidden(&self, found: &BTreeMap<String, PathBuf>) {
        for place in &self.0.places {
            // Whether it can be read has been seen.
            for (name, hidden) in place.models().into_iter().flatten() {
                if let Some(served) = found.get(&name).filter(|served| **served != hidden) {
                    let (served, hidden) = (served.display(), hidden.display());
                    tracing::warn!(model = name, %served, %hidden, "two repositories have a model of this name, and the first one's is served");
                }
                if let Some(artifact) = self.artifact(&name) {
                    let (served, hidden) = (&artifact.artifact, hidden.display());
                    tracing::warn!(model = name, served, %hidden, "an artifact is served under the name of this model, which is not");
                }
            }
        }
    }

    /// Fetches what changed in repositories that are elsewhere.
    ///
    /// # Errors
    /// [`LoadError::Remote`].
    async fn refresh(&self) -> Result<(), LoadError> {
        for (place, uri) in self.places() {
            place.refresh().await.map(drop).map_err(|source| LoadError::remote(uri, source))?;
        }
        Ok(())
    }

    /// The same for a load of `name`, to which only the repository that has it has to answer; what it has stays as it is meanwhile.
    async fn refresh_for(&self, name: &str) -> Result<Still, LoadError> {
        let (mut own, mut failed) = (None, None);
        for (place, uri) in self.places() {
            if own.is_none() && place.is_here() && place.has(name) {
                return Ok(Still::default());
            }
            let refreshed = place.refresh().await.map_err(|source| LoadError::remote(uri, source));
            let is_its_own = own.is_none() && place.has(name);
            match refreshed {
                Ok(still) if is_its_own => own = Some(still),
                Ok(_) => {}
                Err(error) if is_its_own => return Err(error),
                Err(error) => drop(failed.get_or_insert(error)),
            }
        }
        match (own, failed) {
            (None, Some(error)) => Err(error),
            (own, _) => Ok(own.unwrap_or_default()),
        }
    }

    fn places(&self) -> impl Iterator<Item = (&Place, &String)> {
        self.0.places.iter().zip(&self.0.config.repositories)
    }

    /// Loads a model, or loads it again: what is in flight finishes on the old one. A load that has begun ends, whether or not
    /// anybody waits for that, and it has begun when something is fetched for it; one that waits for others to end goes with who asked for it.
    ///
    /// # Errors
    /// [`ControlError`]; a model that was loaded before stays as it was.
    pub async fn load(&self, name: &str, parameters: LoadParameters) -> Result<(), ControlError> {
        self.may_change()?;
        let (registry, own, asked) = (self.clone(), name.to_owned(), CancellationToken::new());
        let left = asked.clone();
        let _left_when_dropped = asked.drop_guard();
        let load = tokio::spawn(async move { registry.load_for(&own, parameters, &left).await });
        load.await.unwrap_or_else(|_| {
            let reason = "loading it was cut short".to_owned();
            self.note_failure(name, 0, &reason);
            Err(ControlError::Failed { name: name.to_owned(), reason })
        })
    }

    /// As [`Registry::load`], for somebody who has `left` when that is cancelled.
    async fn load_for(
        &self,
        name: &str,
        parameters: LoadParameters,
        left: &CancellationToken,
    ) -> Result<(), ControlError> {
        let failed = |reason| ControlError::Failed { name: name.to_owned(), reason };
        let ends = || failed("this server ends".to_owned());
        // Before anything else is held: a bucket that does not answer holds neither other changes nor the end.
        let fetched = self.0.background.run_until_cancelled(self.refresh_for(name)).await.ok_or_else(ends)?;
        let still = fetched.map_err(|error| failed(error_line(&error)))?;
        let changing = self.0.changing.lock();
        let _changing = if still.is_copy() {
            changing.await
        } else {
            let changing = left.run_until_cancelled(changing).await;
            changing.ok_or_else(|| failed("nobody waits for it any more".to_owned()))?
        };
        if self.0.background.is_cancelled() {
            return Err(ends());
        }
        let mut course = Course::default();
        let brought = self.bring(name, parameters, &[], &mut course).await;
        self.check_above(&course.brought);
        brought
    }

    /// Loads models, or loads them again, by whoever holds `changing`: those that could not be.
    pub(super) async fn bring_all(&self, names: Vec<String>) -> Vec<String> {
        let mut course = Course { to_come: names.iter().cloned().collect(), ..Course::default() };
        let mut failed = Vec::new();
        for name in names {
            // An ensemble before it may have brought it already.
            if course.brought.contains(&name) {
                self.write().want(&name);
                failed.extend(course.partly.take(&name));
                continue;
            }
            if let Err(error) = self.bring(&name, LoadParameters::default(), &[], &mut course).await {
                tracing::error!(model = name, error = error_line(&error), "not loaded");
                failed.push(name);
            }
        }
        self.check_above(&course.brought);
        failed
    }

    /// Ensembles whose models were loaded again, with other inputs or outputs, cannot answer until these fit together again.
    fn check_above(&self, brought: &BTreeSet<String>) {
        let loaded = self.loaded();
        // Also those that were to be loaded again themselves, and are as they were.
        let is_above = |model: &&Arc<ModelVersion>| model.steps().iter().any(|(step, _)| brought.contains(*step));
        for model in loaded.iter().filter(is_above) {
            let unfit = model.check_steps().err().map(|why| format!("its models do not fit together any more: {why}"));
            if let Some(reason) = &unfit {
                tracing::error!(model = model.name(), reason, "not ready");
            }
            let mut models = self.write();
            let slots = models.by_name.get_mut(model.name()).into_iter().flat_map(|entry| entry.versions.values_mut());
            for slot in slots.filter(|slot| slot.model.as_ref().is_some_and(|own| Arc::ptr_eq(own, model))) {
                slot.unfit.clone_from(&unfit);
            }
        }
    }

    /// Whether the folder of a model that was loaded from it is another one by now, where nobody else watches that.
    async fn has_changed(&self, name: &str) -> bool {
        let was = self.read().by_name.get(name).and_then(|entry| entry.fingerprint);
        let (Some(was), Ok(()), Some(Origin::Folder(path))) =
            (was, self.may_change(), self.origin(name, &LoadParameters::default()))
        else {
            return false;
        };
        // What is being fetched is not what it is to be yet.
        if self.missing(name, &path).is_some() {
            return false;
        }
        let is = tokio::task::spawn_blocking(move || folder::fingerprint(&path)).await;
        is.is_ok_and(|is| is.is_ok_and(|is| is != was))
    }

    /// As [`Registry::load`], by whoever holds `changing`, for ensembles `above`.
    async fn bring(
        &self,
        name: &str,
        parameters: LoadParameters,
        above: &[&str],
        course: &mut Course,
    ) -> Result<(), ControlError> {
        let failed = |reason| ControlError::Failed { name: name.to_owned(), reason };
        let origin = self.origin(name, &parameters);
        if matches!(origin, Some(Origin::Artifact(_))) && parameters != LoadParameters::default() {
            let reason = "an artifact is what its manifest says; load it without parameters".to_owned();
            return Err(ControlError::Parameters { name: name.to_owned(), reason });
        }
        self.loading(name);
        let loaded = match origin {
            Some(Origin::Artifact(source)) => {
                artifact::load(&source, &self.0.opening).await.map_err(|error| error_line(&error))
            }
            Some(Origin::Folder(path)) => self.bring_folder(name, path, parameters, above, course).await,
            None => {
                self.forget(name);
                return Err(ControlError::NotFound { name: name.to_owned() });
            }
        };
        // Who takes the place of one that runs has to run.
        let is_proof_needed =
            self.read().of_unit(name).any(|model| model.graphs().iter().any(|graph| graph.is_proven()));
        let mut loaded = loaded.inspect_err(|reason| self.note_failure(name, 0, reason)).map_err(failed)?;
        // Proof that the engines run before they are asked: a model that comes must not make the server unready.
        loaded.prove(is_proof_needed).await;
        let broken = loaded.failed.clone();
        // An artifact gives several.
        let names: Vec<String> = loaded.versions.iter().map(|model| model.name().to_owned()).collect();
        let fingerprint = loaded.fingerprint;
        if let Err(taken) = self.install(name, loaded) {
            let reason = format!("another model is called {taken:?}");
            self.note_failure(name, 0, &reason);
            return Err(failed(reason));
        }
        course.brought.insert(name.to_owned());
        course.brought.extend(names);
        let mut models = self.write();
        if above.is_empty() {
            models.want(name);
        }
        if let Some(entry) = models.by_name.get_mut(name) {
            entry.fingerprint = fingerprint;
        }
        drop(models);
        let reasons: Vec<_> = broken.iter().map(|(version, reason)| format!("version {version}: {reason}")).collect();
        if reasons.is_empty() { Ok(()) } else { Err(failed(reasons.join("; "))) }
    }

    /// Opens a model's folder, and the models that it is made of before it, where they are not loaded.
    async fn bring_folder(
        &self,
        name: &str,
        path: PathBuf,
        parameters: LoadParameters,
        above: &[&str],
        course: &mut Course,
    ) -> Result<Loaded, String> {
        if let Some(reason) = self.missing(name, &path) {
            return Err(reason);
        }
        let cut_short = |_| "opening it was cut short".to_owned();
        let own = name.to_owned();
        let found =
            tokio::task::spawn_blocking(move || Found::read(&own, &path, &parameters)).await.map_err(cut_short)??;
        let above = [above, &[name]].concat();
        for (step, _) in found.ensembling().map(Ensemble::models).unwrap_or_default() {
            if above.contains(&step) {
                return Err(format!("it is made of itself: {}, {step}", above.join(", ")));
            }
            self.check_below(step, &above)?;
            // One that serves as it was, and is another in its folder, comes first: it may fit the ensemble only then.
            let comes_anew =
                !course.brought.contains(step) && (course.to_come.contains(step) || self.has_changed(step).await);
            if comes_anew || !self.ready(step, "") {
                let step_brought = Box::pin(self.bring(step, LoadParameters::default(), &above, course)).await;
                // Of a step that has come, a version may have failed; whether the rest does is seen when it is opened.
                let has_come = course.brought.contains(step) && self.ready(step, "");
                match step_brought {
                    Ok(()) => {}
                    Err(error) if has_come => {
                        tracing::error!(model = step, error = error_line(&error), "not loaded as a whole");
                        course.partly.insert(step.to_owned());
                    }
                    Err(error) => return Err(format!("it needs model {step:?}: {}", error_line(&error))),
                }
            }
        }
        let registry = Arc::downgrade(&self.0);
        let find: Find = Arc::new(move |name, version| match registry.upgrade() {
            Some(registry) => Self(registry).model(name, version),
            None => Err(InferError::NotReady { model: name.to_owned(), reason: "the server ends".to_owned() }),
        });
        let (own, opening) = (name.to_owned(), self.0.opening.clone());
        // Opening a graph reads and optimises it: seconds of CPU for a large one.
        tokio::task::spawn_blocking(move || found.open(&own, &opening, &find)).await.map_err(cut_short)?
    }

    /// Looks through what is loaded below `step`: none of the ensembles `above` may be there, and nesting has an end.
    fn check_below(&self, step: &str, above: &[&str]) -> Result<(), String> {
        let mut level = BTreeSet::from([step.to_owned()]);
        for _ in above.len()..=MAX_NESTING {
            level = self.steps_of(&level);
            if let Some(again) = above.iter().find(|name| level.contains(**name)) {
                return Err(format!("it is made of itself: {}, {step}, ..., {again}", above.join(", ")));
            }
            if level.is_empty() {
                return Ok(());
            }
        }
        Err(format!("more than {MAX_NESTING} ensembles are in each other below it"))
    }

    fn origin(&self, name: &str, parameters: &LoadParameters) -> Option<Origin> {
        if let Some(source) = self.artifact(name) {
            return Some(Origin::Artifact(source.clone()));
        }
        if !folder::is_model_name(name) {
            return None;
        }
        match self.0.places.iter().find(|place| place.has(name)) {
            Some(place) => Some(Origin::Folder(place.path().join(name))),
            // A model whose files come with the request needs no folder.
            None => (!parameters.files.is_empty()).then(|| Origin::Folder(PathBuf::new())),
        }
    }

    /// Takes a model away: it answers what it has admitted, and its memory is given back. With `dependents` the models
    /// that an ensemble is made of go with it, but for those that were loaded for themselves or that another ensemble needs.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn unload(&self, name: &str, dependents: bool) -> Result<(), ControlError> {
        self.may_change()?;
        let _changing = self.0.changing.lock().await;
        let unit = self.read().unit_of(name);
        let Some(unit) = unit else {
            // One that was never loaded is as unloaded as it can be.
            let is_there = self.origin(name, &LoadParameters::default()).is_some();
            return if is_there { Ok(()) } else { Err(ControlError::NotFound { name: name.to_owned() }) };
        };
        let steps_of = |name: &str| self.steps_of(&BTreeSet::from([name.to_owned()]));
        let mut below = if dependents { steps_of(name) } else { BTreeSet::new() };
        self.remove(&unit);
        while let Some(step) = below.pop_first() {
            // What comes with it goes with it.
            let Some(unit) = self.read().by_name.get(&step).map(|entry| entry.unit.clone()) else { continue };
            let (is_wanted, names) = self.read().unit(&unit);
            let is_needed =
                || self.loaded().iter().any(|model| model.steps().iter().any(|(needed, _)| names.contains(*needed)));
            if !is_wanted && !is_needed() {
                below.extend(self.steps_of(&names));
                self.remove(&unit);
            }
        }
        Ok(())
    }

    /// Names of the models that all versions of these models are made of.
    fn steps_of(&self, names: &BTreeSet<String>) -> BTreeSet<String> {
        let loaded = self.loaded();
        let steps = loaded.iter().filter(|model| names.contains(model.name())).flat_map(|model| model.steps());
        steps.map(|(step, _)| step.to_owned()).collect()
    }

    /// Notes in the index that a model is on its way.
    fn loading(&self, name: &str) {
        let mut models = self.write();
        let entry = models.by_name.entry(name.to_owned()).or_default();
        if entry.is_free() {
            name.clone_into(&mut entry.unit);
        }
        if entry.versions.is_empty() {
            entry.versions.insert(0, Slot { state: State::Loading, ..Slot::default() });
        }
    }

    /// Takes back [`Registry::loading`] for a model that does not exist.
    fn forget(&self, name: &str) {
        let mut models = self.write();
        let is_new =
            |entry: &super::Entry| entry.versions.iter().all(|(version, slot)| *version == 0 && slot.model.is_none());
        if models.by_name.get(name).is_some_and(is_new) {
            models.by_name.remove(name);
        }
    }

    /// Why the folder of a model is not here as a whole, where it is in a bucket.
    fn missing(&self, name: &str, path: &Path) -> Option<String> {
        let place = self.0.places.iter().find(|place| place.path().join(name) == path)?;
        place.missing(name)
    }

    /// Says in the index why a model cannot be what it is in its bucket.
    pub(super) fn note_missing(&self, name: &str) {
        let origin = self.origin(name, &LoadParameters::default());
        if let Some(Origin::Folder(path)) = origin
            && let Some(reason) = self.missing(name, &path)
        {
            if !self.read().by_name.contains_key(name) {
                self.loading(name);
            }
            self.note_failure(name, 0, &reason);
        }
    }

    /// Notes why a version could not be loaded. Where an older load of it still answers, that is what the reason is about.
    fn note_failure(&self, name: &str, version: u64, reason: &str) {
        let mut models = self.write();
        let Some(entry) = models.by_name.get_mut(name) else { return };
        if version == 0 && entry.versions.values().any(|slot| slot.model.is_some()) {
            entry.versions.values_mut().for_each(|slot| slot.outlive(reason));
            return;
        }
        let slot = entry.versions.entry(version).or_default();
        if slot.model.is_some() {
            slot.outlive(reason);
        } else {
            *slot = Slot { state: State::Unavailable, reason: reason.to_owned(), ..Slot::default() };
        }
    }

    /// No model comes any more, and nobody looks after repositories.
    pub fn end_changes(&self) {
        self.0.background.cancel();
    }

    /// Runs what waits and closes every engine. Nothing is admitted any more, and no model comes.
    pub async fn stop(&self) {
        self.end_changes();
        let _changing = self.0.changing.lock().await;
        for graph in self.graphs() {
            graph.stop().await;
        }
        self.0.retiring.close();
        self.0.retiring.wait().await;
    }

    /// That clients may load and unload models.
    ///
    /// # Errors
    /// [`ControlError::Forbidden`].
    pub fn may_change(&self) -> Result<(), ControlError> {
        match self.0.config.mode {
            ControlMode::Explicit => Ok(()),
            mode @ (ControlMode::None | ControlMode::Poll(_)) => Err(ControlError::Forbidden { mode: mode.as_str() }),
        }
    }

    /// Puts the models of a unit in the place of those that it had. The error is a name that another unit has taken.
    fn install(&self, unit: &str, loaded: Loaded) -> Result<(), String> {
        let mut models = self.write();
        let is_taken = |entry: &super::Entry| entry.unit != unit && !entry.is_free();
        let taken = |model: &&ModelVersion| models.by_name.get(model.name()).is_some_and(is_taken);
        if let Some(model) = loaded.versions.iter().find(taken) {
            return Err(model.name().to_owned());
        }
        let mut kept = BTreeSet::new();
        let mut old = Vec::new();
        for model in loaded.versions {
            let version = model.version().parse().unwrap_or(0);
            kept.insert((model.name().to_owned(), version));
            let entry = models.by_name.entry(model.name().to_owned()).or_default();
            unit.clone_into(&mut entry.unit);
            let reason = loaded.remarks.get(&version).cloned().unwrap_or_default();
            let slot = Slot { state: State::Ready, reason, model: Some(Arc::new(model)), unfit: None };
            old.extend(entry.versions.insert(version, slot).and_then(|slot| slot.model));
        }
        // What was there before goes when all that takes its place has come.
        let is_whole = loaded.failed.is_empty();
        for (name, entry) in models.by_name.iter_mut().filter(|(_, entry)| entry.unit == unit) {
            entry.versions.remove(&0);
            for (version, slot) in entry.versions.iter_mut().filter(|_| is_whole) {
                if !kept.contains(&(name.clone(), *version)) {
                    old.extend(slot.unload());
                }
            }
        }
        let is_loaded = |version: u64| {
            let mut entries = models.by_name.values().filter(|entry| entry.unit == unit);
            entries.any(|entry| entry.versions.get(&version).is_some_and(|slot| slot.model.is_some()))
        };
        // A newer one that could not be loaded again is as it was, and speaks on.
        let speaks_on = models.multimodal.get(unit).map(|old| old.version()).filter(|old| is_loaded(*old));
        let mut new = loaded.multimodal;
        let multimodal = match new.pop_last().map(|(_, newest)| newest) {
            Some(new) if !is_whole && speaks_on > Some(new.version()) => Some(new),
            Some(new) => models.multimodal.insert(unit.to_owned(), new),
            None if is_whole => models.multimodal.remove(unit),
            None => None,
        };
        // What stands for the whole unit while it loads, and is no model itself.
        models.by_name.retain(|_, entry| !entry.versions.is_empty() || entry.unit != unit || !loaded.failed.is_empty());
        drop(models);
        drop(multimodal);
        for (version, reason) in &loaded.failed {
            self.note_failure(unit, *version, reason);
        }
        self.retire(old);
        Ok(())
    }

    pub(super) fn remove(&self, unit: &str) {
        let mut models = self.write();
        let mut old = Vec::new();
        for entry in models.by_name.values_mut().filter(|entry| entry.unit == unit) {
            (entry.is_wanted, entry.fingerprint) = (false, None);
            old.extend(entry.versions.values_mut().filter_map(Slot::unload));
        }
        let multimodal = models.multimodal.remove(unit);
        drop(models);
        drop(multimodal);
        self.retire(old);
    }

    /// Closes the engines of models that are not in the registry any more, once nobody uses them.
    fn retire(&self, old: Vec<Arc<ModelVersion>>) {
        if old.is_empty() {
            return;
        }
        let registry = self.clone();
        // Ends with the last request in flight, so nobody has to wait for it.
        self.0.retiring.spawn(async move {
            let names: Vec<(String, u64)> =
                old.iter().map(|model| (model.name().to_owned(), model.version().parse().unwrap_or(0))).collect();
            let graphs: Vec<Arc<Graph>> = old.iter().flat_map(|model| model.graphs().to_vec()).collect();
            let mut users = old;
            loop {
                users.retain(|model| Arc::strong_count(model) > 1);
                if users.is_empty() && graphs.iter().all(|graph| Arc::strong_count(graph) == 1) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            for graph in graphs {
                graph.stop().await;
            }
            let mut models = registry.write();
            for (name, version) in names {
                let slot = models.by_name.get_mut(&name).and_then(|entry| entry.versions.get_mut(&version));
                if let Some(slot) = slot.filter(|slot| slot.state == State::Unloading) {
                    slot.state = State::Unavailable;
                }
            }
        });
    }
}

impl Slot {
    /// What should have taken its place could not be loaded.
    fn outlive(&mut self, reason: &str) {
        if self.model.is_some() {
            self.reason = format!("it is as it was loaded before; loading it again failed: {reason}");
        }
    }

    /// Takes the model out.
    fn unload(&mut self) -> Option<Arc<ModelVersion>> {
        let model = self.model.take()?;
        (self.state, self.unfit) = (State::Unloading, None);
        "unloaded".clone_into(&mut self.reason);
        Some(model)
    }
}

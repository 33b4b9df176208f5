//! How models come and go.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::{
    ControlError, ControlMode, LoadError, LoadParameters, Loaded, Opening, Registry, RepositoryConfig, Slot, State,
    artifact,
};
use crate::{
    error::chain,
    model::{Graph, ModelVersion},
};

impl Registry {
    /// Loads what is to be served from the start.
    ///
    /// # Errors
    /// [`LoadError`] for the first artifact that cannot be served.
    pub async fn open(config: RepositoryConfig, opening: Opening) -> Result<Self, LoadError> {
        let registry = Self(Arc::new(super::Inner {
            config,
            opening,
            models: std::sync::RwLock::default(),
            changing: tokio::sync::Mutex::default(),
        }));
        let _changing = registry.0.changing.lock().await;
        for source in &registry.0.config.models {
            let loaded = artifact::load(source, &registry.0.opening).await?;
            registry.install(&source.name, loaded).map_err(|name| LoadError::Duplicate { name })?;
        }
        drop(_changing);
        Ok(registry)
    }

    /// Loads a model, or loads it again: what is in flight finishes on the old one.
    ///
    /// # Errors
    /// [`ControlError`]; a model that was loaded before stays as it was.
    pub async fn load(&self, name: &str, parameters: LoadParameters) -> Result<(), ControlError> {
        self.allowed()?;
        let _changing = self.0.changing.lock().await;
        let Some(source) = self.0.config.models.iter().find(|source| source.name == name) else {
            return Err(ControlError::NotFound { name: name.to_owned() });
        };
        if parameters != LoadParameters::default() {
            let reason = "an artifact is what its manifest says; load it without parameters".to_owned();
            return Err(ControlError::Parameters { name: name.to_owned(), reason });
        }
        let failed = |reason| ControlError::Failed { name: name.to_owned(), reason };
        let loaded = artifact::load(source, &self.0.opening).await.map_err(|error| failed(chain(&error)))?;
        self.install(name, loaded).map_err(|taken| failed(format!("another model is called {taken:?}")))
    }

    /// Takes a model away: it answers what it has admitted, and its memory is given back.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn unload(&self, name: &str, _dependents: bool) -> Result<(), ControlError> {
        self.allowed()?;
        let _changing = self.0.changing.lock().await;
        let unit = self.read().by_name.get(name).map(|entry| entry.unit.clone());
        let unit = unit.ok_or_else(|| ControlError::NotFound { name: name.to_owned() })?;
        self.remove(&unit);
        Ok(())
    }

    /// Runs what waits and closes every engine. Nothing is admitted any more.
    pub async fn stop(&self) {
        for graph in self.graphs() {
            graph.stop().await;
        }
    }

    fn allowed(&self) -> Result<(), ControlError> {
        match self.0.config.mode {
            ControlMode::Explicit => Ok(()),
            mode @ (ControlMode::None | ControlMode::Poll(_)) => Err(ControlError::Forbidden { mode: mode.as_str() }),
        }
    }

    /// Puts the models of a unit in the place of those that it had. The error is a name that another unit has taken.
    fn install(&self, unit: &str, loaded: Loaded) -> Result<(), String> {
        let mut models = self.write();
        let taken = |model: &&ModelVersion| models.by_name.get(model.name()).is_some_and(|entry| entry.unit != unit);
        if let Some(model) = loaded.versions.iter().find(taken) {
            return Err(model.name().to_owned());
        }
        let mut kept = BTreeSet::new();
        let mut old = Vec::new();
        for model in loaded.versions {
            let version = model.version().parse().unwrap_or(0);
            kept.insert((model.name().to_owned(), version));
            let entry = models.by_name.entry(model.name().to_owned()).or_default();
            entry.unit = unit.to_owned();
            let slot = Slot { state: State::Ready, reason: String::new(), model: Some(Arc::new(model)) };
            old.extend(entry.versions.insert(version, slot).and_then(|slot| slot.model));
        }
        for (name, entry) in models.by_name.iter_mut().filter(|(_, entry)| entry.unit == unit) {
            for (version, slot) in &mut entry.versions {
                if !kept.contains(&(name.clone(), *version)) {
                    old.extend(slot.unload());
                }
            }
        }
        let multimodal = match loaded.multimodal {
            Some(new) => models.multimodal.insert(unit.to_owned(), new),
            None => models.multimodal.remove(unit),
        };
        drop(models);
        drop(multimodal);
        self.retire(old);
        Ok(())
    }

    fn remove(&self, unit: &str) {
        let mut models = self.write();
        let entries = models.by_name.values_mut().filter(|entry| entry.unit == unit);
        let old = entries.flat_map(|entry| entry.versions.values_mut().filter_map(Slot::unload)).collect();
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
        tokio::spawn(async move {
            let names: Vec<(String, u64)> =
                old.iter().map(|model| (model.name().to_owned(), model.version().parse().unwrap_or(0))).collect();
            let graphs: Vec<Arc<Graph>> = old.iter().filter_map(|model| model.graph().cloned()).collect();
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
    /// Takes the model out.
    fn unload(&mut self) -> Option<Arc<ModelVersion>> {
        let model = self.model.take()?;
        self.state = State::Unloading;
        "unloaded".clone_into(&mut self.reason);
        Some(model)
    }
}

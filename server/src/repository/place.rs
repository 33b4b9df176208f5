//! Where repositories are.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use sensorium_artifact::{ArtifactError, Mirror, Volumes};
use sensorium_telemetry::error_line;

use super::{Opening, folder};

/// A repository's folder of this machine.
#[derive(Clone, Debug)]
pub(super) enum Place {
    Folder(PathBuf),
    /// A copy of what is in a bucket.
    Mirror(Mirror, Missing),
}

/// Why models of a bucket are not here as a whole, by name.
pub(super) type Missing = Arc<Mutex<BTreeMap<String, String>>>;

impl Place {
    /// A path, or the URI of a folder or prefix.
    ///
    /// # Errors
    /// A URI that is none.
    pub(super) fn parse(repository: &str, opening: &Opening) -> Result<Self, ArtifactError> {
        let Opening { volumes, cache, .. } = opening;
        Self::parse_with(repository, volumes, cache)
    }

    fn parse_with(repository: &str, volumes: &Volumes, cache: &Path) -> Result<Self, ArtifactError> {
        if repository.starts_with("s3://") {
            return Mirror::open(repository, cache).map(|mirror| Self::Mirror(mirror, Missing::default()));
        }
        if repository.contains("://") {
            return volumes.local_path(repository).map(Self::Folder);
        }
        Ok(Self::Folder(PathBuf::from(repository)))
    }

    /// Whether it is on this machine, and so always as it is.
    pub(super) fn is_here(&self) -> bool {
        matches!(self, Self::Folder(_))
    }

    /// Where the models are.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Folder(path) => path,
            Self::Mirror(mirror, _) => mirror.folder(),
        }
    }

    /// Makes a copy what its original is now. A model of which something could not be had is [`Place::missing`], and keeps no others from coming.
    ///
    /// # Errors
    /// The remote store's, where it does not say what there is.
    pub(super) async fn refresh(&self) -> Result<(), ArtifactError> {
        let Self::Mirror(mirror, missing) = self else { return Ok(()) };
        let (now, refreshed) = match mirror.refresh().await {
            Ok(missing) => (missing.into_iter().map(|(model, error)| (model, error_line(&error))).collect(), Ok(())),
            Err(error) => {
                let half = |model| (model, "only a part of it has been fetched".to_owned());
                (mirror.partial().into_iter().map(half).collect::<BTreeMap<_, _>>(), Err(error))
            }
        };
        let before = std::mem::replace(&mut *missing.lock().unwrap_or_else(PoisonError::into_inner), now.clone());
        // Once.
        for (model, reason) in now.iter().filter(|(model, reason)| before.get(*model) != Some(*reason)) {
            tracing::warn!(model, reason, "a model could not be fetched, and it stays as it is");
        }
        refreshed
    }

    /// The models in it, by name: also those of which nothing has come yet.
    ///
    /// # Errors
    /// The system's, where it cannot be read.
    pub(super) fn models(&self) -> io::Result<BTreeMap<String, PathBuf>> {
        let mut models = folder::models(self.path())?;
        if let Self::Mirror(_, missing) = self {
            let missing = missing.lock().unwrap_or_else(PoisonError::into_inner);
            for model in missing.keys().filter(|model| folder::is_model_name(model)) {
                models.entry(model.clone()).or_insert_with(|| self.path().join(model));
            }
        }
        Ok(models)
    }

    /// Whether it has a model of this name.
    pub(super) fn has(&self, model: &str) -> bool {
        folder::is_model_name(model) && (self.path().join(model).is_dir() || self.missing(model).is_some())
    }

    /// Why a model is not here as a whole, where it is not.
    pub(super) fn missing(&self, model: &str) -> Option<String> {
        match self {
            Self::Folder(_) => None,
            Self::Mirror(_, missing) => missing.lock().unwrap_or_else(PoisonError::into_inner).get(model).cloned(),
        }
    }
}

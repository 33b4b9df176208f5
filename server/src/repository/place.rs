//! Where repositories are.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use sensorium_artifact::{ArtifactError, Mirror, Volumes};
use sensorium_telemetry::error_line;
use tokio::sync::OwnedMutexGuard;

use super::{Opening, folder};

/// Why a model is missing of which some files are those of another time than the rest.
const PARTLY: &str = "only a part of it has been fetched";

/// A repository's folder of this machine.
#[derive(Clone, Debug)]
pub(super) enum Place {
    Folder(PathBuf),
    /// A copy of what is in a bucket.
    Copy(Arc<Copied>),
}

/// What is in a bucket, as it is here.
#[derive(Debug)]
pub(super) struct Copied {
    mirror: Mirror,
    /// Why models are not here as a whole, by name.
    missing: Mutex<BTreeMap<String, String>>,
    /// Locked while files change, and while nobody wants them to.
    still: Arc<tokio::sync::Mutex<()>>,
}

impl Copied {
    /// Only assignments run under it.
    fn missing(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As long as there is one, the files of a place are fetched by nobody else.
#[derive(Debug, Default)]
pub(super) struct Still {
    locked: Option<OwnedMutexGuard<()>>,
}

impl Still {
    /// Whether it is of a copy.
    pub(super) fn is_copy(&self) -> bool {
        self.locked.is_some()
    }
}

impl Place {
    /// A copy of which nothing is known yet.
    pub(super) fn copy(mirror: Mirror) -> Self {
        Self::Copy(Arc::new(Copied { mirror, missing: Mutex::default(), still: Arc::default() }))
    }

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
            return Mirror::open(repository, cache).map(Self::copy);
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
            Self::Copy(copied) => copied.mirror.folder(),
        }
    }

    /// Makes a copy what its original is now. A model of which something could not be had is [`Place::missing`], and keeps no others from coming.
    ///
    /// # Errors
    /// The remote store's, where it does not say what there is.
    pub(super) async fn refresh(&self) -> Result<Still, ArtifactError> {
        let Self::Copy(copied) = self else { return Ok(Still::default()) };
        let still = Still { locked: Some(copied.still.clone().lock_owned().await) };
        let mirror = &copied.mirror;
        let (now, refreshed) = match mirror.refresh().await {
            Ok(missing) => (missing.into_iter().map(|(model, error)| (model, error_line(&error))).collect(), Ok(still)),
            Err(error) => {
                let half = |model| (model, PARTLY.to_owned());
                (mirror.partial().into_iter().map(half).collect::<BTreeMap<_, _>>(), Err(error))
            }
        };
        let before = std::mem::replace(&mut *copied.missing(), now.clone());
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
        if let Self::Copy(copied) = self {
            let missing = copied.missing();
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
            Self::Copy(copied) => {
                let known = copied.missing().get(model).cloned();
                known.or_else(|| copied.mirror.is_changing(model).then(|| PARTLY.to_owned()))
            }
        }
    }
}

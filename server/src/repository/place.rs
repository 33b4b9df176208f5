//! Where repositories are.

use std::path::{Path, PathBuf};

use sensorium_artifact::{ArtifactError, Mirror, Volumes};

use super::Opening;

/// A repository's folder of this machine.
#[derive(Clone, Debug)]
pub(super) enum Place {
    Folder(PathBuf),
    /// A copy of what is in a bucket.
    Mirror(Mirror),
}

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
            return Mirror::open(repository, cache).map(Self::Mirror);
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
            Self::Mirror(mirror) => mirror.folder(),
        }
    }

    /// Makes a copy what its original is now.
    ///
    /// # Errors
    /// The remote store's.
    pub(super) async fn refresh(&self) -> Result<(), ArtifactError> {
        match self {
            Self::Folder(_) => Ok(()),
            Self::Mirror(mirror) => mirror.refresh().await,
        }
    }
}

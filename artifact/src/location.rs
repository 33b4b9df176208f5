//! Where things are stored: `pvc://`, `file://` and `s3://` URIs, and the volumes that claims are found at.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::ArtifactError;

/// A parsed storage URI. Prints in its normal form: no trailing `/`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Location {
    /// `pvc://CLAIM/PATH`: a folder of a PersistentVolumeClaim; on one machine, of the folder that stands for the claim.
    Claim {
        /// Name of the claim.
        claim: String,
        /// Folder inside it, `/`-separated; empty for its root.
        path: String,
    },
    /// `file:///ABSOLUTE/PATH`: a folder of this machine.
    File(PathBuf),
    /// `s3://BUCKET/PREFIX`: a prefix of a bucket.
    S3 {
        /// Name of the bucket.
        bucket: String,
        /// Key prefix, `/`-separated; empty for the whole bucket.
        prefix: String,
    },
}

impl Location {
    /// Parses a storage URI.
    ///
    /// # Errors
    /// [`ArtifactError::InvalidUri`] for another scheme, an empty claim or bucket, a relative `file://` path, or a
    /// path with empty, `.` or `..` parts.
    pub fn parse(uri: &str) -> Result<Self, ArtifactError> {
        let refused = |reason| ArtifactError::InvalidUri { uri: uri.to_owned(), reason };
        let (scheme, rest) = uri.split_once("://").ok_or_else(|| refused("it has no scheme"))?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (head, path) = rest.split_once('/').unwrap_or((rest, ""));
        if !path.is_empty() && path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(refused("its path has an empty, `.` or `..` part"));
        }
        let (head, path) = (head.to_owned(), path.to_owned());
        match scheme {
            "pvc" if head.is_empty() => Err(refused("the claim is empty")),
            "pvc" => Ok(Self::Claim { claim: head, path }),
            "file" if !head.is_empty() || path.is_empty() => Err(refused("the path must be absolute")),
            "file" => Ok(Self::File(Path::new("/").join(path))),
            "s3" if head.is_empty() => Err(refused("the bucket is empty")),
            "s3" => Ok(Self::S3 { bucket: head, prefix: path }),
            _ => Err(refused("its scheme is unknown")),
        }
    }
}

impl FromStr for Location {
    type Err = ArtifactError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        Self::parse(uri)
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, head, path) = match self {
            Self::Claim { claim, path } => ("pvc", claim, path),
            Self::S3 { bucket, prefix } => ("s3", bucket, prefix),
            Self::File(path) => return write!(f, "file://{}", path.display()),
        };
        let slash = if path.is_empty() { "" } else { "/" };
        write!(f, "{scheme}://{head}{slash}{path}")
    }
}

/// One `--volume CLAIM=DIR` argument: the folder that a claim is mounted at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Name of the claim.
    pub claim: String,
    /// Folder on this machine.
    pub folder: PathBuf,
}

impl FromStr for Volume {
    type Err = ArtifactError;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        let refused = |reason| ArtifactError::InvalidVolume { value: value.to_owned(), reason };
        let (claim, folder) = value.split_once('=').ok_or_else(|| refused("it has no `=`"))?;
        if claim.is_empty() || claim.contains('/') {
            return Err(refused("the claim is empty or has a `/`"));
        }
        if folder.is_empty() {
            return Err(refused("the folder is empty"));
        }
        Ok(Self { claim: claim.to_owned(), folder: PathBuf::from(folder) })
    }
}

/// The folders that claims are mounted at: what makes one configuration fit a cluster and a laptop.
///
/// ```
/// use sensorium_artifact::{Volume, Volumes};
///
/// let arguments = ["datasets=/mnt/datasets"];
/// let volumes: Volumes = arguments.iter().map(|a| a.parse::<Volume>()).collect::<Result<_, _>>()?;
/// let folder = volumes.local_path("pvc://datasets/easy-vqa/train")?;
/// assert_eq!(folder.to_str(), Some("/mnt/datasets/easy-vqa/train"));
/// # Ok::<(), sensorium_artifact::ArtifactError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Volumes(BTreeMap<String, PathBuf>);

impl Volumes {
    /// Adds a volume; a later one for the same claim wins.
    pub fn insert(&mut self, volume: Volume) {
        self.0.insert(volume.claim, volume.folder);
    }

    /// The claims and their folders, in order of the claims.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.0.iter().map(|(claim, folder)| (claim.as_str(), folder.as_path()))
    }

    /// The path on this machine of a `pvc://` or `file://` URI. It need not exist.
    ///
    /// # Errors
    /// [`ArtifactError::InvalidUri`], [`ArtifactError::UnknownClaim`], and [`ArtifactError::NotLocal`] for `s3://`.
    pub fn local_path(&self, uri: &str) -> Result<PathBuf, ArtifactError> {
        match Location::parse(uri)? {
            Location::File(path) => Ok(path),
            Location::S3 { .. } => Err(ArtifactError::NotLocal { uri: uri.to_owned() }),
            Location::Claim { claim, path } => match self.0.get(&claim) {
                // `join("")` would add a trailing slash that shows in messages.
                Some(folder) if path.is_empty() => Ok(folder.clone()),
                Some(folder) => Ok(folder.join(path)),
                None => {
                    let known = self.0.keys().cloned().collect();
                    Err(ArtifactError::UnknownClaim { uri: uri.to_owned(), claim, known })
                }
            },
        }
    }
}

impl FromIterator<Volume> for Volumes {
    fn from_iter<I: IntoIterator<Item = Volume>>(volumes: I) -> Self {
        volumes.into_iter().map(|volume| (volume.claim, volume.folder)).collect::<BTreeMap<_, _>>().into()
    }
}

impl From<BTreeMap<String, PathBuf>> for Volumes {
    fn from(folders: BTreeMap<String, PathBuf>) -> Self {
        Self(folders)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_prints_as_it_parses() {
        for uri in ["pvc://artifacts", "pvc://datasets/easy-vqa/train", "file:///a/b", "s3://bucket", "s3://bucket/a/b"]
        {
            let location = Location::parse(uri).unwrap();
            assert_eq!(location.to_string(), uri);
            assert_eq!(Location::parse(&format!("{uri}/")).unwrap(), location);
        }
    }

    #[test]
    fn a_uri_that_names_no_place_is_refused() {
        let bad = [
            "",
            "artifacts",
            "pvc://",
            "pvc:///a",
            "pvc://a/../b",
            "s3://",
            "s3://b//c",
            "file://a",
            "file:///",
            "gs://b",
        ];
        for uri in bad {
            let error = Location::parse(uri).unwrap_err();
            assert!(matches!(error, ArtifactError::InvalidUri { .. }), "{uri}: {error}");
        }
    }

    #[test]
    fn a_claim_without_a_volume_is_named_with_those_that_have_one() {
        let volumes: Volumes = ["a=/x", "b=/y"].iter().map(|v| v.parse::<Volume>().unwrap()).collect();
        assert_eq!(volumes.local_path("pvc://a").unwrap(), Path::new("/x"));
        let error = volumes.local_path("pvc://c/d").unwrap_err();
        assert_eq!(error.to_string(), "`pvc://c/d` names claim `c`, but no such volume was given (known: a, b)");
        assert!(matches!(volumes.local_path("s3://b/c").unwrap_err(), ArtifactError::NotLocal { .. }));
    }

    #[test]
    fn a_volume_is_a_claim_and_a_folder() {
        for bad in ["a", "=/x", "a=", "a/b=/x"] {
            assert!(matches!(bad.parse::<Volume>().unwrap_err(), ArtifactError::InvalidVolume { .. }), "{bad}");
        }
    }
}

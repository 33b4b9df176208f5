//! The store: one API over a folder and over S3.
//!
//! ```text
//! objects/<hex>/manifest.json      an artifact; <hex> is the digest of exactly these bytes
//! objects/<hex>/graphs/...         its files
//! names/<name>.json                which artifact a name points to
//! tmp/                             what is being written (a folder only)
//! ```

mod client;
mod draft;
mod local;
mod s3;
mod transfer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use draft::Draft;

use crate::atomic::Scratch;
use crate::error::Mismatch;
use crate::manifest::{MANIFEST_FILE, SCHEMA_VERSION, canonical, versioned};
use crate::path::validate_name;
use crate::{ArtifactError, Digest, Location, Manifest, ManifestParts, Volumes};
pub(crate) use client::{client as s3_client, environment as s3_environment};
use local::LocalStore;
use s3::S3Store;
pub(crate) use transfer::Transfer;

pub(crate) const OBJECTS: &str = "objects";
pub(crate) const NAMES: &str = "names";

/// A committed artifact.
#[derive(Clone, Debug, PartialEq)]
pub struct Artifact {
    /// Digest of the manifest's bytes; through it, of everything.
    pub digest: Digest,
    /// What it contains.
    pub manifest: Manifest,
    /// Where it is: the store's URI and its folder.
    pub uri: String,
}

/// A place for artifacts. Cheap to clone; all clones are the same store.
#[derive(Clone, Debug)]
pub struct Store {
    uri: String,
    backend: Backend,
}

#[derive(Clone, Debug)]
enum Backend {
    Local(LocalStore),
    S3(Box<S3Store>),
}

/// What `names/<name>.json` holds.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NameRecord {
    schema_version: u64,
    digest: Digest,
}

impl Store {
    /// Opens the store at a `pvc://`, `file://` or `s3://` URI. Nothing is read or created: a folder that is not there
    /// is an empty store.
    ///
    /// S3 takes its endpoint, region and credentials from the usual `AWS_*` environment variables.
    ///
    /// # Errors
    /// [`ArtifactError::InvalidUri`], [`ArtifactError::UnknownClaim`], and [`ArtifactError::Remote`] for S3 variables
    /// that contradict each other or name no server.
    pub fn open(uri: &str, volumes: &Volumes) -> Result<Self, ArtifactError> {
        Self::open_with(uri, volumes, s3_environment())
    }

    /// As [`Store::open`], with these environment variables instead of the process's own.
    pub fn open_with(
        uri: &str,
        volumes: &Volumes,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ArtifactError> {
        let location = Location::parse(uri)?;
        let uri = location.to_string();
        let backend = match location {
            Location::S3 { bucket, prefix } => {
                Backend::S3(Box::new(S3Store::new(bucket, &prefix, environment.into_iter())?))
            }
            Location::Claim { .. } | Location::File(_) => Backend::Local(LocalStore::new(volumes.local_path(&uri)?)),
        };
        Ok(Self { uri, backend })
    }

    /// The store's URI in its normal form.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Begins an artifact. In a folder store this also removes what killed processes left half-written. Blocks for a
    /// moment.
    ///
    /// # Errors
    /// [`ArtifactError::NoSpace`] and [`ArtifactError::Io`].
    pub fn draft(&self) -> Result<Draft, ArtifactError> {
        let scratch = match &self.backend {
            Backend::Local(local) => local.scratch()?,
            Backend::S3(_) => Scratch::private()?,
        };
        Ok(Draft { scratch })
    }

    /// Makes the draft an artifact: all of it becomes visible at once, under its digest. Committing what is there
    /// already changes nothing and succeeds.
    ///
    /// Dropping the future before it is done commits either nothing or everything.
    ///
    /// # Errors
    /// [`ArtifactError::InvalidManifest`] when a graph's file is not in the draft or a metric is not finite;
    /// [`ArtifactError::InvalidName`]; [`ArtifactError::InvalidPath`] for a file whose name is not portable;
    /// [`ArtifactError::NoSpace`], [`ArtifactError::Io`], [`ArtifactError::Remote`]. The draft is removed in any case.
    pub async fn commit(&self, draft: Draft, parts: ManifestParts) -> Result<Artifact, ArtifactError> {
        let (draft, manifest) = blocking(move || {
            let manifest = parts.into_manifest(draft.entries()?)?;
            Ok((draft, manifest))
        })
        .await?;
        let bytes = manifest.to_canonical()?;
        let digest = Digest::of(&bytes);
        match &self.backend {
            Backend::Local(local) => {
                let (local, manifest) = (local.clone(), manifest.clone());
                blocking(move || local.publish(draft.scratch, &digest, &manifest, &bytes)).await?;
            }
            Backend::S3(s3) => s3.publish(draft.folder(), &digest, &manifest.files, bytes).await?,
        }
        Ok(self.artifact(digest, manifest))
    }

    /// Points `name` to an artifact of this store, in one step for all readers.
    ///
    /// # Errors
    /// [`ArtifactError::InvalidName`]; [`ArtifactError::NotFound`] when there is no such artifact.
    pub async fn promote(&self, name: &str, digest: &Digest) -> Result<(), ArtifactError> {
        validate_name(name)?;
        self.load(digest).await?;
        let record = NameRecord { schema_version: SCHEMA_VERSION, digest: *digest };
        let bytes = canonical(&record).map_err(|error| ArtifactError::InvalidManifest {
            what: format!("the record of name `{name}`"),
            reason: error.to_string(),
        })?;
        self.write(name_key(name), bytes).await
    }

    /// The artifact that `reference` means: a name, or a digest (`sha256:...`). Its manifest is verified, its files are
    /// not: [`Store::fetch`] and [`Store::verify`] do that.
    ///
    /// # Errors
    /// [`ArtifactError::NotFound`], which lists the names there are; [`ArtifactError::Corrupt`] when the manifest is
    /// not the one that was committed; [`ArtifactError::InvalidName`], [`ArtifactError::InvalidDigest`].
    pub async fn resolve(&self, reference: &str) -> Result<Artifact, ArtifactError> {
        let digest = if reference.contains(':') {
            reference.parse()?
        } else {
            validate_name(reference)?;
            match self.name(reference).await? {
                Some(digest) => digest,
                None => return Err(self.not_found(reference).await),
            }
        };
        self.load(&digest).await
    }

    /// A folder of this machine with the artifact's files and manifest, verified. For a folder store it is the
    /// artifact's own folder: do not write there. For S3 it is in `cache`, where it is kept for the next time.
    ///
    /// # Errors
    /// [`ArtifactError::Corrupt`] with every file that does not have the digest that was committed.
    pub async fn fetch(&self, artifact: &Artifact, cache: &Path) -> Result<PathBuf, ArtifactError> {
        match &self.backend {
            Backend::S3(s3) => s3.fetch(artifact, cache.to_owned()).await,
            Backend::Local(local) => {
                self.check(&artifact.digest, &artifact.manifest).await?;
                Ok(local.folder(&artifact.digest))
            }
        }
    }

    /// Reads everything of an artifact and compares it with its digests.
    ///
    /// # Errors
    /// [`ArtifactError::Corrupt`] with every file that does not match; [`ArtifactError::NotFound`].
    pub async fn verify(&self, digest: &Digest) -> Result<Artifact, ArtifactError> {
        let artifact = self.load(digest).await?;
        self.check(digest, &artifact.manifest).await?;
        Ok(artifact)
    }

    /// Whether there is anything of an artifact, whole or not.
    ///
    /// # Errors
    /// [`ArtifactError::Io`] and [`ArtifactError::Remote`].
    pub async fn has(&self, digest: &Digest) -> Result<bool, ArtifactError> {
        match &self.backend {
            Backend::S3(s3) => s3.has(digest).await,
            Backend::Local(local) => {
                let (local, digest) = (local.clone(), *digest);
                blocking(move || local.has(&digest)).await
            }
        }
    }

    /// Removes an artifact and the names that point to it; gives these names. What is not there is no error, so an attempt
    /// that was cut off is finished by the next one. Names go first and the manifest before the files: nobody who reads
    /// meanwhile takes half an artifact for a whole one.
    ///
    /// # Errors
    /// [`ArtifactError::Io`] and [`ArtifactError::Remote`].
    pub async fn remove(&self, digest: &Digest) -> Result<Vec<String>, ArtifactError> {
        let mut removed = Vec::new();
        for name in self.name_list().await? {
            // A record that cannot be read points nowhere, and is not this artifact's.
            if self.name(&name).await.is_ok_and(|target| target == Some(*digest)) {
                self.delete(name_key(&name)).await?;
                removed.push(name);
            }
        }
        match &self.backend {
            Backend::S3(s3) => s3.remove(digest).await?,
            Backend::Local(local) => {
                let (local, digest) = (local.clone(), *digest);
                blocking(move || local.remove(&digest)).await?;
            }
        }
        Ok(removed)
    }

    /// Every committed artifact, in order of name and digest. One with a damaged manifest is left out and logged:
    /// it must not hide the others.
    pub async fn list(&self) -> Result<Vec<Artifact>, ArtifactError> {
        let digests = match &self.backend {
            Backend::S3(s3) => s3.digests().await?,
            Backend::Local(local) => {
                let local = local.clone();
                blocking(move || local.digests()).await?
            }
        };
        let mut artifacts = Vec::new();
        for digest in digests {
            match self.load(&digest).await {
                Ok(artifact) => artifacts.push(artifact),
                Err(error @ (ArtifactError::Io { .. } | ArtifactError::Remote { .. } | ArtifactError::Cancelled)) => {
                    return Err(error);
                }
                Err(error) => tracing::warn!(artifact = %digest, %error, "left out of the list"),
            }
        }
        artifacts.sort_by(|a, b| (&a.manifest.name, a.digest).cmp(&(&b.manifest.name, b.digest)));
        Ok(artifacts)
    }

    /// Every name and the artifact that it points to. One whose record is none, or of a newer program, is left out and logged: it must
    /// not hide the others.
    ///
    /// # Errors
    /// [`ArtifactError::Io`] and [`ArtifactError::Remote`].
    pub async fn names(&self) -> Result<BTreeMap<String, Digest>, ArtifactError> {
        let mut names = BTreeMap::new();
        for name in self.name_list().await? {
            match self.name(&name).await {
                Ok(Some(digest)) => drop(names.insert(name, digest)),
                // A record that went away since is no error.
                Ok(None) => {}
                Err(error @ (ArtifactError::InvalidManifest { .. } | ArtifactError::UnknownSchema { .. })) => {
                    tracing::warn!(name, %error, "left out of the names");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(names)
    }

    async fn load(&self, digest: &Digest) -> Result<Artifact, ArtifactError> {
        let Some(bytes) = self.read(object_key(digest, MANIFEST_FILE)).await? else {
            return Err(self.not_found(&digest.to_string()).await);
        };
        let found = Digest::of(&bytes);
        if found != *digest {
            let mismatch = Mismatch { path: MANIFEST_FILE.to_owned(), expected: *digest, found: Some(found) };
            return Err(ArtifactError::Corrupt { artifact: *digest, mismatches: vec![mismatch] });
        }
        let manifest = Manifest::from_slice(&format!("the manifest of {digest}"), &bytes)?;
        Ok(self.artifact(*digest, manifest))
    }

    async fn check(&self, digest: &Digest, manifest: &Manifest) -> Result<(), ArtifactError> {
        let mismatches = match &self.backend {
            Backend::S3(s3) => s3.check(digest, &manifest.files).await?,
            Backend::Local(local) => {
                let (local, digest, manifest) = (local.clone(), *digest, manifest.clone());
                blocking(move || local.check(&digest, &manifest)).await?
            }
        };
        if mismatches.is_empty() { Ok(()) } else { Err(ArtifactError::Corrupt { artifact: *digest, mismatches }) }
    }

    async fn name(&self, name: &str) -> Result<Option<Digest>, ArtifactError> {
        let Some(bytes) = self.read(name_key(name)).await? else { return Ok(None) };
        let record: NameRecord = versioned(&format!("the record of name `{name}`"), &bytes)?;
        Ok(Some(record.digest))
    }

    async fn name_list(&self) -> Result<Vec<String>, ArtifactError> {
        let names = match &self.backend {
            Backend::S3(s3) => s3.names().await?,
            Backend::Local(local) => {
                let local = local.clone();
                blocking(move || local.names()).await?
            }
        };
        // Editors and file managers leave files with other names behind.
        Ok(names.into_iter().filter(|name| validate_name(name).is_ok()).collect())
    }

    async fn not_found(&self, reference: &str) -> ArtifactError {
        // The names are a courtesy: if they cannot be read either, the error is still that of the reference.
        let mut names = self.name_list().await.unwrap_or_default();
        names.sort();
        ArtifactError::NotFound { reference: reference.to_owned(), store: self.uri.clone(), names }
    }

    async fn read(&self, key: String) -> Result<Option<Vec<u8>>, ArtifactError> {
        match &self.backend {
            Backend::S3(s3) => s3.read(&key).await,
            Backend::Local(local) => {
                let local = local.clone();
                blocking(move || local.read(&key)).await
            }
        }
    }

    async fn write(&self, key: String, bytes: Vec<u8>) -> Result<(), ArtifactError> {
        match &self.backend {
            Backend::S3(s3) => s3.write(&key, bytes).await,
            Backend::Local(local) => {
                let local = local.clone();
                blocking(move || local.write(&key, &bytes)).await
            }
        }
    }

    async fn delete(&self, key: String) -> Result<(), ArtifactError> {
        match &self.backend {
            Backend::S3(s3) => s3.delete(&key).await,
            Backend::Local(local) => {
                let local = local.clone();
                blocking(move || local.delete(&key)).await
            }
        }
    }

    fn artifact(&self, digest: Digest, manifest: Manifest) -> Artifact {
        let uri = format!("{}/{OBJECTS}/{}", self.uri, digest.hex());
        Artifact { digest, manifest, uri }
    }
}

pub(crate) fn object_key(digest: &Digest, path: &str) -> String {
    format!("{OBJECTS}/{}/{path}", digest.hex())
}

fn name_key(name: &str) -> String {
    format!("{NAMES}/{name}.json")
}

/// Runs file-system work off the async threads. It runs to its end even when the caller is dropped.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ArtifactError> + Send + 'static,
) -> Result<T, ArtifactError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(ArtifactError::Cancelled),
    }
}

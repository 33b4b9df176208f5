//! A prefix of a bucket, kept as a folder of this machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use object_store::aws::AmazonS3;
use object_store::path::Path as Key;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use tokio::io::AsyncWriteExt;

use crate::atomic;
use crate::store::{s3_client, s3_environment};
use crate::{ArtifactError, Digest, Location};

/// Files under a prefix as a folder that follows them. Objects are told apart by their entity tags, as the store gives
/// them, so a file that did not change is not downloaded again.
#[derive(Clone, Debug)]
pub struct Mirror {
    client: AmazonS3,
    uri: String,
    prefix: Key,
    folder: PathBuf,
    /// Where files are until they are whole.
    scratch: PathBuf,
}

/// Entity tags of the files that are here, by path.
type Tags = BTreeMap<String, String>;

/// Beside the folder, so that it holds files of the bucket alone.
const TAGS: &str = "tags.json";

impl Mirror {
    /// The prefix at `uri`, `s3://BUCKET/PREFIX`, kept below `cache`. Nothing is read or created.
    ///
    /// # Errors
    /// [`ArtifactError::InvalidUri`], [`ArtifactError::Remote`] for `AWS_*` variables that contradict each other.
    pub fn open(uri: &str, cache: &Path) -> Result<Self, ArtifactError> {
        Self::open_with(uri, cache, s3_environment())
    }

    /// As [`Mirror::open`], with these environment variables instead of the process's own.
    ///
    /// # Errors
    /// As [`Mirror::open`].
    pub fn open_with(
        uri: &str,
        cache: &Path,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ArtifactError> {
        let location = Location::parse(uri)?;
        let uri = location.to_string();
        let Location::S3 { bucket, prefix } = location else {
            return Err(ArtifactError::InvalidUri { uri, reason: "only s3:// is mirrored; a folder is used as it is" });
        };
        let client = s3_client(&bucket, &prefix, environment.into_iter())?;
        let own = cache.join("mirrors").join(Digest::of(uri.as_bytes()).hex());
        Ok(Self { client, uri, prefix: Key::from(prefix), folder: own.join("files"), scratch: own.join("scratch") })
    }

    /// Where the files are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes the folder what the prefix is now: downloads what is new, removes what is gone. A file is replaced whole or
    /// not at all.
    ///
    /// # Errors
    /// [`ArtifactError::Remote`], [`ArtifactError::Io`], [`ArtifactError::NoSpace`]; what was done until then stays.
    pub async fn refresh(&self) -> Result<(), ArtifactError> {
        let failed = |source| ArtifactError::Remote { action: "list", uri: self.uri.clone(), source };
        let objects: Vec<ObjectMeta> = self.client.list(Some(&self.prefix)).try_collect().await.map_err(failed)?;
        let tags_file = self.folder.with_file_name(TAGS);
        for folder in [&self.folder, &self.scratch] {
            std::fs::create_dir_all(folder).map_err(|source| ArtifactError::io("create", folder, source))?;
        }
        let mut tags: Tags =
            std::fs::read(&tags_file).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
        let mut found = Tags::new();
        for object in objects {
            // A name that ends in a slash stands for a folder, and is none of a file.
            let Some(path) = relative(&self.prefix, &object.location) else { continue };
            let tag = object.e_tag.clone().unwrap_or_else(|| format!("{} {}", object.last_modified, object.size));
            let target = self.folder.join(&path);
            if tags.get(&path) != Some(&tag) || !target.is_file() {
                self.download(&object.location, &target).await?;
                tags.insert(path.clone(), tag.clone());
                keep(&tags_file, &tags)?;
            }
            found.insert(path, tag);
        }
        for path in tags.keys().filter(|path| !found.contains_key(*path)) {
            let target = self.folder.join(path);
            match std::fs::remove_file(&target) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(ArtifactError::io("remove", &target, source));
                }
                _ => remove_empty(&self.folder, &target),
            }
        }
        keep(&tags_file, &found)
    }

    async fn download(&self, key: &Key, target: &Path) -> Result<(), ArtifactError> {
        let failed =
            |source| ArtifactError::Remote { action: "download", uri: format!("{} ({key})", self.uri), source };
        let mut content = self.client.get(key).await.map_err(failed)?.into_stream();
        let parent = target.parent().unwrap_or(&self.folder);
        std::fs::create_dir_all(parent).map_err(|source| ArtifactError::io("create", parent, source))?;
        // In pieces, because a model may be larger than memory; aside, so that nobody sees half of it.
        let scratch = tempfile::NamedTempFile::new_in(&self.scratch)
            .map_err(|source| ArtifactError::io("create", &self.scratch, source))?;
        let written = |source| ArtifactError::io("write", target, source);
        let mut file = tokio::fs::File::from_std(scratch.reopen().map_err(written)?);
        while let Some(piece) = content.try_next().await.map_err(failed)? {
            file.write_all(&piece).await.map_err(written)?;
        }
        file.sync_all().await.map_err(written)?;
        scratch.persist(target).map_err(|error| written(error.error)).map(drop)
    }
}

fn keep(file: &Path, tags: &Tags) -> Result<(), ArtifactError> {
    let json = serde_json::to_vec(tags).unwrap_or_default();
    atomic::write(file, &json)
}

/// The path of an object below a prefix; `None` for what has no name there.
fn relative(prefix: &Key, key: &Key) -> Option<String> {
    let parts: Vec<String> = key.prefix_match(prefix)?.map(|part| part.as_ref().to_owned()).collect();
    let is_plain = |part: &String| !part.is_empty() && part != "." && part != ".." && !part.contains('\\');
    (!parts.is_empty() && parts.iter().all(is_plain)).then(|| parts.join("/"))
}

/// Removes folders that `gone` left empty, below `root`.
fn remove_empty(root: &Path, gone: &Path) {
    let mut folder = gone.parent();
    while let Some(path) = folder.filter(|path| *path != root) {
        // A folder that still holds something is not removed, and neither are those above it.
        if std::fs::remove_dir(path).is_err() {
            return;
        }
        folder = path.parent();
    }
}

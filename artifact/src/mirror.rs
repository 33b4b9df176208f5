//! A prefix of a bucket, kept as a folder of this machine.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, io};

use futures::{StreamExt, TryStreamExt, stream};
use object_store::aws::AmazonS3;
use object_store::path::Path as Key;
use object_store::{ObjectMeta, ObjectStore};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;

use crate::atomic;
use crate::store::{Transfer, s3_client, s3_environment};
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
    /// [`Mirror::partial`], as far as this process knows.
    changing: Arc<Mutex<BTreeSet<String>>>,
}

/// What is known of the files that are here.
#[derive(Debug, Default, Deserialize, Serialize)]
struct Kept {
    /// Their entity tags, by path.
    tags: BTreeMap<String, String>,
    /// See [`Mirror::partial`].
    partial: BTreeSet<String>,
}

/// Beside the folder, so that it holds files of the bucket alone.
const KEPT: &str = "kept.json";
/// Downloads at a time.
const DOWNLOADS: usize = 8;
/// How often it is noted what is here already.
const NOTED: Duration = Duration::from_secs(1);

impl Mirror {
    /// The prefix at `uri`, `s3://BUCKET/PREFIX`, kept below `cache`. Nothing is read or created.
    ///
    /// # Errors
    /// [`ArtifactError::InvalidUri`], [`ArtifactError::Remote`] for `AWS_*` variables that contradict each other or name
    /// no server.
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
        let (client, prefix) = s3_client(&bucket, &prefix, environment.into_iter())?;
        let own = cache.join("mirrors").join(Digest::of(uri.as_bytes()).hex());
        let (folder, scratch) = (own.join("files"), own.join("scratch"));
        Ok(Self { client, uri, prefix, folder, scratch, changing: Arc::default() })
    }

    /// Where the files are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes the folder what the prefix is now: removes what is gone, downloads what is new. A file is replaced whole or not at all. One that
    /// cannot be had keeps no others from being: the folders below this one that are not whole for want of some, each with the first reason.
    ///
    /// # Errors
    /// [`ArtifactError::Remote`] where the prefix cannot be listed, [`ArtifactError::Io`], [`ArtifactError::NoSpace`]; what was done until then stays.
    pub async fn refresh(&self) -> Result<BTreeMap<String, ArtifactError>, ArtifactError> {
        let failed = |error| ArtifactError::Remote { action: "list", uri: self.uri.clone(), error };
        let objects = self.client.list(Some(&self.prefix)).try_collect().await.map_err(failed)?;
        let wanted = files(&self.prefix, objects);
        for folder in [&self.folder, &self.scratch] {
            atomic::create_folder(folder)?;
        }
        atomic::sweep_unlocked(&self.scratch);
        let mut kept = self.kept();
        kept.tags.retain(|path, _| wanted.contains_key(path));
        let changed: Vec<(String, ObjectMeta)> = wanted
            .iter()
            .filter(|(path, object)| !self.has(&kept, path, object))
            .map(|(p, o)| (p.clone(), o.clone()))
            .collect();
        let mut strays = Strays::default();
        let found = strays.find(&self.folder, &self.folder, &wanted);
        found.map_err(|source| ArtifactError::io("read", &self.folder, source))?;
        if changed.is_empty() && strays.files.is_empty() && kept.partial.is_empty() {
            // Another process may have made whole what this one has not.
            self.change(&BTreeSet::new());
            return Ok(BTreeMap::new());
        }
        // Until all of a folder is here, it is neither what it was nor what it is to be, also for the next process.
        let gone = strays.files.iter().filter_map(|file| file.strip_prefix(&self.folder).ok()?.to_str());
        kept.partial.extend(changed.iter().map(|(path, _)| path.as_str()).chain(gone).map(top));
        self.change(&kept.partial);
        self.keep(&kept)?;
        // First, so that there is room for what comes, and no file where a folder is to be, nor the other way round.
        strays.remove().map_err(|source| ArtifactError::io("remove what is gone from", &self.folder, source))?;
        let mut missing = BTreeMap::new();
        let mut downloads = stream::iter(changed.into_iter().map(|(path, object)| async move {
            let target = self.folder.join(&path);
            let downloaded = match self.download(&object.location, &target).await {
                // It went away since it was listed, or its name ends in a slash, which its key here has not: an empty folder.
                Ok(false) => {
                    remove(&target).map_err(|source| ArtifactError::io("remove", &target, source)).map(|()| None)
                }
                downloaded => downloaded.map(|_| Some(tag(&object))),
            };
            (path, downloaded)
        }))
        .buffer_unordered(DOWNLOADS);
        let mut since = Instant::now();
        while let Some((path, downloaded)) = downloads.next().await {
            match downloaded {
                Ok(Some(tag)) => drop(kept.tags.insert(path, tag)),
                Ok(None) => {}
                Err(error) if path.contains('/') => drop(missing.entry(top(&path)).or_insert(error)),
                Err(error) => tracing::warn!(path, %error, "a file beside the folders cannot be had"),
            }
            // What is noted is not downloaded again by the next process.
            if since.elapsed() >= NOTED {
                self.keep(&kept)?;
                since = Instant::now();
            }
        }
        drop(downloads);
        kept.partial = missing.keys().cloned().collect();
        self.keep(&kept)?;
        self.change(&kept.partial);
        Ok(missing)
    }

    /// The folders below this one that a refresh has begun to change and not made whole, by whichever process. Empty where there was none.
    pub fn partial(&self) -> BTreeSet<String> {
        self.kept().partial
    }

    /// Whether a refresh of this process changes that folder now, or has not made it whole.
    pub fn is_changing(&self, folder: &str) -> bool {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner).contains(folder)
    }

    fn change(&self, folders: &BTreeSet<String>) {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner).clone_from(folders);
    }

    fn kept(&self) -> Kept {
        let kept = fs::read(self.folder.with_file_name(KEPT)).ok();
        kept.and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default()
    }

    fn keep(&self, kept: &Kept) -> Result<(), ArtifactError> {
        atomic::write(self.folder.with_file_name(KEPT), serde_json::to_vec(kept).unwrap_or_default())
    }

    /// Whether a file is here as its object is.
    fn has(&self, kept: &Kept, path: &str, object: &ObjectMeta) -> bool {
        let is_whole =
            fs::metadata(self.folder.join(path)).is_ok_and(|file| file.is_file() && file.len() == object.size);
        is_whole && kept.tags.get(path) == Some(&tag(object))
    }

    /// Whether there is such an object.
    async fn download(&self, key: &Key, target: &Path) -> Result<bool, ArtifactError> {
        let failed = |error| ArtifactError::Remote { action: "download", uri: format!("{} ({key})", self.uri), error };
        let Some(mut transfer) = Transfer::begin(&self.client, key).await.map_err(failed)? else { return Ok(false) };
        // In pieces, because a model may be larger than memory; aside, so that nobody sees half of it.
        let scratch = tempfile::NamedTempFile::new_in(&self.scratch)
            .map_err(|source| ArtifactError::io("create", &self.scratch, source))?;
        let written = |source| ArtifactError::io("write", target, source);
        // As long as it is, somebody lives who writes it.
        scratch.as_file().lock().map_err(written)?;
        let mut file = tokio::fs::File::from_std(scratch.reopen().map_err(written)?);
        while let Some(piece) = transfer.next().await.map_err(failed)? {
            file.write_all(&piece).await.map_err(written)?;
        }
        // tokio writes behind the caller's back: only a flush tells that the last piece arrived.
        file.flush().await.map_err(written)?;
        file.sync_all().await.map_err(written)?;
        // Not before, because whoever shares the cache removes empty folders.
        atomic::create_folder(target.parent().unwrap_or(&self.folder))?;
        scratch.persist(target).map_err(|error| written(error.error))?;
        Ok(true)
    }
}

/// What tells an object from others of its name.
fn tag(object: &ObjectMeta) -> String {
    object.e_tag.clone().unwrap_or_else(|| format!("{} {}", object.last_modified, object.size))
}

/// The first part of a path.
fn top(path: &str) -> String {
    path.split('/').next().unwrap_or_default().to_owned()
}

/// The path of an object below a prefix; `None` for what has no name there.
fn relative(prefix: &Key, key: &Key) -> Option<String> {
    let parts: Vec<String> = key.prefix_match(prefix)?.map(|part| part.as_ref().to_owned()).collect();
    let is_plain = |part: &String| !part.is_empty() && part != "." && part != ".." && !part.contains('\\');
    (!parts.is_empty() && parts.iter().all(is_plain)).then(|| parts.join("/"))
}

/// The objects that are files here, by path. One whose path leads to others is none, whatever it holds: a folder that some
/// tool made an object of, or a name that a file system can't have twice.
fn files(prefix: &Key, objects: Vec<ObjectMeta>) -> BTreeMap<String, ObjectMeta> {
    // From the last, so that `a` replaces `a/`, which looks the same here.
    let named = |object: ObjectMeta| Some((relative(prefix, &object.location)?, object));
    let mut files: BTreeMap<_, _> = objects.into_iter().rev().filter_map(named).collect();
    let above = |path: &String| path.match_indices('/').map(|(end, _)| path[..end].to_owned()).collect::<Vec<_>>();
    let folders: BTreeSet<String> = files.keys().flat_map(above).collect();
    files.retain(|path, _| !folders.contains(path));
    files
}

/// What is in a folder beside what is wanted.
#[derive(Default)]
struct Strays {
    files: Vec<PathBuf>,
    /// All that there are, those within others first.
    folders: Vec<PathBuf>,
}

impl Strays {
    /// Adds what is in `folder`, which is below `root`.
    fn find(&mut self, root: &Path, folder: &Path, wanted: &BTreeMap<String, ObjectMeta>) -> io::Result<()> {
        let is_wanted = |path: &Path| path.strip_prefix(root).ok()?.to_str().map(|path| wanted.contains_key(path));
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                self.find(root, &path, wanted)?;
                self.folders.push(path);
            } else if is_wanted(&path) != Some(true) {
                self.files.push(path);
            }
        }
        Ok(())
    }

    /// Removes the files, and the folders that are empty then.
    fn remove(&self) -> io::Result<()> {
        self.files.iter().try_for_each(|file| remove(file))?;
        // One that still holds something stays.
        self.folders.iter().for_each(|folder| drop(fs::remove_dir(folder)));
        Ok(())
    }
}

fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

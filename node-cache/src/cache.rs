//! The folder of artifacts: fetched once, whole, verified, and bounded.
//!
//! ```text
//! artifacts/KEY/objects/HEX/...    an artifact, as a store of one; KEY is its place among all stores
//! trash/                           what is being removed
//! ```
//!
//! A download goes on when the one who asked for it has given up: a kubelet waits for two minutes, a large artifact takes
//! longer, and the next attempt finds it further on.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use sensorium_artifact::{Artifact, ArtifactError, Digest, MANIFEST_FILE, Store, Volumes};

use crate::Failure;
use crate::volume::Wanted;

/// Folder of the artifacts, in the cache's.
pub const ARTIFACTS: &str = "artifacts";
/// Folder of what is being removed, beside it.
const TRASH: &str = "trash";
/// Folder of artifacts in a store.
const OBJECTS: &str = "objects";
/// Folder of a store for what is not whole yet.
const UNFINISHED: &str = "tmp";

/// Names of the artifacts that pods use now.
pub type InUse = dyn Fn() -> io::Result<HashSet<String>> + Send + Sync;

/// Artifacts on this node. All clones are the same cache.
#[derive(Clone)]
pub struct Cache {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    capacity: u64,
    in_use: Box<InUse>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<String, Entry>,
    downloads: BTreeMap<String, Download>,
}

struct Entry {
    bytes: u64,
    used: SystemTime,
    /// Those who are just taking it.
    held: u32,
    /// Whether its files were compared with their digests since this process started.
    verified: bool,
    /// Whether it is being downloaded.
    coming: bool,
}

type Download = Shared<BoxFuture<'static, Result<(), Failure>>>;

/// An artifact that stays until this is dropped; longer, if a pod uses it by then.
pub struct Held {
    inner: Arc<Inner>,
    key: String,
}

impl Held {
    /// Name of its folder among the artifacts.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(entry) = self.inner.lock().entries.get_mut(&self.key) {
            entry.held = entry.held.saturating_sub(1);
        }
    }
}

impl Cache {
    /// The cache in the folder `root`, of `capacity` bytes; `in_use` tells which artifacts pods use. Removes what a process
    /// that died left unfinished.
    ///
    /// # Errors
    /// [`Failure::Node`].
    pub fn open(root: &Path, capacity: u64, in_use: Box<InUse>) -> Result<Self, Failure> {
        let (artifacts, trash) = (root.join(ARTIFACTS), root.join(TRASH));
        for folder in [&artifacts, &trash] {
            fs::create_dir_all(folder).map_err(|error| Failure::io("create", folder, &error))?;
        }
        // Pods see what is mounted for them; nobody else on the node is to read other people's models.
        fs::set_permissions(root, fs::Permissions::from_mode(0o700))
            .map_err(|error| Failure::io("close", root, &error))?;
        let mut state = State::default();
        for (key, folder) in entries_of(&artifacts)? {
            match size_of_whole(&folder) {
                Some((bytes, used)) => {
                    let entry = Entry { bytes, used, held: 0, verified: false, coming: false };
                    state.entries.insert(key, entry);
                }
                None => discard(&folder, &trash.join(&key))?,
            }
        }
        for (_, folder) in entries_of(&trash)? {
            fs::remove_dir_all(&folder).map_err(|error| Failure::io("remove", &folder, &error))?;
        }
        let inner = Inner { root: root.to_owned(), capacity, in_use, state: Mutex::new(state) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The artifact that a pod wants, once it is here and whole, if that pod may read it.
    ///
    /// # Errors
    /// [`Failure`].
    pub async fn take(&self, wanted: &Wanted) -> Result<Held, Failure> {
        let store = Store::open_with(&wanted.store, &Volumes::default(), wanted.environment.clone())?;
        // Whether or not it is here already: who cannot read it there gets nothing here.
        let artifact = store.resolve(&wanted.digest.to_string()).await?;
        let key = wanted.key();
        let download = {
            let mut state = self.inner.lock();
            // Somebody may have tidied up the disk.
            let is_ready = state.entries.get(&key).is_some_and(|entry| entry.verified)
                && self.inner.folder(&key).join(OBJECTS).is_dir();
            (!is_ready).then(|| Inner::download(&self.inner, &mut state, &key, store, artifact))
        };
        if let Some(download) = download {
            download.await?;
        }
        let mut state = self.inner.lock();
        let Some(entry) = state.entries.get_mut(&key) else {
            return Err(Failure::Node(format!("{} was removed before it was used; try again", wanted.digest)));
        };
        entry.held += 1;
        entry.used = SystemTime::now();
        self.inner.note_use(&key, entry.used);
        drop(state);
        Ok(Held { inner: Arc::clone(&self.inner), key })
    }

    /// Bytes of all artifacts that are here or on their way.
    pub fn bytes(&self) -> u64 {
        self.inner.lock().entries.values().map(|entry| entry.bytes).sum()
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self, key: &str) -> PathBuf {
        self.root.join(ARTIFACTS).join(key)
    }

    /// The one download of `key` that is under way, started now if there is none.
    fn download(this: &Arc<Self>, state: &mut State, key: &str, store: Store, artifact: Artifact) -> Download {
        if let Some(download) = state.downloads.get(key) {
            return download.clone();
        }
        let (inner, name) = (Arc::clone(this), key.to_owned());
        let task = tokio::spawn(async move {
            let ended = Ended { inner: &inner, key: &name };
            let outcome = inner.fetch(&name, &store, &artifact).await;
            drop(ended);
            outcome
        });
        let download = async move {
            task.await.unwrap_or_else(|error| Err(Failure::Node(format!("the download was cut short: {error}"))))
        };
        let download = download.boxed().shared();
        state.downloads.insert(key.to_owned(), download.clone());
        download
    }

    /// Makes an artifact whole: downloads it, or compares what is there with its digests.
    async fn fetch(&self, key: &str, store: &Store, artifact: &Artifact) -> Result<(), Failure> {
        let bytes = artifact.manifest.total_bytes();
        self.reserve(key, bytes, &artifact.digest)?;
        let folder = self.folder(key);
        tracing::info!(artifact = %artifact.digest, store = store.uri(), bytes, "fetching");
        let outcome = match store.fetch(artifact, &folder).await {
            // Others may have filled the disk; what nobody uses here can go.
            Err(ArtifactError::NoSpace { .. }) if self.evict_unused()? => store.fetch(artifact, &folder).await,
            outcome => outcome,
        };
        // Empty by now, and nothing for pods to look at.
        let _ = fs::remove_dir_all(folder.join(UNFINISHED));
        let mut state = self.lock();
        match outcome {
            Ok(_) => {
                let held = state.entries.get(key).map_or(0, |known| known.held);
                let entry = Entry { bytes, used: SystemTime::now(), held, verified: true, coming: false };
                state.entries.insert(key.to_owned(), entry);
                Ok(())
            }
            Err(error) => {
                let failure = Failure::from(error);
                tracing::warn!(artifact = %artifact.digest, %failure, "could not be fetched");
                if let Some(entry) = state.entries.get_mut(key) {
                    entry.coming = false;
                    if size_of_whole(&folder).is_none() {
                        state.entries.remove(key);
                        drop(state);
                        discard(&folder, &self.root.join(TRASH).join(key))?;
                    }
                }
                Err(failure)
            }
        }
    }

    /// Sets room aside for an artifact, at the cost of those that were used longest ago.
    fn reserve(&self, key: &str, bytes: u64, digest: &Digest) -> Result<(), Failure> {
        loop {
            let victim = {
                let mut state = self.lock();
                if let Some(entry) = state.entries.get_mut(key) {
                    entry.coming = true;
                    return Ok(());
                }
                let used: u64 = state.entries.values().map(|entry| entry.bytes).sum();
                if used.saturating_add(bytes) <= self.capacity {
                    let now = SystemTime::now();
                    let entry = Entry { bytes, used: now, held: 0, verified: false, coming: true };
                    state.entries.insert(key.to_owned(), entry);
                    return Ok(());
                }
                self.take_out_longest_unused(&mut state)?.ok_or_else(|| {
                    Failure::Full(format!(
                        "artifact {digest} has {bytes} bytes; the node's cache has {} in all, and {used} are in use: raise \
                         nodeCache.capacity, or move pods to another node",
                        self.capacity
                    ))
                })?
            };
            remove(&victim)?;
        }
    }

    /// Removes all that nobody uses; says whether there was anything.
    fn evict_unused(&self) -> Result<bool, Failure> {
        let mut any = false;
        loop {
            let victim = self.take_out_longest_unused(&mut self.lock())?;
            let Some(victim) = victim else { return Ok(any) };
            any = true;
            remove(&victim)?;
        }
    }

    /// Takes an artifact that nobody uses out of the cache, in one step; gives the folder that is left to be removed.
    fn take_out_longest_unused(&self, state: &mut State) -> Result<Option<PathBuf>, Failure> {
        let in_use = (self.in_use)().map_err(|error| Failure::Node(format!("could not read the mounts: {error}")))?;
        let unused =
            state.entries.iter().filter(|(key, entry)| entry.held == 0 && !entry.coming && !in_use.contains(*key));
        let Some(key) = unused.min_by_key(|(_, entry)| entry.used).map(|(key, _)| key.clone()) else {
            return Ok(None);
        };
        let (from, to) = (self.folder(&key), self.root.join(TRASH).join(&key));
        // What is left there could not be removed when it was thrown away.
        remove(&to)?;
        match fs::rename(&from, &to) {
            // Somebody may have tidied up the disk.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            moved => moved.map_err(|error| Failure::io("move", &from, &error))?,
        }
        state.entries.remove(&key);
        tracing::info!(key, "removed from the cache: nobody uses it, and its room is needed");
        Ok(Some(to))
    }

    /// So that another process knows it too. No harm is done where that fails.
    fn note_use(&self, key: &str, now: SystemTime) {
        if let Err(error) = File::open(self.folder(key)).and_then(|folder| folder.set_modified(now)) {
            tracing::debug!(key, %error, "could not note when it was used");
        }
    }
}

/// A download that ends, in whichever way.
struct Ended<'a> {
    inner: &'a Inner,
    key: &'a str,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.inner.lock().downloads.remove(self.key);
    }
}

fn entries_of(folder: &Path) -> Result<Vec<(String, PathBuf)>, Failure> {
    let failed = |error| Failure::io("read", folder, &error);
    let entries = fs::read_dir(folder).map_err(failed)?;
    let entry = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.map_err(failed)?;
        Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()))
    };
    entries.map(entry).collect()
}

/// Bytes of an artifact's folder, and when it was last used; nothing where the artifact is not whole.
fn size_of_whole(folder: &Path) -> Option<(u64, SystemTime)> {
    let object = fs::read_dir(folder.join(OBJECTS)).ok()?.flatten().next()?.path();
    if !object.join(MANIFEST_FILE).is_file() {
        return None;
    }
    Some((bytes_below(&object), fs::metadata(folder).and_then(|metadata| metadata.modified()).ok()?))
}

fn bytes_below(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.map(size).sum()
}

/// Removes a folder so that a part of it is never taken for the whole.
fn discard(folder: &Path, trash: &Path) -> Result<(), Failure> {
    remove(trash)?;
    match fs::rename(folder, trash) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Failure::io("move", folder, &error)),
        Ok(()) => remove(trash),
    }
}

/// Removes a folder, if it is there.
fn remove(folder: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(|error| Failure::io("remove", folder, &error)),
    }
}

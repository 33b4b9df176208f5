//! Files and folders that are either whole or not there, also after a crash or on a full disk.
//!
//! Everything is written in a temporary place of the same file system, flushed to the disk, then renamed: a rename is
//! the one change that a file system makes at once. These calls block; use them off the async threads.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use crate::ArtifactError;
use crate::path::join;

/// Name of the folder, beside the folders that [`Dir`] commits, in which they are prepared. Skip it when listing.
pub const TEMPORARY: &str = ".tmp";

/// How the names of files begin that [`write`] has not finished.
const PARTIAL: &str = ".partial-";
/// A file that was not finished for this long never will be: its process is dead.
const ABANDONED: Duration = Duration::from_hours(1);

/// Held while temporary folders are made and swept, so that a sweep never meets one that is not locked yet.
const SWEEP_LOCK: &str = ".lock";
/// In a temporary folder: locked as long as its owner lives.
const OWNER_LOCK: &str = "lock";
/// In a temporary folder: what will be committed.
const CONTENT: &str = "content";

/// Writes `bytes` to the file at `path`, replacing what was there, or leaves it as it was. Creates missing folders.
///
/// # Errors
/// [`ArtifactError::NoSpace`] when the disk is full, else [`ArtifactError::Io`].
///
/// ```
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("state/job.json");
/// sensorium_artifact::atomic::write(&path, b"{}")?;
/// assert_eq!(std::fs::read(&path)?, b"{}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<(), ArtifactError> {
    let path = path.as_ref();
    let failed = |source| ArtifactError::io("write", path, source);
    // `parent` is empty for a bare file name and absent for `/`, which the rename below refuses.
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    create_folder(folder)?;
    let mut file =
        tempfile::Builder::new().prefix(PARTIAL).permissions(readable()).tempfile_in(folder).map_err(failed)?;
    file.write_all(bytes.as_ref()).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    sync(folder)
}

/// Removes what killed processes left in `folder` in the middle of a [`write`], an hour ago or more. Such files are in
/// nobody's way, so what fails is logged and tried again by the next sweep.
pub fn sweep(folder: impl AsRef<Path>) {
    sweep_where(folder.as_ref(), |path| {
        let is_partial = path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(PARTIAL));
        is_partial && age(path).is_some_and(|age| age >= ABANDONED)
    });
}

/// Removes the files in `folder` that nobody has locked: those of killed processes. One that was made a moment ago may be about to be.
pub(crate) fn sweep_unlocked(folder: &Path) {
    const NEW: Duration = Duration::from_secs(10);
    sweep_where(folder, |path| {
        age(path).is_some_and(|age| age >= NEW) && File::open(path).is_ok_and(|file| file.try_lock().is_ok())
    });
}

fn age(path: &Path) -> Option<Duration> {
    fs::metadata(path).ok()?.modified().ok()?.elapsed().ok()
}

fn sweep_where(folder: &Path, is_abandoned: impl Fn(&Path) -> bool) {
    let paths = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in paths.filter(|path| is_abandoned(path)) {
        match fs::remove_file(&path) {
            Ok(()) => tracing::info!(file = %path.display(), "removed what a process left half-written when it died"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // another sweep was faster
            Err(error) => tracing::warn!(file = %path.display(), %error, "could not remove what a dead process left"),
        }
    }
}

/// A folder that appears under its name with all its files, or not at all: for checkpoints, for example.
///
/// It is prepared in `PARENT/.tmp`. Dropping it uncommitted removes it; what a killed process left there is removed
/// when the next `Dir` is made in the same place.
///
/// ```
/// use sensorium_artifact::atomic::Dir;
///
/// let checkpoints = tempfile::tempdir()?;
/// let dir = Dir::create(checkpoints.path(), "step-100")?;
/// std::fs::write(dir.file("rank-0/weights.bin")?, [1, 2, 3])?;
/// let path = dir.commit()?;
/// assert_eq!(std::fs::read(path.join("rank-0/weights.bin"))?, [1, 2, 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Dir {
    scratch: Scratch,
    target: PathBuf,
}

impl Dir {
    /// Prepares the folder `name` of `parent`, which is created when missing.
    ///
    /// # Errors
    /// [`ArtifactError::InvalidPath`] for a `name` that is not a plain folder name, [`ArtifactError::AlreadyExists`]
    /// when it is there already, [`ArtifactError::NoSpace`], [`ArtifactError::Io`].
    pub fn create(parent: impl AsRef<Path>, name: &str) -> Result<Self, ArtifactError> {
        let target = join(parent.as_ref(), name)?;
        if name.contains('/') {
            return Err(ArtifactError::InvalidPath { path: name.to_owned(), reason: "it must be one folder name" });
        }
        if target.exists() {
            return Err(ArtifactError::AlreadyExists { path: target });
        }
        let scratch = Scratch::shared(&parent.as_ref().join(TEMPORARY))?;
        Ok(Self { scratch, target })
    }

    /// The temporary folder; everything under it becomes part of the committed one.
    pub fn path(&self) -> &Path {
        self.scratch.content()
    }

    /// Where to write the file that will be `path` of the committed folder. Creates the folders on the way.
    ///
    /// # Errors
    /// [`ArtifactError::InvalidPath`] when `path` is not `/`-separated, relative and portable.
    pub fn file(&self, path: &str) -> Result<PathBuf, ArtifactError> {
        self.scratch.file(path)
    }

    /// Flushes everything to the disk and gives the folder its name, which is returned as a path.
    ///
    /// # Errors
    /// [`ArtifactError::AlreadyExists`] when another process was first; the other errors of the file system. The
    /// temporary folder is removed in any case.
    pub fn commit(self) -> Result<PathBuf, ArtifactError> {
        let Self { scratch, target } = self;
        sync_tree(scratch.content())?;
        match scratch.publish(&target)? {
            Published::New => Ok(target),
            Published::Exists(_) => Err(ArtifactError::AlreadyExists { path: target }),
        }
    }
}

/// Whether [`Scratch::publish`] was the one that created its target.
#[must_use]
pub(crate) enum Published {
    New,
    Exists(Scratch),
}

/// A temporary folder that dies with its owner. On disk `ROOT/XXXX/{lock,content}`: the lock tells a sweep, also one in
/// another container on the same volume, that the owner lives. A process id would not.
#[derive(Debug)]
pub(crate) struct Scratch {
    // Declared before the folder and so closed first: a network file system keeps folders with open files.
    _lock: Option<File>,
    folder: TempDir,
    content: PathBuf,
}

impl Scratch {
    /// A folder in `root`, which other processes use for the same purpose. Sweeps what dead ones left.
    pub(crate) fn shared(root: &Path) -> Result<Self, ArtifactError> {
        create_folder(root)?;
        let sweep = open_lock(&root.join(SWEEP_LOCK))?;
        sweep.lock().map_err(|source| ArtifactError::io("lock", root, source))?;
        sweep_dead(root)?;
        let folder = tempfile::Builder::new().prefix("draft-").tempdir_in(root);
        let folder = folder.map_err(|source| ArtifactError::io("create a folder in", root, source))?;
        let path = folder.path().join(OWNER_LOCK);
        let lock = open_lock(&path)?;
        lock.lock().map_err(|source| ArtifactError::io("lock", &path, source))?;
        Self::new(folder, Some(lock))
    }

    /// A folder in the system's temporary folder, for a store that is not on this machine.
    pub(crate) fn private() -> Result<Self, ArtifactError> {
        let folder =
            TempDir::new().map_err(|source| ArtifactError::io("create a folder in", std::env::temp_dir(), source))?;
        Self::new(folder, None)
    }

    fn new(folder: TempDir, lock: Option<File>) -> Result<Self, ArtifactError> {
        let content = folder.path().join(CONTENT);
        // Not by TempDir: the committed folder must have ordinary permissions, TempDir makes private ones.
        fs::create_dir(&content).map_err(|source| ArtifactError::io("create", &content, source))?;
        Ok(Self { _lock: lock, folder, content })
    }

    pub(crate) fn content(&self) -> &Path {
        &self.content
    }

    /// `path` inside the content, checked, with its folders created.
    pub(crate) fn file(&self, path: &str) -> Result<PathBuf, ArtifactError> {
        let file = join(&self.content, path)?;
        if let Some(folder) = file.parent() {
            create_folder(folder)?;
        }
        Ok(file)
    }

    /// Renames the content to `target`, unless something is there; flushes the rename to the disk.
    pub(crate) fn publish(self, target: &Path) -> Result<Published, ArtifactError> {
        match fs::rename(&self.content, target) {
            Ok(()) => {}
            // A folder replaces an empty folder only, so that nobody's files are lost in a race.
            Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {
                return Ok(Published::Exists(self));
            }
            Err(error) => return Err(ArtifactError::io("rename a finished folder to", target, error)),
        }
        if let Some(parent) = target.parent() {
            sync(parent)?;
        }
        Ok(Published::New)
    }

    /// Moves `target` into this folder, so that it disappears at once and is deleted with the rest.
    pub(crate) fn take_away(&self, target: &Path) -> Result<(), ArtifactError> {
        fs::rename(target, self.folder.path().join("removed"))
            .map_err(|source| ArtifactError::io("remove", target, source))
    }
}

/// Removes the folders in `root` whose owners are gone. The caller holds the sweep lock.
fn sweep_dead(root: &Path) -> Result<(), ArtifactError> {
    let failed = |source| ArtifactError::io("read", root, source);
    for entry in fs::read_dir(root).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if !path.is_dir() {
            continue;
        }
        match File::options().write(true).open(path.join(OWNER_LOCK)).map(|lock| lock.try_lock()) {
            Ok(Err(TryLockError::WouldBlock)) => continue,
            // Unlocked, or no lock file because its owner died before it made one.
            Ok(Ok(())) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(Err(TryLockError::Error(source))) | Err(source) => return Err(ArtifactError::io("lock", path, source)),
        }
        match fs::remove_dir_all(&path) {
            Ok(()) => tracing::info!(folder = %path.display(), "removed what a process left half-written when it died"),
            // Its owner was just leaving and removed it itself.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Rubbish in the way of nobody: the next sweep tries again.
            Err(error) => tracing::warn!(folder = %path.display(), %error, "could not remove what a dead process left"),
        }
    }
    Ok(())
}

fn open_lock(path: &Path) -> Result<File, ArtifactError> {
    // Opened for writing: network file systems lock such files only.
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(|source| ArtifactError::io("open", path, source))
}

pub(crate) fn create_folder(path: &Path) -> Result<(), ArtifactError> {
    fs::create_dir_all(path).map_err(|source| ArtifactError::io("create", path, source))
}

/// Flushes a file, or a folder's list of names: without it a rename may not survive a power failure.
fn sync(path: &Path) -> Result<(), ArtifactError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|source| ArtifactError::io("flush", path, source))
}

/// Flushes every file and folder under `path`.
pub(crate) fn sync_tree(path: &Path) -> Result<(), ArtifactError> {
    for entry in fs::read_dir(path).map_err(|source| ArtifactError::io("read", path, source))? {
        let entry = entry.map_err(|source| ArtifactError::io("read", path, source))?;
        let kind = entry.file_type().map_err(|source| ArtifactError::io("read", entry.path(), source))?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            sync(&entry.path())?;
        }
    }
    sync(path)
}

/// What an ordinary new file gets, less the umask. Temporary files are private unless told otherwise.
fn readable() -> fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    fs::Permissions::from_mode(0o666)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_write_replaces_the_file_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write(&path, b"first").unwrap();
        write(&path, b"2").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"2");
        assert_eq!(names(folder.path()), ["a.json"]);
    }

    #[test]
    fn a_written_file_is_readable_for_others_as_an_ordinary_new_file_is() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |name| fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
        write(folder.path().join("ours"), b"x").unwrap();
        fs::write(folder.path().join("ordinary"), b"x").unwrap();
        assert_eq!(mode("ours"), mode("ordinary"));
    }

    #[test]
    fn a_sweep_takes_partial_files_that_are_an_hour_old_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let aged = |name: &str, age| {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - age).unwrap();
        };
        aged(".partial-dead", ABANDONED * 2);
        aged(".partial-living", Duration::ZERO);
        aged("a.json", ABANDONED * 2);
        sweep(folder.path());
        assert_eq!(names(folder.path()), [".partial-living", "a.json"]);
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let dropped = Dir::create(parent.path(), "step-1").unwrap();
        fs::write(dropped.file("a/b.bin").unwrap(), b"half").unwrap();
        drop(dropped);
        assert!(!parent.path().join("step-1").exists());

        let dir = Dir::create(parent.path(), "step-1").unwrap();
        fs::write(dir.file("a/b.bin").unwrap(), b"whole").unwrap();
        assert!(!parent.path().join("step-1").exists());
        let path = dir.commit().unwrap();
        assert_eq!(path, parent.path().join("step-1"));
        assert_eq!(fs::read(path.join("a/b.bin")).unwrap(), b"whole");
        assert_eq!(names(&parent.path().join(TEMPORARY)), [SWEEP_LOCK]);
    }

    #[test]
    fn a_folder_that_is_there_is_never_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let (first, second) =
            (Dir::create(parent.path(), "step-1").unwrap(), Dir::create(parent.path(), "step-1").unwrap());
        fs::write(first.file("winner").unwrap(), b"").unwrap();
        first.commit().unwrap();
        assert!(matches!(second.commit().unwrap_err(), ArtifactError::AlreadyExists { .. }));
        assert!(matches!(Dir::create(parent.path(), "step-1").unwrap_err(), ArtifactError::AlreadyExists { .. }));
        assert_eq!(names(&parent.path().join("step-1")), ["winner"]);
    }

    #[test]
    fn a_folder_name_with_a_separator_is_refused() {
        for bad in ["a/b", "..", "/a", "", ".hidden"] {
            let error = Dir::create("/nowhere", bad).unwrap_err();
            assert!(matches!(error, ArtifactError::InvalidPath { .. }), "{error}");
        }
    }

    #[test]
    fn a_sweep_spares_the_living_and_takes_the_dead() {
        let root = tempfile::tempdir().unwrap();
        let living = Scratch::shared(root.path()).unwrap();
        // What a killed process leaves: folders with an unlocked lock, and without one.
        for dead in ["with-lock", "without-lock"] {
            fs::create_dir_all(root.path().join(dead).join(CONTENT)).unwrap();
        }
        fs::write(root.path().join("with-lock").join(OWNER_LOCK), b"").unwrap();
        let other = Scratch::shared(root.path()).unwrap();
        assert!(living.content().exists() && other.content().exists());
        assert_eq!(names(root.path()).len(), 3);
    }
}

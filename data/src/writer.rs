//! Writing a data set.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::index::{INDEX_FILE, Index, SCHEMA_VERSION, SampleEntry, ShardEntry, digest};
use crate::sample::{Annotation, Sample, image_extension, key_problem};
use crate::{DataError, Dataset, durable};

/// A tar file is made of blocks of this many bytes.
const BLOCK: u64 = 512;

/// How a data set is written.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// Samples per shard; 0 counts as 1. More shards than readers spread better, larger shards list faster.
    pub samples_per_shard: usize,
    /// See [`Index::answers`].
    pub answers: Vec<String>,
    /// See [`Index::source`].
    pub source: Option<String>,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self { samples_per_shard: 1000, answers: Vec::new(), source: None }
    }
}

/// Writes a data set that appears whole or not at all.
///
/// The shards grow in `.NAME.partial` beside the target, which [`ShardWriter::finish`] renames. Dropping the writer
/// removes it; what a killed process left there, the next writer of the same target removes. The same samples and options
/// give the same bytes.
#[derive(Debug)]
pub struct ShardWriter {
    target: PathBuf,
    partial: Partial,
    options: WriterOptions,
    index: Index,
    keys: BTreeSet<String>,
    shard: Option<Shard>,
}

impl ShardWriter {
    /// Prepares to write the data set `target`; an earlier one there stays until [`ShardWriter::finish`] replaces it.
    ///
    /// # Errors
    /// [`DataError::Busy`] when another process writes the same target, [`DataError::Occupied`] when there is something
    /// else than a data set, [`DataError::NoSpace`], [`DataError::Io`].
    pub fn create(target: &Path, options: WriterOptions) -> Result<Self, DataError> {
        refuse_other_folders(target)?;
        let partial = Partial::create(target)?;
        let (answers, source) = (options.answers.clone(), options.source.clone());
        let index =
            Index { schema_version: SCHEMA_VERSION, answers, source, questions: 0, captions: 0, shards: Vec::new() };
        Ok(Self { target: target.to_owned(), partial, options, index, keys: BTreeSet::new(), shard: None })
    }

    /// Adds a sample after the others.
    ///
    /// # Errors
    /// [`DataError::InvalidSample`] for a key that is not valid or was used before, or an image that is not PNG, JPEG or
    /// WebP; [`DataError::NoSpace`], [`DataError::Io`].
    pub fn append(&mut self, sample: &Sample) -> Result<(), DataError> {
        let refused = |reason: &str| DataError::InvalidSample { key: sample.key.clone(), reason: reason.to_owned() };
        if let Some(problem) = key_problem(&sample.key) {
            return Err(refused(problem));
        }
        let extension = image_extension(&sample.image).ok_or_else(|| refused("its image is not PNG, JPEG or WebP"))?;
        if !self.keys.insert(sample.key.clone()) {
            return Err(refused("another sample has the same key"));
        }
        let annotation = Annotation { questions: sample.questions.clone(), caption: sample.caption.clone() };
        let annotation = serde_json::to_vec(&annotation).map_err(|error| refused(&error.to_string()))?;

        let mut shard = match self.shard.take() {
            Some(shard) => shard,
            None => Shard::create(&self.partial.folder, self.index.shards.len())?,
        };
        shard.append(&sample.key, extension, &sample.image, &annotation)?;
        self.index.questions += sample.questions.len() as u64;
        self.index.captions += u64::from(sample.caption.is_some());
        if shard.samples.len() >= self.options.samples_per_shard {
            self.index.shards.push(shard.finish()?);
        } else {
            self.shard = Some(shard);
        }
        Ok(())
    }

    /// Flushes everything to the disk, gives the data set its name and opens it.
    ///
    /// # Errors
    /// [`DataError::NoSpace`], [`DataError::Io`]; the target is then as it was before.
    pub fn finish(mut self) -> Result<Dataset, DataError> {
        if let Some(shard) = self.shard.take() {
            self.index.shards.push(shard.finish()?);
        }
        let path = self.partial.folder.join(INDEX_FILE);
        let invalid =
            |error: serde_json::Error| DataError::InvalidIndex { path: path.clone(), reason: error.to_string() };
        let bytes = serde_json::to_vec(&self.index).map_err(invalid)?;
        durable::write(&path, &bytes)?;
        self.partial.publish(&self.target)?;
        Dataset::open(&self.target)
    }
}

/// A shard that is being written.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: String,
    out: BufWriter<File>,
    hasher: Sha256,
    bytes: u64,
    samples: Vec<SampleEntry>,
}

impl Shard {
    fn create(folder: &Path, number: usize) -> Result<Self, DataError> {
        let file = format!("shard-{number:05}.tar");
        let path = folder.join(&file);
        let out = File::create(&path).map_err(|source| DataError::io("create", &path, source))?;
        Ok(Self { path, file, out: BufWriter::new(out), hasher: Sha256::new(), bytes: 0, samples: Vec::new() })
    }

    fn append(&mut self, key: &str, extension: &str, image: &[u8], annotation: &[u8]) -> Result<(), DataError> {
        let image_offset = self.member(&format!("{key}.{extension}"), image)?;
        let annotation_offset = self.member(&format!("{key}.json"), annotation)?;
        let mut hasher = Sha256::new();
        hasher.update(image);
        hasher.update(annotation);
        self.samples.push(SampleEntry {
            key: key.to_owned(),
            image_offset,
            image_bytes: image.len() as u64,
            annotation_offset,
            annotation_bytes: annotation.len() as u64,
            digest: digest(hasher),
        });
        Ok(())
    }

    /// Writes one file of the archive; where its content begins.
    fn member(&mut self, name: &str, content: &[u8]) -> Result<u64, DataError> {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).map_err(|source| DataError::io("name a file in", &self.path, source))?;
        header.set_size(content.len() as u64);
        // No owner and no time: the same samples make the same archive.
        header.set_mode(0o644);
        header.set_cksum();
        self.write(header.as_bytes())?;
        let offset = self.bytes;
        self.write(content)?;
        self.pad(self.bytes.next_multiple_of(BLOCK))?;
        Ok(offset)
    }

    fn finish(mut self) -> Result<ShardEntry, DataError> {
        // The end of an archive is two empty blocks.
        self.pad(self.bytes + 2 * BLOCK)?;
        let Self { path, file, out, hasher, bytes, samples } = self;
        let flushed = out.into_inner().map_err(io::IntoInnerError::into_error).and_then(|out| out.sync_all());
        flushed.map_err(|source| DataError::io("write", path, source))?;
        Ok(ShardEntry { file, bytes, digest: digest(hasher), samples })
    }

    fn pad(&mut self, end: u64) -> Result<(), DataError> {
        self.write(&[0; 2 * BLOCK as usize][..(end - self.bytes) as usize])
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.out.write_all(bytes).map_err(|source| DataError::io("write", &self.path, source))?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// The folder `.NAME.partial` and the lock that makes it ours.
#[derive(Debug)]
struct Partial {
    folder: PathBuf,
    _lock: File,
}

impl Partial {
    fn create(target: &Path) -> Result<Self, DataError> {
        let parent = parent(target);
        durable::create_folder(parent)?;
        let lock_path = hidden(target, "lock");
        let failed = |source| DataError::io("lock", &lock_path, source);
        // Opened for writing: network file systems lock such files only. The empty file stays, since removing a lock that
        // another process may have opened already would give two owners.
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DataError::Busy { path: target.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let folder = hidden(target, "partial");
        durable::remove_folder(&folder)?;
        durable::create_folder(&folder)?;
        Ok(Self { folder, _lock: lock })
    }

    /// Makes this folder the target, in place of an earlier data set.
    fn publish(&self, target: &Path) -> Result<(), DataError> {
        durable::sync_folder(&self.folder)?;
        let replaced = hidden(target, "replaced");
        durable::remove_folder(&replaced)?;
        refuse_other_folders(target)?;
        if target.exists() {
            durable::rename(target, &replaced)?;
        }
        // A crash here leaves no data set, which the next import repairs; never half of one.
        durable::rename(&self.folder, target)?;
        durable::sync_folder(parent(target))?;
        durable::remove_folder(&replaced)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After `publish` there is nothing to remove. Else the next writer removes what cannot be removed now.
        if let Err(error) = durable::remove_folder(&self.folder) {
            tracing::warn!(folder = %self.folder.display(), %error, "could not remove what was half-written");
        }
    }
}

fn refuse_other_folders(target: &Path) -> Result<(), DataError> {
    let occupied = || DataError::Occupied { path: target.to_owned() };
    match fs::read_dir(target) {
        Ok(mut entries) => match entries.next() {
            Some(_) if !target.join(INDEX_FILE).exists() => Err(occupied()),
            _ => Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Err(occupied()),
        Err(source) => Err(DataError::io("read", target, source)),
    }
}

fn parent(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// `.NAME.SUFFIX` beside the target.
fn hidden(target: &Path, suffix: &str) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    parent(target).join(format!(".{name}.{suffix}"))
}

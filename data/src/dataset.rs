//! Reading a data set.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::index::{INDEX_FILE, Index, SampleEntry, digest};
use crate::sample::{Annotation, Sample};
use crate::{DataError, QuestionAnswer};

/// An open data set. Samples are numbered in the order of the index; all reads take `&self` and share nothing, so any
/// number of threads may read at once.
#[derive(Debug)]
pub struct Dataset {
    folder: PathBuf,
    index: Index,
    digest: String,
    shards: Vec<File>,
    /// For each sample its shard and its place in it.
    places: Vec<(usize, usize)>,
}

impl Dataset {
    /// Opens the data set in `folder` and checks that every shard is there and has the size that the index says. The
    /// content is checked when it is read, or all at once by [`Dataset::verify`].
    ///
    /// # Errors
    /// [`DataError::NotADataset`], [`DataError::InvalidIndex`], [`DataError::UnknownSchema`], [`DataError::ShardSize`],
    /// [`DataError::Io`].
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(INDEX_FILE);
        let bytes = fs::read(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => DataError::NotADataset { folder: folder.to_owned() },
            _ => DataError::io("read", &path, source),
        })?;
        let index = Index::parse(&path, &bytes)?;
        let mut shards = Vec::new();
        let mut places = Vec::new();
        for (number, entry) in index.shards.iter().enumerate() {
            let path = folder.join(&entry.file);
            let failed = |source| DataError::io("open", &path, source);
            let shard = File::open(&path).map_err(failed)?;
            let found = shard.metadata().map_err(failed)?.len();
            if found != entry.bytes {
                return Err(DataError::ShardSize { path, expected: entry.bytes, found });
            }
            shards.push(shard);
            places.extend((0..entry.samples.len()).map(|place| (number, place)));
        }
        let mut hasher = Sha256::new();
        hasher.update(&bytes);
        Ok(Self { folder: folder.to_owned(), index, digest: digest(hasher), shards, places })
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Number of questions in all samples.
    pub fn question_count(&self) -> u64 {
        self.index.questions
    }

    /// The possible answers in the order of the classes; empty when they are open.
    pub fn answers(&self) -> &[String] {
        &self.index.answers
    }

    /// The index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The folder it was opened from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Digest of the index, and through it of all samples: `sha256:` and 64 hexadecimal digits.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Reads sample `number`, in `0..len()`, and checks its digest. One read of the file, a few microseconds when it is
    /// cached.
    ///
    /// # Errors
    /// [`DataError::OutOfRange`]; [`DataError::CorruptSample`] with shard and key; [`DataError::Io`].
    pub fn sample(&self, number: usize) -> Result<Sample, DataError> {
        let Some(&(shard, place)) = self.places.get(number) else {
            return Err(DataError::OutOfRange { index: number, len: self.len() });
        };
        let entry = &self.index.shards[shard].samples[place];
        let path = self.folder.join(&self.index.shards[shard].file);
        let mut bytes = vec![0; span(entry, &path)?];
        match self.shards[shard].read_exact_at(&mut bytes, entry.image_offset) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(corrupt(entry, path, "the shard ends before it does"));
            }
            Err(source) => return Err(DataError::io("read", path, source)),
        }
        // The order of the offsets was checked when the index was parsed, and `bytes` ends where the annotation does.
        let annotation = bytes.split_off((entry.annotation_offset - entry.image_offset) as usize);
        bytes.truncate(entry.image_bytes as usize);
        let mut hasher = Sha256::new();
        hasher.update(&bytes);
        hasher.update(&annotation);
        let found = digest(hasher);
        if found != entry.digest {
            return Err(corrupt(entry, path, &format!("it has digest {found}, the index says {}", entry.digest)));
        }
        let Annotation { questions, caption } = serde_json::from_slice(&annotation)
            .map_err(|error| corrupt(entry, path, &format!("its annotation is not valid: {error}")))?;
        Ok(Sample { key: entry.key.clone(), image: bytes, questions, caption })
    }

    /// All samples in order.
    pub fn samples(&self) -> impl Iterator<Item = Result<Sample, DataError>> {
        (0..self.len()).map(|number| self.sample(number))
    }

    /// All questions with their answers, in order of the samples: what a vocabulary is built from. Reads the data set.
    pub fn questions(&self) -> impl Iterator<Item = Result<QuestionAnswer, DataError>> {
        self.samples().flat_map(|sample| match sample {
            Ok(sample) => sample.questions.into_iter().map(Ok).collect::<Vec<_>>(),
            Err(error) => vec![Err(error)],
        })
    }

    /// Reads every shard and compares it with its digest.
    ///
    /// # Errors
    /// [`DataError::ShardDigest`] for the first one that does not match.
    pub fn verify(&self) -> Result<(), DataError> {
        for entry in &self.index.shards {
            let path = self.folder.join(&entry.file);
            let found = file_digest(&path).map_err(|source| DataError::io("read", &path, source))?;
            if found != entry.digest {
                return Err(DataError::ShardDigest { path, expected: entry.digest.clone(), found });
            }
        }
        Ok(())
    }
}

/// Bytes from the beginning of the image to the end of the annotation.
fn span(entry: &SampleEntry, path: &Path) -> Result<usize, DataError> {
    let bytes = entry.end().and_then(|end| usize::try_from(end - entry.image_offset).ok());
    bytes.ok_or_else(|| corrupt(entry, path.to_owned(), "its place in the index is not valid"))
}

fn corrupt(entry: &SampleEntry, shard: PathBuf, reason: &str) -> DataError {
    DataError::CorruptSample { key: entry.key.clone(), shard, reason: reason.to_owned() }
}

pub(crate) fn file_digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(digest(hasher)),
            read => hasher.update(&buffer[..read]),
        }
    }
}

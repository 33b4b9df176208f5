//! Training data: tar shards that any WebDataset reader reads, with an index for random access.
//!
//! A data set is a folder of `shard-00000.tar`, `shard-00001.tar`, ... and an `index.json`. A sample is two files of a
//! shard, `KEY.png` (or `.jpg`, `.webp`) and `KEY.json` with its questions, answers and caption. The index has the place, the
//! size and the digest of each, so that [`Dataset::sample`] is one read at a known offset, from any thread, and a
//! damaged sample is found when it is read and named.
//!
//! What a step of training sees is a pure function of the seed and the step: [`Sampler`] gives the samples, [`choose`]
//! their questions, [`flip`] their augmentation. None of them depends on how many ranks share the batch or on what ran
//! before, so a resumed run and a run on more machines see the same data; the step number is the whole cursor.
//!
//! ```
//! use sensorium_data::{Dataset, QuestionAnswer, Sample, Sampler, ShardWriter, WriterOptions};
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("train");
//! let mut writer = ShardWriter::create(&path, WriterOptions::default())?;
//! for key in ["a", "b", "c"] {
//!     let questions = vec![QuestionAnswer { question: "what is it?".into(), answer: key.into() }];
//!     let image = b"\x89PNG\r\n\x1a\n...".to_vec();
//!     writer.append(&Sample { key: key.into(), image, questions, caption: None })?;
//! }
//! writer.finish()?;
//!
//! let dataset = Dataset::open(&path)?;
//! let sampler = Sampler::new(dataset.len(), 42, 2)?;
//! let batch = sampler.indices(0);
//! assert_eq!(dataset.sample(batch[0])?.questions.len(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What this is not: a decoder. Images stay encoded; `sensorium-modality` turns them into tensors, the same way for
//! training and serving. Given up: reading shards from a stream. They are on a file system, and random access is what
//! makes the order a pure function.

mod dataset;
mod durable;
mod error;
pub mod import;
mod index;
mod sample;
mod sampler;
mod writer;

pub use dataset::Dataset;
pub use error::DataError;
pub use index::{INDEX_FILE, Index, SampleEntry, ShardEntry};
pub use sample::{QuestionAnswer, Sample};
pub use sampler::{Sampler, choose, flip};
pub use writer::{ShardWriter, WriterOptions};

//! Batches: what the data set holds, as the tensors that a step needs, prepared one step ahead on a thread of its own.
//!
//! Which samples, questions and flips make a step is a function of the seed and the step alone. Each rank takes its
//! contiguous slice, so one worker and many see the same global batch, and a resumed run sees what it would have seen.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use sensorium_data::{DataError, Dataset, Sample, Sampler, choose, flip};
use sensorium_modality::{
    ImageLimits, ImageProcessor, PADDING_ID, RgbImage, TextProcessor, UNKNOWN_ID, decode_image, flip_horizontal,
};
use tch::Tensor;

use crate::error::TrainError;
use crate::stop::Stop;

/// Batches that are ready before they are asked for: one in work, one waiting.
const PREFETCH: usize = 1;

/// Memory for samples that are decoded and tokenised, so that later epochs find them so. Of a data set that needs more,
/// the samples that come first stay: each epoch has another order, so any part of it serves as well.
const CACHE_BYTES: usize = 256 << 20;

/// This rank's share of one step.
#[derive(Debug)]
pub struct Batch {
    /// `[B, 3, S, S]`, f32; in memory the three channels come last.
    pub pixels: Tensor,
    /// Questions, when there is such a task.
    pub questions: Option<Questions>,
    /// Captions, when there is a contrastive task.
    pub captions: Option<Captions>,
}

/// Captions of the images of a batch, row by row. An image without one keeps its row, so that every rank has as many.
#[derive(Debug)]
pub struct Captions {
    /// `[B, L]`, i64; one unknown word where there is no caption.
    pub ids: Tensor,
    /// Whether the row is a caption, `[B]`, bool.
    pub present: Tensor,
}

/// Questions about the images of a batch.
#[derive(Debug)]
pub struct Questions {
    /// `[N, L]`, i64.
    pub ids: Tensor,
    /// The image that each question is about, `[N]`, i64.
    pub image_index: Tensor,
    /// The right answer, `[N]`, i64.
    pub targets: Tensor,
}

/// Turns samples into tensors.
#[derive(Debug)]
pub struct Preparation {
    /// Images.
    pub image: ImageProcessor,
    /// Questions and captions.
    pub text: TextProcessor,
    /// Class of each answer.
    pub answers: HashMap<String, i64>,
}

impl Preparation {
    /// One image, decoded and of the network's size.
    pub fn image(&self, sample: &Sample) -> Result<RgbImage, TrainError> {
        let refused = |reason: String| TrainError::Sample { key: sample.key.clone(), reason };
        let image = decode_image(&sample.image, &ImageLimits::default()).map_err(|e| refused(e.to_string()))?;
        Ok(self.image.resize(image))
    }

    /// Token ids of a text, padded to the model's length.
    pub fn ids(&self, sample: &Sample, text: &str) -> Result<Vec<i64>, TrainError> {
        let refused = |reason: String| TrainError::Sample { key: sample.key.clone(), reason };
        let row = self.text.encode_row(text).map_err(|e| refused(format!("\"{text}\": {e}")))?;
        Ok(row.as_slice::<i64>().map_err(|e| refused(e.to_string()))?.to_vec())
    }

    /// The row that stands for a missing caption: not all padding, which no encoder can make anything of.
    fn no_caption(&self) -> Vec<i64> {
        let mut row = vec![PADDING_ID; self.text.config().max_length];
        row[0] = UNKNOWN_ID;
        row
    }

    /// Looks through the texts of a data set, so that one that fits no row is found before, and not after, hours of training.
    ///
    /// # Errors
    /// [`TrainError::Spec`] about `field`, [`TrainError::Stopped`], or the system's.
    pub fn check(&self, field: &'static str, dataset: &Dataset, captions: bool, stop: &Stop) -> Result<(), TrainError> {
        for sample in dataset.samples() {
            stop.check()?;
            let sample = sample?;
            let questions = sample.questions.iter().map(|pair| &pair.question);
            for text in questions.chain(sample.caption.iter().filter(|_| captions)) {
                self.ids(&sample, text).map_err(|error| TrainError::Spec { field, reason: error.to_string() })?;
            }
        }
        Ok(())
    }

    /// Class of a right answer.
    pub fn target(&self, sample: &Sample, answer: &str) -> Result<i64, TrainError> {
        self.answers.get(answer).copied().ok_or_else(|| TrainError::Sample {
            key: sample.key.clone(),
            reason: format!("answer \"{answer}\" is not among the data set's {} answers", self.answers.len()),
        })
    }

    /// Length of a row of ids.
    pub fn length(&self) -> i64 {
        self.text.config().max_length as i64
    }

    /// Images of the network's size as a tensor `[B, 3, S, S]`, channels last in memory.
    pub fn stack_pixels<'a>(&self, images: impl IntoIterator<Item = &'a RgbImage>) -> Result<Tensor, TrainError> {
        let size = i64::from(self.image.config().size);
        let mut values = Vec::new();
        images.into_iter().for_each(|image| self.image.normalize_interleaved(image, &mut values));
        Ok(Tensor::f_from_slice(&values)?.f_view([-1, size, size, 3])?.f_permute([0, 3, 1, 2])?)
    }

    /// Rows of ids as a tensor `[N, L]`.
    pub fn stack_ids(&self, rows: &[i64]) -> Result<Tensor, TrainError> {
        Ok(Tensor::f_from_slice(rows)?.f_view([-1, self.length()])?)
    }
}

/// What every step's batch is made of.
#[derive(Clone, Debug)]
pub struct BatchPlan {
    /// Decides order, questions and flips.
    pub seed: u64,
    /// Images per step over all ranks.
    pub images: usize,
    /// Questions about each; none without a VQA task.
    pub questions_per_image: Option<usize>,
    /// Whether captions are wanted.
    pub captions: bool,
    /// Whether half of the images are mirrored.
    pub horizontal_flip: bool,
    /// This rank and the number of ranks that share a batch.
    pub shard: (u32, u32),
}

/// Prepares batches ahead of the steps that need them.
#[derive(Debug)]
pub struct Loader {
    batches: Receiver<Result<Batch, TrainError>>,
}

impl Loader {
    /// Starts to prepare the batches of `steps`, in order. The thread ends with the last, or when the loader is dropped.
    ///
    /// # Errors
    /// A data set without samples.
    pub fn start(
        dataset: Arc<Dataset>,
        preparation: Arc<Preparation>,
        plan: BatchPlan,
        steps: Range<u64>,
    ) -> Result<Self, TrainError> {
        let sampler = Sampler::new(dataset.len(), plan.seed, plan.images)?;
        let (send, batches) = sync_channel(PREFETCH);
        let work = move || {
            let cache = Cache { samples: HashMap::new(), room: CACHE_BYTES };
            let mut maker = BatchMaker { dataset, preparation, plan, sampler, cache };
            for step in steps {
                let batch = maker.batch(step);
                let failed = batch.is_err();
                if send.send(batch).is_err() || failed {
                    return; // nobody waits any more, or nothing sensible can follow
                }
            }
        };
        thread::spawn(work);
        Ok(Self { batches })
    }

    /// The next batch.
    pub fn next(&self) -> Result<Batch, TrainError> {
        self.batches.recv().map_err(|_| TrainError::LoaderGone)?
    }
}

/// What no step changes about a sample.
struct Prepared {
    image: RgbImage,
    /// Token ids and class of each question; empty without a VQA task.
    questions: Vec<(Vec<i64>, i64)>,
    /// Token ids of the caption, if there is one and it is wanted.
    caption: Option<Vec<i64>>,
}

impl Prepared {
    fn new(preparation: &Preparation, plan: &BatchPlan, sample: &Sample) -> Result<Self, TrainError> {
        let mut questions = Vec::new();
        if plan.questions_per_image.is_some() {
            if sample.questions.is_empty() {
                return Err(TrainError::Sample { key: sample.key.clone(), reason: "it has no questions".to_owned() });
            }
            for pair in &sample.questions {
                questions.push((preparation.ids(sample, &pair.question)?, preparation.target(sample, &pair.answer)?));
            }
        }
        let caption = sample.caption.as_ref().filter(|_| plan.captions);
        let caption = caption.map(|caption| preparation.ids(sample, caption)).transpose()?;
        Ok(Self { image: preparation.image(sample)?, questions, caption })
    }

    fn bytes(&self) -> usize {
        let ids: usize = self.questions.iter().map(|(ids, _)| ids.len() + 4).sum();
        let caption = self.caption.as_ref().map_or(0, Vec::len);
        self.image.as_raw().len() + size_of::<i64>() * (ids + caption) + 2 * size_of::<Self>()
    }
}

/// Prepared samples by number.
struct Cache {
    samples: HashMap<usize, Rc<Prepared>>,
    /// Bytes that are left.
    room: usize,
}

/// Where batches are made.
struct BatchMaker {
    dataset: Arc<Dataset>,
    preparation: Arc<Preparation>,
    plan: BatchPlan,
    sampler: Sampler,
    cache: Cache,
}

impl BatchMaker {
    fn sample(&mut self, number: usize) -> Result<Rc<Prepared>, TrainError> {
        if let Some(sample) = self.cache.samples.get(&number) {
            return Ok(sample.clone());
        }
        let sample = Prepared::new(&self.preparation, &self.plan, &self.dataset.sample(number)?)?;
        let sample = Rc::new(sample);
        if let Some(room) = self.cache.room.checked_sub(sample.bytes()) {
            self.cache.room = room;
            self.cache.samples.insert(number, sample.clone());
        }
        Ok(sample)
    }

    fn batch(&mut self, step: u64) -> Result<Batch, TrainError> {
        let (rank, ranks) = self.plan.shard;
        let indices = self.sampler.indices(step);
        let (mut pixels, mut captions, mut present) = (Vec::new(), Vec::new(), Vec::new());
        let (mut ids, mut image_index, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for (row, slot) in self.sampler.slots(rank, ranks).enumerate() {
            let sample = self.sample(indices[slot])?;
            let BatchPlan { seed, questions_per_image, .. } = self.plan;
            let mut image = sample.image.clone();
            if self.plan.horizontal_flip && flip(seed, step, slot as u64) {
                flip_horizontal(&mut image);
            }
            pixels.push(image);
            if let Some(wanted) = questions_per_image {
                for at in choose(seed, step, slot as u64, sample.questions.len(), wanted) {
                    let (question, target) = &sample.questions[at];
                    ids.extend(question);
                    targets.push(*target);
                    image_index.push(row as i64);
                }
            }
            if self.plan.captions {
                present.push(sample.caption.is_some());
                captions.extend(sample.caption.clone().unwrap_or_else(|| self.preparation.no_caption()));
            }
        }
        let preparation = &self.preparation;
        let questions = match self.plan.questions_per_image {
            Some(_) => Some(Questions {
                ids: preparation.stack_ids(&ids)?,
                image_index: Tensor::f_from_slice(&image_index)?,
                targets: Tensor::f_from_slice(&targets)?,
            }),
            None => None,
        };
        let captions = if self.plan.captions {
            Some(Captions { ids: preparation.stack_ids(&captions)?, present: Tensor::f_from_slice(&present)? })
        } else {
            None
        };
        Ok(Batch { pixels: preparation.stack_pixels(&pixels)?, questions, captions })
    }
}

/// Opens a data set and says which field named it when that fails.
pub fn open(field: &'static str, path: &Path) -> Result<Dataset, TrainError> {
    Dataset::open(path).map_err(|error| match error {
        DataError::NotADataset { .. } => {
            let reason = format!("{error}, for example `sensorium data import easy-vqa`");
            TrainError::Spec { field, reason }
        }
        DataError::InvalidIndex { .. } | DataError::UnknownSchema { .. } => {
            TrainError::Spec { field, reason: error.to_string() }
        }
        // A disk that does not answer may do so later.
        error => error.into(),
    })
}

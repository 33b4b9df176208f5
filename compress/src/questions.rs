//! Questions of a data set, spread evenly over its images.

use std::path::Path;

use sensorium_data::{Dataset, QuestionAnswer};

use crate::error::CompressError;

/// One question with its image.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// Encoded.
    pub(crate) image: Vec<u8>,
    pub(crate) question: String,
    pub(crate) answer: String,
}

/// An open data set and how much of it to ask.
pub(crate) struct Questions {
    uri: String,
    dataset: Dataset,
    wanted: Option<usize>,
}

impl Questions {
    /// Opens the data set in `folder`, which the job calls `uri`; `wanted` questions of it, or all.
    pub(crate) fn open(uri: &str, folder: &Path, wanted: Option<u32>) -> Result<Self, CompressError> {
        let dataset = Dataset::open(folder).map_err(|source| CompressError::Data { uri: uri.to_owned(), source })?;
        if dataset.question_count() == 0 {
            return Err(CompressError::NoQuestions { uri: uri.to_owned() });
        }
        Ok(Self { uri: uri.to_owned(), dataset, wanted: wanted.map(|wanted| wanted as usize) })
    }

    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// Digest of the data set's index.
    pub(crate) fn digest(&self) -> &str {
        self.dataset.digest()
    }

    /// How many questions [`Self::iter`] gives, at most.
    pub(crate) fn len(&self) -> usize {
        let all = self.dataset.question_count() as usize;
        self.wanted.map_or(all, |wanted| wanted.min(all))
    }

    /// The questions, in an order that only depends on the data set and on how many are wanted.
    pub(crate) fn iter(&self) -> Box<dyn Iterator<Item = Result<Asked, CompressError>> + '_> {
        let images = self.dataset.len();
        let ask =
            |image: Vec<u8>, asked: QuestionAnswer| Asked { image, question: asked.question, answer: asked.answer };
        match self.wanted {
            None => Box::new((0..images).flat_map(move |image| match self.sample(image) {
                Ok(sample) => {
                    let image = sample.image;
                    sample.questions.into_iter().map(|asked| Ok(ask(image.clone(), asked))).collect::<Vec<_>>()
                }
                Err(error) => vec![Err(error)],
            })),
            Some(wanted) => {
                let (mut draws, mut is_round_empty) = (0..wanted, false);
                Box::new(std::iter::from_fn(move || {
                    for draw in draws.by_ref() {
                        // Fewer than one per image: evenly spaced images. More: several rounds over all images. The question
                        // moves on with the draw, so that all kinds come up.
                        let is_once = wanted <= images;
                        let (image, question) =
                            if is_once { (draw * images / wanted, draw) } else { (draw % images, draw / images) };
                        // Where a whole round brought nothing, no later one does.
                        if !is_once && image == 0 && std::mem::replace(&mut is_round_empty, true) {
                            return None;
                        }
                        let mut sample = match self.sample(image) {
                            Ok(sample) => sample,
                            Err(error) => return Some(Err(error)),
                        };
                        let count = sample.questions.len();
                        if count > 0 && (is_once || question < count) {
                            is_round_empty = false;
                            return Some(Ok(ask(sample.image, sample.questions.swap_remove(question % count))));
                        }
                    }
                    None
                }))
            }
        }
    }

    fn sample(&self, number: usize) -> Result<sensorium_data::Sample, CompressError> {
        self.dataset.sample(number).map_err(|source| CompressError::Data { uri: self.uri.clone(), source })
    }
}

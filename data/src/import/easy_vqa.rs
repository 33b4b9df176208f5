//! easy-VQA: 64x64 images of one coloured shape each, with questions from templates.
//! Source: Victor Zhou, easy-VQA 1.0, MIT licence.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::index::{INDEX_FILE, Index, digest};
use crate::{DataError, Dataset, QuestionAnswer, Sample, ShardWriter, WriterOptions};

const SPLITS: [&str; 2] = ["train", "test"];
const COLOURS: [&str; 8] = ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"];
const SHAPES: [&str; 3] = ["circle", "rectangle", "triangle"];

/// How far an import is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// `train` or `test`.
    pub split: &'static str,
    /// Samples written.
    pub done: usize,
    /// Samples to write.
    pub total: usize,
}

/// What an import gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// One per split, in order.
    pub splits: Vec<SplitSummary>,
}

/// What an import gave for one split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitSummary {
    /// `train` or `test`.
    pub split: &'static str,
    /// Folder of the data set.
    pub folder: PathBuf,
    /// Images.
    pub samples: usize,
    /// Questions on all images.
    pub questions: u64,
    /// Images whose questions tell colour and shape, and which so have a caption.
    pub captions: u64,
    /// Size of the shards in bytes.
    pub bytes: u64,
    /// Whether it was written now; false when it was there already, whole and from the same source.
    pub written: bool,
}

/// Imports the easy-VQA data at `source` (`answers.txt`, and `questions.json` and `images/` in `train/` and `test/`) as the
/// data sets `out/train` and `out/test`.
///
/// A split that is there already, whole and from the same questions, is left alone; one that is damaged is written
/// again. `progress` is called once per sample written.
///
/// # Errors
/// [`DataError::InvalidSource`] when the source is not easy-VQA's data or contradicts itself; the errors of
/// [`ShardWriter`].
pub fn easy_vqa(source: &Path, out: &Path, mut progress: impl FnMut(Progress)) -> Result<Summary, DataError> {
    let answers = read_answers(source)?;
    // All of the source is looked at before anything is written.
    let mut sources = Vec::new();
    for split in SPLITS {
        sources.push(SplitSource::read(source, split, &answers)?);
    }
    let import = |source: SplitSource| {
        let target = out.join(source.split);
        source.import(&target, &answers, &mut progress)
    };
    Ok(Summary { splits: sources.into_iter().map(import).collect::<Result<_, _>>()? })
}

/// What there is to import for one split.
struct SplitSource {
    split: &'static str,
    /// Folder of the images.
    images: PathBuf,
    /// The questions of each image, in order of the images.
    questions: BTreeMap<u64, Vec<QuestionAnswer>>,
    /// Identifies questions and answers.
    fingerprint: String,
}

impl SplitSource {
    fn read(source: &Path, split: &'static str, answers: &[String]) -> Result<Self, DataError> {
        let images = source.join(split).join("images");
        if !images.is_dir() {
            return Err(missing(images));
        }
        let path = source.join(split).join("questions.json");
        let bytes = read_source(&path)?;
        let rows: Vec<(String, String, u64)> = serde_json::from_slice(&bytes)
            .map_err(|error| invalid(&path, &format_args!("expected [[question, answer, image], ...]: {error}")))?;
        let known: BTreeSet<&str> = answers.iter().map(String::as_str).collect();
        let mut questions: BTreeMap<u64, Vec<QuestionAnswer>> = BTreeMap::new();
        for (question, answer, image) in rows {
            if !known.contains(answer.as_str()) {
                let reason =
                    format_args!("`{question}` of image {image} has answer `{answer}`, which answers.txt lacks");
                return Err(invalid(&path, &reason));
            }
            questions.entry(image).or_default().push(QuestionAnswer { question, answer });
        }
        let mut hasher = Sha256::new();
        hasher.update(&bytes);
        hasher.update(answers.join("\n"));
        Ok(Self { split, images, questions, fingerprint: format!("{SOURCE}{}", digest(hasher)) })
    }

    fn import(
        self,
        target: &Path,
        answers: &[String],
        progress: &mut impl FnMut(Progress),
    ) -> Result<SplitSummary, DataError> {
        let Self { split, images, questions, fingerprint } = self;
        if let Some(dataset) = whole(target, &fingerprint)? {
            return Ok(SplitSummary::new(split, &dataset, false));
        }
        let options =
            WriterOptions { answers: answers.to_vec(), source: Some(fingerprint), ..WriterOptions::default() };
        let mut writer = ShardWriter::create(target, options)?;
        let total = questions.len();
        for (done, (image, questions)) in questions.into_iter().enumerate() {
            let path = images.join(format!("{image}.png"));
            let bytes = fs::read(&path).map_err(|source| DataError::io("read", &path, source))?;
            let caption = caption(&questions);
            writer.append(&Sample { key: format!("{image:06}"), image: bytes, questions, caption })?;
            progress(Progress { split, done: done + 1, total });
        }
        Ok(SplitSummary::new(split, &writer.finish()?, true))
    }
}

impl SplitSummary {
    fn new(split: &'static str, dataset: &Dataset, written: bool) -> Self {
        Self {
            split,
            folder: dataset.folder().to_owned(),
            samples: dataset.len(),
            questions: dataset.question_count(),
            captions: dataset.index().captions,
            bytes: dataset.index().shards.iter().map(|shard| shard.bytes).sum(),
            written,
        }
    }
}

/// What the source of every data set that is made here begins with.
const SOURCE: &str = "easy-vqa ";

/// The data set at `target` if nothing needs to be done.
///
/// # Errors
/// [`DataError::Foreign`] for a data set that somebody else has made.
fn whole(target: &Path, fingerprint: &str) -> Result<Option<Dataset>, DataError> {
    let path = target.join(INDEX_FILE);
    let index = match fs::read(&path) {
        Ok(bytes) => Index::parse(&path, &bytes)?,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(source) => return Err(DataError::io("read", &path, source)),
    };
    if index.source.as_ref().is_none_or(|source| !source.starts_with(SOURCE)) {
        return Err(DataError::Foreign { path: target.to_owned() });
    }
    if index.source.as_deref() != Some(fingerprint) {
        tracing::info!(folder = %target.display(), "made from other questions: writing it again");
        return Ok(None);
    }
    match Dataset::open(target).and_then(|dataset| dataset.verify().map(|()| dataset)) {
        Ok(dataset) => Ok(Some(dataset)),
        Err(error) => {
            tracing::warn!(folder = %target.display(), %error, "not whole: writing it again");
            Ok(None)
        }
    }
}

fn read_answers(source: &Path) -> Result<Vec<String>, DataError> {
    let path = source.join("answers.txt");
    let bytes = read_source(&path)?;
    let text = String::from_utf8(bytes).map_err(|error| invalid(&path, &error))?;
    let answers: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if answers.is_empty() {
        return Err(invalid(&path, &"it lists no answers"));
    }
    match answers.iter().enumerate().find(|(place, answer)| answers[..*place].contains(answer)) {
        Some((_, answer)) => Err(invalid(&path, &format_args!("`{answer}` is listed twice"))),
        None => Ok(answers),
    }
}

/// A description of the image, such as `a blue circle`, from what its questions presuppose, ask and affirm. `None` when
/// they leave the colour or the shape open.
fn caption(questions: &[QuestionAnswer]) -> Option<String> {
    let (mut colour, mut shape) = (None, None);
    for QuestionAnswer { question, answer } in questions {
        let words = || question.split(|c: char| !c.is_ascii_alphabetic());
        let negated = words().any(|word| matches!(word, "not" | "no"));
        // "is there not a red shape?" - "no": there is one.
        let holds = match answer.as_str() {
            "yes" => !negated,
            "no" => negated,
            _ => true,
        };
        if holds {
            for word in words().chain([answer.as_str()]) {
                colour = COLOURS.iter().find(|known| **known == word).or(colour);
                shape = SHAPES.iter().find(|known| **known == word).or(shape);
            }
        }
    }
    Some(format!("a {} {}", colour?, shape?))
}

fn read_source(path: &Path) -> Result<Vec<u8>, DataError> {
    fs::read(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => missing(path.to_owned()),
        _ => DataError::io("read", path, source),
    })
}

fn missing(path: PathBuf) -> DataError {
    let reason = "is not there; give the folder `data` of the easy_vqa Python package, which has answers.txt, and \
                  questions.json and images/ in both train/ and test/";
    DataError::InvalidSource { path, reason: reason.to_owned() }
}

fn invalid(path: &Path, reason: &dyn std::fmt::Display) -> DataError {
    DataError::InvalidSource { path: path.to_owned(), reason: format!("is not easy-VQA's: {reason}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caption_of(questions: &[(&str, &str)]) -> Option<String> {
        let questions: Vec<_> =
            questions.iter().map(|(q, a)| QuestionAnswer { question: (*q).into(), answer: (*a).into() }).collect();
        caption(&questions)
    }

    #[test]
    fn a_caption_is_what_the_questions_presuppose_ask_and_affirm() {
        let blue_circle = Some("a blue circle".to_owned());
        assert_eq!(caption_of(&[("what is the blue shape?", "circle")]), blue_circle);
        assert_eq!(caption_of(&[("what color is the circle?", "blue")]), blue_circle);
        assert_eq!(caption_of(&[("is there a blue shape?", "yes"), ("what shape is present?", "circle")]), blue_circle);
        assert_eq!(caption_of(&[("is no blue shape present?", "no"), ("is there not a circle?", "no")]), blue_circle);
    }

    #[test]
    fn denied_colours_and_shapes_are_not_in_the_caption() {
        let known = ("what is the color of the shape?", "blue");
        assert_eq!(caption_of(&[known, ("is there a circle?", "no")]), None);
        assert_eq!(caption_of(&[known, ("does the image not contain a circle?", "yes")]), None);
    }
}

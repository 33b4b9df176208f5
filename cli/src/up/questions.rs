//! Held-out questions to a server that has just become ready, through its public API.

use std::collections::BTreeSet;
use std::path::Path;

use sensorium_artifact::atomic;
use sensorium_data::{Dataset, QuestionAnswer, Sample};

use crate::client::Client;
use crate::error::Error;
use crate::output;
use crate::report::QuestionReport;
use crate::text::{shorten, widen};

/// A question to ask, with the image that it is about.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Question {
    /// File name for the image, such as `4711.png`.
    pub(super) file_name: String,
    /// The encoded image.
    pub(super) image: Vec<u8>,
    /// The question and the answer that is expected.
    pub(super) qa: QuestionAnswer,
}

/// One question each about `count` images spread over the data set, fewer where it is smaller. The same data set gives
/// the same questions. Answers that were not asked for yet are preferred, so that a handful shows different things.
///
/// # Errors
/// When a sample cannot be read.
pub(super) fn choose(dataset: &Dataset, count: usize) -> Result<Vec<Question>, sensorium_data::DataError> {
    let count = count.min(dataset.len());
    let mut seen = BTreeSet::new();
    let mut questions = Vec::with_capacity(count);
    for slot in 0..count {
        let sample = dataset.sample(slot * dataset.len() / count)?;
        if let Some(qa) = choose_one(&sample, slot, &seen) {
            seen.insert(qa.answer.clone());
            let file_name = format!("{}.{}", sample.key, extension(&sample.image));
            questions.push(Question { file_name, image: sample.image, qa });
        }
    }
    Ok(questions)
}

fn choose_one(sample: &Sample, slot: usize, seen: &BTreeSet<String>) -> Option<QuestionAnswer> {
    let n = sample.questions.len();
    // Starting elsewhere in each image's list varies the wording too.
    let rotated = || (0..n).map(|offset| &sample.questions[(slot + offset) % n]);
    rotated().find(|qa| !seen.contains(&qa.answer)).or_else(|| rotated().next()).cloned()
}

fn extension(image: &[u8]) -> &'static str {
    match image {
        [0xFF, 0xD8, ..] => "jpg",
        [b'R', b'I', b'F', b'F', ..] => "webp",
        _ => "png",
    }
}

/// Asks all questions of `model` and leaves the images in `folder`.
///
/// # Errors
/// When the folder cannot be written to, or the server refuses a question.
pub(super) async fn ask(
    client: &mut Client,
    model: &str,
    questions: Vec<Question>,
    folder: &Path,
) -> Result<Vec<QuestionReport>, Error> {
    let mut reports = Vec::with_capacity(questions.len());
    for Question { file_name, image, qa } in questions {
        let path = folder.join(file_name);
        atomic::write(&path, &image)?;
        let response = client.ask(model, image, &qa.question, 1).await?;
        // `Client::ask` promises at least one answer.
        let (answer, score) = response.answers.into_iter().next().map_or_else(Default::default, |a| (a.text, a.score));
        reports.push(QuestionReport {
            image: shorten(&path).display().to_string(),
            question: qa.question,
            answer,
            expected: qa.answer,
            score: widen(score),
        });
    }
    Ok(reports)
}

/// A line per question: image, question, answer, score, and whether it is the expected one.
pub(super) fn table(questions: &[QuestionReport]) -> String {
    let rows: Vec<Vec<String>> = questions
        .iter()
        .map(|question| {
            let verdict =
                if question.is_right() { "✓".to_owned() } else { format!("✗ expected {}", question.expected) };
            vec![
                question.image.clone(),
                question.question.clone(),
                question.answer.clone(),
                format!("{:.2}", question.score),
                verdict,
            ]
        })
        .collect();
    output::indent(&output::table(&rows))
}

#[cfg(test)]
mod tests {
    use sensorium_data::{ShardWriter, WriterOptions};

    use super::*;

    fn dataset(folder: &Path, samples: usize) -> Dataset {
        let qa = |question: &str, answer: &str| QuestionAnswer { question: question.into(), answer: answer.into() };
        let mut writer = ShardWriter::create(folder, WriterOptions::default()).unwrap();
        for number in 0..samples {
            let questions = vec![qa("what shape?", "circle"), qa("what color?", "blue"), qa("is it red?", "no")];
            let image = b"\x89PNG\r\n\x1a\n".to_vec();
            writer.append(&Sample { key: number.to_string(), image, questions, caption: None }).unwrap();
        }
        writer.finish().unwrap();
        Dataset::open(folder).unwrap()
    }

    #[test]
    fn questions_are_spread_over_the_data_and_prefer_answers_not_seen_yet() {
        let dir = tempfile::tempdir().unwrap();
        let questions = choose(&dataset(&dir.path().join("data"), 100), 4).unwrap();
        let files: Vec<&str> = questions.iter().map(|question| question.file_name.as_str()).collect();
        assert_eq!(files, ["0.png", "25.png", "50.png", "75.png"]);
        let answers: Vec<&str> = questions.iter().map(|question| question.qa.answer.as_str()).collect();
        assert_eq!(answers, ["circle", "blue", "no", "circle"]);
    }

    #[test]
    fn a_small_data_set_is_asked_about_once_per_image() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(choose(&dataset(&dir.path().join("data"), 2), 4).unwrap().len(), 2);
    }

    #[test]
    fn a_wrong_answer_shows_what_was_expected() {
        let report = |answer: &str| QuestionReport {
            image: "7.png".to_owned(),
            question: "what color?".to_owned(),
            answer: answer.to_owned(),
            expected: "blue".to_owned(),
            score: 0.987,
        };
        let expected = "  7.png  what color?  blue   0.99  ✓\n  7.png  what color?  green  0.99  ✗ expected blue\n";
        assert_eq!(table(&[report("blue"), report("green")]), expected);
    }
}

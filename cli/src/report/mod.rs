//! What a run leaves behind for people and scripts: `report.json` and `report.html`.
//!
//! The JSON is a contract: scripts read it, so keys are always there (`null` where a job has no such thing) and do not
//! change their meaning. The page is the same facts to look at, in one file without scripts or links.

mod html;
mod svg;

use std::collections::BTreeMap;
use std::path::Path;

use sensorium_api::run::{Evaluation, HistoryPoint};
use sensorium_artifact::atomic;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// One run of `sensorium up`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Wall time of the whole run.
    pub seconds: f64,
    /// The jobs in the order in which they ran.
    pub jobs: Vec<JobReport>,
    /// What the served models were asked.
    pub questions: Vec<QuestionReport>,
}

/// One job of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobReport {
    /// `TrainingJob`, `CompressionJob` or `ServingJob`.
    pub kind: String,
    /// The manifest's name.
    pub name: String,
    /// How it ended.
    pub state: JobState,
    /// Wall time in this run; close to zero for a reused job.
    pub seconds: f64,
    /// Final measurements by name, such as `vqa_accuracy`.
    pub metrics: BTreeMap<String, f64>,
    /// The artifact that the job wrote, or that it serves.
    pub artifact: Option<ArtifactReport>,
    /// The acceptance gate's verdict, for a compression job.
    pub gate: Option<GateReport>,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobState {
    /// It ran and did what it should.
    Succeeded,
    /// Nothing it depends on had changed: an earlier run's artifact was verified and taken.
    Reused,
    /// It served, and answered what it was asked.
    Ready,
    /// It did not do what it should, and what needs its artifact did not run.
    Failed,
}

/// An artifact in the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArtifactReport {
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Size of all its files.
    pub bytes: u64,
    /// Where it is.
    pub uri: String,
}

/// The acceptance gate in the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateReport {
    /// What was compared, such as `vqa_accuracy`.
    pub metric: String,
    /// The parent's value.
    pub parent: f64,
    /// The candidate's value.
    pub candidate: f64,
    /// Parent minus candidate.
    pub drop: f64,
    /// How many times as fast as the parent, where it was measured.
    pub speedup: Option<f64>,
    /// Whether the candidate took the name.
    pub promoted: bool,
}

/// One question that a served model was asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuestionReport {
    /// Path of the image, to be given to `sensorium infer --image`.
    pub image: String,
    /// The question.
    pub question: String,
    /// What the model said.
    pub answer: String,
    /// What the data set says.
    pub expected: String,
    /// The model's probability for its answer.
    pub score: f64,
}

impl QuestionReport {
    /// Whether the answer is the expected one.
    pub fn is_right(&self) -> bool {
        self.answer == self.expected
    }
}

/// What the page shows beyond the JSON: a job's curves and confusion matrix.
#[derive(Debug, Clone, Default)]
pub struct JobDetails {
    /// One point per recorded step.
    pub history: Vec<HistoryPoint>,
    /// The final evaluation, for a job with a classifying task.
    pub evaluation: Option<Evaluation>,
}

impl JobDetails {
    /// Reads `history.jsonl` and `evaluation.json` from a job's checkpoint folder. What is missing or unreadable is left
    /// out: these are decorations, and no reason to fail a run.
    pub fn read(folder: &Path) -> Self {
        let lines = std::fs::read_to_string(folder.join("history.jsonl")).unwrap_or_default();
        let mut history: Vec<HistoryPoint> = lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        // A resumed job may have written some steps twice; the later line is the one that counts.
        history.reverse();
        history.sort_by_key(|point| point.step);
        history.dedup_by_key(|point| point.step);
        let evaluation = std::fs::read(folder.join("evaluation.json")).ok();
        Self { history, evaluation: evaluation.and_then(|bytes| serde_json::from_slice(&bytes).ok()) }
    }
}

/// Writes `report.json` and `report.html` into `folder`, each whole or not at all.
///
/// `details` belongs to `report.jobs`, by position. Images that cannot be read are left out of the page.
///
/// # Errors
/// When the folder cannot be written to.
pub fn write(folder: &Path, report: &Report, details: &[JobDetails]) -> Result<(), Error> {
    let path = folder.join("report.json");
    let json = serde_json::to_string_pretty(report).map_err(|error| Error::io("write", &path)(error.into()))?;
    let images = report.questions.iter().map(|question| std::fs::read(&question.image).ok()).collect::<Vec<_>>();
    atomic::write(folder.join("report.html"), html::page(report, details, &images))?;
    Ok(atomic::write(path, json + "\n")?)
}

/// Text for HTML: element content and double-quoted attributes.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests;

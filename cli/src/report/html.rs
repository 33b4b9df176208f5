//! The report as one self-contained page.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{GateReport, JobDetails, JobReport, JobState, QuestionReport, Report, escape, svg};
use crate::text::{duration, size};

const STYLE: &str = include_str!("report.css");

/// The whole page. `details` goes with `report.jobs` and `images` with `report.questions`, by position.
pub(super) fn page(report: &Report, details: &[JobDetails], images: &[Option<Vec<u8>>]) -> String {
    let mut body = String::new();
    for (index, job) in report.jobs.iter().enumerate() {
        let none = JobDetails::default();
        section(&mut body, job, details.get(index).unwrap_or(&none));
    }
    if !report.questions.is_empty() {
        questions(&mut body, &report.questions, images);
    }
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>Sensorium report</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>Sensorium report</h1>\n<p>{}</p>\n{body}</main>\n</body>\n</html>\n",
        escape(&summary(report)),
    )
}

fn summary(report: &Report) -> String {
    let mut text = format!("{} jobs in {}", report.jobs.len(), duration(report.seconds));
    if !report.questions.is_empty() {
        let right = report.questions.iter().filter(|question| question.is_right()).count();
        let _ = write!(text, "; {right} of {} questions answered as expected", report.questions.len());
    }
    text
}

fn section(body: &mut String, job: &JobReport, details: &JobDetails) {
    let (class, state) = match job.state {
        JobState::Succeeded => ("good", "succeeded"),
        JobState::Reused => ("good", "reused"),
        JobState::Ready => ("good", "ready"),
        JobState::Failed => ("bad", "failed"),
    };
    let _ = write!(
        body,
        "<section>\n<h2>{}/{} <span class=\"{class}\">{state}</span></h2>\n<dl>\n<dt>time</dt><dd>{}</dd>\n",
        escape(&job.kind),
        escape(&job.name),
        duration(job.seconds),
    );
    for (name, value) in &job.metrics {
        let _ = writeln!(body, "<dt>{}</dt><dd>{}</dd>", escape(name), crate::text::number(*value));
    }
    if let Some(artifact) = &job.artifact {
        let _ = writeln!(
            body,
            "<dt>artifact</dt><dd>{}<br><code>{}</code><br><code>{}</code></dd>",
            size(artifact.bytes),
            escape(&artifact.digest),
            escape(&artifact.uri),
        );
    }
    body.push_str("</dl>\n");
    if let Some(gate) = &job.gate {
        gate_figure(body, gate);
    }
    curves(body, details);
    if let Some(evaluation) = &details.evaluation {
        let _ =
            write!(body, "<div class=\"pair\">\n<figure><figcaption>Answers by what was expected (rows)</figcaption>");
        let _ = writeln!(body, "{}</figure>", svg::confusion(&evaluation.labels, &evaluation.confusion));
        let kinds: Vec<(&str, f64)> = evaluation.by_kind.iter().map(|(kind, value)| (kind.as_str(), *value)).collect();
        if !kinds.is_empty() {
            let _ = write!(body, "<figure><figcaption>Accuracy by kind of question</figcaption>");
            let _ = writeln!(body, "{}</figure>", svg::bars("Accuracy by kind of question", &kinds));
        }
        body.push_str("</div>\n");
    }
    body.push_str("</section>\n");
}

fn gate_figure(body: &mut String, gate: &GateReport) {
    let verdict = if gate.promoted { "promoted" } else { "refused: the candidate is kept and does not take the name" };
    let speed = gate.speedup.map_or(String::new(), |speedup| format!(", {speedup:.2} times as fast"));
    let _ = writeln!(
        body,
        "<figure><figcaption>Acceptance gate on {}: {:+.2} points{speed}; {verdict}</figcaption>{}</figure>",
        escape(&gate.metric),
        -gate.drop * 100.0,
        svg::bars("Acceptance gate", &[("parent", gate.parent), ("candidate", gate.candidate)]),
    );
}

fn curves(body: &mut String, details: &JobDetails) {
    let loss: svg::Points = details.history.iter().map(|point| (point.step as f64, point.loss)).collect();
    let accuracy: svg::Points =
        details.history.iter().filter_map(|point| Some((point.step as f64, point.accuracy?))).collect();
    if loss.is_empty() {
        return;
    }
    body.push_str("<div class=\"pair\">\n");
    let _ = writeln!(body, "<figure><figcaption>Loss by step</figcaption>{}</figure>", svg::curve("Loss", &loss, None));
    if accuracy.len() > 1 {
        let picture = svg::curve("Accuracy", &accuracy, Some(1.0));
        let _ = writeln!(body, "<figure><figcaption>Accuracy by step</figcaption>{picture}</figure>");
    }
    body.push_str("</div>\n");
}

fn questions(body: &mut String, questions: &[QuestionReport], images: &[Option<Vec<u8>>]) {
    body.push_str("<section>\n<h2>Questions to the served model</h2>\n<div class=\"cards\">\n");
    for (index, question) in questions.iter().enumerate() {
        body.push_str("<div class=\"card\">\n");
        if let Some(bytes) = images.get(index).and_then(Option::as_ref) {
            let _ = writeln!(
                body,
                "<img alt=\"{}\" src=\"data:{};base64,{}\">",
                escape(&question.image),
                media_type(bytes),
                STANDARD.encode(bytes),
            );
        }
        let (class, mark) = if question.is_right() { ("good", "✓") } else { ("bad", "✗") };
        let _ = write!(
            body,
            "<p>{}</p>\n<p><span class=\"{class}\">{mark}</span> <strong>{}</strong> <small>{:.2}</small></p>\n",
            escape(&question.question),
            escape(&question.answer),
            question.score,
        );
        if !question.is_right() {
            let _ = writeln!(body, "<p><small>expected {}</small></p>", escape(&question.expected));
        }
        body.push_str("</div>\n");
    }
    body.push_str("</div>\n</section>\n");
}

/// The media type of an encoded image, by its first bytes.
fn media_type(bytes: &[u8]) -> &'static str {
    match bytes {
        [0xFF, 0xD8, ..] => "image/jpeg",
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => "image/webp",
        _ => "image/png",
    }
}

//! The result of a job, as one line of JSON that fits where a cluster looks for it.

use std::path::Path;

use sensorium_api::run::RunResult;
use sensorium_artifact::atomic;

/// Kubernetes keeps 4096 bytes of what a container leaves in its termination log, and cuts the rest.
const MOST_BYTES: usize = 4000;
/// Of a message that has to be cut, this much is kept at least; the log has all of it.
const LEAST_MESSAGE: usize = 500;

/// Writes `result` to `path`. What is too long for a termination log is shortened first: the message is cut, then the
/// artifact's record is left out.
///
/// # Errors
/// When the file can't be written.
pub fn write(path: &Path, result: &RunResult) -> anyhow::Result<()> {
    let bytes = encode(result.clone())?;
    // Kubernetes mounts the termination log as a file of its own, which can be written but not replaced.
    Ok(atomic::write(path, &bytes).or_else(|_| std::fs::write(path, &bytes))?)
}

fn encode(mut result: RunResult) -> serde_json::Result<Vec<u8>> {
    let excess = |result: &RunResult| serde_json::to_vec(result).map(|it| it.len().saturating_sub(MOST_BYTES));
    let beyond = excess(&result)?;
    if beyond > 0 {
        // A character of the message is at least one byte of JSON.
        let keep = result.message.len().saturating_sub(beyond + ELLIPSIS.len()).max(LEAST_MESSAGE);
        cut(&mut result.message, keep);
    }
    if excess(&result)? > 0
        && let Some(artifact) = &mut result.artifact
    {
        artifact.record = None;
    }
    serde_json::to_vec(&result)
}

const ELLIPSIS: &str = "...";

fn cut(text: &mut String, keep: usize) {
    if keep + ELLIPSIS.len() < text.len() {
        text.truncate(text.floor_char_boundary(keep));
        text.push_str(ELLIPSIS);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use sensorium_api::run::{ArtifactRecord, ArtifactResult, RunState};

    use super::*;

    fn result(message: &str, steps: usize) -> RunResult {
        let record = ArtifactRecord { steps: vec!["train".to_owned(); steps], ..ArtifactRecord::default() };
        let artifact = ArtifactResult {
            name: "vqa".to_owned(),
            digest: "sha256:".to_owned() + &"0".repeat(64),
            bytes: 1,
            uri: "pvc://artifacts/objects/0".to_owned(),
            record: Some(record),
        };
        let (message, metrics) = (message.to_owned(), BTreeMap::new());
        RunResult { state: RunState::Succeeded, message, artifact: Some(artifact), metrics, gate: None, seconds: 1.0 }
    }

    fn written(result: RunResult) -> RunResult {
        let bytes = encode(result).unwrap();
        assert!(bytes.len() <= MOST_BYTES, "{} bytes", bytes.len());
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn what_fits_is_written_whole() {
        let short = result("trained 10 steps", 3);
        assert_eq!(written(short.clone()), short);
    }

    #[test]
    fn a_long_message_is_cut_before_the_record_is_left_out() {
        let found = written(result(&"grüße ".repeat(2_000), 3));
        assert!(found.message.len() > 3_000 && found.message.ends_with(ELLIPSIS), "{}", found.message);
        assert!(found.artifact.unwrap().record.is_some());
    }

    #[test]
    fn a_record_that_does_not_fit_is_left_out_and_the_rest_stays() {
        let found = written(result("trained 10 steps", 1_000));
        assert_eq!(found.message, "trained 10 steps");
        assert_eq!(found.artifact.unwrap().record, None);
    }
}

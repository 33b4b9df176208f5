use super::*;

fn report(image: &str) -> Report {
    Report {
        seconds: 345.6,
        jobs: vec![
            JobReport {
                kind: "TrainingJob".to_owned(),
                name: "vqa".to_owned(),
                state: JobState::Succeeded,
                seconds: 290.0,
                metrics: [("vqa_accuracy".to_owned(), 0.9875)].into(),
                artifact: Some(ArtifactReport {
                    digest: "sha256:aa".to_owned(),
                    bytes: 945_000,
                    uri: "pvc://artifacts/objects/aa".to_owned(),
                }),
                gate: None,
            },
            JobReport {
                kind: "CompressionJob".to_owned(),
                name: "vqa-int8".to_owned(),
                state: JobState::Failed,
                seconds: 12.0,
                metrics: BTreeMap::new(),
                artifact: None,
                gate: Some(GateReport {
                    metric: "vqa_accuracy".to_owned(),
                    parent: 0.9875,
                    candidate: 0.95,
                    drop: 0.0375,
                    speedup: Some(1.8),
                    promoted: false,
                }),
            },
        ],
        questions: vec![
            QuestionReport {
                image: image.to_owned(),
                question: "what color is the <circle>?".to_owned(),
                answer: "blue".to_owned(),
                expected: "blue".to_owned(),
                score: 0.99,
            },
            QuestionReport {
                image: "gone.png".to_owned(),
                question: "is there a square?".to_owned(),
                answer: "yes".to_owned(),
                expected: "no".to_owned(),
                score: 0.51,
            },
        ],
    }
}

fn details() -> Vec<JobDetails> {
    let point = |step, loss, accuracy| HistoryPoint {
        step,
        loss,
        learning_rate: 1e-3,
        grad_norm: 1.0,
        accuracy,
        seconds: step as f64,
    };
    let evaluation = Evaluation {
        labels: vec!["yes".to_owned(), "no".to_owned()],
        confusion: vec![vec![90, 10], vec![0, 100]],
        accuracy: 0.95,
        by_kind: [("color".to_owned(), 1.0), ("yes/no".to_owned(), 0.9)].into(),
    };
    let history = vec![point(1, 2.56, None), point(2, 1.2, Some(0.5)), point(3, 0.4, Some(0.95))];
    vec![JobDetails { history, evaluation: Some(evaluation) }, JobDetails::default()]
}

#[test]
fn the_json_has_the_keys_that_scripts_rely_on() {
    insta::assert_json_snapshot!(report("4711.png"));
}

#[test]
fn the_page_is_as_reviewed() {
    insta::assert_snapshot!(html::page(&report("4711.png"), &details(), &[Some(b"png".to_vec()), None]));
}

#[test]
fn the_page_needs_nothing_but_itself() {
    let page = html::page(&report("4711.png"), &details(), &[Some(b"png".to_vec()), None]);
    for outside in ["<script", "<link", "@import", "url(", "http://", "https://"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("src=\"data:image/png;base64,cG5n\""));
    assert!(page.contains("&lt;circle&gt;") && !page.contains("<circle>"));
}

#[test]
fn tags_of_the_page_are_balanced() {
    let page = html::page(&report("4711.png"), &details(), &[None, None]);
    let mut open: Vec<&str> = Vec::new();
    for tag in page.split('<').skip(1).map(|rest| rest.split('>').next().unwrap()) {
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
        let is_void = tag.ends_with('/') || matches!(name, "!doctype" | "meta" | "img" | "br");
        match tag.strip_prefix('/') {
            Some(_) => assert_eq!(open.pop(), Some(name), "</{name}> closes what is not open"),
            None if is_void => {}
            None => open.push(name),
        }
    }
    assert!(open.is_empty(), "still open: {open:?}");
}

#[test]
fn both_files_are_written_and_the_json_reads_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("4711.png");
    std::fs::write(&image, b"\x89PNG").unwrap();
    let report = report(image.to_str().unwrap());
    write(dir.path(), &report, &details()).unwrap();
    let read: Report = serde_json::from_slice(&std::fs::read(dir.path().join("report.json")).unwrap()).unwrap();
    assert_eq!(read, report);
    assert!(std::fs::read_to_string(dir.path().join("report.html")).unwrap().contains("data:image/png;base64,"));
}

#[test]
fn a_resumed_run_counts_each_step_once_and_the_later_record_wins() {
    let dir = tempfile::tempdir().unwrap();
    let line = |step: u64, loss: f64| {
        format!(r#"{{"step":{step},"loss":{loss},"learningRate":0.1,"gradNorm":1,"seconds":1}}"#)
    };
    let text = [line(1, 3.0), line(2, 9.0), line(2, 2.0), line(3, 1.0), r#"{"step":4,"lo"#.to_owned()].join("\n");
    std::fs::write(dir.path().join("history.jsonl"), text).unwrap();
    let history = JobDetails::read(dir.path()).history;
    let curve: Vec<(u64, f64)> = history.iter().map(|point| (point.step, point.loss)).collect();
    assert_eq!(curve, [(1, 3.0), (2, 2.0), (3, 1.0)]);
    assert!(JobDetails::read(dir.path()).evaluation.is_none());
}

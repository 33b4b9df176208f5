use std::collections::BTreeMap;
use std::path::Path;

use super::*;
use crate::view::View;

const SUCCESS: &str = r#"{"state":"succeeded","message":"trained","metrics":{"vqa_accuracy":0.98},"seconds":1}"#;
const BUDGET: Budget =
    Budget { max_restarts: 0, deadline: None, grace: Duration::from_secs(20), pause: Duration::from_millis(1) };

/// One process that runs `script`, in which `$RESULT` is the result file and `$ATTEMPT` the number of the attempt.
fn attempt(dir: &Path, number: u32, script: &str) -> Attempt {
    let result = dir.join("result.json");
    let env = [("RESULT", result.display().to_string()), ("ATTEMPT", number.to_string())];
    let process = ProcessSpec {
        name: "worker-0".to_owned(),
        program: "/bin/sh".into(),
        args: vec!["-c".to_owned(), script.to_owned()],
        env: env.map(|(name, value)| (name.to_owned(), value)).into(),
        log: dir.join("worker-0.log"),
    };
    Attempt { processes: vec![process], progress: None, result, reserved: FreePorts::default() }
}

async fn run_script(dir: &Path, script: &str, budget: Budget) -> Result<Finished, Error> {
    let mut view = View::Plain.start("TrainingJob/vqa", "1 worker");
    let interrupt = Interrupt::install().unwrap();
    run("TrainingJob/vqa", |number| Ok(attempt(dir, number, script)), budget, &mut view, &interrupt).await
}

fn failure(outcome: Result<Finished, Error>) -> JobFailure {
    match outcome {
        Err(Error::Job(failure)) => *failure,
        other => panic!("not a failed job: {other:?}"),
    }
}

#[tokio::test]
async fn a_job_succeeds_when_its_processes_do_and_its_result_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let finished = run_script(dir.path(), &format!("echo '{SUCCESS}' > $RESULT"), BUDGET).await.unwrap();
    assert_eq!(finished.attempts, 1);
    assert_eq!(finished.result.metrics, BTreeMap::from([("vqa_accuracy".to_owned(), 0.98)]));
}

#[tokio::test]
async fn a_job_that_ends_without_a_result_has_failed_even_if_an_earlier_run_left_one() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("result.json"), SUCCESS).unwrap();
    let failure = failure(run_script(dir.path(), "true", BUDGET).await);
    assert_eq!(failure.to_string(), "TrainingJob/vqa failed: it ended without a result");
}

#[tokio::test]
async fn a_failing_job_is_started_again_until_it_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let script = format!("[ $ATTEMPT = 3 ] || exit 1; echo '{SUCCESS}' > $RESULT");
    let finished = run_script(dir.path(), &script, Budget { max_restarts: 3, ..BUDGET }).await.unwrap();
    assert_eq!(finished.attempts, 3);
}

#[tokio::test]
async fn restarts_are_counted_and_the_last_lines_of_the_log_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let script = r#"echo attempt $ATTEMPT
        echo '{"service":"t","timestamp":"now","level":"ERROR","message":"no such shard","shard":7}'
        exit 1"#;
    let failure = failure(run_script(dir.path(), script, Budget { max_restarts: 2, ..BUDGET }).await);
    assert_eq!(failure.to_string(), "TrainingJob/vqa failed after 3 attempts: worker-0 exited with code 1");
    assert_eq!(failure.tail.last().unwrap(), "ERROR no such shard shard=7");
    assert!(failure.tail.contains(&"attempt 3".to_owned()), "{:?}", failure.tail);
    assert_eq!(failure.log, Some(dir.path().join("worker-0.log")));
}

#[tokio::test]
async fn a_bad_configuration_and_a_gates_refusal_are_not_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let budget = Budget { max_restarts: 3, ..BUDGET };
    let usage = failure(run_script(dir.path(), "echo unknown field >&2; exit 2", budget).await);
    assert_eq!((usage.attempts, usage.tail), (1, vec!["unknown field".to_owned()]));

    let gate = r#"{"metric":"vqa_accuracy","parent":0.98,"candidate":0.9,"drop":0.08,"speedup":2,"sizeRatio":0.3,"promoted":false,"message":"m"}"#;
    let result = format!(r#"{{"state":"failed","message":"accuracy fell by 8 points","gate":{gate},"seconds":1}}"#);
    let refused = failure(run_script(dir.path(), &format!("echo '{result}' > $RESULT; exit 1"), budget).await);
    assert_eq!((refused.attempts, refused.reason.as_str()), (1, "accuracy fell by 8 points"));
    assert!(!refused.result.unwrap().gate.unwrap().promoted);
}

#[tokio::test]
async fn a_deadline_covers_all_attempts() {
    let dir = tempfile::tempdir().unwrap();
    let budget = Budget { max_restarts: 1000, deadline: Some(Duration::from_millis(500)), ..BUDGET };
    let began = Instant::now();
    let failure = failure(run_script(dir.path(), "sleep 0.1; exit 1", budget).await);
    assert!(failure.reason.contains("activeDeadlineSeconds"), "{}", failure.reason);
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn lines_that_are_not_of_our_log_stay_as_they_are() {
    for line in ["Segmentation fault", "[1, 2]", r#"{"level":"INFO"}"#, "{"] {
        assert_eq!(readable(line), line);
    }
}

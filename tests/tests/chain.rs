//! The chain from data to a served model through `sensorium up`: its report, reuse, interruption and resumption.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};
use sensorium_tests::{Bench, Running, compression, serving, training};
use serde_json::Value;

/// A tiny job takes seconds; a machine that builds something else meanwhile needs this at most.
const LIMIT: Duration = Duration::from_mins(5);
/// A command that was interrupted has to checkpoint and leave.
const STOP_LIMIT: Duration = Duration::from_mins(1);

/// Steps enough that a test can interrupt in between, few enough to finish soon.
const LONG_STEPS: u32 = 400;
const CHECKPOINTS: &str = "volumes/checkpoints/default/tiny";

fn bench() -> Result<Bench> {
    let bench = Bench::new()?;
    bench.import_easy_vqa(64, 24)?;
    Ok(bench)
}

fn job<'a>(report: &'a Value, kind: &str) -> Result<&'a Value> {
    let jobs = report["jobs"].as_array().context("jobs is a list")?;
    jobs.iter().find(|job| job["kind"] == kind).with_context(|| format!("no {kind} in {report:#}"))
}

#[test]
fn a_chain_ends_with_a_served_model_and_a_report_and_is_reused_when_nothing_changed() -> Result<()> {
    let bench = bench()?;
    bench.write("jobs/training.yaml", &training(12, 6))?;
    bench.write("jobs/compression.yaml", &compression())?;
    bench.write("jobs/serving.yaml", &serving("tiny-int8"))?;

    let first = bench.run(&["up", "jobs"], LIMIT)?.success()?;
    let report = bench.report()?;
    let trained = job(&report, "TrainingJob")?;
    ensure!(trained["state"] == "Succeeded" && trained["name"] == "tiny", "{trained:#}");
    ensure!(trained["metrics"]["vqa_accuracy"].is_f64() && trained["gate"].is_null(), "{trained:#}");
    let compressed = job(&report, "CompressionJob")?;
    ensure!(compressed["gate"]["promoted"] == true && compressed["gate"]["metric"] == "vqa_accuracy", "{compressed:#}");
    let drop = compressed["gate"]["drop"].as_f64().context("drop")?;
    let (parent, candidate) = (&compressed["gate"]["parent"], &compressed["gate"]["candidate"]);
    let expected = parent.as_f64().context("parent")? - candidate.as_f64().context("candidate")?;
    ensure!((drop - expected).abs() < 1e-9, "{compressed:#}");
    let served = job(&report, "ServingJob")?;
    ensure!(served["state"] == "Ready", "{served:#}");
    ensure!(served["artifact"]["digest"] == compressed["artifact"]["digest"], "{report:#}");

    let questions = report["questions"].as_array().context("questions is a list")?;
    ensure!(questions.len() == 3, "{report:#}");
    for question in questions {
        let score = question["score"].as_f64().context("score")?;
        ensure!((0.0..=1.0).contains(&score), "{question:#}");
        let image = bench.path().join(question["image"].as_str().context("image")?);
        ensure!(fs::read(image)?.starts_with(b"\x89PNG"), "{question:#}");
        let asked = question["question"].as_str().context("question")?;
        ensure!(first.stdout.contains(asked), "{}", first.stdout);
    }
    let page = fs::read_to_string(bench.state().join("report.html"))?;
    ensure!(page.contains("<svg") && page.contains("data:image/png;base64,"));
    ensure!(bench.processes().is_empty(), "processes left: {:?}", bench.processes());
    let verified = bench.run(&["artifact", "verify"], LIMIT)?.success()?.stdout;
    ensure!(verified.lines().filter(|line| line.starts_with("ok")).count() == 2, "{verified}");

    let began = Instant::now();
    let second = bench.run(&["up", "jobs"], LIMIT)?.success()?;
    let again = bench.report()?;
    for kind in ["TrainingJob", "CompressionJob"] {
        let (then, now) = (job(&report, kind)?, job(&again, kind)?);
        ensure!(now["state"] == "Reused", "{}", second.stdout);
        for same in ["artifact", "metrics", "gate"] {
            ensure!(then[same] == now[same], "{kind} {same}: {then:#} {now:#}");
        }
    }
    ensure!(again["questions"] == report["questions"], "{again:#}");
    ensure!(began.elapsed() < Duration::from_secs(30), "nothing changed, and it took {:?}", began.elapsed());
    Ok(())
}

#[test]
fn an_encoder_in_a_process_of_its_own_changes_no_answer_and_ends_with_the_run() -> Result<()> {
    let bench = bench()?;
    bench.write("jobs/training.yaml", &training(12, 6))?;
    bench.write("jobs/serving.yaml", &serving("tiny"))?;
    bench.run(&["up", "jobs"], LIMIT)?.success()?;
    let together = bench.report()?;
    ensure!(together["questions"].as_array().is_some_and(|questions| questions.len() == 3), "{together:#}");

    let encoders = "  encoders: [{graph: image_encoder, replicas: 2}]\n";
    bench.write("jobs/serving.yaml", &(serving("tiny") + encoders))?;
    let finished = bench.run(&["up", "jobs"], LIMIT)?.success()?;
    let apart = bench.report()?;
    let questions = |report: &Value| report["questions"].as_array().cloned().context("questions is a list");
    for (apart, together) in questions(&apart)?.iter().zip(&questions(&together)?) {
        for same in ["question", "answer"] {
            ensure!(apart[same] == together[same], "{apart:#} {together:#}");
        }
        let score = |question: &Value| question["score"].as_f64().context("score");
        // Kernels add in another order where memory begins at another place; f32 keeps seven digits.
        ensure!((score(apart)? - score(together)?).abs() < 1e-5, "{apart:#} {together:#}");
    }
    ensure!(bench.processes().is_empty(), "processes left: {:?}", bench.processes());
    let logs = bench.entries("jobs/servingjob-tiny/logs");
    for name in ["server-0.log", "image_encoder-0.log", "image_encoder-1.log"] {
        ensure!(logs.iter().any(|log| log == name), "{logs:?} {}", finished.stdout);
    }
    Ok(())
}

#[test]
fn an_interrupted_run_leaves_nothing_half_done_and_the_next_goes_on_from_its_checkpoint() -> Result<()> {
    let bench = bench()?;
    bench.write("training.yaml", &training(LONG_STEPS, 5))?;
    let mut running = Running::start(bench.sensorium(&["up", "training.yaml"]))?;
    bench.wait_for("a checkpoint", LIMIT, |bench| has_checkpoint(bench) || !running.is_running().unwrap_or(false))?;
    if !running.is_running()? {
        bail!("it ended before it was interrupted: {:#?}", running.finish(STOP_LIMIT)?);
    }
    running.signal(Signal::INT)?;
    let interrupted = running.finish(STOP_LIMIT)?;
    ensure!(interrupted.status.code() == Some(130), "{interrupted:?}");
    ensure!(interrupted.stderr.contains("interrupted"), "{}", interrupted.stderr);
    ensure!(bench.processes().is_empty(), "processes left: {:?}", bench.processes());
    for folder in ["volumes/artifacts/objects", "volumes/artifacts/tmp", "volumes/artifacts/names"] {
        ensure!(bench.entries(folder).is_empty(), "{folder} has {:?}", bench.entries(folder));
    }
    ensure!(bench.report().is_err(), "an interrupted run has no report");

    let resumed = bench.run(&["up", "training.yaml"], LIMIT)?.success()?;
    ensure!(resumed.stdout.contains("goes on from step "), "{}", resumed.stdout);
    let report = bench.report()?;
    ensure!(job(&report, "TrainingJob")?["state"] == "Succeeded", "{report:#}");
    let history = fs::read_to_string(bench.state().join(CHECKPOINTS).join("history.jsonl"))?;
    let steps = history.lines().map(|line| serde_json::from_str::<Value>(line)?["step"].as_u64().context("step"));
    let steps: Vec<u64> = steps.collect::<Result<_>>()?;
    ensure!(steps.is_sorted() && steps.last() == Some(&u64::from(LONG_STEPS)), "{steps:?}");
    Ok(())
}

#[test]
fn a_killed_worker_costs_one_restart_and_changes_nothing_in_the_result() -> Result<()> {
    let undisturbed = bench()?;
    undisturbed.write("training.yaml", &training(LONG_STEPS, 5))?;
    undisturbed.run(&["up", "training.yaml"], LIMIT)?.success()?;

    let bench = bench()?;
    bench.write("training.yaml", &training(LONG_STEPS, 5))?;
    let mut running = Running::start(bench.sensorium(&["up", "training.yaml"]))?;
    bench.wait_for("a checkpoint", LIMIT, |bench| has_checkpoint(bench) || !running.is_running().unwrap_or(false))?;
    let worker = bench.processes().into_iter().max().context("a worker")?;
    let worker = Pid::from_raw(i32::try_from(worker)?).context("a process id")?;
    rustix::process::kill_process(worker, Signal::KILL)?;
    let finished = running.finish(LIMIT)?.success()?;
    ensure!(finished.stdout.contains("; starting again (1 of 3 restarts)"), "{}", finished.stdout);
    ensure!(finished.stdout.contains("goes on from step "), "{}", finished.stdout);

    let digest =
        |bench: &Bench| Ok::<_, anyhow::Error>(job(&bench.report()?, "TrainingJob")?["artifact"]["digest"].clone());
    let (wanted, found) = (digest(&undisturbed)?, digest(&bench)?);
    ensure!(found == wanted, "{found} after the restart, {wanted} without");
    Ok(())
}

#[test]
fn killing_the_command_leaves_no_process() -> Result<()> {
    let bench = bench()?;
    bench.write("training.yaml", &training(100_000, 1000))?;
    let running = Running::start(bench.sensorium(&["up", "training.yaml"]))?;
    // The command's own line does not name the folder: it is told `training.yaml`, and works there.
    bench.wait_for("two workers", LIMIT, |bench| bench.processes().len() == 2)?;
    running.signal(Signal::KILL)?;
    running.finish(STOP_LIMIT)?;
    bench.wait_for("the workers leave", STOP_LIMIT, |bench| bench.processes().is_empty())
}

#[test]
fn a_second_run_in_the_same_state_folder_is_told_who_has_it() -> Result<()> {
    let bench = bench()?;
    bench.write("training.yaml", &training(100_000, 1000))?;
    let running = Running::start(bench.sensorium(&["up", "training.yaml"]))?;
    bench.wait_for("two workers", LIMIT, |bench| bench.processes().len() == 2)?;
    let second = bench.run(&["up", "training.yaml"], STOP_LIMIT)?;
    ensure!(second.status.code() == Some(1), "{second:?}");
    ensure!(second.stderr.starts_with("error: another `sensorium up` (process "), "{}", second.stderr);
    running.signal(Signal::TERM)?;
    ensure!(running.finish(STOP_LIMIT)?.status.code() == Some(130));
    Ok(())
}

#[test]
fn a_failed_job_ends_with_a_report_a_reason_and_exit_code_1() -> Result<()> {
    let bench = bench()?;
    bench.write("training.yaml", &training(12, 6).replace("maxLength: 12", "maxLength: 2"))?;
    let failed = bench.run(&["up", "training.yaml"], LIMIT)?;
    ensure!(failed.status.code() == Some(1), "{failed:?}");
    ensure!(failed.stderr.starts_with("error: TrainingJob/tiny failed"), "{}", failed.stderr);
    ensure!(
        failed.stderr.contains("hint: the whole log is .sensorium/jobs/trainingjob-tiny/logs/worker-"),
        "{}",
        failed.stderr
    );
    let report = bench.report()?;
    ensure!(job(&report, "TrainingJob")?["state"] == "Failed", "{report:#}");
    Ok(())
}

#[test]
fn missing_data_is_said_before_anything_starts() -> Result<()> {
    let bench = Bench::new()?;
    bench.write("training.yaml", &training(12, 6))?;
    let failed = bench.run(&["up", "training.yaml"], STOP_LIMIT)?;
    ensure!(failed.status.code() == Some(1), "{failed:?}");
    ensure!(failed.stderr.contains("cannot use the data pvc://datasets/easy-vqa/"), "{}", failed.stderr);
    ensure!(failed.stderr.ends_with("hint: sensorium data import easy-vqa\n"), "{}", failed.stderr);
    ensure!(bench.entries("jobs").is_empty());
    Ok(())
}

fn has_checkpoint(bench: &Bench) -> bool {
    // Checkpoints are in a folder per spec, so that a changed spec does not go on from another's weights.
    let specs = bench.entries(CHECKPOINTS);
    specs.iter().flat_map(|spec| bench.entries(&format!("{CHECKPOINTS}/{spec}"))).any(|name| name.starts_with("step-"))
}

//! Runs one job to its end: attempts, restarts, deadline, interruption.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use sensorium_api::run::{Progress, RunResult, RunState};
use sensorium_telemetry::error_line;

use crate::error::Error;
use crate::http;
use crate::local::interrupt::Interrupt;
use crate::local::ports::FreePorts;
use crate::local::process::{ProcessError, ProcessSpec, Workers, log_tail};
use crate::text::duration;
use crate::view::JobView;

/// Time between SIGTERM and SIGKILL: enough to finish a training step and write a checkpoint; as on a cluster.
pub const GRACE: Duration = Duration::from_secs(30);
/// Exit code by which a program says that another attempt would fail in the same way: a bad configuration.
pub const EXIT_USAGE: i32 = 2;
/// How often progress is asked for.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// Lines of a failed worker's log that an error shows.
const TAIL_LINES: usize = 8;

/// What to start for one attempt.
#[derive(Debug)]
pub struct Attempt {
    /// The processes of all roles, in order of their ranks.
    pub processes: Vec<ProcessSpec>,
    /// Address of rank 0's `/progress`, if it has one.
    pub progress: Option<String>,
    /// Where the result will be.
    pub result: PathBuf,
    /// The ports that the processes will listen on, kept from others until then.
    pub reserved: FreePorts,
}

/// How long, and how often, a job may try.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Attempts after the first.
    pub max_restarts: u32,
    /// Time for all attempts together.
    pub deadline: Option<Duration>,
    /// Time between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// Time between an attempt and the next.
    pub pause: Duration,
}

/// A job that succeeded.
#[derive(Debug)]
pub struct Finished {
    /// What the job says of itself.
    pub result: RunResult,
    /// How many attempts it took.
    pub attempts: u32,
}

/// A job that failed for good.
#[derive(Debug, thiserror::Error)]
#[error("{job} failed{}: {reason}", after(*attempts))]
pub struct JobFailure {
    /// `KIND/NAME`.
    pub job: String,
    /// How many attempts were made.
    pub attempts: u32,
    /// What was wrong with the last one.
    pub reason: String,
    /// The last lines of the failed worker's log, as a person reads them.
    pub tail: Vec<String>,
    /// The whole log.
    pub log: Option<PathBuf>,
    /// What the job itself says of the failure; a refused candidate has its gate here.
    pub result: Option<RunResult>,
}

fn after(attempts: u32) -> String {
    if attempts > 1 { format!(" after {attempts} attempts") } else { String::new() }
}

/// Starts attempts until one succeeds or the budget is spent. `prepare` gives what to start, with the attempt's number
/// counted from 1; each attempt gets new ports that way.
///
/// # Errors
/// [`Error::Job`] when the job failed, [`Error::Interrupted`] when we were asked to stop; no process is left either way.
pub async fn run(
    job: &str,
    mut prepare: impl FnMut(u32) -> Result<Attempt, Error>,
    budget: Budget,
    view: &mut JobView,
    interrupt: &Interrupt,
) -> Result<Finished, Error> {
    let deadline = budget.deadline.map(|limit| (Instant::now() + limit, limit));
    let mut attempts = 0;
    loop {
        attempts += 1;
        let mut attempt = prepare(attempts)?;
        let end = run_once(&mut attempt, budget.grace, deadline, view, interrupt).await?;
        let mut failure = match end {
            Ok(result) => return Ok(Finished { result, attempts }),
            Err(failure) => failure,
        };
        if failure.is_final || attempts > budget.max_restarts {
            job.clone_into(&mut failure.failure.job);
            failure.failure.attempts = attempts;
            return Err(Error::Job(failure.failure));
        }
        view.note(&format!(
            "{}; starting again ({attempts} of {} restarts)",
            failure.failure.reason, budget.max_restarts
        ));
        tokio::select! {
            () = tokio::time::sleep(budget.pause) => {}
            () = interrupt.asked() => return Err(Error::Interrupted),
        }
    }
}

impl JobFailure {
    /// A failure of which nothing but the reason is known yet.
    pub fn new(reason: String) -> Self {
        Self { job: String::new(), attempts: 0, reason, tail: Vec::new(), log: None, result: None }
    }
}

struct AttemptFailure {
    failure: Box<JobFailure>,
    /// Whether another attempt would end in the same way.
    is_final: bool,
}

impl AttemptFailure {
    fn new(reason: String) -> Self {
        Self { failure: Box::new(JobFailure::new(reason)), is_final: false }
    }
}

async fn run_once(
    attempt: &mut Attempt,
    grace: Duration,
    deadline: Option<(Instant, Duration)>,
    view: &mut JobView,
    interrupt: &Interrupt,
) -> Result<Result<RunResult, AttemptFailure>, Error> {
    match std::fs::remove_file(&attempt.result) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("remove", &attempt.result)(error));
        }
        _ => {}
    }
    drop(std::mem::take(&mut attempt.reserved));
    let mut workers = Workers::start(&attempt.processes, grace)?;
    let end = tokio::select! {
        end = workers.finish() => end,
        never = show_progress(attempt.progress.as_deref(), view) => match never {},
        () = interrupt.asked() => {
            view.note("stopping; Ctrl-C again to not wait for it");
            workers.stop(interrupt.insisted()).await;
            return Err(Error::Interrupted);
        }
        limit = passed(deadline) => {
            workers.stop(interrupt.insisted()).await;
            let reason = format!("it ran for longer than activeDeadlineSeconds allows ({})", duration(limit.as_secs_f64()));
            return Ok(Err(AttemptFailure { is_final: true, ..AttemptFailure::new(reason) }));
        }
    };
    Ok(judge(attempt, end))
}

/// What an attempt's exit codes and its result file say together.
fn judge(attempt: &Attempt, end: Result<(), ProcessError>) -> Result<RunResult, AttemptFailure> {
    let result = std::fs::read(&attempt.result).ok().and_then(|bytes| serde_json::from_slice::<RunResult>(&bytes).ok());
    let mut failed = match (end, &result) {
        (Err(error), _) => blame(attempt, &error, result.as_ref()),
        (Ok(()), None) => AttemptFailure::new("it ended without a result".to_owned()),
        (Ok(()), Some(result)) if result.state == RunState::Succeeded => return Ok(result.clone()),
        (Ok(()), Some(result)) => AttemptFailure::new(result.message.clone()),
    };
    // A gate's verdict is a measurement; measuring again would not change it.
    failed.is_final |= result.as_ref().is_some_and(|result| result.gate.is_some());
    failed.failure.result = result;
    Err(failed)
}

fn blame(attempt: &Attempt, error: &ProcessError, result: Option<&RunResult>) -> AttemptFailure {
    let is_final = matches!(error, ProcessError::Failed { status, .. } if status.code() == Some(EXIT_USAGE));
    AttemptFailure { failure: Box::new(failure_of(attempt, error, result)), is_final }
}

/// Who failed, and in whose words: the job's own where the failed process is the one that reports, else its log's.
pub fn failure_of(attempt: &Attempt, error: &ProcessError, result: Option<&RunResult>) -> JobFailure {
    let mut failure = JobFailure::new(error_line(error));
    let ProcessError::Failed { index, .. } = error else { return failure };
    let reported = result.filter(|result| result.state == RunState::Failed);
    let process = attempt.processes.get(*index);
    match (index, reported, process) {
        (0, Some(result), _) => failure.reason.clone_from(&result.message),
        (_, _, Some(process)) => {
            failure.tail = log_tail(&process.log, TAIL_LINES).iter().map(|line| readable(line)).collect();
        }
        _ => {}
    }
    failure.log = process.map(|process| process.log.clone());
    failure
}

async fn passed(deadline: Option<(Instant, Duration)>) -> Duration {
    match deadline {
        Some((at, limit)) => {
            tokio::time::sleep_until(at.into()).await;
            limit
        }
        None => std::future::pending().await,
    }
}

/// Polls and shows progress for ever; without an address, waits for ever.
async fn show_progress(address: Option<&str>, view: &mut JobView) -> Infallible {
    let Some(address) = address else { return std::future::pending().await };
    loop {
        if let Some((200, body)) = http::get(address, "/progress").await
            && let Ok(progress) = serde_json::from_slice::<Progress>(&body)
        {
            view.update(&progress);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// A JSON log line as `LEVEL message key=value`; any other line as it is.
fn readable(line: &str) -> String {
    let Ok(serde_json::Value::Object(mut fields)) = serde_json::from_str(line) else { return line.to_owned() };
    let mut take = |key: &str| fields.remove(key).map(|value| value.as_str().map_or(value.to_string(), str::to_owned));
    let (Some(level), Some(message)) = (take("level"), take("message")) else { return line.to_owned() };
    let mut text = format!("{level} {message}");
    for (key, value) in &fields {
        if !matches!(key.as_str(), "service" | "timestamp" | "target" | "spans" | "span") {
            let _ = write!(text, " {key}={}", value.as_str().map_or(value.to_string(), str::to_owned));
        }
    }
    text
}

#[cfg(test)]
mod tests;

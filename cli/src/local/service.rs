//! A server that runs beside the command, from its start to its end.

use std::time::Duration;

use sensorium_operator::plan::WorkloadPlan;

use crate::error::Error;
use crate::http;
use crate::local::interrupt::Interrupt;
use crate::local::job::{Attempt, GRACE, JobFailure, failure_of};
use crate::local::process::{ProcessError, Workers};
use crate::text::duration;

/// Time between two looks at a server that is not ready yet.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// A server that is not ready by then never will be: it reads one artifact from a local disk.
const READY_TIMEOUT: Duration = Duration::from_mins(2);

/// A running server. Dropping it kills it.
pub struct Service {
    job: String,
    attempt: Attempt,
    workers: Workers,
}

impl Service {
    /// Starts the processes and waits until each of `probes` (`HOST:PORT`, path) answers 200.
    ///
    /// # Errors
    /// [`Error::Job`] when a process ends or is not ready in time; [`Error::Interrupted`]. No process is left then.
    pub async fn start(
        plan: &WorkloadPlan,
        mut attempt: Attempt,
        probes: &[(String, String)],
        interrupt: &Interrupt,
    ) -> Result<Self, Error> {
        let job = plan.job.to_string();
        drop(std::mem::take(&mut attempt.reserved));
        let mut workers = Workers::start(&attempt.processes, GRACE)?;
        let reason = tokio::select! {
            () = all_ready(probes) => return Ok(Self { job, attempt, workers }),
            end = workers.finish() => return Err(ended(&job, &attempt, end)),
            () = interrupt.asked() => None,
            () = tokio::time::sleep(READY_TIMEOUT) => Some(format!("it was not ready within {}", duration(READY_TIMEOUT.as_secs_f64()))),
        };
        workers.stop(interrupt.insisted()).await;
        Err(reason.map_or(Error::Interrupted, |reason| failed(&job, &attempt, reason)))
    }

    /// Waits until the server ends, which it should not.
    ///
    /// # Errors
    /// Always, in the end.
    pub async fn watch(&mut self) -> Error {
        let end = self.workers.finish().await;
        ended(&self.job, &self.attempt, end)
    }

    /// Lets requests in flight finish and ends the server.
    pub async fn stop(mut self, interrupt: &Interrupt) {
        self.workers.stop(interrupt.insisted()).await;
    }
}

async fn all_ready(probes: &[(String, String)]) {
    for (address, path) in probes {
        while !matches!(http::get(address, path).await, Some((200, _))) {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

fn ended(job: &str, attempt: &Attempt, end: Result<(), ProcessError>) -> Error {
    match end {
        Ok(()) => failed(job, attempt, "the server ended by itself".to_owned()),
        Err(error) => {
            Error::Job(Box::new(JobFailure { job: job.to_owned(), attempts: 1, ..failure_of(attempt, &error, None) }))
        }
    }
}

fn failed(job: &str, attempt: &Attempt, reason: String) -> Error {
    let log = attempt.processes.first().map(|process| process.log.clone());
    let failure = JobFailure { log, ..JobFailure::new(reason) };
    Error::Job(Box::new(JobFailure { job: job.to_owned(), attempts: 1, ..failure }))
}

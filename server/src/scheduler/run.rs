//! The thread that owns an engine.

use std::time::Instant;

use sensorium_engine::Engine;
use tokio_util::sync::CancellationToken;

use super::{
    Done, ScheduleError, Work,
    admit::{Job, Queue},
    batch,
};
use crate::model::Timings;

/// Runs batches until the queue is closed and empty.
pub(super) fn serve(mut engine: Box<dyn Engine>, queue: &Queue, lost: CancellationToken) {
    let _watch = Watch { queue, lost };
    let mut was_busy = false;
    while let Some(jobs) = queue.next_batch(was_busy) {
        run_batch(engine.as_mut(), queue, jobs);
        was_busy = true;
    }
}

/// Tells everybody when the thread ends, also when the engine panics: callers that wait, and whoever keeps the process.
struct Watch<'a> {
    queue: &'a Queue,
    lost: CancellationToken,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if self.queue.abandon() {
            tracing::error!(graph = self.queue.graph, "the engine's thread ended unasked");
            self.lost.cancel();
        }
    }
}

fn run_batch(engine: &mut dyn Engine, queue: &Queue, jobs: Vec<Job>) {
    let taken = Instant::now();
    for job in &jobs {
        queue.metrics.queued(taken.saturating_duration_since(job.admitted));
    }
    match run_together(engine, queue, &jobs, taken) {
        Ok(answers) => {
            for (job, answer) in jobs.into_iter().zip(answers) {
                // A caller that left does not want its answer.
                let _ = job.reply.send(Ok(answer));
            }
        }
        Err(error) if jobs.len() == 1 => {
            if let Some(job) = jobs.into_iter().next() {
                let _ = job.reply.send(Err(error));
            }
        }
        // One member's values may have failed all of them, and only a run of its own shows whose.
        Err(error) => {
            tracing::debug!(graph = queue.graph, requests = jobs.len(), %error, "batch failed, running each alone");
            for job in jobs {
                if !job.reply.is_closed() {
                    let answer = run_together(engine, queue, std::slice::from_ref(&job), taken);
                    let _ = job.reply.send(answer.map(|mut answers| answers.remove(0)));
                }
            }
        }
    }
}

/// Runs the rows of all jobs at once: an answer for each.
fn run_together(
    engine: &mut dyn Engine,
    queue: &Queue,
    jobs: &[Job],
    taken: Instant,
) -> Result<Vec<Done>, ScheduleError> {
    let works: Vec<&Work> = jobs.iter().map(|job| &job.work).collect();
    let rows = works.iter().map(|work| work.rows).sum();
    let failed = |source| ScheduleError::Engine { graph: queue.graph.clone(), source: Box::new(source) };
    let unfit = || ScheduleError::Outputs { graph: queue.graph.clone(), rows };

    let span = tracing::info_span!(parent: None, "batch", model = queue.graph, rows, requests = jobs.len());
    for job in jobs {
        span.follows_from(&job.span);
    }
    let _entered = span.entered();
    let started = Instant::now();
    let (inputs, wanted) = batch::join(&works).map_err(|_| unfit())?;
    let joined = Instant::now();
    let found = engine.run_raw(&inputs, &wanted).map_err(failed)?;
    let ran = Instant::now();
    let outputs = batch::split(&works, &wanted, &found).ok_or_else(unfit)?;
    let timings = Timings {
        compute_input: joined - started,
        compute_infer: ran - joined,
        compute_output: ran.elapsed(),
        batch_size: rows,
        ..Timings::default()
    };
    queue.metrics.ran(rows, jobs.len(), timings.compute_infer);
    queue.statistics.executed(rows, &timings);
    queue.note_success();
    let done = |(outputs, job): (Vec<_>, &Job)| Done {
        outputs,
        timings: Timings { queue: taken.saturating_duration_since(job.admitted), ..timings },
    };
    Ok(outputs.into_iter().zip(jobs).map(done).collect())
}

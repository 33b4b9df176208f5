//! The thread that owns an engine.

use std::time::Instant;

use sensorium_engine::{Engine, EngineError, Named};
use tokio_util::sync::CancellationToken;

use super::{
    ScheduleError, Work,
    admit::{Job, Queue},
    batch,
};

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
    for job in &jobs {
        queue.metrics.queued(job.admitted.elapsed());
    }
    if jobs.len() > 1 {
        match run_together(engine, queue, &jobs) {
            Ok(answers) => {
                for (job, answer) in jobs.into_iter().zip(answers) {
                    // A caller that left does not want its answer.
                    let _ = job.reply.send(Ok(answer));
                }
                return;
            }
            // One member's values may have failed all of them, and only a run of its own shows whose.
            Err(error) => {
                tracing::debug!(graph = queue.graph, requests = jobs.len(), %error, "batch failed, running each alone");
            }
        }
    }
    for job in jobs {
        if job.reply.is_closed() {
            continue;
        }
        let answer = run_one(engine, queue, job.work, &[&job.span]);
        let answer =
            answer.map_err(|source| ScheduleError::Engine { graph: queue.graph.clone(), source: Box::new(source) });
        let _ = job.reply.send(answer);
    }
}

fn run_together(engine: &mut dyn Engine, queue: &Queue, jobs: &[Job]) -> Result<Vec<Named>, ScheduleError> {
    let works: Vec<&Work> = jobs.iter().map(|job| &job.work).collect();
    let unfit = |source| ScheduleError::Outputs {
        graph: queue.graph.clone(),
        rows: works.iter().map(|work| work.rows).sum(),
        source,
    };
    let joined = batch::join(&works).map_err(unfit)?;
    let spans: Vec<_> = jobs.iter().map(|job| &job.span).collect();
    let outputs = run_one(engine, queue, joined, &spans)
        .map_err(|source| ScheduleError::Engine { graph: queue.graph.clone(), source: Box::new(source) })?;
    batch::split(&works, &outputs).map_err(unfit)
}

fn run_one(
    engine: &mut dyn Engine,
    queue: &Queue,
    work: Work,
    members: &[&tracing::Span],
) -> Result<Named, EngineError> {
    let rows = work.rows;
    let span = tracing::info_span!(parent: None, "batch", model = queue.graph, rows, requests = members.len());
    for member in members {
        span.follows_from(*member);
    }
    let _entered = span.entered();
    let started = Instant::now();
    let outputs = engine.run(work.inputs, &work.outputs);
    if outputs.is_ok() {
        queue.metrics.ran(rows, members.len(), started.elapsed());
        queue.note_success();
    }
    outputs
}

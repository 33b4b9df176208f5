//! Who runs batches: the scheduler's threads, and callers where that is quicker than to wake one.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use sensorium_engine::Engine;

use super::{
    Reopen,
    admit::{Queue, Task},
    outbox::Outbox,
    run::{Ready, Runner},
    slots::Held,
    state::Job,
};

/// First pause before a dead engine is replaced, and the longest; it doubles from one to the other.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A thread that runs batches, and replaces engines that die.
pub(super) struct Server {
    pub(super) runner: Arc<Runner>,
    pub(super) reopen: Option<Reopen>,
    /// Held by every thread that may still run something.
    pub(super) alive: Arc<()>,
}

impl Server {
    /// Runs batches until the queue is closed and empty. An engine that dies is replaced after a pause; the requests that
    /// died with it are told.
    pub(super) fn serve(self) {
        let Self { runner, reopen, alive } = self;
        let queue = &runner.queue;
        let (mut back, mut outbox) = (None, Outbox::default());
        let (mut pause, mut replaced) = (FIRST_PAUSE, Instant::now());
        while let Some(task) = queue.take(back.take(), &mut outbox) {
            if let Task::Run(jobs, ready) = task {
                back = runner.survive(ready, jobs, None, &mut outbox);
                if outbox.is_due(Instant::now()) {
                    queue.deliver(&mut outbox);
                }
                if back.is_some() {
                    continue;
                }
            }
            queue.deliver(&mut outbox);
            if replaced.elapsed() > LONGEST_PAUSE {
                pause = FIRST_PAUSE;
            }
            let Some(engine) = reopen.as_ref().and_then(|reopen| replace(queue, reopen, &mut pause)) else {
                // One thread fewer; the last one tells everybody.
                if Arc::into_inner(alive).is_some() && queue.abandon() {
                    tracing::error!(graph = queue.graph, "the last engine died");
                    runner.lost.cancel();
                }
                return;
            };
            (back, replaced) = (Some(Ready::new(engine)), Instant::now());
        }
    }
}

/// An engine in the place of one that died, after a pause; `None` where the queue was closed meanwhile.
fn replace(queue: &Queue, reopen: &Reopen, pause: &mut Duration) -> Option<Box<dyn Engine>> {
    loop {
        tracing::error!(
            graph = queue.graph,
            pause_seconds = pause.as_secs_f64(),
            "an engine died and is replaced after a pause"
        );
        let is_open = queue.pause(Instant::now() + *pause);
        *pause = (*pause * 2).min(LONGEST_PAUSE);
        if !is_open {
            return None;
        }
        match reopen() {
            Ok(engine) => return Some(engine),
            Err(error) => tracing::error!(graph = queue.graph, error, "the engine could not be opened again"),
        }
    }
}

/// A caller's promise to run the next batch. Dropping it breaks it: a thread is told.
#[derive(Debug)]
pub(super) struct Turn {
    runner: Arc<Runner>,
    is_kept: bool,
}

impl Turn {
    /// Makes the promise in the name of a caller, and keeps it beside him.
    pub(super) fn spawn(runner: &Arc<Runner>) {
        let turn = Self { runner: runner.clone(), is_kept: false };
        if let Some(runtime) = &runner.queue.runtime {
            runtime.spawn(turn.boxed());
        }
    }

    /// Runs the next batch, if it will be quick. While more comes, what brings it goes first.
    async fn serve(mut self) {
        let Runner { queue, share, .. } = &*self.runner;
        let mut rows = queue.rows();
        loop {
            tokio::task::yield_now().await;
            let before = std::mem::replace(&mut rows, queue.rows());
            if rows <= before || rows >= queue.policy.max_rows {
                break;
            }
        }
        self.is_kept = true;
        let Some((jobs, ready, held)) = queue.take_now(share) else { return };
        let mut outbox = Outbox::default();
        queue.leave_runtime_to_others();
        let back = self.runner.survive(ready, jobs, Some(held), &mut outbox);
        outbox.deliver();
        let Some(ready) = back else { return queue.lose() };
        if queue.give_back(ready) {
            // Whoever waits for this thread comes first.
            Self::spawn(&self.runner);
        }
    }

    /// As [`Turn::serve`]: boxed, since a future cannot hold one of its own kind.
    fn boxed(self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.serve())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.is_kept {
            self.runner.queue.break_promise();
        }
    }
}

impl Runner {
    /// Runs `jobs`: the engine again, unless it died. What a panic leaves behind is dropped: the engine, and the batch with
    /// its callers' replies.
    fn survive(&self, mut ready: Ready, jobs: Vec<Job>, held: Option<Held<'_>>, outbox: &mut Outbox) -> Option<Ready> {
        catch_unwind(AssertUnwindSafe(|| {
            self.run_batch(&mut ready, jobs, held, outbox);
            ready
        }))
        .ok()
    }
}

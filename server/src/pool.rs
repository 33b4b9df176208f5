//! CPU work that would block the async threads: decoding images, tokenising.

use std::sync::Arc;

use tokio::sync::Semaphore;

/// Runs a few pieces of work at a time, lets some more wait, and refuses the rest. Clones share the limits.
#[derive(Clone, Debug)]
pub struct CpuPool {
    /// Who may wait or run.
    places: Arc<Semaphore>,
    /// Who may run.
    cores: Arc<Semaphore>,
    limit: usize,
}

/// Why work was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Too much of it waits. Trying again later may succeed.
    #[error("{limit} requests are being prepared already; try again later")]
    Overloaded {
        /// How many may be.
        limit: usize,
    },
    /// The work panicked, or the process is about to end.
    #[error("the work was cut short")]
    CutShort,
}

impl CpuPool {
    /// At most `running` at a time, while up to `waiting` wait.
    pub fn new(running: usize, waiting: usize) -> Self {
        let limit = running.saturating_add(waiting).min(Semaphore::MAX_PERMITS);
        Self { places: Arc::new(Semaphore::new(limit)), cores: Arc::new(Semaphore::new(running.min(limit))), limit }
    }

    /// Runs `work` on a thread of its own. Dropping the future while it waits withdraws it; work that has begun goes on
    /// and keeps its place to the end, so that the limits hold whatever callers do.
    ///
    /// # Errors
    /// [`PoolError`].
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, PoolError> {
        let place = self.places.clone().try_acquire_owned().map_err(|_| PoolError::Overloaded { limit: self.limit })?;
        let core = self.cores.clone().acquire_owned().await.map_err(|_| PoolError::CutShort)?;
        let span = tracing::Span::current();
        let work = move || {
            let _held = (place, core);
            span.in_scope(work)
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| PoolError::CutShort)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_beyond_the_places_is_refused_at_once_and_places_come_back() {
        let pool = CpuPool::new(1, 1);
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let first = tokio::spawn({
            let pool = pool.clone();
            async move { pool.run(move || gate.recv().is_ok()).await }
        });
        let second = tokio::spawn({
            let pool = pool.clone();
            async move { pool.run(|| true).await }
        });
        while pool.places.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(pool.run(|| ()).await, Err(PoolError::Overloaded { limit: 2 }));
        second.abort();
        assert!(second.await.unwrap_err().is_cancelled());
        assert_eq!(pool.places.available_permits(), 1, "a caller that leaves gives its place back");
        release.send(()).unwrap();
        assert_eq!(first.await.unwrap(), Ok(true));
        assert_eq!(pool.run(|| 7).await, Ok(7));
    }

    #[tokio::test]
    async fn work_that_panics_is_an_error_and_costs_no_place() {
        let pool = CpuPool::new(1, 0);
        assert_eq!(pool.run(|| -> () { panic!("on purpose") }).await, Err(PoolError::CutShort));
        assert_eq!(pool.run(|| 7).await, Ok(7));
    }
}

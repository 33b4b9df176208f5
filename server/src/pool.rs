//! CPU work that would block the async threads: decoding images, tokenising.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Runs a few pieces of work at a time, lets some more requests wait, and refuses the rest. Clones share the limits.
#[derive(Clone, Debug)]
pub struct CpuPool {
    /// Who may wait or run.
    places: Arc<Semaphore>,
    /// Who may run.
    cores: Arc<Semaphore>,
    limit: usize,
    room: Arc<Room>,
}

/// A request that may run pieces of work, one after the other: each of them waits behind those of others that came before it.
#[derive(Debug)]
pub struct Place {
    pool: CpuPool,
    /// Shared with the work that runs, which may go on when this is gone.
    held: Arc<OwnedSemaphorePermit>,
}

/// Memory for what is being worked on.
#[derive(Debug)]
pub struct Room {
    bytes: u64,
    taken: Mutex<u64>,
    given: Condvar,
}

/// A part of it, until this is dropped.
#[derive(Debug)]
pub struct Taken<'a> {
    room: &'a Room,
    bytes: u64,
}

impl Room {
    fn new(bytes: u64) -> Self {
        Self { bytes, taken: Mutex::default(), given: Condvar::new() }
    }

    /// Waits until there are so many bytes, all of them for who wants more. Only for work that runs, which ends whatever becomes of
    /// others, and that takes room once.
    pub fn take(&self, bytes: u64) -> Taken<'_> {
        let bytes = bytes.min(self.bytes);
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let has_none = |taken: &mut u64| self.bytes - *taken < bytes;
        let mut taken = self.given.wait_while(taken, has_none).unwrap_or_else(PoisonError::into_inner);
        *taken += bytes;
        Taken { room: self, bytes }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.room.taken.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.room.given.notify_all();
    }
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
    /// At most `running` pieces at a time, which take `bytes` of memory, while up to `waiting` requests wait.
    pub fn new(running: usize, waiting: usize, bytes: u64) -> Self {
        let limit = running.saturating_add(waiting).min(Semaphore::MAX_PERMITS);
        Self {
            places: Arc::new(Semaphore::new(limit)),
            cores: Arc::new(Semaphore::new(running.min(limit))),
            limit,
            room: Arc::new(Room::new(bytes)),
        }
    }

    /// A place for a request.
    ///
    /// # Errors
    /// [`PoolError::Overloaded`].
    pub fn enter(&self) -> Result<Place, PoolError> {
        let held = self.places.clone().try_acquire_owned().map_err(|_| PoolError::Overloaded { limit: self.limit })?;
        Ok(Place { pool: self.clone(), held: Arc::new(held) })
    }
}

impl Place {
    /// Runs `work` on a thread of its own. Dropping the future while it waits withdraws it; work that has begun goes on
    /// and keeps its place to the end, so that the limits hold whatever callers do.
    ///
    /// # Errors
    /// [`PoolError::CutShort`].
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Room) -> T + Send + 'static) -> Result<T, PoolError> {
        let core = self.pool.cores.clone().acquire_owned().await.map_err(|_| PoolError::CutShort)?;
        let (held, room, span) = (self.held.clone(), self.pool.room.clone(), tracing::Span::current());
        let work = move || {
            let _held = (held, core);
            span.in_scope(|| work(&room))
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| PoolError::CutShort)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_beyond_the_places_is_refused_at_once_and_places_come_back() {
        let pool = CpuPool::new(1, 1, 1);
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let place = pool.enter().unwrap();
        let first = tokio::spawn(async move { place.run(move |_| gate.recv().is_ok()).await });
        let place = pool.enter().unwrap();
        let second = tokio::spawn(async move { place.run(|_| true).await });
        assert_eq!(pool.enter().unwrap_err(), PoolError::Overloaded { limit: 2 });
        second.abort();
        assert!(second.await.unwrap_err().is_cancelled());
        assert_eq!(pool.places.available_permits(), 1, "a caller that leaves gives its place back");
        release.send(()).unwrap();
        assert_eq!(first.await.unwrap(), Ok(true));
        assert_eq!(pool.enter().unwrap().run(|_| 7).await, Ok(7));
    }

    #[tokio::test]
    async fn work_that_panics_is_an_error_and_costs_no_place() {
        let pool = CpuPool::new(1, 0, 1);
        assert_eq!(pool.enter().unwrap().run(|_| -> () { panic!("on purpose") }).await, Err(PoolError::CutShort));
        assert_eq!(pool.enter().unwrap().run(|_| 7).await, Ok(7));
    }

    #[tokio::test]
    async fn a_request_of_many_pieces_lets_others_go_between_them_and_ends_with_its_caller() {
        let pool = CpuPool::new(1, 8, 1);
        let order = Arc::<Mutex<Vec<&str>>>::default();
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let (place, seen) = (pool.enter().unwrap(), order.clone());
        let long = tokio::spawn(async move {
            place.run(move |_| gate.recv().is_ok()).await?;
            for _ in 0..1000 {
                let seen = seen.clone();
                place.run(move |_| seen.lock().unwrap().push("long")).await?;
            }
            Ok::<_, PoolError>(())
        });
        while pool.cores.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let (place, seen) = (pool.enter().unwrap(), order.clone());
        let mut short = Box::pin(place.run(move |_| seen.lock().unwrap().push("short")));
        assert!(futures::poll!(&mut short).is_pending());
        release.send(()).unwrap();
        short.await.unwrap();
        assert!(order.lock().unwrap().iter().filter(|who| **who == "long").count() <= 1);
        long.abort();
        assert!(long.await.unwrap_err().is_cancelled());
        let done = order.lock().unwrap().len();
        assert!(done < 1000);
        assert_eq!(pool.enter().unwrap().run(|_| 7).await, Ok(7));
        assert!(order.lock().unwrap().len() <= done + 1, "but for the piece that had begun");
    }

    #[test]
    fn room_is_waited_for_and_who_wants_more_than_there_is_gets_all() {
        let room = Room::new(10);
        let (some, more) = (room.take(4), room.take(6));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(room.take(1000)));
            std::thread::sleep(std::time::Duration::from_millis(20));
            drop(some);
            assert!(!waiting.is_finished());
            drop(more);
            waiting.join().unwrap();
        });
        assert_eq!(*room.taken.lock().unwrap(), 0);
    }
}

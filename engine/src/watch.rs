//! Runs of a library, looked at from outside: one that nobody waits for any more is told to end.
//!
//! How long a run takes may depend on the values of a request, and not on what the last ones took. So each is looked at, by one
//! thread for all engines of the process, which costs a run that is quick no more than to be written down.
#![allow(unsafe_code, reason = "what is looked at lies with whoever runs it, as with scoped threads")]

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::engine::Waiters;

/// Time between looks, and before the first one.
const LOOK: Duration = Duration::from_millis(20);
/// So long after the last run the thread sleeps until the next one.
const IDLE: Duration = Duration::from_secs(10);

static WATCHED: Mutex<Watched> = Mutex::new(Watched { runs: Vec::new(), next: 0, thread: Thread::None });
static BEGUN: Condvar = Condvar::new();

/// All runs of this process that somebody waits for.
struct Watched {
    runs: Vec<Run>,
    next: u64,
    thread: Thread,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Thread {
    None,
    Looking,
    Asleep,
}

type PollGone = dyn FnMut(&mut Context<'_>) -> Poll<()> + Send;
type End = dyn Fn() -> bool;

struct Run {
    id: u64,
    since: Instant,
    deadline: Option<Instant>,
    poll_gone: *mut PollGone,
    end: *const End,
    is_cut: bool,
}

// SAFETY: both pointers are used under the lock alone, and as long as the run is among the others: see `watched`. What is behind the
// first is `Send`, and nobody else uses it meanwhile; the second only tells a library to end a run, which may be said by any thread.
unsafe impl Send for Run {}

impl Run {
    /// Tells it to end if nobody waits for it. One that cannot be told runs to its end.
    fn look(&mut self, now: Instant) {
        let is_late = self.deadline.is_some_and(|deadline| now >= deadline);
        let mut context = Context::from_waker(Waker::noop());
        // SAFETY: see above.
        if is_late || unsafe { (*self.poll_gone)(&mut context) }.is_ready() {
            // SAFETY: see above.
            self.is_cut = unsafe { (*self.end)() };
        }
    }
}

/// Runs `run` while `waiters` wait, and says whether it was told to end, by `end`, which may come from another thread and says whether
/// it could.
pub(crate) fn watched<R>(waiters: Waiters<'_>, end: &dyn Fn() -> bool, run: impl FnOnce() -> R) -> (R, bool) {
    let Waiters { deadline, poll_gone } = waiters;
    // SAFETY: only lifetimes are left out. The run is taken from the list before they end, also if it panics, and nobody looks at
    // it then: whoever looks holds the lock.
    let (poll_gone, end) = unsafe {
        (
            mem::transmute::<&mut (dyn FnMut(&mut Context<'_>) -> Poll<()> + Send), *mut PollGone>(poll_gone),
            mem::transmute::<&dyn Fn() -> bool, *const End>(end),
        )
    };
    let listed = Listed { id: enter(deadline, poll_gone, end) };
    let found = run();
    (found, listed.leave())
}

/// A run that is among the others until this is dropped.
struct Listed {
    id: u64,
}

impl Listed {
    /// Whether it was told to end.
    fn leave(self) -> bool {
        let is_cut = leave(self.id);
        mem::forget(self);
        is_cut
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        leave(self.id);
    }
}

fn leave(id: u64) -> bool {
    let mut watched = lock();
    let place = watched.runs.iter().position(|run| run.id == id);
    place.is_some_and(|place| watched.runs.swap_remove(place).is_cut)
}

fn enter(deadline: Option<Instant>, poll_gone: *mut PollGone, end: *const End) -> u64 {
    let mut watched = lock();
    let id = watched.next;
    watched.next += 1;
    watched.runs.push(Run { id, since: Instant::now(), deadline, poll_gone, end, is_cut: false });
    match watched.thread {
        Thread::Looking => {}
        Thread::Asleep => {
            watched.thread = Thread::Looking;
            BEGUN.notify_one();
        }
        Thread::None => match std::thread::Builder::new().name("sensorium-watch".to_owned()).spawn(look) {
            Ok(_) => watched.thread = Thread::Looking,
            Err(error) => tracing::warn!(%error, "nobody looks whether runs are still waited for"),
        },
    }
    id
}

/// Looks at all runs again and again.
fn look() {
    let mut watched = lock();
    let mut last = Instant::now();
    loop {
        let now = Instant::now();
        if !watched.runs.is_empty() {
            last = now;
        }
        watched = if now.duration_since(last) < IDLE {
            BEGUN.wait_timeout(watched, LOOK).unwrap_or_else(PoisonError::into_inner).0
        } else {
            watched.thread = Thread::Asleep;
            let asleep = |watched: &mut Watched| watched.thread == Thread::Asleep;
            BEGUN.wait_while(watched, asleep).unwrap_or_else(PoisonError::into_inner)
        };
        let now = Instant::now();
        for run in watched.runs.iter_mut().filter(|run| !run.is_cut && now.duration_since(run.since) >= LOOK) {
            // One that panics is not looked at again, and the others are.
            if catch_unwind(AssertUnwindSafe(|| run.look(now))).is_err() {
                run.is_cut = true;
            }
        }
    }
}

fn lock() -> MutexGuard<'static, Watched> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Runs until it is told to end, or for so long; whether it was told.
    fn run(deadline: Option<Instant>, poll_gone: &mut PollGone, longest: Duration) -> bool {
        let (told, begun) = (AtomicBool::new(false), Instant::now());
        let end = || {
            told.store(true, Ordering::Relaxed);
            true
        };
        let ((), is_cut) = watched(Waiters { deadline, poll_gone }, &end, || {
            while !told.load(Ordering::Relaxed) && begun.elapsed() < longest {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        assert_eq!(is_cut, told.load(Ordering::Relaxed));
        is_cut
    }

    #[test]
    fn a_run_ends_when_its_waiters_have_gone_or_their_time_is_over_and_no_other_does() {
        const LONG: Duration = Duration::from_mins(1);
        let soon = || Some(Instant::now() + Duration::from_millis(30));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert!(run(soon(), &mut |_| Poll::Pending, LONG)));
                scope.spawn(|| assert!(run(None, &mut |_| Poll::Ready(()), LONG)));
                scope.spawn(|| assert!(!run(None, &mut |_| Poll::Pending, Duration::from_millis(200))));
                scope.spawn(|| {
                    assert!(!run(Some(Instant::now() + LONG), &mut |_| Poll::Pending, Duration::from_millis(200)));
                });
            }
        });
    }

    #[test]
    fn a_run_that_panics_is_looked_at_no_more() {
        let mut asked = false;
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            watched(
                Waiters {
                    deadline: None,
                    poll_gone: &mut |_| {
                        asked = true;
                        Poll::Pending
                    },
                },
                &|| true,
                || panic!("on purpose"),
            )
        }));
        assert!(panicked.is_err());
        asked = false;
        std::thread::sleep(LOOK * 3);
        assert!(!asked);
    }
}

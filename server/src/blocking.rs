//! Work that would keep other requests waiting, where that does no harm.

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task,
};

/// Bytes that are read, written or copied where the request is; about a quarter of a millisecond of parsing.
const INLINE: usize = 256 << 10;

/// Runs `work` here when it is about few bytes, else on a thread for such work.
pub(crate) async fn aside<T: Send + 'static>(bytes: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
    if bytes <= INLINE {
        return work();
    }
    match task::spawn_blocking(work).await {
        Ok(done) => done,
        // It panicked, as it would have here; it is never cancelled.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Runs `work` here; when it is about many bytes, those who share this thread go elsewhere first. For where nobody can
/// wait.
pub(crate) fn in_place<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    let can_move = || Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread);
    if bytes > INLINE && can_move() { task::block_in_place(work) } else { work() }
}

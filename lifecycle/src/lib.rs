//! How a program of Sensorium is asked to end: SIGTERM, SIGINT, or the end of the process that started it.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Set to `1` by a parent that holds the other end of this process's standard input: its end means the same as SIGTERM,
/// so that not even a killed parent leaves processes behind.
pub const EXIT_WITH_PARENT: &str = "SENSORIUM_EXIT_WITH_PARENT";

/// Listens from this call on, so that nothing is lost during a slow start; what it returns completes when somebody asks.
/// Call it on a Tokio runtime. The signals never end this process by themselves again, however often they come.
///
/// # Errors
/// When the operating system refuses a signal handler.
pub fn asked_to_end() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let orphaned = orphaned();
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = orphaned => {}
        }
    })
}

/// Completes when the parent is gone, if it asked to be followed.
fn orphaned() -> impl Future<Output = ()> + Send + 'static {
    let (gone, ended) = oneshot::channel();
    let follows = std::env::var_os(EXIT_WITH_PARENT).is_some_and(|value| value == "1");
    if follows {
        // Reading blocks and cannot be cancelled; this thread ends with the process. Nothing is ever sent.
        std::thread::spawn(move || {
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            let _ = gone.send(());
        });
    }
    async move {
        if !follows || ended.await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

//! Ctrl-C and SIGTERM: the first asks, the second insists.
//!
//! SIGHUP keeps its default: it ends us, and the children leave when their standard input does, checkpoint written.

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::error::Error;

/// Whether, and how urgently, we were asked to stop. Lives as long as the run that it interrupts.
#[derive(Debug)]
pub struct Interrupt {
    first: CancellationToken,
    second: CancellationToken,
    listener: JoinHandle<()>,
}

impl Interrupt {
    /// Takes over SIGINT and SIGTERM. Must be called inside a Tokio runtime.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn install() -> std::io::Result<Self> {
        let (first, second) = (CancellationToken::new(), CancellationToken::new());
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let tokens = [first.clone(), second.clone()];
        let listener = tokio::spawn(async move {
            for token in tokens {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                token.cancel();
            }
        });
        Ok(Self { first, second, listener })
    }

    /// Completes once we were asked to stop.
    pub async fn asked(&self) {
        self.first.cancelled().await;
    }

    /// What `work` comes to, unless we are asked to stop before: for what leaves nothing behind when it is dropped.
    ///
    /// # Errors
    /// Those of `work`, and [`Error::Interrupted`].
    pub async fn or<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        tokio::select! {
            done = work => done,
            () = self.asked() => Err(Error::Interrupted),
        }
    }

    /// Whether we were asked to stop.
    pub fn is_asked(&self) -> bool {
        self.first.is_cancelled()
    }

    /// Fires when we were asked a second time.
    pub fn insisted(&self) -> &CancellationToken {
        &self.second
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

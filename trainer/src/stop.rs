//! When to stop: SIGTERM, SIGINT, or the end of the process that started this one.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};

/// Set to `1` by a parent that holds the other end of this process's standard input: its end means stop, so that not even
/// a killed parent leaves workers behind.
const EXIT_WITH_PARENT: &str = "SENSORIUM_EXIT_WITH_PARENT";

/// Becomes true once, and stays so. Cloning shares.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Whether somebody asked.
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Asks.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Listens for signals, and for the end of the parent where it asked for that. Call it on a Tokio runtime.
    ///
    /// # Errors
    /// When the operating system refuses a signal handler.
    pub fn listen(&self) -> std::io::Result<()> {
        for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
            let mut signals = signal(kind)?;
            let stop = self.clone();
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    stop.request();
                }
            });
        }
        if std::env::var_os(EXIT_WITH_PARENT).is_some_and(|value| value == "1") {
            let stop = self.clone();
            std::thread::spawn(move || {
                // Nothing is ever sent; read returns when the other end is closed.
                while matches!(std::io::stdin().read(&mut [0; 64]), Ok(1..)) {}
                stop.request();
            });
        }
        Ok(())
    }
}

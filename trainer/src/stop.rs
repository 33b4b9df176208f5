//! When to stop: a flag that the training loop looks at between steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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

    /// Asks as soon as this process is asked to end. Call it on a Tokio runtime.
    ///
    /// # Errors
    /// When the operating system refuses a signal handler.
    pub fn listen(&self) -> std::io::Result<()> {
        let (asked, stop) = (sensorium_lifecycle::asked_to_end()?, self.clone());
        tokio::spawn(async move {
            asked.await;
            stop.request();
        });
        Ok(())
    }
}

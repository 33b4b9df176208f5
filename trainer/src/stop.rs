//! When to stop: a flag that the training loop looks at between steps, and all that takes long before them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sensorium_dist::{ProcessGroup, ReduceOp};
use tch::Tensor;

use crate::error::TrainError;

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

    /// For what comes before the first step, where nothing is to be saved.
    ///
    /// # Errors
    /// [`TrainError::Stopped`] where somebody asked.
    pub fn check(&self) -> Result<(), TrainError> {
        if self.is_requested() { Err(TrainError::Stopped { step: 0, unsaved: None }) } else { Ok(()) }
    }

    /// As [`Stop::check`], with one answer for all ranks: one that left by itself would fail the others.
    ///
    /// # Errors
    /// [`TrainError::Stopped`] where somebody asked any rank.
    pub fn check_together(&self, group: &ProcessGroup) -> Result<(), TrainError> {
        let asked = Tensor::f_from_slice(&[f64::from(self.is_requested())])?;
        group.all_reduce(&asked, ReduceOp::Max)?.wait()?;
        if asked.f_double_value(&[0])? > 0.0 {
            self.request();
        }
        self.check()
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

//! What is recorded about every request, however it ends.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use tonic::{Code, Status};

use super::Service;
use crate::metrics::{Metrics, UNKNOWN_MODEL};

/// Counts one request when it is dropped: a call whose client goes away is dropped in the middle.
struct Observed<'a> {
    metrics: &'a Metrics,
    model: &'a str,
    version: &'a str,
    started: Instant,
    code: Code,
}

impl Drop for Observed<'_> {
    fn drop(&mut self) {
        self.metrics.request(self.model, self.version, self.code, self.started.elapsed());
    }
}

impl Service {
    /// Counts a request that was refused before anybody knew for which model it is.
    pub(crate) fn refused(&self, code: Code) {
        self.metrics.request(UNKNOWN_MODEL, "", code, Duration::ZERO);
    }

    /// Runs `answer`, a request to this name and version, and counts it; `None` is a model that this server does not have.
    /// Failures that are ours are logged here, the one place that sees them all.
    pub(super) async fn observed<T>(
        &self,
        model: Option<(&str, &str)>,
        answer: Pin<&mut impl Future<Output = Result<T, Status>>>,
    ) -> Result<T, Status> {
        // Labels are of what is served, so that clients cannot make up any.
        let (model, version) = model.unwrap_or((UNKNOWN_MODEL, ""));
        let started = Instant::now();
        let mut observed = Observed { metrics: &self.metrics, model, version, started, code: Code::Cancelled };
        let answer = answer.await;
        observed.code = answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
        if let Err(status) = &answer {
            match status.code() {
                Code::Internal => tracing::error!(model, message = status.message(), "request failed"),
                code => tracing::debug!(model, ?code, message = status.message(), "request refused"),
            }
        }
        answer
    }
}

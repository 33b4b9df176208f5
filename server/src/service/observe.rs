//! What is recorded about every request, however it ends.

use std::time::Instant;

use tonic::{Code, Response, Status};

use super::Service;
use crate::metrics::{Metrics, UNKNOWN_MODEL};

/// Counts one request when it is dropped: a call whose client goes away is dropped in the middle.
struct Observed<'a> {
    metrics: &'a Metrics,
    model: &'a str,
    started: Instant,
    code: Code,
}

impl Drop for Observed<'_> {
    fn drop(&mut self) {
        self.metrics.request(self.model, self.code, self.started.elapsed());
    }
}

impl Service {
    /// Runs `answer`, a request to `model`, and counts it. Failures that are ours are logged here, the one place that
    /// sees them all.
    pub(super) async fn observed<T>(
        &self,
        model: &str,
        is_served: bool,
        answer: impl Future<Output = Result<T, Status>>,
    ) -> Result<Response<T>, Status> {
        let model = if is_served { model } else { UNKNOWN_MODEL };
        let mut observed = Observed { metrics: &self.metrics, model, started: Instant::now(), code: Code::Cancelled };
        let answer = answer.await;
        observed.code = answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
        if let Err(status) = &answer {
            match status.code() {
                Code::Internal => tracing::error!(model, message = status.message(), "request failed"),
                code => tracing::debug!(model, ?code, message = status.message(), "request refused"),
            }
        }
        answer.map(Response::new)
    }
}

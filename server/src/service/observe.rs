//! What is recorded about every request, however it ends.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use tonic::{Code, Status};
use tracing::Span;

use super::Service;
use crate::{
    metrics::{Metrics, UNKNOWN_MODEL},
    spans,
};

/// Counts one request when it is dropped: a call whose client goes away is dropped in the middle.
struct Observed<'a> {
    metrics: &'a Metrics,
    model: &'a str,
    started: Instant,
    code: Code,
    /// That of the request.
    span: Span,
    /// What was wrong, where it was said.
    message: String,
}

impl Drop for Observed<'_> {
    fn drop(&mut self) {
        self.metrics.request(self.model, self.code, self.started.elapsed());
        match self.code {
            Code::Ok => spans::answered(&self.span),
            code => spans::failed(&self.span, code, &self.message),
        }
    }
}

impl Service {
    /// Counts a request that was refused before anybody knew for which model it is.
    pub(crate) fn refused(&self, code: Code) {
        self.metrics.request(UNKNOWN_MODEL, code, Duration::ZERO);
    }

    /// Counts a request for this name and version that could not be read.
    pub(crate) fn unread(&self, name: &str, version: &str, code: Code) {
        match self.model(name, version) {
            Ok(model) => {
                model.refused(code);
                self.metrics.request(model.name(), code, Duration::ZERO);
            }
            Err(_) => self.refused(code),
        }
    }

    /// Runs `answer`, a request to the model of this name, and counts it; `None` is a model that this server does not have.
    /// Failures that are ours are logged here, the one place that sees them all.
    pub(super) async fn observed<T>(
        &self,
        model: Option<&str>,
        answer: Pin<&mut impl Future<Output = Result<T, Status>>>,
    ) -> Result<T, Status> {
        // Labels are of what is served, so that clients cannot make up any.
        let model = model.unwrap_or(UNKNOWN_MODEL);
        let (started, span, message) = (Instant::now(), Span::current(), String::new());
        let mut observed = Observed { metrics: &self.metrics, model, started, code: Code::Cancelled, span, message };
        let answer = answer.await;
        observed.code = answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
        if let Err(status) = &answer {
            let error = status.message();
            if !observed.span.is_none() {
                error.clone_into(&mut observed.message);
            }
            match status.code() {
                Code::Internal => tracing::error!(model, error, "request failed"),
                code => tracing::debug!(model, ?code, error, "request refused"),
            }
        }
        answer
    }
}

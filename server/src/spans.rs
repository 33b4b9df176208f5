//! What spans say of requests: how they ended, and where their time went.

use sensorium_telemetry::record_end;
use tonic::Code;
use tracing::Span;

use crate::model::Timings;

/// There was an answer.
pub(crate) fn answered(span: &Span) {
    record_end(span, Code::Ok.into(), None);
}

/// There was none.
pub(crate) fn failed(span: &Span, code: Code, message: &str) {
    use Code::{DataLoss, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown};
    // As OpenTelemetry's conventions for servers of gRPC have it.
    let is_ours = matches!(code, Unknown | DeadlineExceeded | Unimplemented | Internal | Unavailable | DataLoss);
    record_end(span, code.into(), is_ours.then_some(message));
}

/// Where the time went.
pub(crate) fn timed(span: &Span, timings: &Timings) {
    // Most requests are not traced.
    if span.is_none() {
        return;
    }
    let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    span.record("cache_hit", timings.cache_hit);
    span.record("queue_us", micros(timings.queue));
    span.record("compute_input_us", micros(timings.compute_input));
    span.record("compute_infer_us", micros(timings.compute_infer));
    span.record("compute_output_us", micros(timings.compute_output));
}

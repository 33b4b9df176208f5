//! What comes with a request beside its message.

use std::time::{Duration, Instant};

use sensorium_telemetry::Parent;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::codegen::http::HeaderMap;

/// One call, over gRPC or HTTP.
#[derive(Clone, Debug)]
pub struct Call {
    /// When its caller stops waiting.
    pub deadline: Option<Instant>,
    /// The trace that it is part of.
    pub parent: Option<Parent>,
    /// Its place among those that the drain waits for, where it has one before its body has come.
    pub(super) running: Option<TaskTrackerToken>,
}

impl Call {
    /// Reads the headers of a call that arrives now: `grpc-timeout`, `traceparent`, `tracestate`.
    pub fn new(headers: &HeaderMap) -> Self {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let timeout = text("grpc-timeout").and_then(timeout);
        Self {
            // A deadline beyond what the clock can count is none.
            deadline: timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
            parent: text("traceparent").and_then(|parent| Parent::parse(parent, text("tracestate"))),
            running: None,
        }
    }
}

/// The duration that `grpc-timeout` spells: at most eight digits and a unit.
fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        assert_eq!(timeout("1H"), Some(Duration::from_hours(1)));
        assert_eq!(timeout("99999999u"), Some(Duration::from_micros(99_999_999)));
        assert_eq!(timeout("250m"), Some(Duration::from_millis(250)));
        for wrong in ["", "m", "5", "-1S", "123456789S", "1s", "1é"] {
            assert_eq!(timeout(wrong), None, "{wrong}");
        }
    }
}

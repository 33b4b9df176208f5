//! Logs, traces and metric names of every Sensorium program, set up in one place.
//!
//! A program calls [`init`] once, first thing in `main`; one that exports traces or changes its log level while it runs
//! calls [`start`] and keeps the [`Telemetry`] that it returns. Metrics are declared by the [`metrics`] table, which
//! `docs/metrics.md` describes; a test holds the two together.
//!
//! ```
//! sensorium_telemetry::init("sensorium-example")?;
//! tracing::info!(step = 7, "saved a checkpoint");
//! # Ok::<(), sensorium_telemetry::InitError>(())
//! ```

mod logs;
pub mod metrics;
mod sampling;
mod traces;

use std::time::Duration;

use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::{
    Layer as _,
    layer::SubscriberExt as _,
    util::{SubscriberInitExt as _, TryInitError},
};

pub use logs::{FilterError, LogControl};
pub use sampling::{Sampling, SetSampling, TraceControl};
pub use traces::{Parent, batch_span, record_end, step_span};

/// An error and its causes in one line, as logs and messages want them.
///
/// ```
/// # #[derive(Debug, thiserror::Error)]
/// # #[error("cannot read the file")]
/// # struct Read(#[source] std::io::Error);
/// let error = Read(std::io::Error::other("disk on fire"));
/// assert_eq!(sensorium_telemetry::error_line(&error), "cannot read the file: disk on fire");
/// ```
pub fn error_line(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |line, cause| {
        let cause = cause.to_string();
        // Some errors have their cause's words among their own.
        if line.contains(&cause) { line } else { format!("{line}: {cause}") }
    })
}

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// `SENSORIUM_LOG` does not parse.
    #[error("the environment variable {variable} cannot be used", variable = logs::FILTER_VARIABLE)]
    Filter(#[from] FilterError),
    /// The exporter of traces refuses its endpoint.
    #[error("traces cannot be exported to {endpoint:?}; write an OTLP gRPC endpoint such as http://127.0.0.1:4317")]
    Exporter {
        /// As configured.
        endpoint: String,
        /// What is wrong with it.
        source: opentelemetry_otlp::ExporterBuildError,
    },
    /// Telemetry was set up before in this process, or another subscriber is installed.
    #[error("logging is set up already")]
    AlreadySet(#[source] TryInitError),
}

/// What [`start`] sets up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Names the program in every line and span.
    pub service: &'static str,
    /// Where spans go by OTLP over gRPC, such as `http://127.0.0.1:4317`; `None` exports nothing and costs nothing.
    pub otlp_endpoint: Option<String>,
    /// Which requests are traced.
    pub sampling: Sampling,
    /// How lines are written.
    pub lines: Lines,
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lines {
    /// By whoever has something to say, who waits for whoever reads it: the last word of a process that is killed is there.
    AtOnce,
    /// By a thread of their own: nobody waits for whoever reads them, and where 8,192 wait, more are dropped.
    Aside,
}

/// How long the end of a program waits for its last spans to be taken.
const LAST_SPANS: Duration = Duration::from_secs(1);

/// What can be changed while the program runs, and must be ended with it.
#[derive(Debug)]
pub struct Telemetry {
    /// The log level.
    pub logs: LogControl,
    /// Which requests are traced.
    pub traces: TraceControl,
    exporter: Option<opentelemetry_sdk::trace::SdkTracerProvider>,
    /// Writes the last lines of the log when it is dropped.
    _lines: Option<WorkerGuard>,
}

impl Telemetry {
    /// Sends the spans that are waiting to be exported, and the last lines. Blocks for up to a second when nobody takes them. What is said after
    /// this may not be written.
    pub fn shutdown(self) {
        if let Some(exporter) = self.exporter
            && let Err(error) = exporter.shutdown_with_timeout(LAST_SPANS)
        {
            tracing::warn!(%error, "the last spans could not be exported");
        }
    }
}

/// Sends the logs of this process to stderr, as they come: one JSON object per line that names `service`, or, where stderr is a
/// terminal, lines for people. `SENSORIUM_LOG` chooses the levels, `info` by default. Exports no traces.
///
/// # Errors
/// [`InitError::Filter`] when `SENSORIUM_LOG` does not parse; [`InitError::AlreadySet`] on a second call.
pub fn init(service: &'static str) -> Result<(), InitError> {
    let (filter, _) = logs::filter(std::env::var(logs::FILTER_VARIABLE).ok())?;
    let lines = logs::lines(service, std::io::stderr).with_filter(filter);
    tracing_subscriber::registry().with(lines).try_init().map_err(InitError::AlreadySet)
}

/// As [`init`], and sends spans to a collector. With an endpoint this must run inside a Tokio runtime, which carries
/// the connection.
///
/// # Errors
/// As [`init`], and [`InitError::Exporter`].
pub fn start(options: Options) -> Result<Telemetry, InitError> {
    let (filter, mut logs) = logs::filter(std::env::var(logs::FILTER_VARIABLE).ok())?;
    let exporter = options.otlp_endpoint.map(|endpoint| traces::exporter(options.service, endpoint)).transpose()?;
    let spans = exporter.as_ref().map(traces::layer);
    let (lines, guard) = match options.lines {
        Lines::AtOnce => (logs::lines(options.service, std::io::stderr), None),
        Lines::Aside => {
            let (writer, guard) = logs::aside();
            logs.dropped = Some(writer.error_counter());
            (logs::lines(options.service, writer), Some(guard))
        }
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(logs::WithRequests(filter)))
        .with(spans)
        .try_init()
        .map_err(InitError::AlreadySet)?;
    let traces = TraceControl::new(exporter.is_some(), options.sampling);
    Ok(Telemetry { logs, traces, exporter, _lines: guard })
}

#[cfg(test)]
mod tests {
    use super::error_line;

    #[test]
    fn an_error_says_its_causes_once_each() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read the file")]
        struct Read(#[source] std::io::Error);
        #[derive(Debug, thiserror::Error)]
        #[error(transparent)]
        struct Wrapped(Read);
        let error = Wrapped(Read(std::io::Error::other("disk on fire")));
        assert_eq!(error_line(&error), "cannot read the file: disk on fire");
    }
}

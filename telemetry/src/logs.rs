//! Where log lines go and what they look like.

use std::{fmt, io::IsTerminal as _};

use tracing::{Event, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::ParseError,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Json, JsonFields, Writer},
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
    util::{SubscriberInitExt as _, TryInitError},
};

/// The environment variable that chooses what is logged.
const FILTER_VARIABLE: &str = "SENSORIUM_LOG";
const DEFAULT_FILTER: &str = "info";

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// `SENSORIUM_LOG` does not parse.
    #[error(
        "{FILTER_VARIABLE}={value:?} is not a log filter; write a level (debug) or levels by target (info,sensorium_server=debug)"
    )]
    Filter {
        /// What the variable holds.
        value: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// `init` ran before in this process, or another subscriber is installed.
    #[error("logging is set up already")]
    AlreadySet(#[source] TryInitError),
}

/// Sends the logs of this process to stderr: one JSON object per line that names `service`, or, where stderr is a
/// terminal, lines for people. `SENSORIUM_LOG` chooses the levels, `info` by default.
///
/// # Errors
/// [`InitError::Filter`] when `SENSORIUM_LOG` does not parse; [`InitError::AlreadySet`] on a second call.
pub fn init(service: &'static str) -> Result<(), InitError> {
    let filter = filter(std::env::var(FILTER_VARIABLE).ok())?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = if std::io::stderr().is_terminal() {
        lines.with_target(false).boxed()
    } else {
        lines.fmt_fields(JsonFields::new()).event_format(JsonLine::new(service)).boxed()
    };
    tracing_subscriber::registry().with(filter).with(lines).try_init().map_err(InitError::AlreadySet)
}

/// An unset or empty variable means the default, as with most programs.
fn filter(value: Option<String>) -> Result<EnvFilter, InitError> {
    let value = value.filter(|value| !value.is_empty()).unwrap_or_else(|| DEFAULT_FILTER.to_owned());
    EnvFilter::builder().parse(&value).map_err(|source| InitError::Filter { value, source })
}

/// The JSON format of `tracing-subscriber` with the event's fields at the top level, led by the service's name.
struct JsonLine {
    service: &'static str,
    inner: Format<Json>,
}

impl JsonLine {
    fn new(service: &'static str) -> Self {
        Self { service, inner: tracing_subscriber::fmt::format().json().flatten_event(true).with_current_span(false) }
    }
}

impl<S, N> FormatEvent<S, N> for JsonLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = String::new();
        self.inner.format_event(context, Writer::new(&mut line), event)?;
        // The formatter has no place for constant fields, so the first one goes in behind its opening brace.
        let rest = line.strip_prefix('{').ok_or(fmt::Error)?;
        write!(writer, "{{\"service\":\"{}\",{rest}", self.service)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_is_one_json_object_with_service_fields_and_spans() {
        let captured = Captured::default();
        let writer = captured.clone();
        let layer = tracing_subscriber::fmt::layer()
            .fmt_fields(JsonFields::new())
            .event_format(JsonLine::new("sensorium-test"))
            .with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let _span = tracing::info_span!("infer", model = "vqa").entered();
            tracing::warn!(step = 7, "two\nlines");
        });
        let text = String::from_utf8(captured.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["service"], "sensorium-test");
        assert_eq!(line["level"], "WARN");
        assert_eq!(line["message"], "two\nlines");
        assert_eq!(line["step"], 7);
        assert_eq!(line["spans"][0]["model"], "vqa");
    }

    #[test]
    fn an_empty_variable_means_the_default() {
        assert_eq!(filter(Some(String::new())).unwrap().to_string(), DEFAULT_FILTER);
        assert_eq!(filter(None).unwrap().to_string(), DEFAULT_FILTER);
    }

    #[test]
    fn a_filter_that_does_not_parse_is_named() {
        let error = filter(Some("info,=,=".to_owned())).unwrap_err();
        assert!(matches!(&error, InitError::Filter { value, .. } if value == "info,=,="), "{error:?}");
    }
}

//! Where log lines go, what they look like, and which of them are written.

use std::{
    fmt,
    io::IsTerminal as _,
    sync::{Arc, Mutex, PoisonError},
};

use tracing::{
    Event, Metadata, Subscriber,
    span::{Attributes, Id, Record},
    subscriber::Interest,
};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{LevelFilter, ParseError},
    fmt::{
        FmtContext, FormatEvent, FormatFields, MakeWriter,
        format::{Format, Json, JsonFields, Writer},
    },
    layer::{Context, Filter},
    registry::LookupSpan,
    reload,
};

use crate::traces::{REQUEST, TraceId};

/// The environment variable that chooses what is logged.
pub(crate) const FILTER_VARIABLE: &str = "SENSORIUM_LOG";
const DEFAULT_FILTER: &str = "info";

/// Text that chooses no log lines.
#[derive(Debug, thiserror::Error)]
#[error("{value:?} is not a log filter; write a level (debug) or levels by target (info,sensorium_server=debug)")]
pub struct FilterError {
    /// As it was given.
    value: String,
    /// What is wrong with it.
    source: ParseError,
}

/// Changes which lines are written while the program runs. Clones change the same.
#[derive(Clone, Debug)]
pub struct LogControl {
    reload: reload::Handle<EnvFilter, Registry>,
    current: Arc<Mutex<String>>,
    /// Where lines may be dropped.
    pub(crate) dropped: Option<ErrorCounter>,
}

impl LogControl {
    /// What is written now.
    pub fn filter(&self) -> String {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lines that were dropped, because as many waited to be written as may.
    pub fn dropped_lines(&self) -> u64 {
        self.dropped.as_ref().map_or(0, |dropped| dropped.dropped_lines() as u64)
    }

    /// Writes what `value` chooses from now on: a level, or levels by target, as in `SENSORIUM_LOG`.
    ///
    /// # Errors
    /// [`FilterError`], and nothing changes.
    pub fn set(&self, value: &str) -> Result<(), FilterError> {
        let filter = parse(value)?;
        // Until it holds: of two at once the last one is what is said, too.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        // Fails only when the subscriber is gone, and then there is nothing to write.
        let _ = self.reload.reload(filter);
        value.clone_into(&mut current);
        Ok(())
    }
}

/// The filter that a variable's value stands for, and its control. An unset or empty variable means the default, as
/// with most programs.
pub(crate) fn filter(value: Option<String>) -> Result<(reload::Layer<EnvFilter, Registry>, LogControl), FilterError> {
    let value = value.filter(|value| !value.is_empty()).unwrap_or_else(|| DEFAULT_FILTER.to_owned());
    let (filter, reload) = reload::Layer::new(parse(&value)?);
    Ok((filter, LogControl { reload, current: Arc::new(Mutex::new(value)), dropped: None }))
}

fn parse(value: &str) -> Result<EnvFilter, FilterError> {
    EnvFilter::builder().parse(value).map_err(|source| FilterError { value: value.to_owned(), source })
}

/// A filter of lines that lets spans of requests through, whatever the level: a line about a request has the id of its trace also where nothing but
/// errors is written.
pub(crate) struct WithRequests<F>(pub(crate) F);

fn is_request(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && metadata.name() == REQUEST && metadata.target().starts_with("sensorium")
}

impl<S, F: Filter<S>> Filter<S> for WithRequests<F> {
    fn enabled(&self, metadata: &Metadata<'_>, context: &Context<'_, S>) -> bool {
        is_request(metadata) || self.0.enabled(metadata, context)
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        if is_request(metadata) { Interest::always() } else { self.0.callsite_enabled(metadata) }
    }

    fn event_enabled(&self, event: &Event<'_>, context: &Context<'_, S>) -> bool {
        self.0.event_enabled(event, context)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        // Those spans are of that level.
        self.0.max_level_hint().map(|hint| hint.max(LevelFilter::INFO))
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        self.0.on_new_span(attributes, id, context);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        self.0.on_record(id, values, context);
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        self.0.on_enter(id, context);
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        self.0.on_exit(id, context);
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        self.0.on_close(id, context);
    }
}

/// Lines that wait to be written at most. One that finds so many is dropped.
const WAITING: usize = 8192;

/// Standard error, written to by a thread of its own: whoever reads it may be slow, or have stopped, and nobody who has something to say waits for
/// that. The last lines are written when the guard is dropped, if they are taken within a second.
pub(crate) fn aside() -> (NonBlocking, WorkerGuard) {
    NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING)
        .lossy(true)
        .thread_name("logs")
        .finish(std::io::stderr())
}

/// JSON to `writer`, or lines for people where standard error is a terminal.
pub(crate) fn lines<W>(service: &'static str, writer: W) -> Box<dyn Layer<Registry> + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    if std::io::stderr().is_terminal() {
        lines.with_target(false).boxed()
    } else {
        lines.fmt_fields(JsonFields::new()).event_format(JsonLine::new(service)).boxed()
    }
}

/// The JSON format of `tracing-subscriber` with the event's fields at the top level, led by the service's name and, in a
/// request that is traced, the trace's id.
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
        // The formatter has no place for constant fields, so the first ones go in behind its opening brace.
        let rest = line.strip_prefix('{').ok_or(fmt::Error)?;
        write!(writer, "{{\"service\":\"{}\",", self.service)?;
        let mut spans = context.event_scope().into_iter().flatten();
        if let Some(id) = spans.find_map(|span| span.extensions().get::<TraceId>().copied()) {
            write!(writer, "\"trace_id\":\"{id}\",")?;
        }
        writer.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;
    use crate::{Parent, traces::keep_trace};

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Captured {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl std::io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn layer(captured: &Captured) -> Box<dyn Layer<Registry> + Send + Sync> {
        let writer = captured.clone();
        let lines = tracing_subscriber::fmt::layer().fmt_fields(JsonFields::new());
        lines.event_format(JsonLine::new("sensorium-test")).with_writer(move || writer.clone()).boxed()
    }

    #[test]
    fn a_line_is_one_json_object_with_service_fields_and_spans() {
        let captured = Captured::default();
        let subscriber = tracing_subscriber::registry().with(layer(&captured));
        tracing::subscriber::with_default(subscriber, || {
            let _span = tracing::info_span!("infer", model = "vqa").entered();
            tracing::warn!(step = 7, "two\nlines");
        });
        let text = captured.text();
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["service"], "sensorium-test");
        assert_eq!(line["level"], "WARN");
        assert_eq!(line["message"], "two\nlines");
        assert_eq!(line["step"], 7);
        assert_eq!(line["spans"][0]["model"], "vqa");
    }

    #[test]
    fn the_level_can_be_changed_while_the_program_runs() {
        let captured = Captured::default();
        let (filter, control) = filter(None).unwrap();
        let subscriber = tracing_subscriber::registry().with(layer(&captured).with_filter(filter));
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("before");
            control.set("debug").unwrap();
            tracing::debug!("between");
            assert!(control.set("info,=,=").is_err());
            control.set("off").unwrap();
            tracing::error!("after");
        });
        assert_eq!(control.filter(), "off");
        let text = captured.text();
        assert!(text.contains("between") && !text.contains("before") && !text.contains("after"), "{text}");
    }

    #[test]
    fn a_line_of_a_request_has_its_trace_whatever_the_level() {
        let captured = Captured::default();
        let (filter, _control) = filter(Some("error".to_owned())).unwrap();
        let subscriber = tracing_subscriber::registry().with(layer(&captured).with_filter(WithRequests(filter)));
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("infer", model = "vqa");
            let parent = Parent::parse(&format!("00-{}-{}-01", "ab".repeat(16), "cd".repeat(8)), None).unwrap();
            keep_trace(&span, &parent);
            let _entered = span.entered();
            let _other = tracing::info_span!("other").entered();
            tracing::info!("too much");
            tracing::error!("failed");
        });
        let text = captured.text();
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["trace_id"], "ab".repeat(16), "{text}");
        assert_eq!(line["spans"].as_array().map(Vec::len), Some(1), "{text}");
    }

    #[test]
    fn an_empty_variable_means_the_default() {
        assert_eq!(filter(Some(String::new())).unwrap().1.filter(), DEFAULT_FILTER);
        assert_eq!(filter(None).unwrap().1.filter(), DEFAULT_FILTER);
    }

    #[test]
    fn a_filter_that_does_not_parse_is_named() {
        let error = filter(Some("info,=,=".to_owned())).unwrap_err();
        assert!(error.to_string().starts_with("\"info,=,=\" is not a log filter"), "{error}");
    }
}

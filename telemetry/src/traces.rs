//! Spans of requests, sent to a collector by OTLP.

use std::{
    fmt,
    str::FromStr as _,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use opentelemetry::{
    Context, KeyValue, SpanId, TraceFlags,
    trace::{Link, SpanContext, SpanKind, TraceContextExt as _, TraceState, TracerProvider as _},
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SamplingDecision, SamplingResult, SdkTracerProvider, ShouldSample, SpanData},
};
use tracing::{Level, Span, Subscriber, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{Layer, Registry, filter::Targets, registry::LookupSpan};

use crate::{InitError, TraceControl};

/// The name of the span of a request, with which a trace begins here.
pub(crate) const REQUEST: &str = "infer";

/// The trace of whoever sent a request, as its `traceparent` says (W3C Trace Context, level 1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent(SpanContext);

impl Parent {
    /// Reads the headers `traceparent` and `tracestate`; `None` for a `traceparent` that is none, which the standard
    /// says to ignore.
    pub fn parse(traceparent: &str, tracestate: Option<&str>) -> Option<Self> {
        let mut fields = traceparent.trim().split('-');
        let (version, trace, span, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let lowercase_hex = |text: &str, length: usize| {
            text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let whole = [(version, 2), (trace, 32), (span, 16), (flags, 2)];
        // Later versions may append fields; version 0 has none, and ff is no version.
        if !whole.iter().all(|(field, length)| lowercase_hex(field, *length))
            || version == "ff"
            || (version == "00" && fields.next().is_some())
        {
            return None;
        }
        let trace = opentelemetry::TraceId::from_hex(trace).ok()?;
        let span = SpanId::from_hex(span).ok()?;
        let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
        let state = tracestate.and_then(|state| TraceState::from_str(state).ok()).unwrap_or_default();
        let context = SpanContext::new(trace, span, flags, true, state);
        context.is_valid().then_some(Self(context))
    }

    /// The trace of all that is done for one Kubernetes object, by whichever process: its id is the object's uid.
    /// `None` for what is no UUID.
    pub fn of_object(uid: &str) -> Option<Self> {
        let digits = uid.replace('-', "");
        Self::parse(&format!("00-{digits}-{}-01", digits.get(16..)?), None)
    }

    /// The span that this is called in; `None` where there is none that anybody exports.
    pub fn current() -> Option<Self> {
        let context = Span::current().context().span().span_context().clone();
        context.is_valid().then_some(Self(context))
    }

    /// The header `traceparent`, with which another process goes on with this trace.
    pub fn traceparent(&self) -> String {
        format!("00-{}-{}-{:02x}", self.0.trace_id(), self.0.span_id(), self.0.trace_flags().to_u8())
    }

    /// Makes `span`, which nobody has entered yet, part of this trace.
    pub fn adopt(&self, span: &Span) {
        // Fails only for a span that nobody exports.
        let _ = span.set_parent(Context::new().with_remote_span_context(self.0.clone()));
    }

    pub(crate) fn is_sampled(&self) -> bool {
        self.0.is_sampled()
    }
}

/// The id of a request's trace, kept with its span for log lines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TraceId(opentelemetry::TraceId);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A span with these fields, and room for what is said of its end: a field that is not declared cannot be recorded.
macro_rules! ending_span {
    ({ $(parent: $parent:expr,)? name: $name:literal }, $($fields:tt)*) => {
        tracing::info_span!(
            $(parent: $parent,)?
            $name,
            otel.status_code = Empty,
            otel.status_description = Empty,
            rpc.grpc.status_code = Empty,
            cache_hit = Empty,
            queue_us = Empty,
            compute_input_us = Empty,
            compute_infer_us = Empty,
            compute_output_us = Empty,
            $($fields)*
        )
    };
}

/// The span of a step of an ensemble, within that of the request; one that does nothing where the request is not traced.
pub fn step_span(model: &str, version: &str) -> Span {
    let request = Span::current();
    if request.is_none() { request } else { ending_span!({ name: "step" }, model, version) }
}

/// The span of a run of an engine, which is nobody's child: it is of several requests.
pub fn batch_span(model: &str, rows: usize, requests: usize) -> Span {
    ending_span!({ parent: None, name: "batch" }, model, rows, requests)
}

impl TraceControl {
    /// The span of a request to `model`: one that is exported if this request is traced, else one that does nothing.
    /// `served` is the version of the model, where it is there: requests for others are traced only as part of somebody's trace, as anybody
    /// can make up names. Of `model` and `id`, which may be anything a client sends, it keeps the beginning.
    pub fn request_span(&self, model: &str, served: Option<&str>, id: &str, parent: Option<&Parent>) -> Span {
        const LONGEST: usize = 80;
        if (served.is_none() && parent.is_none()) || !self.sample(model, parent) {
            return Span::none();
        }
        let beginning = |text: &str| text.chars().take(LONGEST).collect::<String>();
        let (model, id) = (beginning(model), beginning(id));
        let version = served.unwrap_or("");
        let span = ending_span!({ name: "infer" }, model, version, id, otel.kind = "server");
        if let Some(parent) = parent {
            parent.adopt(&span);
        }
        keep_trace(&span, &Parent(span.context().span().span_context().clone()));
        span
    }
}

/// Keeps the id of a trace with a span of it, for log lines.
pub(crate) fn keep_trace(span: &Span, of: &Parent) {
    let trace = TraceId(of.0.trace_id());
    span.with_subscriber(|(id, dispatch)| {
        if let Some(span) = dispatch.downcast_ref::<Registry>().and_then(|registry| registry.span(id)) {
            span.extensions_mut().insert(trace);
        }
    });
}

/// Says on `span` how what it stands for ended: by which code of gRPC, and, where `failed`, why. The convention of OpenTelemetry for servers is that
/// what its caller did wrong is no error of the span.
pub fn record_end(span: &Span, code: i32, failed: Option<&str>) {
    span.record("rpc.grpc.status_code", code);
    if let Some(why) = failed {
        span.record("otel.status_code", "ERROR");
        span.record("otel.status_description", why);
    }
}

/// Batches of finished spans to `endpoint`, from a thread of its own.
pub(crate) fn exporter(service: &'static str, endpoint: String) -> Result<SdkTracerProvider, InitError> {
    let exporter = SpanExporter::builder().with_tonic().with_endpoint(&endpoint).build();
    let exporter = exporter.map_err(|source| InitError::Exporter { endpoint: endpoint.clone(), source })?;
    let resource = Resource::builder().with_service_name(service).build();
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(Watched { exporter, endpoint, is_failing: AtomicBool::new(false) })
        .with_resource(resource)
        .with_sampler(TracedRequests)
        .build())
}

/// An exporter that says in the log when its collector does not take spans, and when it does again.
#[derive(Debug)]
struct Watched {
    exporter: SpanExporter,
    endpoint: String,
    is_failing: AtomicBool,
}

impl opentelemetry_sdk::trace::SpanExporter for Watched {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len();
        let exported = self.exporter.export(batch).await;
        let was_failing = self.is_failing.swap(exported.is_err(), Ordering::Relaxed);
        match &exported {
            // Once: what comes after it is lost as well, until it is said that it is not.
            Err(error) if !was_failing => {
                tracing::warn!(%error, endpoint = self.endpoint, spans = count, "the collector of traces takes none, and they are lost");
            }
            Ok(()) if was_failing => tracing::info!(endpoint = self.endpoint, "the collector takes traces again"),
            _ => {}
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// Hands spans to the exporter.
pub(crate) fn layer<S>(provider: &SdkTracerProvider) -> impl Layer<S> + use<S>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("sensorium"))
        .with_location(false)
        .with_target(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        // What happens below our own spans is not about requests.
        .with_filter(Targets::new().with_target("sensorium", Level::INFO))
}

/// Keeps the spans of requests, which are only made when they are traced, what is below them, and what links to them.
/// Anything else in the program that happens to be a span is no trace.
#[derive(Clone, Debug)]
struct TracedRequests;

impl ShouldSample for TracedRequests {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        _: opentelemetry::TraceId,
        name: &str,
        _: &SpanKind,
        _: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let parent = parent.map(|parent| parent.span().span_context().clone()).filter(SpanContext::is_valid);
        let kept = match &parent {
            Some(parent) => parent.is_sampled(),
            None => name == REQUEST || links.iter().any(|link| link.span_context.is_sampled()),
        };
        let decision = if kept { SamplingDecision::RecordAndSample } else { SamplingDecision::Drop };
        let trace_state = parent.map(|parent| parent.trace_state().clone()).unwrap_or_default();
        SamplingResult { decision, attributes: Vec::new(), trace_state }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    #[test]
    fn a_traceparent_is_read_as_the_standard_writes_it() {
        let parent = Parent::parse(&format!("00-{TRACE}-{SPAN}-01"), Some("vendor=1")).unwrap();
        assert_eq!(parent.0.trace_id().to_string(), TRACE);
        assert_eq!(parent.0.span_id().to_string(), SPAN);
        assert!(parent.is_sampled() && parent.0.is_remote());
        assert_eq!(parent.0.trace_state().header(), "vendor=1");
        assert!(!Parent::parse(&format!("00-{TRACE}-{SPAN}-00"), None).unwrap().is_sampled());
        assert!(Parent::parse(&format!("01-{TRACE}-{SPAN}-01-more"), None).is_some(), "a later version");
    }

    #[test]
    fn the_trace_of_an_object_has_its_uid() {
        let parent = Parent::of_object("0eb54409-3616-4b36-a777-0df9732676cb").unwrap();
        assert_eq!(parent.traceparent(), "00-0eb5440936164b36a7770df9732676cb-a7770df9732676cb-01");
        assert_eq!(Parent::parse(&parent.traceparent(), None), Some(parent));
        assert_eq!(Parent::of_object("no uid"), None);
    }

    #[test]
    fn what_is_no_traceparent_is_ignored() {
        let zeros = "0".repeat(32);
        for text in [
            String::new(),
            "00".to_owned(),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{zeros}-{SPAN}-01"),
            format!("00-{TRACE}-0000000000000000-01"),
            format!("00-{}-{SPAN}-01", &TRACE[1..]),
            "é".repeat(30),
        ] {
            assert_eq!(Parent::parse(&text, None), None, "{text}");
        }
    }
}

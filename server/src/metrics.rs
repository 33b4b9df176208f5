//! This server's metrics: values for the table in `sensorium_telemetry::metrics`.
//!
//! Labels come from closed sets: models and graphs that are served, and status codes. A request for anything else
//! counts under [`UNKNOWN_MODEL`].

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, text},
    metrics::{
        MetricType, TypedMetric,
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::Registry,
};
use sensorium_telemetry::metrics as names;
use tonic::Code;

/// The `model` label of requests for a model that this server does not have.
pub const UNKNOWN_MODEL: &str = "unknown";

/// The one version of every model; artifacts are told apart by digest.
pub const VERSION: &str = "1";

type Labels<const N: usize> = [(&'static str, String); N];
type Histograms = Family<Labels<1>, Histogram, Buckets>;

/// All metrics of a server. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    ready: Gauge,
    requests: Family<Labels<2>, Counter>,
    request_seconds: Histograms,
    queue_seconds: Histograms,
    queue_requests: Family<Labels<1>, Gauge>,
    batch_rows: Histograms,
    run_seconds: Histograms,
    abandoned: Family<Labels<1>, Counter>,
    triton: Triton,
}

/// The same events under Triton's names.
#[derive(Clone, Debug, Default)]
struct Triton {
    success: Family<Labels<2>, Untyped>,
    failure: Family<Labels<3>, Untyped>,
    count: Family<Labels<2>, Untyped>,
    exec_count: Family<Labels<2>, Untyped>,
    request_us: Family<Labels<2>, Untyped>,
    queue_us: Family<Labels<2>, Untyped>,
    infer_us: Family<Labels<2>, Untyped>,
    pending: Family<Labels<2>, Gauge>,
}

impl Metrics {
    /// Metrics that start at zero.
    pub fn new() -> Self {
        let seconds = || Histograms::new_with_constructor(Buckets::Seconds);
        let mut registry = Registry::default();
        let ready = Gauge::default();
        let (requests, queue_requests, abandoned) = (Family::default(), Family::default(), Family::default());
        let (request_seconds, queue_seconds, run_seconds) = (seconds(), seconds(), seconds());
        let batch_rows = Histograms::new_with_constructor(Buckets::Rows);
        let triton = Triton::default();
        names::SERVER_READY.register(&mut registry, ready.clone());
        names::SERVER_REQUESTS.register(&mut registry, requests.clone());
        names::SERVER_REQUEST_SECONDS.register(&mut registry, request_seconds.clone());
        names::SERVER_QUEUE_SECONDS.register(&mut registry, queue_seconds.clone());
        names::SERVER_QUEUE_REQUESTS.register(&mut registry, queue_requests.clone());
        names::SERVER_BATCH_ROWS.register(&mut registry, batch_rows.clone());
        names::SERVER_RUN_SECONDS.register(&mut registry, run_seconds.clone());
        names::SERVER_ABANDONED.register(&mut registry, abandoned.clone());
        names::TRITON_SUCCESS.register(&mut registry, triton.success.clone());
        names::TRITON_FAILURE.register(&mut registry, triton.failure.clone());
        names::TRITON_COUNT.register(&mut registry, triton.count.clone());
        names::TRITON_EXEC_COUNT.register(&mut registry, triton.exec_count.clone());
        names::TRITON_REQUEST_US.register(&mut registry, triton.request_us.clone());
        names::TRITON_QUEUE_US.register(&mut registry, triton.queue_us.clone());
        names::TRITON_INFER_US.register(&mut registry, triton.infer_us.clone());
        names::TRITON_PENDING.register(&mut registry, triton.pending.clone());
        Self {
            registry: Arc::new(registry),
            ready,
            requests,
            request_seconds,
            queue_seconds,
            queue_requests,
            batch_rows,
            run_seconds,
            abandoned,
            triton,
        }
    }

    /// Everything in the OpenMetrics text format.
    ///
    /// # Errors
    /// None in practice: it writes into memory.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// Whether the server is ready.
    pub fn set_ready(&self, ready: bool) {
        self.ready.set(i64::from(ready));
    }

    /// A request ended. `model` is one that is served, or [`UNKNOWN_MODEL`].
    pub fn request(&self, model: &str, code: Code, took: Duration) {
        self.requests.get_or_create(&[label("model", model), label("code", code_label(code))]).inc();
        self.request_seconds.get_or_create(&[label("model", model)]).observe(took.as_secs_f64());
        let reason = match code {
            Code::Ok => {
                self.triton.success.get_or_create(&versioned(model)).add(1);
                self.triton.request_us.get_or_create(&versioned(model)).add(micros(took));
                return;
            }
            Code::ResourceExhausted | Code::Unavailable => "REJECTED",
            Code::Cancelled | Code::DeadlineExceeded => "CANCELED",
            _ => "OTHER",
        };
        let [model, version] = versioned(model);
        self.triton.failure.get_or_create(&[model, version, label("reason", reason)]).add(1);
    }

    /// The metrics of one graph.
    pub fn graph(&self, graph: &str) -> GraphMetrics {
        let own = [label("model", graph)];
        let versioned = versioned(graph);
        GraphMetrics {
            queue_seconds: self.queue_seconds.get_or_create_owned(&own),
            queue_requests: self.queue_requests.get_or_create_owned(&own),
            batch_rows: self.batch_rows.get_or_create_owned(&own),
            run_seconds: self.run_seconds.get_or_create_owned(&own),
            abandoned: self.abandoned.get_or_create_owned(&own),
            count: self.triton.count.get_or_create_owned(&versioned),
            exec_count: self.triton.exec_count.get_or_create_owned(&versioned),
            queue_us: self.triton.queue_us.get_or_create_owned(&versioned),
            infer_us: self.triton.infer_us.get_or_create_owned(&versioned),
            pending: self.triton.pending.get_or_create_owned(&versioned),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// The metrics of one graph's queue and engine, looked up once.
#[derive(Clone, Debug)]
pub struct GraphMetrics {
    queue_seconds: Histogram,
    queue_requests: Gauge,
    batch_rows: Histogram,
    run_seconds: Histogram,
    abandoned: Counter,
    count: Untyped,
    exec_count: Untyped,
    queue_us: Untyped,
    infer_us: Untyped,
    pending: Gauge,
}

impl GraphMetrics {
    /// This many requests wait now.
    pub fn waiting(&self, requests: usize) {
        self.queue_requests.set(requests as i64);
        self.pending.set(requests as i64);
    }

    /// A request left the queue for the engine.
    pub fn queued(&self, waited: Duration) {
        self.queue_seconds.observe(waited.as_secs_f64());
        self.queue_us.add(micros(waited));
    }

    /// A request left the queue because its caller had left.
    pub fn abandoned(&self) {
        self.abandoned.inc();
    }

    /// The engine ran a batch.
    pub fn ran(&self, rows: usize, requests: usize, took: Duration) {
        self.batch_rows.observe(rows as f64);
        self.run_seconds.observe(took.as_secs_f64());
        self.count.add(rows as u64);
        self.exec_count.add(1);
        self.infer_us.add(micros(took).saturating_mul(requests as u64));
    }
}

/// Bucket bounds by what is measured.
#[derive(Clone, Copy, Debug)]
enum Buckets {
    /// 100 microseconds to 10 seconds, three to a decade.
    Seconds,
    /// Powers of two up to 1024.
    Rows,
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        match self {
            Self::Seconds => Histogram::new([
                0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
            ]),
            Self::Rows => Histogram::new((0..=10).map(|power| f64::from(1 << power))),
        }
    }
}

/// A sum that only grows under a name without `_total`. The encoder gives every counter that suffix, and Triton's
/// counters have none.
#[derive(Clone, Debug, Default)]
struct Untyped(Arc<AtomicU64>);

impl Untyped {
    fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }
}

impl TypedMetric for Untyped {
    const TYPE: MetricType = MetricType::Unknown;
}

impl EncodeMetric for Untyped {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        encoder.encode_gauge(&self.0.load(Ordering::Relaxed))
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

fn label(name: &'static str, value: &str) -> (&'static str, String) {
    (name, value.to_owned())
}

fn versioned(model: &str) -> Labels<2> {
    [label("model", model), label("version", VERSION)]
}

/// Saturates after half a million years.
fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn code_label(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_shows_each_metric_under_its_name_in_the_table() {
        let metrics = Metrics::new();
        let graph = metrics.graph("m");
        metrics.set_ready(true);
        graph.waiting(1);
        graph.queued(Duration::from_millis(3));
        graph.abandoned();
        graph.ran(4, 2, Duration::from_micros(70));
        metrics.request("m", Code::Ok, Duration::from_micros(90));
        metrics.request("m", Code::ResourceExhausted, Duration::ZERO);
        let text = metrics.encode().unwrap();
        for metric in names::ALL
            .iter()
            .filter(|metric| ["sensorium_server_", "nv_"].iter().any(|own| metric.name.starts_with(own)))
        {
            let suffix = if metric.kind == names::Kind::Histogram { "_count" } else { "" };
            let labels = if metric.labels.is_empty() { " " } else { "{" };
            assert!(text.contains(&format!("\n{}{suffix}{labels}", metric.name)), "{} is not in\n{text}", metric.name);
        }
        assert!(text.contains("nv_inference_compute_infer_duration_us{model=\"m\",version=\"1\"} 140\n"), "{text}");
        assert!(
            text.contains("nv_inference_request_failure{model=\"m\",version=\"1\",reason=\"REJECTED\"} 1\n"),
            "{text}"
        );
    }
}

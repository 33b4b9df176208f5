//! This server's metrics: values for the table in `sensorium_telemetry::metrics`.
//!
//! Labels come from closed sets: models and graphs that are served, and status codes. A request for anything else
//! counts under [`UNKNOWN_MODEL`].

mod triton;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::text,
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::Registry,
};
use sensorium_telemetry::metrics as names;
use tonic::Code;

pub use self::triton::{CacheCounts, Counts};

/// The `model` label of requests for a model that this server does not have.
pub const UNKNOWN_MODEL: &str = "unknown";

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
    batch_rows_limit: Family<Labels<1>, Gauge>,
    batch_cost: Histograms,
    padding: Histograms,
    run_seconds: Histograms,
    abandoned: Family<Labels<1>, Counter>,
    budget: BudgetMetrics,
    connections: ConnectionMetrics,
    first_response: Family<Labels<2>, Histogram, Buckets>,
    cache: Family<Labels<2>, Counter>,
    triton_pending: Family<Labels<2>, Gauge>,
    /// What every request counts, found without making labels of names.
    answered: Arc<RwLock<HashMap<String, Answered>>>,
    /// How many hold a [`Served`] of each version of each model. Series come and go while it is locked.
    served: Arc<Mutex<HashMap<String, HashMap<String, usize>>>>,
}

/// What others count, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    /// Every version that is ready.
    pub models: Vec<Counts>,
    /// The response cache.
    pub cache: CacheCounts,
    /// Log lines that were dropped.
    pub dropped_lines: u64,
}

impl Counted {
    fn registry(&self) -> Registry {
        let mut registry = triton::registry(&self.models, &self.cache);
        let dropped = Counter::<u64>::default();
        dropped.inc_by(self.dropped_lines);
        names::SERVER_LOG_LINES_DROPPED.register(&mut registry, dropped);
        registry
    }
}

/// What a request that succeeds counts.
#[derive(Clone, Debug)]
struct Answered {
    ok: Counter,
    seconds: Histogram,
}

impl Metrics {
    /// Metrics that start at zero.
    pub fn new() -> Self {
        let histograms = |buckets| Histograms::new_with_constructor(buckets);
        let mut metrics = Self {
            registry: Arc::default(),
            ready: Gauge::default(),
            requests: Family::default(),
            request_seconds: histograms(Buckets::Seconds),
            queue_seconds: histograms(Buckets::Seconds),
            queue_requests: Family::default(),
            batch_rows: histograms(Buckets::Rows),
            batch_rows_limit: Family::default(),
            batch_cost: histograms(Buckets::Elements),
            padding: histograms(Buckets::Shares),
            run_seconds: histograms(Buckets::Seconds),
            abandoned: Family::default(),
            budget: BudgetMetrics::default(),
            connections: ConnectionMetrics::default(),
            first_response: Family::new_with_constructor(Buckets::Milliseconds),
            cache: Family::default(),
            triton_pending: Family::default(),
            answered: Arc::default(),
            served: Arc::default(),
        };
        let mut registry = Registry::default();
        names::SERVER_READY.register(&mut registry, metrics.ready.clone());
        names::SERVER_REQUESTS.register(&mut registry, metrics.requests.clone());
        names::SERVER_REQUEST_SECONDS.register(&mut registry, metrics.request_seconds.clone());
        names::SERVER_QUEUE_SECONDS.register(&mut registry, metrics.queue_seconds.clone());
        names::SERVER_QUEUE_REQUESTS.register(&mut registry, metrics.queue_requests.clone());
        names::SERVER_BATCH_ROWS.register(&mut registry, metrics.batch_rows.clone());
        names::SERVER_BATCH_ROWS_LIMIT.register(&mut registry, metrics.batch_rows_limit.clone());
        names::SERVER_BATCH_COST.register(&mut registry, metrics.batch_cost.clone());
        names::SERVER_PADDING.register(&mut registry, metrics.padding.clone());
        names::SERVER_RUN_SECONDS.register(&mut registry, metrics.run_seconds.clone());
        names::SERVER_ABANDONED.register(&mut registry, metrics.abandoned.clone());
        names::SERVER_REQUEST_BYTES.register(&mut registry, metrics.budget.held.clone());
        names::SERVER_REQUEST_BYTES_LIMIT.register(&mut registry, metrics.budget.limit.clone());
        names::SERVER_REQUEST_BYTES_REFUSALS.register(&mut registry, metrics.budget.refused.clone());
        names::SERVER_CONNECTIONS.register(&mut registry, metrics.connections.open.clone());
        names::SERVER_CONNECTIONS_LIMIT.register(&mut registry, metrics.connections.limit.clone());
        names::SERVER_CONNECTIONS_REFUSALS.register(&mut registry, metrics.connections.refused.clone());
        names::SERVER_CACHE.register(&mut registry, metrics.cache.clone());
        names::TRITON_PENDING.register(&mut registry, metrics.triton_pending.clone());
        names::TRITON_FIRST_RESPONSE_MS.register(&mut registry, metrics.first_response.clone());
        metrics.registry = Arc::new(registry);
        metrics
    }

    /// Everything in the OpenMetrics text format.
    ///
    /// # Errors
    /// None in practice: it writes into memory.
    pub fn encode(&self, counted: &Counted) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode_registry(&mut text, &self.registry)?;
        text::encode_registry(&mut text, &counted.registry())?;
        text::encode_eof(&mut text)?;
        Ok(text)
    }

    /// Whether the server is ready.
    pub fn set_ready(&self, ready: bool) {
        self.ready.set(i64::from(ready));
    }

    /// A request ended. `model` is one of which somebody holds a [`Served`], or [`UNKNOWN_MODEL`].
    pub fn request(&self, model: &str, code: Code, took: Duration) {
        if code == Code::Ok {
            let known = self.answered.read().unwrap_or_else(PoisonError::into_inner).get(model).cloned();
            let answered = known.unwrap_or_else(|| self.answered(model));
            answered.ok.inc();
            answered.seconds.observe(took.as_secs_f64());
            return;
        }
        self.requests.get_or_create(&[label("model", model), label("code", code_label(code))]).inc();
        self.request_seconds.get_or_create(&[label("model", model)]).observe(took.as_secs_f64());
    }

    fn answered(&self, model: &str) -> Answered {
        let ok = [label("model", model), label("code", code_label(Code::Ok))];
        let answered = Answered {
            ok: self.requests.get_or_create_owned(&ok),
            seconds: self.request_seconds.get_or_create_owned(&[label("model", model)]),
        };
        let mut all = self.answered.write().unwrap_or_else(PoisonError::into_inner);
        all.entry(model.to_owned()).or_insert(answered).clone()
    }

    /// The bytes of all requests.
    pub fn budget(&self) -> BudgetMetrics {
        self.budget.clone()
    }

    /// The connections of clients.
    pub fn connections(&self) -> ConnectionMetrics {
        self.connections.clone()
    }

    /// The first of several responses of a request was there after `took`.
    pub fn first_response(&self, model: &str, version: &str, took: Duration) {
        self.first_response.get_or_create(&versioned(model, version)).observe(took.as_secs_f64() * 1000.0);
    }

    /// For whoever answers for a version of a model: its series are there, from zero on, for as long as anybody holds this.
    pub fn served(&self, model: &str, version: &str) -> Arc<Served> {
        let mut served = self.served_by_name();
        *served.entry(model.to_owned()).or_default().entry(version.to_owned()).or_default() += 1;
        self.answered(model);
        let _zero = self.triton_pending.get_or_create(&versioned(model, version));
        Arc::new(Served { metrics: self.clone(), model: model.to_owned(), version: version.to_owned() })
    }

    /// Takes away what has the label of a version that nobody serves any more, and of its model where that was the last one.
    fn forget(&self, model: &str, version: &str) {
        let mut served = self.served_by_name();
        let Some(versions) = served.get_mut(model) else { return };
        if let Some(holders) = versions.get_mut(version) {
            *holders -= 1;
            if *holders > 0 {
                return;
            }
        }
        versions.remove(version);
        let labels = versioned(model, version);
        self.triton_pending.remove(&labels);
        self.first_response.remove(&labels);
        if !versions.is_empty() {
            return;
        }
        served.remove(model);
        self.answered.write().unwrap_or_else(PoisonError::into_inner).remove(model);
        for code in (0..=16).map(Code::from_i32) {
            self.requests.remove(&[label("model", model), label("code", code_label(code))]);
        }
        for outcome in ["hit", "miss"] {
            self.cache.remove(&[label("model", model), label("outcome", outcome)]);
        }
        let own = [label("model", model)];
        let Self { request_seconds, queue_seconds, batch_rows, batch_cost, padding, run_seconds, .. } = self;
        for histogram in [request_seconds, queue_seconds, batch_rows, batch_cost, padding, run_seconds] {
            histogram.remove(&own);
        }
        self.queue_requests.remove(&own);
        self.batch_rows_limit.remove(&own);
        self.abandoned.remove(&own);
    }

    /// Only counting happens under it.
    fn served_by_name(&self) -> MutexGuard<'_, HashMap<String, HashMap<String, usize>>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The metrics of one version of a graph.
    pub fn graph(&self, graph: &str, version: &str) -> GraphMetrics {
        // First, so that what follows is not taken away.
        let served = self.served(graph, version);
        let own = [label("model", graph)];
        let cache = |outcome| self.cache.get_or_create_owned(&[label("model", graph), label("outcome", outcome)]);
        GraphMetrics {
            queue_seconds: self.queue_seconds.get_or_create_owned(&own),
            queue_requests: self.queue_requests.get_or_create_owned(&own),
            batch_rows: self.batch_rows.get_or_create_owned(&own),
            batch_rows_limit: self.batch_rows_limit.get_or_create_owned(&own),
            batch_cost: self.batch_cost.get_or_create_owned(&own),
            padding: self.padding.get_or_create_owned(&own),
            run_seconds: self.run_seconds.get_or_create_owned(&own),
            abandoned: self.abandoned.get_or_create_owned(&own),
            hits: cache("hit"),
            misses: cache("miss"),
            pending: self.triton_pending.get_or_create_owned(&versioned(graph, version)),
            _served: served,
        }
    }
}

/// A version of a model is served: see [`Metrics::served`].
pub struct Served {
    metrics: Metrics,
    model: String,
    version: String,
}

impl fmt::Debug for Served {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Served")
            .field("model", &self.model)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.metrics.forget(&self.model, &self.version);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// The bytes of all requests, counted where they are shown. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct BudgetMetrics {
    held: Gauge,
    limit: Gauge,
    refused: Counter,
}

impl BudgetMetrics {
    /// So many bytes may be held.
    pub fn limit(&self, bytes: usize) {
        self.limit.set(bytes as i64);
    }

    /// Counts bytes as held; those that were held before.
    pub fn take(&self, bytes: usize) -> usize {
        usize::try_from(self.held.inc_by(bytes as i64)).unwrap_or(0)
    }

    /// Counts bytes as given back.
    pub fn give(&self, bytes: usize) {
        self.held.dec_by(bytes as i64);
    }

    /// Bytes that are held now.
    pub fn held(&self) -> usize {
        usize::try_from(self.held.get()).unwrap_or(0)
    }

    /// A request was refused.
    pub fn refused(&self) {
        self.refused.inc();
    }
}

/// The connections of clients, counted where they are shown. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct ConnectionMetrics {
    open: Gauge,
    limit: Gauge,
    refused: Counter,
}

impl ConnectionMetrics {
    /// So many may be open.
    pub fn limit(&self, connections: u32) {
        self.limit.set(connections.into());
    }

    /// Counts one as open; those that were before.
    pub fn opened(&self) -> u32 {
        u32::try_from(self.open.inc()).unwrap_or(0)
    }

    /// Counts one as closed.
    pub fn closed(&self) {
        self.open.dec();
    }

    /// One was refused.
    pub fn refused(&self) {
        self.refused.inc();
    }
}

/// What one queue has in the gauges of what waits, until it is dropped.
#[derive(Debug)]
pub(crate) struct Waiting {
    gauges: [Gauge; 2],
    shown: AtomicI64,
}

impl Waiting {
    /// This many requests wait in it now.
    pub(crate) fn set(&self, requests: usize) {
        let now = requests as i64;
        let change = now - self.shown.swap(now, Ordering::Relaxed);
        for gauge in &self.gauges {
            gauge.inc_by(change);
        }
    }

    /// So many more wait, for something beside the queue, until this is dropped.
    pub(crate) fn more(&self, requests: usize) -> Elsewhere<'_> {
        let elsewhere = Elsewhere { waiting: self, requests: requests as i64 };
        for gauge in &self.gauges {
            gauge.inc_by(elsewhere.requests);
        }
        elsewhere
    }
}

/// Requests that wait for something beside a queue: their turn in a sequence, or the machine.
#[derive(Debug)]
pub(crate) struct Elsewhere<'a> {
    waiting: &'a Waiting,
    requests: i64,
}

impl Drop for Elsewhere<'_> {
    fn drop(&mut self) {
        for gauge in &self.waiting.gauges {
            gauge.dec_by(self.requests);
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// The metrics of one graph's queue and engine, looked up once.
#[derive(Clone, Debug)]
pub struct GraphMetrics {
    queue_seconds: Histogram,
    queue_requests: Gauge,
    batch_rows: Histogram,
    batch_rows_limit: Gauge,
    batch_cost: Histogram,
    padding: Histogram,
    run_seconds: Histogram,
    abandoned: Counter,
    hits: Counter,
    misses: Counter,
    pending: Gauge,
    /// None of these is taken away before.
    _served: Arc<Served>,
}

impl GraphMetrics {
    /// For one of the queues that the gauges of what waits are the sum of: versions, instances and loads of a model have one each.
    pub(crate) fn waiting(&self) -> Waiting {
        Waiting { gauges: [self.queue_requests.clone(), self.pending.clone()], shown: AtomicI64::new(0) }
    }

    /// A request left the queue for the engine.
    pub fn queued(&self, waited: Duration) {
        self.queue_seconds.observe(waited.as_secs_f64());
    }

    /// A request left the queue because its caller had left.
    pub fn abandoned(&self) {
        self.abandoned.inc();
    }

    /// The engine ran a batch.
    pub fn ran(&self, rows: usize, took: Duration) {
        self.batch_rows.observe(rows as f64);
        self.run_seconds.observe(took.as_secs_f64());
    }

    /// A batch may have so many rows from now on.
    pub fn batch_rows_limit(&self, rows: usize) {
        self.batch_rows_limit.set(rows as i64);
    }

    /// A batch was put together of `useful` input elements and `padding` beside them.
    pub fn padded(&self, useful: usize, padding: usize) {
        let all = (useful + padding).max(1) as f64;
        self.batch_cost.observe(all);
        self.padding.observe(padding as f64 / all);
    }

    /// An answer was looked for in the response cache.
    pub fn cache(&self, hit: bool) {
        if hit { &self.hits } else { &self.misses }.inc();
    }
}

/// Bucket bounds by what is measured.
#[derive(Clone, Copy, Debug)]
enum Buckets {
    /// 100 microseconds to 10 seconds, three to a decade.
    Seconds,
    /// Triton's, for the first response of many.
    Milliseconds,
    /// Powers of two up to 1024.
    Rows,
    /// Powers of four from 16 to 16 million.
    Elements,
    /// Tenths.
    Shares,
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        match self {
            Self::Seconds => Histogram::new([
                0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
            ]),
            Self::Milliseconds => Histogram::new([100.0, 500.0, 2000.0, 5000.0]),
            Self::Rows => Histogram::new((0..=10).map(|power| f64::from(1 << power))),
            Self::Elements => Histogram::new((2..=12).map(|power| f64::from(1 << (2 * power)))),
            Self::Shares => Histogram::new((0..=10).map(|tenths| f64::from(tenths) / 10.0)),
        }
    }
}

fn label(name: &'static str, value: &str) -> (&'static str, String) {
    (name, value.to_owned())
}

fn versioned(model: &str, version: &str) -> Labels<2> {
    [label("model", model), label("version", version)]
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
    use sensorium_proto::inference::{InferStatistics, ModelStatistics, StatisticDuration};

    use super::*;

    #[test]
    fn a_scrape_shows_each_metric_under_its_name_in_the_table() {
        let metrics = Metrics::new();
        let graph = metrics.graph("m", "3");
        metrics.set_ready(true);
        let (one, other) = (graph.waiting(), graph.waiting());
        one.set(7);
        other.set(2);
        one.set(1);
        drop(other);
        graph.queued(Duration::from_millis(3));
        graph.abandoned();
        graph.ran(4, Duration::from_micros(70));
        graph.batch_rows_limit(8);
        graph.padded(6, 2);
        graph.cache(true);
        metrics.request("m", Code::Ok, Duration::from_micros(90));
        metrics.first_response("m", "3", Duration::from_millis(700));
        metrics.request("m", Code::ResourceExhausted, Duration::ZERO);
        let elsewhere = graph.waiting();
        let _more = elsewhere.more(2);
        let statistics = ModelStatistics {
            name: "m".to_owned(),
            version: "3".to_owned(),
            inference_count: 4,
            inference_stats: Some(InferStatistics {
                compute_infer: Some(StatisticDuration { count: 2, ns: 140_500 }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let cache = CacheCounts { used: 0.25, hits: 3, misses: 4, ..CacheCounts::default() };
        let text = metrics
            .encode(&Counted { models: vec![Counts { statistics, failures: [1, 0, 0, 0] }], cache, dropped_lines: 5 })
            .unwrap();
        for metric in names::ALL
            .iter()
            .filter(|metric| ["sensorium_server_", "nv_"].iter().any(|own| metric.name.starts_with(own)))
        {
            let suffix = if metric.kind == names::Kind::Histogram { "_count" } else { "" };
            let labels = if metric.labels.is_empty() { " " } else { "{" };
            assert!(text.contains(&format!("\n{}{suffix}{labels}", metric.name)), "{} is not in\n{text}", metric.name);
        }
        for line in [
            r#"nv_inference_compute_infer_duration_us{model="m",version="3"} 140"#,
            r#"nv_inference_count{model="m",version="3"} 4"#,
            r#"nv_inference_request_failure{model="m",version="3",reason="REJECTED"} 1"#,
            r#"nv_inference_request_failure{model="m",version="3",reason="BACKEND"} 0"#,
            "nv_cache_num_lookups 7",
            "sensorium_server_log_lines_dropped_total 5",
            "nv_cache_util 0.25",
            r#"nv_inference_first_response_histogram_ms_bucket{le="2000.0",model="m",version="3"} 1"#,
            r#"sensorium_server_padding_ratio_sum{model="m"} 0.25"#,
            r#"sensorium_server_queue_requests{model="m"} 3"#,
            r#"sensorium_server_batch_rows_limit{model="m"} 8"#,
            r#"sensorium_server_requests_total{model="m",code="OK"} 1"#,
        ] {
            assert!(text.contains(&format!("\n{line}\n")), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1);
    }

    #[test]
    fn series_of_a_model_are_there_from_zero_until_nobody_serves_it() {
        let metrics = Metrics::new();
        let count = || {
            let text = metrics.encode(&Counted::default()).unwrap();
            let of = |name: &str| text.lines().filter(|line| line.contains(&format!("model=\"{name}\""))).count();
            (of("m"), of("other"), text.contains(r#"sensorium_server_requests_total{model="m",code="OK"} 0"#))
        };
        let _other = metrics.served("other", "1");
        let others = count().1;
        let (old, new) = (metrics.graph("m", "1"), metrics.graph("m", "2"));
        assert!(count().2, "the first request is an increase");
        metrics.request("m", Code::Internal, Duration::ZERO);
        metrics.request("m", Code::Ok, Duration::ZERO);
        metrics.first_response("m", "1", Duration::ZERO);
        new.cache(false);
        let both = count().0;
        let again = metrics.graph("m", "1");
        drop(old);
        assert_eq!(count().0, both, "another load of the same version is there");
        drop(again);
        assert!(count().0 < both && count().0 > 0, "the other version is there");
        let late = new.waiting();
        drop(new);
        assert_eq!(count(), (0, others, false));
        late.set(3);
        let _anew = metrics.graph("m", "1");
        assert!(count().2, "and counts from zero");
    }
}

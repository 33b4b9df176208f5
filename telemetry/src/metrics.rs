//! Every metric of every program, in one table: name, kind, labels and meaning.
//!
//! Names follow `sensorium_<component>_<what>_<unit>` in base units; labels come from closed sets. The `nv_inference_*`
//! names are Triton's, so that its dashboards read this server too.

use prometheus_client::registry::{Metric as Collect, Registry};

/// What a metric's value does over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations by size.
    Histogram,
    /// Only grows, but Triton named it without `_total`, so it is exposed without a type.
    Untyped,
}

impl Kind {
    /// The word in `docs/metrics.md`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Untyped => "untyped",
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// As a scrape shows it, without the `_bucket`, `_sum` and `_count` of a histogram.
    pub name: &'static str,
    /// What its value does.
    pub kind: Kind,
    /// Names of its labels, in order.
    pub labels: &'static [&'static str],
    /// One phrase without a full stop.
    pub help: &'static str,
}

impl Metric {
    /// Adds `collector` to `registry` under this name and help.
    pub fn register(&self, registry: &mut Registry, collector: impl Collect) {
        // The encoder appends `_total` to what it knows as a counter.
        let name = match self.kind {
            Kind::Counter => self.name.strip_suffix("_total").unwrap_or(self.name),
            Kind::Gauge | Kind::Histogram | Kind::Untyped => self.name,
        };
        registry.register(name, self.help, collector);
    }
}

/// Declares each metric as a constant, and `ALL` with the lot.
macro_rules! metrics {
    ($($constant:ident = $kind:ident $name:literal [$($label:literal),*] $help:literal;)+) => {
        $(#[doc = $help] pub const $constant: Metric =
            Metric { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help };)+

        /// The whole table, in the order of `docs/metrics.md`.
        pub const ALL: &[Metric] = &[$($constant),+];
    };
}

metrics! {
    SERVER_READY = Gauge "sensorium_server_ready" []
        "1 while every model is ready and the server admits requests, else 0";
    SERVER_REQUESTS = Counter "sensorium_server_requests_total" ["model", "code"]
        "Finished requests by gRPC status code";
    SERVER_REQUEST_SECONDS = Histogram "sensorium_server_request_seconds" ["model"]
        "Time from a request's arrival to its response, requests that failed included";
    SERVER_QUEUE_SECONDS = Histogram "sensorium_server_queue_seconds" ["model"]
        "Time a request waited until an engine began with it";
    SERVER_QUEUE_REQUESTS = Gauge "sensorium_server_queue_requests" ["model"]
        "Requests that wait for an engine now: in the queue, for their turn in a sequence, or for the machine";
    SERVER_BATCH_ROWS = Histogram "sensorium_server_batch_rows" ["model"]
        "Rows of one engine run";
    SERVER_BATCH_ROWS_LIMIT = Gauge "sensorium_server_batch_rows_limit" ["model"]
        "Rows that a batch may have now: its max_batch_size, or fewer where that was found to run more of them per second";
    SERVER_RUN_SECONDS = Histogram "sensorium_server_run_seconds" ["model"]
        "Time of one engine run";
    SERVER_ABANDONED = Counter "sensorium_server_abandoned_total" ["model"]
        "Queued requests that were dropped unrun, because they were cancelled or their deadline had passed";
    SERVER_BATCH_COST = Histogram "sensorium_server_batch_cost" ["model"]
        "Cost of one engine run, in elements of its inputs with padding";
    SERVER_PADDING = Histogram "sensorium_server_padding_ratio" ["model"]
        "Share of a batch's input elements that is padding";
    SERVER_REQUEST_BYTES = Gauge "sensorium_server_request_bytes" []
        "Bytes of requests that are held now, decompressed";
    SERVER_REQUEST_BYTES_LIMIT = Gauge "sensorium_server_request_bytes_limit" []
        "Bytes of requests that may be held";
    SERVER_REQUEST_BYTES_REFUSALS = Counter "sensorium_server_request_bytes_refusals_total" []
        "Requests that were refused because all together held as many bytes as they may";
    SERVER_CONNECTIONS = Gauge "sensorium_server_connections" []
        "Connections of clients that are open now, those to the metrics port not counted";
    SERVER_CONNECTIONS_LIMIT = Gauge "sensorium_server_connections_limit" []
        "Connections of clients that may be open";
    SERVER_CONNECTIONS_REFUSALS = Counter "sensorium_server_connections_refusals_total" []
        "Connections that were closed at once because as many were open as may be";
    SERVER_CACHE = Counter "sensorium_server_cache_lookups_total" ["model", "outcome"]
        "Looks into the response cache; the outcome is hit or miss";
    SERVER_LOG_LINES_DROPPED = Counter "sensorium_server_log_lines_dropped_total" []
        "Log lines that were not written, because nobody took those before them";
    TRAINER_STEP = Gauge "sensorium_trainer_step" []
        "Updates that are done";
    TRAINER_LOSS = Gauge "sensorium_trainer_loss" []
        "Weighted loss of the last step over all ranks, in nats";
    TRAINER_ACCURACY = Gauge "sensorium_trainer_accuracy_ratio" []
        "Share of held-out questions answered right at the last evaluation";
    TRAINER_SAMPLES_PER_SECOND = Gauge "sensorium_trainer_samples_per_second" []
        "Images trained on per second over all ranks, lately";
    TRAINER_CHECKPOINT_FAILURES = Counter "sensorium_trainer_checkpoint_failures_total" []
        "Checkpoints that could not be written";
    OPERATOR_RECONCILE_SECONDS = Histogram "sensorium_reconcile_duration_seconds" ["kind"]
        "Time of one visit to an object";
    OPERATOR_REACTION = Histogram "sensorium_reaction_seconds" ["kind", "until"]
        "Time from a watch's news of an object until the first write that came of it was sent or answered";
    OPERATOR_RECONCILE = Counter "sensorium_reconcile_total" ["kind", "outcome"]
        "Visits to objects; the outcome is ok, conflict (changed meanwhile, visited again), not_ready or error";
    OPERATOR_WRITES = Counter "sensorium_writes_total" ["kind", "verb"]
        "Writes to the API server on behalf of objects of a kind";
    OPERATOR_WATCH_STALENESS = Gauge "sensorium_watch_staleness_seconds" ["watch"]
        "Time for which a watch has had nothing but errors, 0 while it hears news";
    OPERATOR_LEADER = Gauge "sensorium_leader" []
        "1 while this operator is the one that acts";
    OPERATOR_JOBS = Gauge "sensorium_jobs" ["kind", "state"]
        "Objects of a kind by the state that they print";
    TRITON_SUCCESS = Untyped "nv_inference_request_success" ["model", "version"]
        "Requests that succeeded";
    TRITON_FAILURE = Untyped "nv_inference_request_failure" ["model", "version", "reason"]
        "Requests that failed; the reason is REJECTED, CANCELED, BACKEND (an engine failed) or OTHER";
    TRITON_COUNT = Untyped "nv_inference_count" ["model", "version"]
        "Rows inferred";
    TRITON_EXEC_COUNT = Untyped "nv_inference_exec_count" ["model", "version"]
        "Engine runs";
    TRITON_REQUEST_US = Untyped "nv_inference_request_duration_us" ["model", "version"]
        "Sum of the times of requests that succeeded, in microseconds";
    TRITON_QUEUE_US = Untyped "nv_inference_queue_duration_us" ["model", "version"]
        "Sum of the times that requests waited until an engine began with them, in microseconds";
    TRITON_INPUT_US = Untyped "nv_inference_compute_input_duration_us" ["model", "version"]
        "Sum of the times that inputs were put together, in microseconds; each request of a batch counts the whole of it";
    TRITON_INFER_US = Untyped "nv_inference_compute_infer_duration_us" ["model", "version"]
        "Sum of the times that requests were run, in microseconds; each request of a batch counts the whole run";
    TRITON_OUTPUT_US = Untyped "nv_inference_compute_output_duration_us" ["model", "version"]
        "Sum of the times that outputs were taken apart, in microseconds; each request of a batch counts the whole of it";
    TRITON_CACHE_HITS = Untyped "nv_cache_num_hits_per_model" ["model", "version"]
        "Requests that were answered from the response cache";
    TRITON_CACHE_MISSES = Untyped "nv_cache_num_misses_per_model" ["model", "version"]
        "Requests that were looked for in the response cache and not found";
    TRITON_CACHE_HIT_US = Untyped "nv_cache_hit_duration_per_model" ["model", "version"]
        "Sum of the times that answers took from the response cache, in microseconds";
    TRITON_CACHE_MISS_US = Untyped "nv_cache_miss_duration_per_model" ["model", "version"]
        "Sum of the times that looking into the response cache and filling it took, in microseconds";
    TRITON_CACHE_ENTRIES = Gauge "nv_cache_num_entries" []
        "Answers in the response cache";
    TRITON_CACHE_UTIL = Gauge "nv_cache_util" []
        "Part of the response cache's bytes that is taken, from 0 to 1";
    TRITON_CACHE_EVICTIONS = Untyped "nv_cache_num_evictions" []
        "Answers that had to leave the response cache for others";
    TRITON_CACHE_LOOKUPS = Untyped "nv_cache_num_lookups" []
        "Requests that were looked for in the response cache";
    TRITON_CACHE_ALL_HITS = Untyped "nv_cache_num_hits" []
        "Requests of all models that were answered from the response cache";
    TRITON_CACHE_ALL_MISSES = Untyped "nv_cache_num_misses" []
        "Requests of all models that were looked for in the response cache and not found";
    TRITON_CACHE_LOOKUP_US = Untyped "nv_cache_lookup_duration" []
        "Sum of the times that looking into the response cache took, in microseconds";
    TRITON_CACHE_INSERTION_US = Untyped "nv_cache_insertion_duration" []
        "Sum of the times that keeping answers in the response cache took, in microseconds";
    TRITON_PENDING = Gauge "nv_inference_pending_request_count" ["model", "version"]
        "Requests that wait now: in the queue, for their turn in a sequence, or for the machine";
    TRITON_FIRST_RESPONSE_MS = Histogram "nv_inference_first_response_histogram_ms" ["model", "version"]
        "Time until the first response of requests that have several, in milliseconds";
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of `docs/metrics.md` as they must be.
    fn rows() -> Vec<String> {
        let row = |metric: &Metric| {
            let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
            format!("| `{}` | {} | {} | {} |", metric.name, metric.kind.as_str(), labels.join(", "), metric.help)
        };
        ALL.iter().map(row).collect()
    }

    #[test]
    fn the_documentation_lists_exactly_the_metrics_that_exist() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md")).unwrap();
        let documented: Vec<_> = page.lines().filter(|line| line.starts_with("| `")).collect();
        assert_eq!(documented, rows(), "docs/metrics.md must hold these rows:\n{}", rows().join("\n"));
    }

    #[test]
    fn names_follow_the_convention_of_their_kind() {
        for metric in ALL {
            assert_eq!(metric.name.ends_with("_total"), metric.kind == Kind::Counter, "{}", metric.name);
            let is_of_models = metric.name.starts_with("nv_") && !metric.labels.is_empty();
            assert_eq!(is_of_models, metric.labels.contains(&"version"), "{}", metric.name);
            assert!(
                ["nv_inference_", "nv_cache_", "sensorium_"].iter().any(|prefix| metric.name.starts_with(prefix)),
                "{}",
                metric.name
            );
            assert!(!metric.help.ends_with('.'), "the encoder ends {} with a full stop", metric.name);
        }
    }
}

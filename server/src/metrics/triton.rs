//! What models and the response cache have counted themselves, under Triton's names.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder},
    metrics::{MetricType, TypedMetric, family::Family, gauge::Gauge},
    registry::Registry,
};
use sensorium_proto::inference::{InferStatistics, ModelStatistics, StatisticDuration};
use sensorium_telemetry::metrics::{self as names, Metric};

use super::{Labels, label, versioned};
use crate::model::Failure;

/// What models have counted themselves.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// As `ModelStatistics` reports it.
    pub statistics: ModelStatistics,
    /// Requests without an answer, in the order of [`Failure::ALL`].
    pub failures: [u64; Failure::ALL.len()],
}

/// What models count, under Triton's names.
pub(super) fn registry(models: &[Counts], cache: &CacheCounts) -> Registry {
    type Value = fn(&ModelStatistics) -> u64;
    fn part(
        model: &ModelStatistics,
        part: impl Fn(&InferStatistics) -> Option<StatisticDuration>,
    ) -> StatisticDuration {
        model.inference_stats.as_ref().and_then(part).unwrap_or_default()
    }
    let values: [(Metric, Value); 12] = [
        (names::TRITON_SUCCESS, |model| part(model, |all| all.success).count),
        (names::TRITON_COUNT, |model| model.inference_count),
        (names::TRITON_EXEC_COUNT, |model| model.execution_count),
        (names::TRITON_REQUEST_US, |model| part(model, |all| all.success).ns / 1000),
        (names::TRITON_QUEUE_US, |model| part(model, |all| all.queue).ns / 1000),
        (names::TRITON_INPUT_US, |model| part(model, |all| all.compute_input).ns / 1000),
        (names::TRITON_INFER_US, |model| part(model, |all| all.compute_infer).ns / 1000),
        (names::TRITON_OUTPUT_US, |model| part(model, |all| all.compute_output).ns / 1000),
        (names::TRITON_CACHE_HITS, |model| part(model, |all| all.cache_hit).count),
        (names::TRITON_CACHE_MISSES, |model| part(model, |all| all.cache_miss).count),
        (names::TRITON_CACHE_HIT_US, |model| part(model, |all| all.cache_hit).ns / 1000),
        (names::TRITON_CACHE_MISS_US, |model| part(model, |all| all.cache_miss).ns / 1000),
    ];
    let mut registry = Registry::default();
    for (metric, value) in values {
        let family = Family::<Labels<2>, Untyped>::default();
        for Counts { statistics, .. } in models {
            family.get_or_create(&versioned(&statistics.name, &statistics.version)).add(value(statistics));
        }
        metric.register(&mut registry, family);
    }
    let failures = Family::<Labels<3>, Untyped>::default();
    for Counts { statistics, failures: counts } in models {
        for (reason, count) in Failure::ALL.into_iter().zip(counts) {
            let [model, version] = versioned(&statistics.name, &statistics.version);
            failures.get_or_create(&[model, version, label("reason", reason.as_str())]).add(*count);
        }
    }
    names::TRITON_FAILURE.register(&mut registry, failures);
    cache.register(&mut registry);
    registry
}

/// What the response cache has done, for all models together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CacheCounts {
    /// Answers that are in it.
    pub entries: u64,
    /// Which part of its bytes they take.
    pub used: f64,
    /// Answers that had to go before they were old, because others came.
    pub evictions: u64,
    /// Requests that found an answer.
    pub hits: u64,
    /// Requests that found none.
    pub misses: u64,
    /// Time that looking took.
    pub lookups: Duration,
    /// Time that keeping took.
    pub insertions: Duration,
}

impl CacheCounts {
    fn register(&self, registry: &mut Registry) {
        let untyped = |value: u64| {
            let metric = Untyped::default();
            metric.add(value);
            metric
        };
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let entries: Gauge = Gauge::default();
        entries.set(i64::try_from(self.entries).unwrap_or(i64::MAX));
        let used = Gauge::<f64, AtomicU64>::default();
        used.set(self.used);
        names::TRITON_CACHE_ENTRIES.register(registry, entries);
        names::TRITON_CACHE_UTIL.register(registry, used);
        names::TRITON_CACHE_EVICTIONS.register(registry, untyped(self.evictions));
        names::TRITON_CACHE_LOOKUPS.register(registry, untyped(self.hits + self.misses));
        names::TRITON_CACHE_ALL_HITS.register(registry, untyped(self.hits));
        names::TRITON_CACHE_ALL_MISSES.register(registry, untyped(self.misses));
        names::TRITON_CACHE_LOOKUP_US.register(registry, untyped(micros(self.lookups)));
        names::TRITON_CACHE_INSERTION_US.register(registry, untyped(micros(self.insertions)));
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

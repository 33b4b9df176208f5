//! What the operator tells of itself: metrics, and whether its watches still hear anything.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use sensorium_api::JobState;
use sensorium_telemetry::{error_line, metrics as names};

/// A watch that has had nothing but errors for so long will not recover by itself: better to start anew.
const STALE: Duration = Duration::from_mins(5);

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabel {
    kind: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct UntilLabel {
    kind: &'static str,
    until: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct WatchLabel {
    watch: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabel {
    kind: &'static str,
    state: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VerbLabel {
    kind: &'static str,
    verb: &'static str,
}

/// Says how many objects are in each state.
type States = Box<dyn Fn() -> Vec<(JobState, i64)> + Send + Sync>;

/// Shared by all controllers and by the HTTP server that tells about them.
pub struct Health {
    registry: Registry,
    duration: Family<KindLabel, Histogram>,
    reactions: Family<UntilLabel, Histogram>,
    visits: Family<OutcomeLabel, Counter>,
    writes: Family<VerbLabel, Counter>,
    staleness: Family<WatchLabel, Gauge<f64, AtomicU64>>,
    leader: Gauge,
    jobs: Family<StateLabel, Gauge>,
    /// Who knows the states of the objects of a kind.
    counted: Mutex<Vec<(&'static str, States)>>,
    /// Since when each watch has had nothing but errors.
    failing: Mutex<BTreeMap<String, Option<Instant>>>,
}

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Health").finish_non_exhaustive()
    }
}

impl Default for Health {
    fn default() -> Self {
        let mut registry = Registry::default();
        let duration: Family<KindLabel, Histogram> =
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 14)));
        let reactions: Family<UntilLabel, Histogram> =
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.01, 1.5, 22)));
        let (visits, writes, staleness) = (Family::default(), Family::default(), Family::default());
        let (leader, jobs) = (Gauge::default(), Family::default());
        names::OPERATOR_RECONCILE_SECONDS.register(&mut registry, duration.clone());
        names::OPERATOR_REACTION.register(&mut registry, reactions.clone());
        names::OPERATOR_RECONCILE.register(&mut registry, Family::clone(&visits));
        names::OPERATOR_WRITES.register(&mut registry, Family::clone(&writes));
        names::OPERATOR_WATCH_STALENESS.register(&mut registry, Family::clone(&staleness));
        names::OPERATOR_LEADER.register(&mut registry, Gauge::clone(&leader));
        names::OPERATOR_JOBS.register(&mut registry, Family::clone(&jobs));
        Self {
            registry,
            duration,
            reactions,
            visits,
            writes,
            staleness,
            leader,
            jobs,
            counted: Mutex::default(),
            failing: Mutex::default(),
        }
    }
}

impl Health {
    /// Notes one visit.
    pub(super) fn visited(&self, kind: &'static str, outcome: &'static str, took: Duration) {
        self.duration.get_or_create(&KindLabel { kind }).observe(took.as_secs_f64());
        self.visits.get_or_create(&OutcomeLabel { kind, outcome }).inc();
    }

    /// Notes how long after the news of an object the first write that came of it was sent, and answered.
    pub(super) fn reacted(&self, kind: &'static str, sent: Duration, answered: Duration) {
        for (until, took) in [("sent", sent), ("answered", answered)] {
            self.reactions.get_or_create(&UntilLabel { kind, until }).observe(took.as_secs_f64());
        }
    }

    /// Notes one write to the API server.
    pub(super) fn wrote(&self, kind: &'static str, verb: &'static str) {
        self.writes.get_or_create(&VerbLabel { kind, verb }).inc();
    }

    /// Writes so far, for tests and benchmarks.
    pub fn writes(&self, kind: &'static str, verb: &'static str) -> u64 {
        self.writes.get_or_create(&VerbLabel { kind, verb }).get()
    }

    /// Notes whether this process leads.
    pub fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// The objects of `kind` are counted by `states` whenever somebody asks.
    pub(super) fn count(&self, kind: &'static str, states: impl Fn() -> Vec<(JobState, i64)> + Send + Sync + 'static) {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).push((kind, Box::new(states)));
    }

    /// A watch begins.
    pub(super) fn watch(self: &Arc<Self>, name: String) -> Watch {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), None);
        Watch { name, health: Arc::clone(self) }
    }

    /// The watch that has heard nothing but errors for too long, if there is one.
    pub fn stale(&self) -> Option<String> {
        let failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        failing.iter().find_map(|(name, since)| {
            let seconds = since.map(|since| since.elapsed())?;
            (seconds > STALE).then(|| format!("the watch on {name} has failed for {} s", seconds.as_secs()))
        })
    }

    /// All metrics, as Prometheus reads them.
    pub fn metrics(&self) -> String {
        for (name, since) in self.failing.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let seconds = since.map_or(0.0, |since| since.elapsed().as_secs_f64());
            self.staleness.get_or_create(&WatchLabel { watch: name.clone() }).set(seconds);
        }
        self.jobs.clear();
        // Who stands by knows them too, and a sum over all operators should count them once.
        let counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        for (kind, states) in counted.iter().filter(|_| self.leader.get() == 1) {
            for (state, count) in states() {
                self.jobs.get_or_create(&StateLabel { kind, state: format!("{state:?}") }).set(count);
            }
        }
        let mut text = String::new();
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            tracing::error!(%error, "could not encode metrics");
        }
        text
    }
}

/// One watch's line to [`Health`].
#[derive(Debug)]
pub(super) struct Watch {
    name: String,
    health: Arc<Health>,
}

impl Watch {
    /// Notes that the watch heard something, or that it failed.
    pub(super) fn note(&self, error: Option<&kube::runtime::watcher::Error>) {
        let mut failing = self.health.failing.lock().unwrap_or_else(PoisonError::into_inner);
        let since = failing.entry(self.name.clone()).or_default();
        match error {
            None => *since = None,
            Some(error) => {
                if since.is_none() {
                    tracing::warn!(watch = self.name, error = error_line(error), "a watch failed; trying again");
                    *since = Some(Instant::now());
                }
            }
        }
    }
}

//! Which requests are traced, decided before a span exists: a request that is not traced costs a counter.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use crate::Parent;

/// How many requests are traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Whether any is.
    pub enabled: bool,
    /// One request of so many that come without a trace of their own; 1 is every one.
    pub rate: u64,
    /// So many more at most; `None` for no end.
    pub count: Option<u64>,
}

impl Default for Sampling {
    /// Everything.
    fn default() -> Self {
        Self { enabled: true, rate: 1, count: None }
    }
}

/// Decides which requests are traced. Clones share the decision.
#[derive(Clone, Debug)]
pub struct TraceControl {
    exported: bool,
    state: Arc<RwLock<State>>,
}

#[derive(Debug)]
struct State {
    all: Counted,
    models: BTreeMap<String, Counted>,
}

/// A setting and what has been counted since it was made.
#[derive(Debug)]
struct Counted {
    sampling: Sampling,
    seen: AtomicU64,
    left: AtomicI64,
}

impl Counted {
    fn new(sampling: Sampling) -> Self {
        let left = sampling.count.map_or(i64::MAX, |count| i64::try_from(count).unwrap_or(i64::MAX));
        Self { sampling, seen: AtomicU64::new(0), left: AtomicI64::new(left) }
    }

    fn sample(&self, parent: Option<&Parent>) -> bool {
        if !self.sampling.enabled {
            return false;
        }
        let chosen = match parent {
            Some(parent) => parent.is_sampled(),
            None => self.seen.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.sampling.rate.max(1)),
        };
        chosen && (self.sampling.count.is_none() || self.left.fetch_sub(1, Ordering::Relaxed) > 0)
    }
}

impl TraceControl {
    /// Traces as `sampling` says, if spans are exported at all.
    pub fn new(exported: bool, sampling: Sampling) -> Self {
        let state = State { all: Counted::new(sampling), models: BTreeMap::new() };
        Self { exported, state: Arc::new(RwLock::new(state)) }
    }

    /// Whether spans go anywhere.
    pub fn is_exported(&self) -> bool {
        self.exported
    }

    /// Whether the next request to `model` is traced. A request that belongs to a trace already follows its `parent`.
    pub(crate) fn sample(&self, model: &str, parent: Option<&Parent>) -> bool {
        if !self.exported {
            return false;
        }
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.models.get(model).unwrap_or(&state.all).sample(parent)
    }

    /// What applies to `model`, or to models without a setting of their own.
    pub fn sampling(&self, model: Option<&str>) -> Sampling {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        model.and_then(|model| state.models.get(model)).unwrap_or(&state.all).sampling
    }

    /// Applies `sampling` to `model`, or to all models without a setting of their own, and counts anew. `None` takes a
    /// model's own setting away, or returns to the default for all.
    pub fn set(&self, model: Option<&str>, sampling: Option<Sampling>) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        match (model, sampling) {
            (None, sampling) => state.all = Counted::new(sampling.unwrap_or_default()),
            (Some(model), None) => drop(state.models.remove(model)),
            (Some(model), Some(sampling)) => drop(state.models.insert(model.to_owned(), Counted::new(sampling))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled(control: &TraceControl, model: &str, requests: usize) -> usize {
        (0..requests).filter(|_| control.sample(model, None)).count()
    }

    #[test]
    fn one_request_of_the_rate_is_traced_and_no_more_than_the_count() {
        let control = TraceControl::new(true, Sampling { enabled: true, rate: 10, count: None });
        assert_eq!(sampled(&control, "m", 100), 10);
        control.set(None, Some(Sampling { enabled: true, rate: 10, count: Some(3) }));
        assert_eq!(sampled(&control, "m", 100), 3);
        control.set(None, Some(Sampling { enabled: false, ..Sampling::default() }));
        assert_eq!(sampled(&control, "m", 100), 0);
    }

    #[test]
    fn a_model_can_have_a_setting_of_its_own() {
        let control = TraceControl::new(true, Sampling { enabled: false, ..Sampling::default() });
        control.set(Some("m"), Some(Sampling { enabled: true, rate: 2, count: None }));
        assert_eq!((sampled(&control, "m", 10), sampled(&control, "other", 10)), (5, 0));
        control.set(Some("m"), None);
        assert_eq!(sampled(&control, "m", 10), 0);
    }

    #[test]
    fn a_request_of_a_trace_does_as_its_parent_does() {
        let control = TraceControl::new(true, Sampling { enabled: true, rate: 1000, count: None });
        let parent =
            |flags| Parent::parse(&format!("00-{}-{}-{flags}", "ab".repeat(16), "cd".repeat(8)), None).unwrap();
        assert!((0..5).all(|_| control.sample("m", Some(&parent("01")))));
        assert!(!control.sample("m", Some(&parent("00"))));
    }

    #[test]
    fn nothing_is_traced_when_spans_go_nowhere() {
        assert_eq!(sampled(&TraceControl::new(false, Sampling::default()), "m", 10), 0);
    }
}

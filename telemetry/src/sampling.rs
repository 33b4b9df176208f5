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

/// The parts of a [`Sampling`] that somebody has set; the others are as they are for all models, or were at the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetSampling {
    /// Whether any request is traced.
    pub enabled: Option<bool>,
    /// One request of how many.
    pub rate: Option<u64>,
    /// How many more at most, and `Some(None)` for no end.
    pub count: Option<Option<u64>>,
}

/// Decides which requests are traced. Clones share the decision.
#[derive(Clone, Debug)]
pub struct TraceControl {
    exported: bool,
    /// What holds while nobody has set anything.
    start: Sampling,
    state: Arc<RwLock<State>>,
}

#[derive(Debug, Default)]
struct State {
    all: Scope,
    models: BTreeMap<String, Scope>,
}

/// What was set for all models, or for one, and what has been counted since.
#[derive(Debug, Default)]
struct Scope {
    set: SetSampling,
    seen: AtomicU64,
    /// How many more are traced, where there is an end.
    left: AtomicI64,
}

impl Scope {
    fn left(&self) -> u64 {
        u64::try_from(self.left.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// Sets `set`, and counts anew what that changes.
    fn change(&mut self, set: SetSampling, count: Option<u64>) {
        if set.count.is_some() || self.set.count.is_some() {
            self.left = to_go(count);
        }
        (self.set, self.seen) = (set, AtomicU64::new(0));
    }
}

fn to_go(count: Option<u64>) -> AtomicI64 {
    AtomicI64::new(count.map_or(i64::MAX, |count| i64::try_from(count).unwrap_or(i64::MAX)))
}

impl TraceControl {
    /// Traces as `start` says, if spans are exported at all.
    pub fn new(exported: bool, start: Sampling) -> Self {
        let mut state = State::default();
        state.all.left = to_go(start.count);
        Self { exported, start, state: Arc::new(RwLock::new(state)) }
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
        let own = state.models.get(model);
        let sampling = self.applying(&state, own);
        if !sampling.enabled {
            return false;
        }
        // Each part is counted where it was set.
        let scope = |is_own: fn(&SetSampling) -> bool| own.filter(|own| is_own(&own.set)).unwrap_or(&state.all);
        let chosen = parent.map_or_else(
            || {
                let seen = &scope(|set| set.rate.is_some()).seen;
                seen.fetch_add(1, Ordering::Relaxed).is_multiple_of(sampling.rate.max(1))
            },
            Parent::is_sampled,
        );
        let left = || scope(|set| set.count.is_some()).left.fetch_sub(1, Ordering::Relaxed);
        chosen && (sampling.count.is_none() || left() > 0)
    }

    /// What applies to `model`, or to models for which nothing is set, with the count of those that are left.
    pub fn sampling(&self, model: Option<&str>) -> Sampling {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        self.applying(&state, model.and_then(|model| state.models.get(model)))
    }

    fn applying(&self, state: &State, own: Option<&Scope>) -> Sampling {
        let over = |below: Sampling, scope: &Scope| {
            let count = scope.set.count.unwrap_or(below.count);
            Sampling {
                enabled: scope.set.enabled.unwrap_or(below.enabled),
                rate: scope.set.rate.unwrap_or(below.rate),
                count: if scope.set.count.is_some() { count.map(|_| scope.left()) } else { count },
            }
        };
        let start = Sampling { count: self.start.count.map(|_| state.all.left()), ..self.start };
        let all = over(start, &state.all);
        own.map_or(all, |own| over(all, own))
    }

    /// What was set for `model`, or for all.
    pub fn set_for(&self, model: Option<&str>) -> SetSampling {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let scope = model.map_or(Some(&state.all), |model| state.models.get(model));
        scope.map(|scope| scope.set).unwrap_or_default()
    }

    /// Sets `set`, and nothing else, for `model`, or for all: what it leaves out for a model is as for all, and for all as at the start.
    pub fn set(&self, model: Option<&str>, set: SetSampling) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let Some(model) = model else { return state.all.change(set, set.count.unwrap_or(self.start.count)) };
        if set == SetSampling::default() {
            state.models.remove(model);
        } else {
            state.models.entry(model.to_owned()).or_default().change(set, set.count.flatten());
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
        control.set(None, SetSampling { count: Some(Some(3)), ..SetSampling::default() });
        assert_eq!(sampled(&control, "m", 20), 2);
        assert_eq!(control.sampling(None).count, Some(1), "so many are left");
        assert_eq!(sampled(&control, "m", 100), 1);
        assert_eq!(control.sampling(None).count, Some(0));
        control.set(None, SetSampling { enabled: Some(false), ..SetSampling::default() });
        assert_eq!(sampled(&control, "m", 100), 0);
        assert_eq!(control.sampling(None).count, None, "as at the start");
    }

    #[test]
    fn what_is_not_set_for_a_model_is_as_for_all_and_for_all_as_at_the_start() {
        let start = Sampling { enabled: true, rate: 5, count: None };
        let control = TraceControl::new(true, start);
        control.set(Some("m"), SetSampling { rate: Some(2), ..SetSampling::default() });
        assert_eq!((sampled(&control, "m", 10), sampled(&control, "other", 10)), (5, 2));
        control.set(None, SetSampling { enabled: Some(false), ..SetSampling::default() });
        assert_eq!((sampled(&control, "m", 10), sampled(&control, "other", 10)), (0, 0), "off is off for it, too");
        assert_eq!(control.sampling(Some("m")), Sampling { enabled: false, rate: 2, count: None });
        control.set(Some("m"), SetSampling { enabled: Some(true), ..control.set_for(Some("m")) });
        assert_eq!((sampled(&control, "m", 10), sampled(&control, "other", 10)), (5, 0));
        control.set(None, SetSampling { count: Some(Some(3)), ..SetSampling::default() });
        assert_eq!(sampled(&control, "m", 10), 3, "all of them together");
        control.set(Some("m"), SetSampling::default());
        control.set(None, SetSampling::default());
        assert_eq!((control.sampling(Some("m")), control.sampling(None)), (start, start));
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

//! Readiness that is earned: every engine has run something real not long ago.
//!
//! Requests prove it in passing; an engine without any is given one row of zeros now and then, through the same queue
//! that requests take. A queue that does not move or an engine that only fails makes the server unready.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinSet, time};

use crate::{metrics::Metrics, model::Graph, repository::Registry, scheduler::LONGEST_PROBE};

/// How long an engine may be without proof before it is probed.
const PROBE_AGE: Duration = Duration::from_secs(5);
/// How long an engine is trusted after its last proof: time to be probed, and once more.
const TRUST: Duration = Duration::from_secs(30);
/// Time between looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Probes that begin at once; more are spread over the time until the next look, and over as many looks as an engine may be without proof.
const AT_ONCE: usize = 8;

/// Keeps `ready` true while every engine of `repository` proves itself. Never returns; dropping it is safe anywhere.
pub async fn watch(repository: &Registry, ready: &watch::Sender<bool>, metrics: &Metrics) -> ! {
    let mut ticks = time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    let mut probes = Probes::default();
    loop {
        ticks.tick().await;
        let graphs = repository.graphs();
        probes.begin(&graphs);
        // What is answered soon counts now.
        let _ = time::timeout(INTERVAL, probes.end()).await;
        let unproven = graphs.iter().find(|graph| graph.last_success().is_none_or(|ago| ago > TRUST));
        let is_ready = unproven.is_none();
        metrics.set_ready(is_ready);
        let changed = ready.send_if_modified(|ready| std::mem::replace(ready, is_ready) != is_ready);
        match unproven {
            None if changed => tracing::info!("ready"),
            Some(graph) if changed => {
                tracing::error!(graph = graph.name(), "not ready: the engine has not run for {TRUST:?}");
            }
            _ => {}
        }
    }
}

/// Probes that are under way.
#[derive(Default)]
struct Probes {
    running: JoinSet<()>,
    /// Each of the graphs, for as long as it is probed.
    graphs: HashMap<tokio::task::Id, Arc<Graph>>,
}

impl Probes {
    /// Begins to probe those of `graphs` that have been without proof for the longest: requests that come meanwhile shall not wait for hundreds of
    /// them.
    fn begin(&mut self, graphs: &[Arc<Graph>]) {
        let is_probed = |graph: &Arc<Graph>| self.graphs.values().any(|probed| Arc::ptr_eq(probed, graph));
        let idle = graphs.iter().filter(|graph| !is_probed(graph));
        let idle = idle.map(|graph| (graph, graph.last_success().unwrap_or(Duration::MAX)));
        for (graph, delay) in due(idle.collect(), graphs.len()) {
            let own = graph.clone();
            let begun = self.running.spawn(async move {
                time::sleep(delay).await;
                probe(own).await;
            });
            self.graphs.insert(begun.id(), graph.clone());
        }
    }

    /// Waits for all of them.
    async fn end(&mut self) {
        while let Some(ended) = self.running.join_next_with_id().await {
            self.graphs.remove(&ended.map_or_else(|error| error.id(), |(id, ())| id));
        }
    }
}

/// Which of those that have been without proof for so long are to be probed before the next look, those first that have been for
/// the longest, and how long after this one, where there are `all` engines.
fn due<T>(mut idle: Vec<(T, Duration)>, all: usize) -> Vec<(T, Duration)> {
    idle.retain(|(_, age)| *age >= PROBE_AGE);
    idle.sort_by_key(|(_, age)| std::cmp::Reverse(*age));
    idle.truncate(all.div_ceil(PROBE_AGE.as_secs() as usize).max(AT_ONCE));
    let rest = idle.len().saturating_sub(AT_ONCE).max(1) as u32;
    let delay = |index: usize| INTERVAL * index.saturating_sub(AT_ONCE) as u32 / rest;
    idle.into_iter().enumerate().map(|(index, (graph, _))| (graph, delay(index))).collect()
}

async fn probe(graph: Arc<Graph>) {
    match time::timeout(LONGEST_PROBE, graph.probe(PROBE_AGE)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(graph = graph.name(), error = &error as &dyn std::error::Error, "probe failed");
        }
        Err(_) => tracing::warn!(graph = graph.name(), "probe was not answered within {LONGEST_PROBE:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_engines_are_probed_at_once_and_many_are_spread_over_looks() {
        let idle = |count: usize| (0..count).map(|graph| (graph, PROBE_AGE + Duration::from_millis(graph as u64)));
        let few = due(idle(3).chain([(9, PROBE_AGE / 2)]).collect(), 4);
        assert_eq!(few, [(2, Duration::ZERO), (1, Duration::ZERO), (0, Duration::ZERO)], "the oldest proof first");
        let many = due(idle(1000).collect(), 1000);
        assert_eq!(many.len(), 200, "all of them in as many looks as one may be without proof");
        assert_eq!(many.iter().filter(|(_, delay)| delay.is_zero()).count(), AT_ONCE + 1);
        let between = |pair: &[(usize, Duration)]| pair[1].1.saturating_sub(pair[0].1) <= INTERVAL / 100;
        assert!(many.windows(2).all(between) && many.iter().all(|(_, delay)| *delay < INTERVAL), "{many:?}");
    }
}

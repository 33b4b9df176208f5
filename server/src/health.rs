//! Readiness that is earned: every engine has run something real not long ago.
//!
//! Requests prove it in passing; an engine without any is given one row of zeros now and then, through the same queue
//! that requests take. A queue that does not move or an engine that only fails makes the server unready.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinSet, time};

use crate::{metrics::Metrics, model::Graph, repository::Registry, scheduler::LONGEST_PROBE};

/// How long an engine may be without proof before it is probed.
const PROBE_AGE: Duration = Duration::from_secs(5);
/// How long an engine is trusted after its last proof: time to be probed, and once more.
const TRUST: Duration = Duration::from_secs(30);
/// Time between looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Keeps `ready` true while every engine of `repository` proves itself. Never returns; dropping it is safe anywhere.
pub async fn watch(repository: &Registry, ready: &watch::Sender<bool>, metrics: &Metrics) -> ! {
    let mut ticks = time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let mut probes = JoinSet::new();
        let graphs = repository.graphs();
        for graph in &graphs {
            probes.spawn(probe(graph.clone()));
        }
        probes.join_all().await;
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

async fn probe(graph: Arc<Graph>) {
    match time::timeout(LONGEST_PROBE, graph.probe(PROBE_AGE)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(graph = graph.name(), error = &error as &dyn std::error::Error, "probe failed");
        }
        Err(_) => tracing::warn!(graph = graph.name(), "probe was not answered within {LONGEST_PROBE:?}"),
    }
}

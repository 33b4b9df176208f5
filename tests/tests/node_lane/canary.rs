//! A canary that is worse than the servers it should replace, judged by the metrics of both.

use std::path::Path;

use anyhow::{Result, ensure};
use sensorium_tests::Node;
use serde_json::json;

use crate::client::{finished, start_client};
use crate::{CHAIN, START, change_serving, ready, reason};

const JOB: (&str, &str) = ("servingjob", "vqa");

/// Servers with too little CPU answer late: they are taken back, and a client that asks all the while never notices more.
pub(crate) fn one_that_is_slow_is_taken_back(node: &Node, questions: &Path) -> Result<()> {
    let strategy = json!({"steps": [{"weight": 50, "pauseSeconds": 120}], "analysis": {"minRequests": 20}});
    change_serving(node, &json!({"replicas": 2, "autoscaling": null, "rollout": {"canary": strategy}}))?;
    node.eventually("both servers answer", START, || {
        let servers = node.get("deployment", CHAIN, "vqa-server")?.unwrap_or_default();
        Ok((servers["status"]["readyReplicas"] == 2).then_some(()))
    })?;
    start_client(node, questions, "careful", 45)?;
    change_serving(node, &json!({"resources": {"requests": {"cpu": "30m"}, "limits": {"cpu": "30m"}}}))?;

    let why = reason(node, JOB, "Degraded", "RolledBack")?;
    ensure!(why.contains("times as long as with the old servers"), "{why}");
    node.eventually("the canary is gone", START, || {
        Ok(node.get("deployment", CHAIN, "vqa-canary")?.is_none().then_some(()))
    })?;
    finished(node, "careful", |said| said["asked"].as_u64() > Some(100))?;
    ready(node)?;

    // Back to what serves: nothing is left to be rolled out, or to complain of.
    change_serving(node, &json!({"resources": {"requests": {"cpu": "100m"}, "limits": null}}))?;
    reason(node, JOB, "Degraded", "AsWanted").map(drop)
}

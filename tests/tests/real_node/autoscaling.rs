//! Autoscaling by CPU, with the metrics of a real metrics-server.

use std::path::Path;

use anyhow::Result;
use sensorium_tests::Node;
use serde_json::{Value, json};

use crate::client::{finished, start_client};
use crate::{CHAIN, START, change_serving, ready};

/// More servers while a client asks, one when it has gone, and no request fails meanwhile.
pub(crate) fn servers_follow_the_load(node: &Node, questions: &Path) -> Result<()> {
    change_serving(
        node,
        &json!({
            "replicas": null,
            "autoscaling": {"minReplicas": 1, "maxReplicas": 3, "target": 50},
            "resources": {"requests": {"cpu": "100m"}},
        }),
    )?;
    servers(node, "one server is enough when nobody asks", |servers, percent| servers == 1 && percent.is_some())?;
    start_client(node, questions, "load", 40)?;
    servers(node, "one server is too few for the client", |servers, percent| servers > 1 && percent > Some(0))?;
    finished(node, "load", |said| said["asked"].as_u64() > Some(100))?;
    servers(node, "one server is enough again", |servers, percent| servers == 1 && percent < Some(50))?;
    ready(node)
}

/// Waits for a number of ready servers, and the CPU that the autoscaler sees them use, in percent of what they request.
fn servers(node: &Node, what: &str, holds: impl Fn(u64, Option<u64>) -> bool) -> Result<()> {
    node.eventually(what, START, || {
        let autoscaler = node.get("hpa", CHAIN, "vqa-server")?.unwrap_or_default();
        let servers = node.get("deployment", CHAIN, "vqa-server")?.unwrap_or_default();
        let percent = autoscaler["status"]["currentMetrics"][0]["resource"]["current"]["averageUtilization"].as_u64();
        let count = |field: &Value| field.as_u64().unwrap_or(0);
        let ready = count(&servers["status"]["readyReplicas"]);
        let settled = ready == count(&servers["spec"]["replicas"]) && ready == count(&servers["status"]["replicas"]);
        Ok((settled && holds(ready, percent)).then_some(()))
    })
}

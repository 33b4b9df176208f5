//! A graph in pods of its own: found by cluster DNS, called by the servers, replaced with them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use sensorium_tests::Node;
use serde_json::{Value, json};

use crate::client::{ask, finished, start_client};
use crate::{CHAIN, START, change_serving, ready};

const ENCODERS: &str = "app.kubernetes.io/component=encoder";

/// Answers stay right when the image encoder moves to two pods of its own; a rollout brings new ones, and no request fails.
pub(crate) fn come_and_go_with_their_servers(node: &Node, questions: &Path) -> Result<()> {
    let encoder = json!({"graph": "image_encoder", "replicas": 2, "resources": {"requests": {"cpu": "50m"}}});
    change_serving(node, &json!({"replicas": 1, "autoscaling": null, "encoders": [encoder]}))?;
    let first = settled(node, 1)?.remove(0);
    let service = node.get("service", CHAIN, &first)?.context("its Service")?;
    ensure!(service["spec"]["clusterIP"] == "None", "{service:#}");
    ask(node, questions, "far", 0)?;
    let pods = node.list("pods", CHAIN, ENCODERS)?;
    ensure!(pods.len() == 2, "{pods:#?}");
    for pod in &pods {
        let asked = answered(node, pod)?;
        ensure!(asked > 0.0, "the servers call every pod: {pod:#}");
    }

    start_client(node, questions, "further", 30)?;
    change_serving(node, &json!({"batching": {"maxBatchSize": 8}}))?;
    finished(node, "further", |said| said["asked"].as_u64() > Some(100))?;
    let second = settled(node, 1)?.remove(0);
    ensure!(first != second, "other servers have encoders of their own");

    change_serving(node, &json!({"encoders": null}))?;
    settled(node, 0).map(drop)
}

/// Waits until all servers are of the newest spec, and only so many encoders are left; their names.
fn settled(node: &Node, encoders: usize) -> Result<Vec<String>> {
    let names = node.eventually(&format!("{encoders} encoders are left"), START, || {
        let job = node.get("servingjob", CHAIN, "vqa")?.unwrap_or_default();
        let holds = |name: &str, status: &str| {
            let conditions = job["status"]["conditions"].as_array().cloned().unwrap_or_default();
            conditions.iter().any(|c| {
                c["type"] == name && c["status"] == status && c["observedGeneration"] == job["metadata"]["generation"]
            })
        };
        let deployments = node.list("deployments", CHAIN, ENCODERS)?;
        let names: Vec<String> =
            deployments.iter().filter_map(|encoder| Some(encoder["metadata"]["name"].as_str()?.to_owned())).collect();
        let done = holds("Progressing", "False") && holds("WorkloadsReady", "True") && holds("Ready", "True");
        Ok((done && names.len() == encoders).then_some(names))
    })?;
    ready(node)?;
    Ok(names)
}

/// Requests that a pod has answered well.
fn answered(node: &Node, pod: &Value) -> Result<f64> {
    let name = pod["metadata"]["name"].as_str().context("a pod has a name")?;
    let metrics =
        node.kubectl(&["get", "--raw", &format!("/api/v1/namespaces/{CHAIN}/pods/{name}:8002/proxy/metrics")])?;
    let lines = metrics.lines().filter(|line| line.starts_with("sensorium_server_requests_total{"));
    let counts = lines
        .filter(|line| line.contains("code=\"OK\""))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    Ok(counts.sum::<f64>())
}

//! Canaries that are worse than the servers that they should replace, while a client asks that must not notice.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use sensorium_artifact::{ManifestParts, Store, Volumes};
use sensorium_tests::Node;
use serde_json::{Value, json};

use crate::buckets::{Buckets, MAKER, STORE};
use crate::client::{finished, start_client, start_hasty_client};
use crate::{CHAIN, START, change_serving, ready, reason};

const JOB: (&str, &str) = ("servingjob", "vqa");
/// Too little CPU to answer as fast as servers without a limit.
const SLOW: &str = "40m";

/// Servers with too little CPU answer late, and are judged by how late.
pub(crate) fn one_that_is_slow_is_taken_back(node: &Node, questions: &Path) -> Result<()> {
    slow_canary(node, &json!({"minRequests": 20}))?;
    start_client(node, questions, "careful", 25)?;
    let why = reason(node, JOB, "Degraded", "RolledBack")?;
    ensure!(why.contains("times as long as with the old servers"), "{why}");
    finished(node, "careful", |said| said["asked"].as_u64() > Some(50))?;
    back(node)
}

/// The same servers, judged by the requests that they do not answer in the time that a caller gives them.
pub(crate) fn one_that_fails_is_taken_back(node: &Node, questions: &Path) -> Result<()> {
    slow_canary(node, &json!({"minRequests": 20, "maxErrorRate": 0.05, "maxLatencyRatio": 1000}))?;
    start_client(node, questions, "patient", 25)?;
    start_hasty_client(node, questions, "hasty", 100, 25)?;
    let why = reason(node, JOB, "Degraded", "RolledBack")?;
    ensure!(why.contains("requests failed") && why.contains("maxErrorRate allows 5.0 %"), "{why}");
    finished(node, "patient", |said| said["asked"].as_u64() > Some(50))?;
    finished(node, "hasty", |said| said["late"].as_u64() > Some(0))?;
    back(node)
}

/// Brings a slow canary beside the one stable server, and waits until it answers.
fn slow_canary(node: &Node, analysis: &Value) -> Result<()> {
    let strategy = json!({"steps": [{"weight": 50, "pauseSeconds": 120}], "analysis": analysis});
    change_serving(node, &json!({"replicas": 1, "autoscaling": null, "rollout": {"canary": strategy}}))?;
    change_serving(node, &json!({"resources": {"requests": {"cpu": SLOW}, "limits": {"cpu": SLOW}}}))?;
    node.eventually("the canary answers", START, || {
        let canary = node.get("deployment", CHAIN, "vqa-canary")?.unwrap_or_default();
        Ok((canary["status"]["readyReplicas"] == 1).then_some(()))
    })
}

/// Goes back to what serves: nothing is left to be rolled out, or to complain of.
fn back(node: &Node) -> Result<()> {
    node.eventually("the canary is gone", START, || {
        Ok(node.get("deployment", CHAIN, "vqa-canary")?.is_none().then_some(()))
    })?;
    ready(node)?;
    change_serving(node, &json!({"resources": {"requests": {"cpu": "100m"}, "limits": null}}))?;
    reason(node, JOB, "Degraded", "AsWanted").map(drop)
}

/// A newer artifact of the name, with a graph that no runtime can read although every digest is right.
pub(crate) fn one_whose_model_cannot_be_read_is_taken_back(
    node: &Node,
    questions: &Path,
    buckets: &Buckets,
) -> Result<()> {
    let strategy = json!({"steps": [{"weight": 50, "pauseSeconds": 5}], "analysis": null});
    change_serving(node, &json!({"rollout": {"progressDeadlineSeconds": 15, "canary": strategy}}))?;
    start_client(node, questions, "unmoved", 30)?;
    let mut record = node
        .list("modelartifact", CHAIN, "sensorium.dev/artifact=vqa-int8")?
        .pop()
        .context("the artifact that is served")?;
    let digest = unreadable(buckets, record["spec"]["digest"].as_str().context("a digest")?)?;
    record["metadata"] = json!({
        "name": "unreadable", "namespace": CHAIN, "labels": {"sensorium.dev/artifact": "vqa-int8"},
        "annotations": {"sensorium.dev/access": json!({"envFromSecrets": [MAKER]}).to_string()},
    });
    record.as_object_mut().context("a record is an object")?.remove("status");
    record["spec"]["uri"] = json!(format!("{STORE}/objects/{}", digest.trim_start_matches("sha256:")));
    record["spec"]["digest"] = json!(digest);
    node.apply(&record.to_string())?;

    let why = reason(node, JOB, "Progressing", "RolledBack")?;
    ensure!(why.contains("did not answer within 15 s"), "{why}");
    finished(node, "unmoved", |said| said["asked"].as_u64() > Some(50))?;
    node.kubectl(&["delete", "modelartifact", "unreadable", "--namespace", CHAIN])?;
    back(node)
}

/// Commits a copy of an artifact with a graph that is none; its digest.
fn unreadable(buckets: &Buckets, digest: &str) -> Result<String> {
    let store = Store::open(&format!("file://{}", buckets.store().display()), &Volumes::default())?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let good = store.resolve(digest).await?;
        let folder = store.fetch(&good, Path::new("")).await?;
        let draft = store.draft()?;
        for file in &good.manifest.files {
            fs::copy(folder.join(&file.path), draft.path(&file.path)?)?;
        }
        let graph = good.manifest.graphs.first().context("an artifact has a graph")?;
        fs::write(draft.path(&graph.file)?, b"not a graph")?;
        let manifest = good.manifest.clone();
        let parts = ManifestParts {
            name: manifest.name,
            format: manifest.format,
            graphs: manifest.graphs,
            pipeline: manifest.pipeline,
            modalities: manifest.modalities,
            metrics: manifest.metrics,
            lineage: manifest.lineage,
        };
        Ok(store.commit(draft, parts).await?.digest.to_string())
    })
}

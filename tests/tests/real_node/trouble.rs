//! What goes wrong in the life of a cluster, and must not show in the end.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sensorium_tests::Node;
use serde_json::{Value, json};

use crate::client::{finished, start_client};
use crate::setup::install;
use crate::{CHAIN, START, change_serving, ready, succeeded};

/// The job trains although a worker, the operator, the API server and then everything on the node is killed.
pub(crate) fn trained_through_trouble(node: &Node) -> Result<()> {
    let worker = "sensorium.dev/kind=TrainingJob";
    let running = |attempt: u64| {
        move || -> Result<Option<Vec<Value>>> {
            let pods = node.list("pods", CHAIN, &format!("{worker},sensorium.dev/attempt={attempt}"))?;
            let all = pods.len() == 2 && pods.iter().all(|pod| pod["status"]["phase"] == "Running");
            Ok(all.then_some(pods))
        }
    };
    let checkpointed = || -> Result<Option<()>> {
        let job = node.get("trainingjob", CHAIN, "vqa")?.unwrap_or_default();
        Ok((job["status"]["progress"]["step"].as_u64() > Some(30)).then_some(()))
    };
    let pods = node.eventually("both workers run", START, running(1))?;
    node.eventually("the job says how far it is", START, checkpointed)?;
    ensure!(node.kill_containers(Some(&pods[1]))? == 1, "a worker was to be killed");

    let pods = node.eventually("the group was started again", START, running(2))?;
    node.kubectl(&["delete", "pods", "--namespace", "sensorium-system", "--all", "--force", "--grace-period=0"])?;
    node.kill_api_server()?;
    node.eventually("the API server is back", START, || node.kubectl(&["get", "--raw=/readyz"]).map(Some))?;
    let left = running(2)()?.unwrap_or_default();
    ensure!(
        left.iter().map(|pod| &pod["metadata"]["uid"]).eq(pods.iter().map(|pod| &pod["metadata"]["uid"])),
        "workers do not need it"
    );

    node.kill_containers(None)?;
    let job = succeeded(node, "trainingjob", "vqa")?;
    ensure!(job["status"]["restarts"].as_u64() >= Some(2), "two of the failures were the workers' own: {job:#}");
    ensure!(job["status"]["artifact"]["digest"].is_string(), "{job:#}");
    Ok(())
}

/// No request fails while the servers are replaced one by one.
pub(crate) fn serves_through_trouble(node: &Node, questions: &Path) -> Result<()> {
    start_client(node, questions, "steady", 30)?;
    node.eventually("the client asks", START, || {
        let pod = node.get("pod", "client", "steady")?.unwrap_or_default();
        Ok((pod["status"]["phase"] == "Running").then_some(()))
    })?;
    std::thread::sleep(Duration::from_secs(5));
    change_serving(node, &json!({"batching": {"maxBatchSize": 16}}))?;
    finished(node, "steady", |said| said["asked"].as_u64() > Some(100))?;
    let deployment = node.get("deployment", CHAIN, "vqa-server")?.context("the servers")?;
    ensure!(deployment["metadata"]["generation"].as_u64() > Some(1), "nothing was rolled out: {deployment:#}");
    ready(node)
}

/// An upgrade keeps everything running; after an uninstall the objects are still there, and another install goes on.
pub(crate) fn upgraded_and_uninstalled(node: &Node) -> Result<()> {
    install(node, &["--set", "replicas=1"])?;
    ready(node)?;
    let servers = node.list("pods", CHAIN, "sensorium.dev/kind=ServingJob")?.len();
    node.run("helm", &["uninstall", "sensorium", "--namespace", "sensorium-system", "--wait"])?;
    ensure!(node.get("trainingjob", CHAIN, "vqa")?.is_some(), "an uninstall takes no job along");
    ensure!(node.list("pods", CHAIN, "sensorium.dev/kind=ServingJob")?.len() == servers, "the servers go on");
    ensure!(node.list("deployments", "sensorium-system", "")?.is_empty(), "the operator is gone");
    install(node, &[])?;
    ready(node)
}

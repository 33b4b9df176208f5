//! The chain on a real node: Helm, pods, a bucket that the node reads for all of its pods, a client in a pod, what goes wrong in
//! the life of a cluster, autoscaling, canaries, and GPUs as far as a node without any has them.
//!
//! One test, because a node takes a while to start and a model a while to learn; it reads as a story.
//! Root only, as it makes namespaces and mounts; without root it says so and ends. `make test-node` runs it alone.

mod autoscaling;
mod buckets;
mod canary;
mod client;
mod encoders;
mod gpus;
mod setup;
mod trouble;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sensorium_tests::{Bench, Node, images};
use serde_json::{Value, json};

use buckets::Buckets;
use client::{ask, questions};
use setup::{chain, claims, install};

/// A pod that has to be placed and started, on a machine with other work.
const START: Duration = Duration::from_mins(3);
/// All of a job, restarts included.
const JOB: Duration = Duration::from_mins(12);
const CHAIN: &str = "chain";

#[test]
fn the_chain_runs_on_a_node_and_survives_what_happens_to_clusters() -> Result<()> {
    if !Node::is_possible() {
        println!("not run: a node needs root, for its namespaces and mounts");
        return Ok(());
    }
    let archives = images()?;
    let bench = Bench::new()?;
    // One kind of question is learned within a minute; the whole set takes eight.
    bench.import_easy_vqa_where(1500, 200, |question| question.starts_with("what color"))?;
    let node = Node::start()?;
    for archive in &archives {
        node.run("ctr", &["images", "import", "--no-unpack=false", &archive.display().to_string()])
            .or_else(|_| node.run("ctr", &["images", "import", &archive.display().to_string()]))?;
    }
    install(&node, &[])?;
    node.kubectl(&["create", "namespace", CHAIN])?;
    // The strictest of Kubernetes' standards: every pod that the operator makes has to meet it.
    node.kubectl(&["label", "namespace", CHAIN, "pod-security.kubernetes.io/enforce=restricted"])?;
    node.apply(&claims(&bench.state().join("volumes"))?)?;
    let buckets = Buckets::start(&node, &bench.path().join("buckets"))?;
    node.apply(&Buckets::secrets())?;
    let questions = questions(&bench)?;

    for manifest in chain()? {
        node.apply(&manifest)?;
    }
    let mut stages = Stages(Instant::now());
    trouble::trained_through_trouble(&node)?;
    stages.end("trained, through trouble");
    let job = succeeded(&node, "compressionjob", "vqa-int8")?;
    ensure!(job["status"]["gate"]["promoted"] == true, "{job:#}");
    let artifacts = node.list("modelartifact", CHAIN, "")?;
    ensure!(artifacts.len() == 2, "{artifacts:#?}");
    ready(&node)?;

    ask(&node, &questions, "client", 0)?;
    stages.end("compressed, serving, and right");
    buckets::shared_by_those_who_may_read_it(&node, &buckets)?;
    stages.end("fetched once per node");
    trouble::serves_through_trouble(&node, &questions)?;
    stages.end("rolled out while a client asks");
    autoscaling::servers_follow_the_load(&node, &questions)?;
    stages.end("scaled up and down");
    encoders::come_and_go_with_their_servers(&node, &questions)?;
    stages.end("encoders in pods of their own");
    canary::one_that_is_slow_is_taken_back(&node, &questions)?;
    stages.end("a slow canary taken back");
    canary::one_that_fails_is_taken_back(&node, &questions)?;
    stages.end("a failing canary taken back");
    canary::one_whose_model_cannot_be_read_is_taken_back(&node, &questions, &buckets)?;
    stages.end("an unreadable model taken back");
    gpus::jobs_get_the_gpus_that_they_ask_for(&node)?;
    stages.end("GPUs given out");
    buckets.fetched_once()?;
    trouble::upgraded_and_uninstalled(&node)?;
    stages.end("upgraded, uninstalled, and installed again");
    Ok(())
}

/// Tells whoever watches how far the test is.
struct Stages(Instant);

impl Stages {
    fn end(&mut self, what: &str) {
        println!("{:>4} s  {what}", self.0.elapsed().as_secs());
        self.0 = Instant::now();
    }
}

pub(crate) fn succeeded(node: &Node, kind: &str, name: &str) -> Result<Value> {
    let job = node.eventually(&format!("{kind}/{name} ends"), JOB, || {
        let job = node.get(kind, CHAIN, name)?.unwrap_or_default();
        Ok(["Succeeded", "Failed"].iter().any(|state| job["status"]["state"] == **state).then_some(job))
    })?;
    ensure!(job["status"]["state"] == "Succeeded", "{job:#}");
    Ok(job)
}

pub(crate) fn ready(node: &Node) -> Result<()> {
    node.kubectl(&["wait", "--for=condition=Ready", "servingjob/vqa", "--namespace", CHAIN, "--timeout=5m"]).map(drop)
}

/// Waits until a condition of a job has a reason, and gives its message.
pub(crate) fn reason(node: &Node, (kind, name): (&str, &str), condition: &str, reason: &str) -> Result<String> {
    node.eventually(&format!("{kind}/{name} has {condition} for {reason}"), START, || {
        let job = node.get(kind, CHAIN, name)?.unwrap_or_default();
        let conditions = job["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let found = conditions.iter().find(|found| found["type"] == condition && found["reason"] == reason);
        Ok(found.map(|found| found["message"].as_str().unwrap_or_default().to_owned()))
    })
}

/// Changes the spec of the chain's ServingJob.
pub(crate) fn change_serving(node: &Node, spec: &Value) -> Result<()> {
    let change = json!({"spec": spec}).to_string();
    node.kubectl(&["patch", "servingjob", "vqa", "--namespace", CHAIN, "--type=merge", "--patch", &change]).map(drop)
}

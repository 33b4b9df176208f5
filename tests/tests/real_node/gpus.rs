//! GPUs that only a device plugin of the tests' own knows of: what asks for them is placed, counted and told of them as on a
//! node that has some. Nothing computes on them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use sensorium_tests::{Node, training};
use serde_json::{Value, json};

use crate::{CHAIN, START, reason};

const GPU: &str = "nvidia.com/gpu";
const SLICE: &str = "nvidia.com/mig-1g.10gb";
const GPUS: [&str; 4] = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"];
const PRODUCT: &str = "Sensorium-Test-80GB";

/// Four GPUs and a slice of a fifth are given to the jobs that ask for them, and no job gets more than there is.
pub(crate) fn jobs_get_the_gpus_that_they_ask_for(node: &Node) -> Result<()> {
    let _gpus = node.offer_gpus(GPU, &GPUS)?;
    let _slices = node.offer_gpus(SLICE, &["MIG-a"])?;
    node.eventually("the node has GPUs", START, || {
        let node = node.get("node", CHAIN, "node0")?.unwrap_or_default();
        let allocatable = &node["status"]["allocatable"];
        Ok((allocatable[GPU] == "4" && allocatable[SLICE] == "1").then_some(()))
    })?;
    // Its handler is the one that there is; what counts is that the pods ask for it.
    let class = json!({
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}, "handler": "runc",
    });
    node.apply(&class.to_string())?;

    apply(node, "wide", (2, 2), GPU, &json!({"gpuProduct": PRODUCT, "runtimeClassName": "nvidia"}))?;
    waits(node, "wide", "didn't match Pod's node affinity/selector")?;
    node.kubectl(&["label", "node", "node0", &format!("nvidia.com/gpu.product={PRODUCT}")])?;
    let pods = running(node, "wide", 2)?;
    node.eventually("the four processes train together", START, || {
        let job = node.get("trainingjob", CHAIN, "wide")?.unwrap_or_default();
        Ok((job["status"]["progress"]["step"].as_u64() > Some(0)).then_some(()))
    })?;
    each_process_has_a_rank_and_a_device(node, &pods)?;

    apply(node, "greedy", (1, 1), GPU, &json!({}))?;
    waits(node, "greedy", "Insufficient nvidia.com/gpu")?;
    apply(node, "slice", (1, 1), SLICE, &json!({}))?;
    let pods = running(node, "slice", 1)?;
    let seen = look_into(node, &pods[0])?;
    ensure!(seen.processes.len() == 1 && seen.processes[0]["NVIDIA_VISIBLE_DEVICES"] == "MIG-a", "{seen:#?}");

    delete(node, &["wide"])?;
    running(node, "greedy", 1)?;
    delete(node, &["greedy", "slice"])
}

/// Applies a job of some workers with some processes each, which trains for longer than anybody looks, with one device for
/// each process.
fn apply(node: &Node, name: &str, (workers, processes): (u64, u64), device: &str, scheduling: &Value) -> Result<()> {
    let mut job: Value = serde_yaml_ng::from_str(&training(100_000, 100_000))?;
    job["metadata"] = json!({"name": name, "namespace": CHAIN});
    let spec = &mut job["spec"];
    spec["workers"] = json!(workers);
    spec["processesPerWorker"] = json!(processes);
    spec["parallelism"]["data"] = json!(workers * processes);
    spec["scheduling"] = scheduling.clone();
    spec["resources"] = json!({"requests": {"cpu": "50m"}, "limits": {"cpu": "1", device: processes.to_string()}});
    spec["output"]["artifact"] = json!(name);
    node.apply(&job.to_string())
}

/// Waits until the job says that it waits, and for what.
fn waits(node: &Node, name: &str, what_for: &str) -> Result<()> {
    node.eventually(&format!("{name} waits: {what_for}"), START, || {
        let said = reason(node, ("trainingjob", name), "PodsReady", "Starting")?;
        Ok(said.contains(what_for).then_some(()))
    })?;
    let pods = pods(node, name)?;
    ensure!(pods.iter().all(|pod| pod["status"]["phase"] == "Pending"), "{pods:#?}");
    Ok(())
}

fn pods(node: &Node, name: &str) -> Result<Vec<Value>> {
    node.list("pods", CHAIN, &format!("sensorium.dev/kind=TrainingJob,sensorium.dev/name={name}"))
}

fn running(node: &Node, name: &str, count: usize) -> Result<Vec<Value>> {
    node.eventually(&format!("{name} runs"), START, || {
        let pods = pods(node, name)?;
        let all = pods.len() == count && pods.iter().all(|pod| pod["status"]["phase"] == "Running");
        Ok(all.then_some(pods))
    })
}

fn each_process_has_a_rank_and_a_device(node: &Node, pods: &[Value]) -> Result<()> {
    let (mut ranks, mut devices) = (BTreeSet::new(), BTreeSet::new());
    for pod in pods {
        ensure!(pod["spec"]["runtimeClassName"] == "nvidia", "{pod:#}");
        let mut seen = look_into(node, pod)?;
        // The one that starts them has the pod's variables too.
        seen.processes.retain(|process| process.contains_key("SENSORIUM_EXIT_WITH_PARENT"));
        ensure!(seen.processes.len() == 2, "{seen:#?}");
        // The runtime's own has 64 MiB, which is too little for NCCL.
        ensure!(seen.shared_memory.starts_with("tmpfs "), "{seen:#?}");
        for process in &seen.processes {
            let text = |name: &str| process.get(name).with_context(|| format!("no {name} in {process:#?}"));
            let number = |name: &str| Ok::<usize, anyhow::Error>(text(name)?.parse()?);
            let (rank, local_rank) = (number("RANK")?, number("LOCAL_RANK")?);
            ensure!((number("WORLD_SIZE")?, number("LOCAL_WORLD_SIZE")?) == (4, 2), "{process:#?}");
            ensure!(rank == number("GROUP_RANK")? * 2 + local_rank, "{process:#?}");
            ensure!(text("MASTER_ADDR")?.starts_with("wide-worker-1-0.") && number("MASTER_PORT")? > 0, "{process:#?}");
            ensure!(text("NCCL_DEBUG")? == "WARN" && number("TORCH_NCCL_ASYNC_ERROR_HANDLING")? == 1, "{process:#?}");
            let visible: Vec<&str> = text("NVIDIA_VISIBLE_DEVICES")?.split(',').collect();
            ensure!(visible.len() == 2, "a worker sees the devices of its processes: {visible:?}");
            ranks.insert(rank);
            devices.insert(visible[local_rank].to_owned());
        }
    }
    ensure!(ranks == (0..4).collect(), "{ranks:?}");
    ensure!(devices == GPUS.map(str::to_owned).into(), "each process has a device to itself: {devices:?}");
    Ok(())
}

/// What there is inside of a worker's container.
#[derive(Debug)]
struct Inside {
    /// The environment of each process of the trainer.
    processes: Vec<BTreeMap<String, String>>,
    /// The mount on /dev/shm that counts: the last one.
    shared_memory: String,
}

/// Looks from a container beside the worker's, whose image has no shell.
fn look_into(node: &Node, pod: &Value) -> Result<Inside> {
    const SCRIPT: &str = r"for process in /proc/[0-9]*; do tr '\0' '\n' < $process/environ; echo; done
        grep ' /dev/shm ' /proc/1/mounts
        echo seen";
    let name = pod["metadata"]["name"].as_str().context("a pod has a name")?;
    let mut arguments = vec!["debug", name, "--namespace", CHAIN, "--container=look", "--image=localhost/busybox:test"];
    arguments.extend(["--target=main", "--profile=restricted", "--quiet", "--", "sh", "-c", SCRIPT]);
    node.kubectl(&arguments)?;
    let seen = node.eventually(&format!("a look into {name}"), START, || {
        let seen = node.kubectl(&["logs", name, "--namespace", CHAIN, "--container=look"])?;
        Ok(seen.ends_with("seen\n").then_some(seen))
    })?;
    let variables = |process: &str| -> BTreeMap<String, String> {
        let pairs = process.lines().filter_map(|line| line.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    };
    let processes = seen.split("\n\n").map(variables).filter(|process| process.contains_key("RANK")).collect();
    let shared_memory = seen.lines().rfind(|line| line.contains(" /dev/shm ")).unwrap_or_default().to_owned();
    Ok(Inside { processes, shared_memory })
}

fn delete(node: &Node, names: &[&str]) -> Result<()> {
    node.kubectl(&[&["delete", "trainingjobs", "--namespace", CHAIN], names].concat()).map(drop)
}

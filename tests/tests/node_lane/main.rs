//! The chain on a real node: Helm, pods, a client in a pod, and what goes wrong in the life of a cluster.
//!
//! Root only, as it makes namespaces and mounts; without root it says so and ends. `make test-node` runs it alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sensorium_tests::{Bench, Node, images, python};
use serde_json::{Value, json};

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
    let questions = questions(&bench)?;

    for manifest in chain()? {
        node.apply(&manifest)?;
    }
    trained_through_trouble(&node)?;
    let job = succeeded(&node, "compressionjob", "vqa-int8")?;
    ensure!(job["status"]["gate"]["promoted"] == true, "{job:#}");
    let artifacts = node.list("modelartifact", CHAIN, "")?;
    ensure!(artifacts.len() == 2, "{artifacts:#?}");
    ready(&node)?;

    ask(&node, &questions, "client", 0)?;
    serves_through_trouble(&node, &questions)?;
    upgraded_and_uninstalled(&node)
}

/// The job trains although a worker, the operator, the API server and then everything on the node is killed.
fn trained_through_trouble(node: &Node) -> Result<()> {
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
fn serves_through_trouble(node: &Node, questions: &Path) -> Result<()> {
    start_client(node, questions, "steady", 45)?;
    node.eventually("the client asks", START, || {
        let pod = node.get("pod", "client", "steady")?.unwrap_or_default();
        Ok((pod["status"]["phase"] == "Running").then_some(()))
    })?;
    std::thread::sleep(Duration::from_secs(5));
    let change = json!({"spec": {"batching": {"maxBatchSize": 16}}}).to_string();
    node.kubectl(&["patch", "servingjob", "vqa", "--namespace", CHAIN, "--type=merge", "--patch", &change])?;
    finished(node, "steady", |said| said["asked"].as_u64() > Some(100))?;
    let deployment = node.get("deployment", CHAIN, "vqa-server")?.context("the servers")?;
    ensure!(deployment["metadata"]["generation"].as_u64() > Some(1), "nothing was rolled out: {deployment:#}");
    ready(node)
}

/// An upgrade keeps everything running; after an uninstall the objects are still there, and another install goes on.
fn upgraded_and_uninstalled(node: &Node) -> Result<()> {
    install(node, &["--set", "replicas=1"])?;
    ready(node)?;
    node.run("helm", &["uninstall", "sensorium", "--namespace", "sensorium-system", "--wait"])?;
    ensure!(node.get("trainingjob", CHAIN, "vqa")?.is_some(), "an uninstall takes no job along");
    ensure!(node.list("pods", CHAIN, "sensorium.dev/kind=ServingJob")?.len() == 2, "the servers go on");
    ensure!(node.list("deployments", "sensorium-system", "")?.is_empty(), "the operator is gone");
    install(node, &[])?;
    ready(node)
}

fn install(node: &Node, more: &[&str]) -> Result<()> {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/sensorium").display().to_string();
    let mut arguments = vec!["upgrade", "--install", "sensorium", &chart, "--namespace", "sensorium-system"];
    arguments.extend(["--create-namespace", "--set", "image.tag=test", "--set", "image.pullPolicy=Never"]);
    arguments.extend(["--wait", "--timeout", "5m"]);
    arguments.extend(more);
    node.run("helm", &arguments).map(drop)
}

/// Volumes on this machine for the claims that the example names, writable by the pods' user.
fn claims(volumes: &Path) -> Result<String> {
    let mut text = String::new();
    for claim in ["artifacts", "checkpoints", "datasets"] {
        let folder = volumes.join(claim);
        fs::create_dir_all(&folder)?;
        own(&folder)?;
        let volume = json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": claim},
            "spec": {
                "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "storageClassName": "",
                "hostPath": {"path": folder}, "claimRef": {"namespace": CHAIN, "name": claim},
            },
        });
        let claimed = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim, "namespace": CHAIN},
            "spec": {
                "accessModes": ["ReadWriteMany"], "storageClassName": "",
                "resources": {"requests": {"storage": "1Gi"}},
            },
        });
        text += &format!("{volume}\n---\n{claimed}\n---\n");
    }
    Ok(text)
}

/// Gives a folder and all that is in it to the user of the images.
fn own(folder: &Path) -> Result<()> {
    std::os::unix::fs::chown(folder, Some(65_532), Some(65_532))?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { own(&path)? } else { std::os::unix::fs::chown(&path, Some(65_532), Some(65_532))? }
    }
    Ok(())
}

/// The example as it is, but shorter: one kind of question needs a tenth of the steps.
fn chain() -> Result<Vec<String>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/easy-vqa");
    let mut manifests = Vec::new();
    for name in ["training", "compression", "serving"] {
        let text = fs::read_to_string(folder.join(format!("{name}.yaml")))?;
        let mut manifest: Value = serde_yaml_ng::from_str(&text)?;
        manifest["metadata"]["namespace"] = json!(CHAIN);
        let spec = &mut manifest["spec"];
        let cpu = json!({"requests": {"cpu": "100m"}, "limits": {"cpu": "1"}});
        match name {
            "training" => {
                spec["training"]["steps"] = json!(200);
                spec["training"]["batch"]["questionsPerImage"] = json!(1);
                spec["training"]["optimizer"]["warmupSteps"] = json!(20);
                spec["training"]["evaluateEverySteps"] = json!(100);
                spec["checkpoint"]["everySteps"] = json!(20);
                spec["resources"] = cpu;
            }
            "serving" => {
                spec["replicas"] = json!(2);
                spec["networkAccess"] = json!({"fromNamespaces": {"kubernetes.io/metadata.name": "client"}});
            }
            _ => spec["resources"] = cpu,
        }
        manifests.push(manifest.to_string());
    }
    Ok(manifests)
}

fn succeeded(node: &Node, kind: &str, name: &str) -> Result<Value> {
    let job = node.eventually(&format!("{kind}/{name} ends"), JOB, || {
        let job = node.get(kind, CHAIN, name)?.unwrap_or_default();
        Ok(["Succeeded", "Failed"].iter().any(|state| job["status"]["state"] == **state).then_some(job))
    })?;
    ensure!(job["status"]["state"] == "Succeeded", "{job:#}");
    Ok(job)
}

fn ready(node: &Node) -> Result<()> {
    node.kubectl(&["wait", "--for=condition=Ready", "servingjob/vqa", "--namespace", CHAIN, "--timeout=5m"]).map(drop)
}

/// Test images with a question about their colour each, in a folder for the client's pod.
fn questions(bench: &Bench) -> Result<PathBuf> {
    let folder = bench.path().join("client");
    fs::create_dir_all(&folder)?;
    let asked = bench.easy_vqa_questions("test", 40, |question| question.starts_with("what color"))?;
    let mut list = Vec::new();
    for (image, question, answer) in asked {
        let name = image.file_name().context("an image has a name")?.to_string_lossy().into_owned();
        fs::copy(&image, folder.join(&name))?;
        list.push(json!([name, question, answer]));
    }
    fs::write(folder.join("questions.json"), serde_json::to_vec(&list)?)?;
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node_client.py"), folder.join("node_client.py"))?;
    Ok(folder)
}

/// Asks once, from a pod of another namespace, by the Service's name, and wants the answers to be right.
fn ask(node: &Node, questions: &Path, pod: &str, seconds: u32) -> Result<()> {
    start_client(node, questions, pod, seconds)?;
    finished(node, pod, |said| said["asked"] == 40 && said["right"].as_u64() >= Some(36))
}

/// Python from this machine, seen through read-only mounts: nothing of it has to be in an image.
fn start_client(node: &Node, questions: &Path, pod: &str, seconds: u32) -> Result<()> {
    let (python, mut folders) = python()?;
    folders.push(questions.display().to_string());
    let script = questions.join("node_client.py");
    let list = questions.join("questions.json");
    let mut command = vec![
        json!(python),
        json!(script),
        json!(format!("vqa.{CHAIN}.svc.cluster.local:8001")),
        json!("vqa"),
        json!(list),
    ];
    if seconds > 0 {
        command.push(json!(seconds.to_string()));
    }
    let name = |index: usize| format!("folder-{index}");
    let volumes: Vec<Value> = folders
        .iter()
        .enumerate()
        .map(|(index, folder)| json!({"name": name(index), "hostPath": {"path": folder}}))
        .collect();
    let mounts: Vec<Value> = folders
        .iter()
        .enumerate()
        .map(|(index, folder)| json!({"name": name(index), "mountPath": folder, "readOnly": true}))
        .collect();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod, "namespace": "client"},
        "spec": {
            "restartPolicy": "Never",
            "containers": [{
                "name": "main", "image": "localhost/busybox:test", "imagePullPolicy": "Never",
                "command": command, "volumeMounts": mounts,
            }],
            "volumes": volumes,
        },
    });
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "client"}});
    node.apply(&format!("{namespace}\n---\n{pod}"))
}

fn finished(node: &Node, name: &str, holds: impl Fn(&Value) -> bool) -> Result<()> {
    let pod = node.eventually(&format!("client {name} ends"), START, || {
        let pod = node.get("pod", "client", name)?.unwrap_or_default();
        Ok(["Succeeded", "Failed"].iter().any(|phase| pod["status"]["phase"] == **phase).then_some(pod))
    })?;
    let said = node.kubectl(&["logs", name, "--namespace", "client"])?;
    ensure!(pod["status"]["phase"] == "Succeeded", "the client failed: {said}");
    let counts: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
    ensure!(holds(&counts), "{said}");
    Ok(())
}

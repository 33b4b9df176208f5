//! A client in a pod of another namespace, which asks by the Service's name.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sensorium_tests::{Bench, Node, python};
use serde_json::{Value, json};

use crate::{CHAIN, START};

/// Test images with a question about their colour each, in a folder for the client's pod.
pub(crate) fn questions(bench: &Bench) -> Result<PathBuf> {
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
    for script in ["client.py", "hasty.py"] {
        fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real_node").join(script), folder.join(script))?;
    }
    Ok(folder)
}

/// Asks once, from a pod of another namespace, by the Service's name, and wants the answers to be right.
pub(crate) fn ask(node: &Node, questions: &Path, pod: &str, seconds: u32) -> Result<()> {
    start_client(node, questions, pod, seconds)?;
    finished(node, pod, |said| said["asked"] == 40 && said["right"].as_u64() >= Some(36))
}

/// Starts a client that asks every question once, or goes on asking for some seconds.
pub(crate) fn start_client(node: &Node, questions: &Path, pod: &str, seconds: u32) -> Result<()> {
    let seconds = (seconds > 0).then(|| seconds.to_string());
    let list = questions.join("questions.json").display().to_string();
    let arguments = [format!("vqa.{CHAIN}.svc.cluster.local:8001"), "vqa".to_owned(), list];
    start(node, questions, pod, "client.py", arguments.into_iter().chain(seconds))
}

/// Starts a client that gives the servers so many milliseconds for each answer, and does not mind getting none.
pub(crate) fn start_hasty_client(
    node: &Node,
    questions: &Path,
    pod: &str,
    milliseconds: u32,
    seconds: u32,
) -> Result<()> {
    let list = questions.join("questions.json").display().to_string();
    let address = format!("vqa.{CHAIN}.svc.cluster.local:8000");
    let arguments = [address, "vqa".to_owned(), list, milliseconds.to_string(), seconds.to_string()];
    start(node, questions, pod, "hasty.py", arguments)
}

/// Starts a script in a pod. Its Python is this machine's, seen through read-only mounts: nothing of it has to be in an image.
fn start(
    node: &Node,
    questions: &Path,
    pod: &str,
    script: &str,
    arguments: impl IntoIterator<Item = String>,
) -> Result<()> {
    let (python, mut folders) = python()?;
    folders.push(questions.display().to_string());
    let script = questions.join(script).display().to_string();
    let command: Vec<String> = [python, script].into_iter().chain(arguments).collect();
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

/// Waits until a client has ended, and has been answered every time.
pub(crate) fn finished(node: &Node, name: &str, holds: impl Fn(&Value) -> bool) -> Result<()> {
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

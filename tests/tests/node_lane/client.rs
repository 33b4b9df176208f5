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
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node_lane/client.py"), folder.join("client.py"))?;
    Ok(folder)
}

/// Asks once, from a pod of another namespace, by the Service's name, and wants the answers to be right.
pub(crate) fn ask(node: &Node, questions: &Path, pod: &str, seconds: u32) -> Result<()> {
    start_client(node, questions, pod, seconds)?;
    finished(node, pod, |said| said["asked"] == 40 && said["right"].as_u64() >= Some(36))
}

/// Starts a client that asks every question once, or goes on asking for some seconds. Its Python is this machine's, seen
/// through read-only mounts: nothing of it has to be in an image.
pub(crate) fn start_client(node: &Node, questions: &Path, pod: &str, seconds: u32) -> Result<()> {
    let (python, mut folders) = python()?;
    folders.push(questions.display().to_string());
    let script = questions.join("client.py");
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

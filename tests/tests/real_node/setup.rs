//! What the chain needs before it starts: the chart, the claims with their data, the manifests.

use std::fs;
use std::path::Path;

use anyhow::Result;
use sensorium_tests::Node;
use serde_json::{Value, json};

use crate::{CHAIN, buckets};

/// Installs the chart, or upgrades it, with some more of its values.
pub(crate) fn install(node: &Node, more: &[&str]) -> Result<()> {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/sensorium").display().to_string();
    let mut arguments = vec!["upgrade", "--install", "sensorium", &chart, "--namespace", "sensorium-system"];
    arguments.extend(["--create-namespace", "--set", "image.tag=test", "--set", "image.pullPolicy=Never"]);
    arguments.extend(["--wait", "--timeout", "5m"]);
    let state = node.state().display();
    let cache = [
        "nodeCache.enabled=true".to_owned(),
        format!("nodeCache.endpoints[0]={}", buckets::ENDPOINT),
        format!("nodeCache.kubeletFolder={state}/kubelet/root"),
        format!("nodeCache.folder={state}/node-cache"),
    ];
    arguments.extend(cache.iter().flat_map(|value| ["--set", value.as_str()]));
    arguments.extend(more);
    node.run("helm", &arguments).map(drop)
}

/// Volumes on this machine for the claims that the example names, writable by the pods' user.
pub(crate) fn claims(volumes: &Path) -> Result<String> {
    let mut documents = Vec::new();
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
        documents.extend([volume.to_string(), claimed.to_string()]);
    }
    Ok(documents.join("\n---\n"))
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
pub(crate) fn chain() -> Result<Vec<String>> {
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
                spec["model"]["store"] = json!(buckets::STORE);
                spec["pods"] = json!({"envFromSecrets": [buckets::READER]});
                spec["networkAccess"] = json!({"fromNamespaces": {"kubernetes.io/metadata.name": "client"}});
            }
            _ => {
                spec["resources"] = cpu;
                spec["output"]["store"] = json!(buckets::STORE);
                spec["pods"] = json!({"envFromSecrets": [buckets::MAKER]});
            }
        }
        manifests.push(manifest.to_string());
    }
    Ok(manifests)
}

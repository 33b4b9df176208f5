//! What the chain makes goes to a bucket, from where the node fetches it, once, for all pods that serve it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use sensorium_tests::{Node, S3User};
use serde_json::{Value, json};

use crate::{CHAIN, START, ready};

/// At the node's own address, which pods reach too.
const ADDRESS: &str = "192.0.2.1:9000";
pub(crate) const ENDPOINT: &str = "http://192.0.2.1:9000";
pub(crate) const STORE: &str = "s3://models/chain";
/// Users, and Secrets of the same names: who makes artifacts and verifies them, who serves them, and somebody else.
pub(crate) const MAKER: &str = "maker";
pub(crate) const READER: &str = "reader";
const STRANGER: &str = "stranger";
/// Label of the plugin's pods.
const PLUGIN: &str = "app.kubernetes.io/name=sensorium-node-cache";

/// The store, on the node's network, until this is dropped.
pub(crate) struct Buckets {
    _server: Child,
    folder: PathBuf,
    log: PathBuf,
}

impl Buckets {
    pub(crate) fn start(node: &Node, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let log = folder.with_extension("log");
        let users = [(MAKER, "models"), (READER, "models"), (STRANGER, "elsewhere")];
        let users = users.map(|(user, bucket)| format!("{user}={bucket}"));
        let mut arguments = vec![ADDRESS.to_owned(), folder.display().to_string(), log.display().to_string()];
        arguments.extend(users);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = node.command(env!("CARGO_BIN_EXE_sensorium-test-s3"), &arguments);
        let mut server = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(server.stdout.take().context("its output is a pipe")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "the S3 server did not start; it says why above");
        Ok(Self { _server: server, folder: folder.to_owned(), log })
    }

    /// Each user's Secret.
    pub(crate) fn secrets() -> String {
        let secret = |name: &str| {
            let user = S3User::new(name, "");
            json!({
                "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": CHAIN},
                "stringData": {
                    "AWS_ENDPOINT_URL": ENDPOINT, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
                    "AWS_ACCESS_KEY_ID": user.id, "AWS_SECRET_ACCESS_KEY": user.secret,
                },
            })
            .to_string()
        };
        [MAKER, READER, STRANGER].map(secret).join("\n---\n")
    }

    /// The folder that is [`STORE`].
    pub(crate) fn store(&self) -> PathBuf {
        self.folder.join(STORE.trim_start_matches("s3://"))
    }

    /// How often those who serve have downloaded each file of artifacts, manifests left out.
    fn downloads(&self) -> Result<BTreeMap<String, usize>> {
        let mut counts = BTreeMap::new();
        for line in fs::read_to_string(&self.log)?.lines() {
            let file = line.strip_prefix(READER).and_then(|rest| rest.strip_prefix(" GET ")?.strip_suffix(" 200"));
            if let Some(file) = file.filter(|file| file.contains("/objects/") && !file.ends_with("/manifest.json")) {
                *counts.entry(file.to_owned()).or_default() += 1;
            }
        }
        Ok(counts)
    }

    /// However many servers there were, each file has left the store once.
    pub(crate) fn fetched_once(&self) -> Result<()> {
        let downloads = self.downloads()?;
        ensure!(downloads.len() > 1 && downloads.values().all(|count| *count == 1), "{downloads:#?}");
        Ok(())
    }
}

/// Two servers share what the node fetched, another one finds it after the plugin was started anew, and somebody who may not
/// read the artifact gets nothing.
pub(crate) fn shared_by_those_who_may_read_it(node: &Node, buckets: &Buckets) -> Result<()> {
    let servers = servers(node)?;
    ensure!(servers.len() == 2, "{servers:#?}");
    for server in &servers {
        let volumes = server["spec"]["volumes"].as_array().cloned().unwrap_or_default();
        ensure!(volumes.iter().any(|volume| volume["csi"]["driver"] == "node-cache.sensorium.dev"), "{server:#}");
    }
    buckets.fetched_once()?;

    node.kubectl(&["delete", "pods", "--namespace", "sensorium-system", "--selector", PLUGIN, "--wait=true"])?;
    let name = servers[0]["metadata"]["name"].as_str().context("a pod has a name")?;
    node.kubectl(&["delete", "pod", name, "--namespace", CHAIN, "--wait=false"])?;
    node.eventually("another server has taken its place", START, || {
        let pods = self::servers(node)?;
        let is_ready = |pod: &Value| pod["status"]["containerStatuses"][0]["ready"] == true;
        let is_gone = pods.iter().all(|pod| pod["metadata"]["name"] != name);
        Ok((is_gone && pods.iter().filter(|pod| is_ready(pod)).count() == 2).then_some(()))
    })?;
    ready(node)?;
    buckets.fetched_once()?;

    let mut volume = servers[0]["spec"]["volumes"].as_array().cloned().unwrap_or_default();
    volume.retain(|volume| volume["csi"].is_object());
    volume[0]["csi"]["nodePublishSecretRef"] = json!({"name": STRANGER});
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "stranger", "namespace": CHAIN},
        "spec": {
            "securityContext": servers[0]["spec"]["securityContext"],
            "containers": [{
                "name": "main", "image": "localhost/busybox:test", "imagePullPolicy": "Never",
                "securityContext": servers[0]["spec"]["containers"][0]["securityContext"],
                "volumeMounts": [{"name": volume[0]["name"], "mountPath": "/model"}],
            }],
            "volumes": volume,
        },
    });
    node.apply(&pod.to_string())?;
    node.eventually("the stranger is told why", START, || {
        let about = "--field-selector=involvedObject.name=stranger,reason=FailedMount";
        let events = node.kubectl(&["get", "events", "--namespace", CHAIN, about, "--output", "json"])?;
        let told = events.contains("PermissionDenied") && events.contains("the pod's credentials do not let it");
        Ok(told.then_some(()))
    })?;
    let pod = node.get("pod", CHAIN, "stranger")?.unwrap_or_default();
    ensure!(pod["status"]["phase"] == "Pending", "{pod:#}");
    node.kubectl(&["delete", "pod", "stranger", "--namespace", CHAIN, "--grace-period=1"]).map(drop)
}

fn servers(node: &Node) -> Result<Vec<Value>> {
    let pods = node.list("pods", CHAIN, "sensorium.dev/kind=ServingJob,app.kubernetes.io/component=server")?;
    Ok(pods.into_iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).collect())
}

//! A graph in pods of its own: found by cluster DNS, called by the servers, over TLS where the job wants it, replaced with
//! them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use sensorium_tests::Node;
use serde_json::{Value, json};

use crate::client::{ask, finished, start_client};
use crate::{CHAIN, START, change_serving, ready};

/// Names of the Secrets with the job's certificate and its tokens.
const TLS: &str = "vqa-tls";
const TOKENS: &str = "vqa-clients";
const TOKEN: &str = "0123456789abcdef0123456789abcdef";
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

    node.apply(&secrets()?)?;
    change_serving(node, &json!({"security": {"tls": {"secretName": TLS}, "tokens": {"secretName": TOKENS}}}))?;
    // Ready servers have called their encoders, and the kubelet both, over TLS.
    let third = settled(node, 1)?.remove(0);
    ensure!(second != third, "encoders that are called in another way are others");
    // Those of the encoder before may still be on their way out.
    let pods = node.list("pods", CHAIN, &format!("sensorium.dev/encoder={third}"))?;
    ensure!(pods.len() == 2, "{pods:#?}");
    for pod in &pods {
        let container = pod["spec"]["containers"][0].to_string();
        ensure!(container.contains("/mnt/tls/tls.key") && container.contains("/mnt/tokens/tokens"), "{pod:#}");
        ensure!(!container.contains(TOKEN), "a token is in no argument: {pod:#}");
    }

    change_serving(node, &json!({"encoders": null, "security": null}))?;
    settled(node, 0).map(drop)
}

/// A certificate for the job's Service with its authority, as cert-manager writes them, and a client's token.
fn secrets() -> Result<String> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, "an authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec![format!("vqa.{CHAIN}.svc")])?.signed_by(&key, &authority)?;
    let secret = |name: &str, content: Value| {
        let metadata = json!({"name": name, "namespace": CHAIN});
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": content}).to_string()
    };
    let files = json!({"tls.crt": certificate.pem(), "tls.key": key.serialize_pem(), "ca.crt": authority.pem()});
    Ok([secret(TLS, files), secret(TOKENS, json!({"tokens": format!("alice {TOKEN}\n")}))].join("\n---\n"))
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

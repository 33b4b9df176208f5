//! The Helm chart: what it renders, what its schema refuses, and what installing, upgrading and uninstalling it do to a
//! real API server.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use sensorium_tests::ApiCluster;
use serde_json::Value;
use serde_yaml_ng::{Deserializer, Value as Yaml};

/// Every optional part, so that its template is rendered and checked too.
const EVERYTHING: &str = r#"
watchNamespace: research
replicas: 3
image: {registry: registry.example.com/ml, tag: 1.2.3}
images:
  trainer: {digest: "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}
  server: {registry: elsewhere.example.com, tag: canary}
imagePullSecrets: [{name: first}, {name: second}]
extraArgs: [--concurrency=32]
extraEnv: [{name: OTEL_EXPORTER_OTLP_ENDPOINT, value: "http://collector:4317"}]
serviceAccount: {annotations: {example.com/role: operator}}
priorityClassName: high
nodeSelector: {kubernetes.io/os: linux}
tolerations: [{operator: Exists}]
affinity: {nodeAffinity: {}}
topologySpreadConstraints: [{maxSkew: 1, topologyKey: topology.kubernetes.io/zone, whenUnsatisfiable: DoNotSchedule}]
podLabels: {team: ml}
podAnnotations: {example.com/note: here}
networkPolicy: {extraEgress: [{ports: [{port: 4317}]}]}
nodeCache: {enabled: true, endpoints: ["http://minio.storage:9000", "https://s3.example.com"], capacity: 2Ti}
metrics: {podMonitor: {enabled: true, labels: {release: prometheus}}, prometheusRule: {enabled: true}, dashboard: {enabled: true}}
"#;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn chart() -> PathBuf {
    repository().join("charts/sensorium")
}

/// `helm`, as built beside the Kubernetes of the tests.
fn helm(arguments: &[&str], values: &str) -> Result<Result<String, String>> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let output =
            Command::new(repository().join("scripts/cluster-binaries")).stderr(Stdio::inherit()).output().ok()?;
        output.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
    });
    let folder = folder.as_ref().context("scripts/cluster-binaries failed; it says why above")?;
    let mut command = Command::new(folder.join("helm"));
    command.args(arguments).arg(chart()).args(["--values", "-"]);
    finish(command, values)
}

/// What a command printed: to its output if it succeeded, else to its errors.
fn finish(mut command: Command, input: &str) -> Result<Result<String, String>> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("its input is a pipe")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    let text = |bytes| String::from_utf8(bytes).context("the output is text");
    Ok(if output.status.success() { Ok(text(output.stdout)?) } else { Err(text(output.stderr)?) })
}

fn render(release: &str, namespace: &str, values: &str) -> Result<String> {
    helm(&["template", release, "--namespace", namespace], values)?.map_err(|errors| anyhow!("{errors}"))
}

fn documents(yaml: &str) -> Result<Vec<Yaml>> {
    let documents = Deserializer::from_str(yaml).map(<Yaml as serde::Deserialize>::deserialize);
    Ok(documents.collect::<Result<Vec<_>, _>>()?.into_iter().filter(|document| !document.is_null()).collect())
}

#[test]
fn lint_has_nothing_to_say() -> Result<()> {
    for values in ["", EVERYTHING] {
        if let Err(errors) = helm(&["lint", "--strict"], values)? {
            bail!("{errors}");
        }
    }
    Ok(())
}

#[test]
fn the_default_is_two_operators_for_the_whole_cluster() -> Result<()> {
    insta::assert_snapshot!("default", render("sensorium", "sensorium-system", "crds: {install: false}")?);
    Ok(())
}

#[test]
fn one_namespace_and_every_option_at_once() -> Result<()> {
    let rendered = render("ml", "ops", &format!("{EVERYTHING}\ncrds: {{install: false}}"))?;
    let kinds = documents(&rendered)?
        .iter()
        .map(|object| object["kind"].as_str().unwrap_or("?").to_owned())
        .collect::<Vec<_>>();
    // The two roles for users are all that is cluster-wide, and rbac.userRoles leaves them out.
    ensure!(!kinds.contains(&"ClusterRoleBinding".to_owned()), "{kinds:?}");
    // The dashboard is data, and long.
    let (before, dashboard) = rendered.split_once("  sensorium.json: |-\n").context("the dashboard")?;
    let (dashboard, after) = dashboard.split_once("\n---\n").context("an object after the dashboard")?;
    serde_json::from_str::<Value>(dashboard)?;
    insta::assert_snapshot!("everything", format!("{before}  sensorium.json: ...\n---\n{after}"));
    Ok(())
}

#[test]
fn a_bad_value_is_refused_with_its_place_and_what_would_be_right() -> Result<()> {
    for (values, message) in [
        ("replica: 3", "additional properties 'replica' not allowed"),
        ("replicas: two", "at '/replicas': got string, want integer"),
        ("images: {trainer: {repo: x}}", "at '/images/trainer': additional properties 'repo' not allowed"),
        ("image: {digest: latest}", "at '/image/digest': 'latest' does not match pattern '^(sha256:[0-9a-f]{64})?$'"),
        (
            "image: {pullPolicy: Sometimes}",
            "at '/image/pullPolicy': value must be one of 'Always', 'IfNotPresent', 'Never'",
        ),
        (
            "image: {registry: 'https://registry.example.com'}",
            "at '/image/registry': 'https://registry.example.com' does not match",
        ),
        ("watchNamespace: [a, b]", "at '/watchNamespace': got array, want string"),
        ("extraArgs: [concurrency]", "at '/extraArgs/0': 'concurrency' does not match pattern '^--'"),
        ("imagePullSecrets: [registry]", "at '/imagePullSecrets/0': got string, want object"),
        ("nodeCache: {folder: cache}", "at '/nodeCache/folder': 'cache' does not match pattern"),
        ("nodeCache: {endpoints: [minio]}", "at '/nodeCache/endpoints/0': 'minio' does not match pattern"),
        ("podDisruptionBudget: {maxUnavailable: 0}", "at '/podDisruptionBudget/maxUnavailable'"),
    ] {
        let Err(errors) = helm(&["template", "sensorium"], values)? else { bail!("{values} was taken") };
        ensure!(errors.contains(message), "{values}:\n{errors}");
    }
    Ok(())
}

#[test]
fn the_crds_are_those_of_the_repository_and_stay_when_the_release_goes() -> Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(repository().join("crds"))? {
        let path = entry?.path();
        let name = path.file_name().context("a name")?;
        let copy = fs::read(chart().join("files/crds").join(name)).unwrap_or_default();
        ensure!(fs::read(&path)? == copy, "the chart's copy of {} is out of date; run make generate", path.display());
        names.push(name.to_owned());
    }
    ensure!(fs::read_dir(chart().join("files/crds"))?.count() == names.len(), "the chart has CRDs that crds/ has not");

    let rendered = documents(&render("sensorium", "sensorium-system", "")?)?;
    let rendered = rendered.iter().filter(|object| object["kind"] == "CustomResourceDefinition").collect::<Vec<_>>();
    ensure!(rendered.len() == names.len(), "{} of {}", rendered.len(), names.len());
    for crd in rendered {
        let name = crd["spec"]["names"]["plural"].as_str().context("a plural")?;
        ensure!(crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep", "{name}");
        // Through JSON, where 1.0 and 1 are one number, as the API server has it.
        let original: Yaml =
            serde_yaml_ng::from_str(&fs::read_to_string(repository().join(format!("crds/{name}.yaml")))?)?;
        let (original, crd) =
            (as_numbers(serde_json::to_value(&original["spec"])?), as_numbers(serde_json::to_value(&crd["spec"])?));
        ensure!(original == crd, "Helm changed the schema of {name}");
    }
    Ok(())
}

/// Every number as a float.
fn as_numbers(value: Value) -> Value {
    match value {
        Value::Number(number) => Value::from(number.as_f64()),
        Value::Array(items) => items.into_iter().map(as_numbers).collect(),
        Value::Object(fields) => fields.into_iter().map(|(name, value)| (name, as_numbers(value))).collect(),
        other => other,
    }
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_exist() -> Result<()> {
    let documented = fs::read_to_string(repository().join("docs/metrics.md"))?;
    for file in ["files/alerts.yaml", "files/dashboard.json"] {
        let text = fs::read_to_string(chart().join(file))?;
        for word in text.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_')) {
            if !word.starts_with("sensorium_") {
                continue;
            }
            let name = ["_bucket", "_count", "_sum"].iter().find_map(|part| word.strip_suffix(part)).unwrap_or(word);
            ensure!(
                documented.contains(&format!("`{name}`")),
                "{file} asks for {name}, which docs/metrics.md does not have"
            );
        }
    }
    Ok(())
}

/// A line of words for a program of the cluster, `helm` or `kubectl`. CHART and CRDS stand for their folders.
fn command(cluster: &ApiCluster, line: &str) -> Result<Command> {
    let mut words = line.split_whitespace();
    let mut command = cluster.command(words.next().context("a program")?);
    for word in words {
        match word {
            "CHART" => command.arg(chart()),
            "CRDS" => command.arg(repository().join("crds")),
            word => command.arg(word),
        };
    }
    Ok(command)
}

/// Runs a line of words and returns what it printed.
fn run(cluster: &ApiCluster, line: &str, input: &str) -> Result<String> {
    finish(command(cluster, line)?, input)?.map_err(|errors| anyhow!("{line}: {errors}"))
}

/// Waits until a line of words prints `expected`.
fn eventually(cluster: &ApiCluster, line: &str, expected: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        let printed = run(cluster, line, "")?;
        if printed.trim() == expected {
            return Ok(());
        }
        ensure!(began.elapsed() < Duration::from_mins(1), "{line} still prints {printed:?}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// Whether the operator may.
fn may(cluster: &ApiCluster, question: &str, namespace: &str) -> Result<bool> {
    let line = format!(
        "kubectl auth can-i {question} --namespace {namespace} \
         --as system:serviceaccount:sensorium-system:sensorium-operator"
    );
    let output = command(cluster, &line)?.output()?; // it fails when the answer is no
    match String::from_utf8_lossy(&output.stdout).trim() {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => bail!("{line}: {}", String::from_utf8_lossy(&output.stderr)),
    }
}

// One test, since what it installs is cluster-wide.
#[test]
fn a_release_is_installed_upgraded_and_uninstalled_on_a_real_api_server() -> Result<()> {
    let cluster = ApiCluster::shared()?;
    let run = |line: &str| run(cluster, line, "");

    // The tests' cluster comes with the CRDs; this one is to have them from the chart.
    run("kubectl delete --wait --filename CRDS")?;
    run("kubectl create namespace sensorium-system")?;
    run("kubectl create namespace research")?;
    run("kubectl label namespace sensorium-system pod-security.kubernetes.io/enforce=restricted")?;
    let notes = run("helm install sensorium CHART --namespace sensorium-system")?;
    ensure!(notes.contains("looks after all namespaces"), "{notes}");

    // Pod Security lets the pods in: the controller has made both.
    let pods = "kubectl get pods --namespace sensorium-system --output jsonpath={.items[*].spec.containers[*].name}";
    eventually(cluster, pods, "operator operator")?;

    for (allowed, question, namespace) in [
        (true, "patch trainingjobs.sensorium.dev --subresource status", "research"),
        (true, "create jobs.batch", "research"),
        (true, "create networkpolicies.networking.k8s.io", "research"),
        (true, "delete pods", "research"),
        (true, "create leases.coordination.k8s.io", "sensorium-system"),
        (true, "update leases.coordination.k8s.io/sensorium-operator", "sensorium-system"),
        (false, "get secrets", "research"),
        (false, "create pods", "research"),
        (false, "create pods --subresource exec", "research"),
        (false, "create servingjobs.sensorium.dev", "research"),
        (false, "delete servingjobs.sensorium.dev", "research"),
        (false, "update leases.coordination.k8s.io/another", "sensorium-system"),
        (false, "update leases.coordination.k8s.io/sensorium-operator", "research"),
        (false, "get nodes", "research"),
        (false, "create clusterroles.rbac.authorization.k8s.io", "research"),
        (false, "get customresourcedefinitions.apiextensions.k8s.io", "research"),
    ] {
        ensure!(may(cluster, question, namespace)? == allowed, "may the operator {question} in {namespace}?");
    }

    // Whoever has `edit` may write jobs, once the controller has aggregated the role.
    let edit = "kubectl get clusterrole edit --output jsonpath={.rules[?(@.apiGroups[0]=='sensorium.dev')].verbs[0]}";
    eventually(cluster, edit, "create update get")?;

    // An upgrade brings a CRD up to date, and mends one that somebody changed.
    let short_names = "kubectl get crd trainingjobs.sensorium.dev --output jsonpath={.spec.names.shortNames[*]}";
    let before = run(short_names)?;
    run(
        r#"kubectl patch crd trainingjobs.sensorium.dev --type=merge --patch {"spec":{"names":{"shortNames":["old"]}}}"#,
    )?;
    run("helm upgrade sensorium CHART --namespace sensorium-system --set replicas=1 --set watchNamespace=research")?;
    ensure!(run(short_names)? == before, "the CRD was not upgraded");
    let replicas =
        "kubectl get deployment sensorium-operator --namespace sensorium-system --output jsonpath={.spec.replicas}";
    ensure!(run(replicas)? == "1", "the Deployment was not upgraded");
    ensure!(may(cluster, "create jobs.batch", "research")?, "it may not write in the namespace that it watches");
    ensure!(!may(cluster, "create jobs.batch", "default")?, "it watches one namespace and may write in another");

    // What users made outlives the release, and the next one takes it over.
    let record = format!(
        "{{apiVersion: sensorium.dev/v1alpha1, kind: ModelArtifact, metadata: {{name: kept, namespace: research}}, \
         spec: {{uri: 'pvc://artifacts', digest: 'sha256:{}', signature: [{{name: fusion, inputs: [], outputs: []}}]}}}}",
        "0".repeat(64)
    );
    let kept = "kubectl get modelartifact kept --namespace research";
    self::run(cluster, "kubectl apply --filename -", &record)?;
    run("helm uninstall sensorium --namespace sensorium-system --wait")?;
    let left =
        run("kubectl get clusterroles,clusterrolebindings,roles,rolebindings,serviceaccounts,deployments,services,\
         networkpolicies,poddisruptionbudgets,configmaps --all-namespaces \
         --selector app.kubernetes.io/instance=sensorium --output name")?;
    ensure!(left.trim().is_empty(), "left behind: {left}");
    run(kept)?;
    run("helm install sensorium CHART --namespace sensorium-system")?;
    run(kept)?;

    // The API server takes every option, save the two whose kinds it does not have.
    let options = EVERYTHING.replace("podMonitor: {enabled: true", "podMonitor: {enabled: false");
    let options = options.replace("prometheusRule: {enabled: true", "prometheusRule: {enabled: false");
    let options = format!("{options}\ncrds: {{install: false}}\nrbac: {{userRoles: false}}");
    self::run(cluster, "kubectl apply --dry-run=server --filename -", &render("ml", "research", &options)?)?;
    Ok(())
}

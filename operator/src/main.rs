//! `sensorium-operator`: keeps a cluster as TrainingJobs, CompressionJobs, ServingJobs and ModelArtifacts want it.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use clap::Parser;
use futures::FutureExt as _;
use kube::{Client, Config};
use sensorium_operator::controller::{self, Health, Settings, Stop};
use sensorium_operator::lease::{self, Election};
use sensorium_operator::render::Images;

/// Longer than any watch lasts by itself, so that a connection which hears nothing more is noticed.
const READ_TIMEOUT: Duration = Duration::from_secs(295);

/// Keeps a cluster as TrainingJobs, CompressionJobs, ServingJobs and ModelArtifacts want it.
#[derive(Debug, Parser)]
#[command(
    name = "sensorium-operator",
    version,
    max_term_width = 100,
    after_help = "Examples:\n  sensorium-operator --trainer-image registry.example/sensorium-trainer:0.1.0 \\\n    \
                  --server-image registry.example/sensorium-server:0.1.0 --cli-image registry.example/sensorium-cli:0.1.0\n  \
                  with --namespace team-a --leader-elect false besides: for one namespace of the current kubeconfig context, alone"
)]
struct Options {
    /// Look at this namespace only; at all of them by default
    #[arg(long, env = "SENSORIUM_NAMESPACE")]
    namespace: Option<String>,
    /// Image with sensorium-trainer
    #[arg(long, env = "SENSORIUM_TRAINER_IMAGE")]
    trainer_image: String,
    /// Image with sensorium-server
    #[arg(long, env = "SENSORIUM_SERVER_IMAGE")]
    server_image: String,
    /// Image with sensorium, which verifies artifacts
    #[arg(long, env = "SENSORIUM_CLI_IMAGE")]
    cli_image: String,
    /// When nodes fetch these images
    #[arg(long, env = "SENSORIUM_IMAGE_PULL_POLICY", default_value = "IfNotPresent",
          value_parser = ["Always", "IfNotPresent", "Never"])]
    image_pull_policy: String,
    /// Secrets with the registry's credentials, in the namespaces of the jobs
    #[arg(long, env = "SENSORIUM_IMAGE_PULL_SECRETS", value_delimiter = ',')]
    image_pull_secrets: Vec<String>,
    /// Where /metrics, /livez and /readyz are served
    #[arg(long, env = "SENSORIUM_HTTP_ADDR", default_value = "0.0.0.0:8080", value_name = "HOST:PORT")]
    http_addr: SocketAddr,
    /// Act only while holding the Lease, so that several operators can stand by
    #[arg(long, env = "SENSORIUM_LEADER_ELECT", default_value_t = true, action = clap::ArgAction::Set)]
    leader_elect: bool,
    /// Name of the Lease
    #[arg(long, env = "SENSORIUM_LEASE_NAME", default_value = "sensorium-operator")]
    lease_name: String,
    /// Namespace of the Lease: the operator's own
    #[arg(long, env = "SENSORIUM_LEASE_NAMESPACE", default_value = "default")]
    lease_namespace: String,
    /// Name by which this operator holds the Lease and writes events: the pod's
    #[arg(long, env = "SENSORIUM_IDENTITY")]
    identity: Option<String>,
    /// Objects of one kind that are visited at the same time. A visit does little but wait for the API server, so a slow one
    /// wants more of them
    #[arg(long, env = "SENSORIUM_CONCURRENCY", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: u16,
    /// Whether nodes fetch artifacts from buckets for their pods: whether sensorium-node-cache runs on all of them
    #[arg(long, env = "SENSORIUM_NODE_CACHE", default_value_t = false, action = clap::ArgAction::Set)]
    node_cache: bool,
    /// Collector that takes spans by OTLP over gRPC, from the operator and from the pods of its jobs
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    otlp_endpoint: Option<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("sensorium-operator: could not start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    // The exporter of traces wants to be made in the runtime that carries its connection.
    let entered = runtime.enter();
    let traces = sensorium_telemetry::Options {
        service: "sensorium-operator",
        otlp_endpoint: options.otlp_endpoint.clone(),
        sampling: sensorium_telemetry::Sampling::default(),
        lines: sensorium_telemetry::Lines::Aside,
    };
    let telemetry = match sensorium_telemetry::start(traces) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("sensorium-operator: {error}");
            return ExitCode::from(2);
        }
    };
    drop(entered);
    let code = match runtime.block_on(run(options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the operator ends");
            ExitCode::FAILURE
        }
    };
    telemetry.shutdown();
    code
}

async fn run(options: Options) -> anyhow::Result<()> {
    let asked = sensorium_lifecycle::asked_to_end().context("could not listen for signals")?;
    let stop: Stop = asked.boxed().shared();
    let mut config =
        Config::infer().await.context("no cluster: neither a service account nor a kubeconfig was found")?;
    config.read_timeout = Some(READ_TIMEOUT);
    let client = Client::try_from(config).context("the cluster's configuration cannot be used")?;

    let health = Arc::new(Health::default());
    let ready = Arc::new(AtomicBool::new(false));
    serve(options.http_addr, Probes { health: Arc::clone(&health), ready: Arc::clone(&ready) }).await?;
    if !until(&stop, definitions(&client)).await {
        return Ok(());
    }
    ready.store(true, Ordering::Relaxed);

    let identity = options.identity.unwrap_or_else(|| {
        std::env::var("HOSTNAME").unwrap_or_else(|_| format!("sensorium-operator-{}", std::process::id()))
    });
    let settings = Settings {
        images: Images {
            trainer: options.trainer_image,
            server: options.server_image,
            cli: options.cli_image,
            pull_policy: options.image_pull_policy,
            pull_secrets: options.image_pull_secrets,
        },
        namespace: options.namespace,
        concurrency: options.concurrency,
        identity: identity.clone(),
        pod_monitors: knows_pod_monitors(&client).await,
        node_cache: options.node_cache,
        otlp_endpoint: options.otlp_endpoint,
    };
    let (acts, lead) = tokio::sync::watch::channel(!options.leader_elect);
    let working = controller::run(client.clone(), settings, Arc::clone(&health), lead, stop);
    if !options.leader_elect {
        health.leads(true);
        working.await;
        return Ok(());
    }
    let mut election = Election::new(client, &options.lease_namespace, &options.lease_name, &identity);
    tracing::info!(identity, "waiting to lead");
    let leads = || {
        tracing::info!(identity, "leading");
        health.leads(true);
        acts.send_replace(true);
    };
    // Who has lost the Lease must not act: another one does already. The process ends, and comes back as a follower.
    let outcome = tokio::select! {
        () = working => Ok(()),
        why = election.lead(leads) => Err(anyhow::anyhow!("this operator does not hold the Lease any more: {why}")),
    };
    health.leads(false);
    if let Err(error) = election.give_up().await {
        tracing::warn!(error, "the Lease was not given up; it runs out in {} s", lease::DURATION.as_secs());
    }
    outcome
}

/// Whether `work` was done before `stop`.
async fn until<T, E>(stop: &Stop, work: impl Future<Output = Result<T, E>>) -> bool {
    tokio::select! {
        outcome = work => outcome.is_ok(),
        () = stop.clone() => false,
    }
}

/// Waits until the cluster knows our kinds.
async fn definitions(client: &Client) -> Result<(), std::convert::Infallible> {
    let mut told = false;
    loop {
        match client.list_api_group_resources(sensorium_api::API_VERSION).await {
            Ok(list) if list.resources.iter().filter(|resource| !resource.name.contains('/')).count() >= 4 => {
                return Ok(());
            }
            outcome => {
                if !told {
                    let why = outcome.err().map(|error| error.to_string());
                    tracing::warn!(
                        why,
                        "waiting for the CustomResourceDefinitions of sensorium.dev; install the chart, or apply crds/"
                    );
                    told = true;
                }
            }
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// Whether the Prometheus operator's kinds are installed.
async fn knows_pod_monitors(client: &Client) -> bool {
    let found = client.list_api_group_resources("monitoring.coreos.com/v1").await;
    found.is_ok_and(|list| list.resources.iter().any(|resource| resource.kind == "PodMonitor"))
}

#[derive(Clone)]
struct Probes {
    health: Arc<Health>,
    ready: Arc<AtomicBool>,
}

async fn serve(address: SocketAddr, probes: Probes) -> anyhow::Result<()> {
    let listener =
        tokio::net::TcpListener::bind(address).await.with_context(|| format!("could not listen on {address}"))?;
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .with_state(probes);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the HTTP server ended");
        }
    });
    Ok(())
}

async fn metrics(State(probes): State<Probes>) -> ([(&'static str, &'static str); 1], String) {
    ([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], probes.health.metrics())
}

async fn live(State(probes): State<Probes>) -> (StatusCode, String) {
    match probes.health.stale() {
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, why),
        None => (StatusCode::OK, "ok".to_owned()),
    }
}

async fn ready(State(probes): State<Probes>) -> (StatusCode, &'static str) {
    if probes.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the CustomResourceDefinitions of sensorium.dev are not installed yet")
    }
}

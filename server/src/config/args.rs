//! What the operator typed, set in the environment, or wrote into a file.

use std::{
    fmt::Display,
    net::{SocketAddr, ToSocketAddrs as _},
    num::{IntErrorKind, NonZeroU32, NonZeroUsize, ParseIntError},
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::{Parser, ValueEnum};
use sensorium_artifact::Volume;
use sensorium_engine::Device;
use serde::{Deserialize, Deserializer, de::Error as _};

use super::ConfigError;
use crate::repository::{ModelSource, RemoteGraph};

/// Serves models over gRPC and HTTP: the Open Inference Protocol v2 with Triton's extensions, and
/// sensorium.v1.MultimodalService.
#[derive(Clone, Debug, Default, Deserialize, Parser)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[command(
    name = "sensorium-server",
    version,
    after_help = "Examples:
  sensorium-server --model-repository /models
  sensorium-server --model vqa=pvc://artifacts/vqa-int8 --volume artifacts=/srv/artifacts
  sensorium-server --config serving.json --volume artifacts=/srv/artifacts --grpc-addr 0.0.0.0:8001
  sensorium-server --model-repository /models --check

A flag wins over its environment variable, that over the settings file, and that over the configuration of a ServingJob.
SENSORIUM_LOG chooses what is logged (info, debug, sensorium_server=trace)."
)]
pub struct ServerArgs {
    /// Settings by the names of these flags without dashes before them, as YAML or JSON
    #[arg(long, env = "SENSORIUM_SETTINGS", value_name = "FILE")]
    #[serde(skip)]
    pub settings: Option<PathBuf>,
    /// Configuration of a ServingJob, as JSON; its model is served under the job's name
    #[arg(long, env = "SENSORIUM_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Load everything, print the index of models and end: exit code 1 if one of them cannot be served
    #[arg(long)]
    #[serde(skip)]
    pub check: bool,

    /// Serve the artifact at URI (STORE/NAME or STORE/objects/HEX) as NAME; may be repeated
    #[arg(long = "model", value_name = "NAME=URI", help_heading = "Models")]
    #[serde(deserialize_with = "texts")]
    pub model: Vec<ModelSource>,
    /// Serve only this graph of the artifacts, for servers that call it with --remote-graph; may be repeated
    #[arg(long, value_name = "GRAPH", conflicts_with = "remote_graph", help_heading = "Models")]
    pub graph: Vec<String>,
    /// Call this graph of the artifacts at other servers (those started with --graph) instead of running it; may be
    /// repeated
    #[arg(long, value_name = "GRAPH=HOST:PORT[,...]", help_heading = "Models")]
    #[serde(deserialize_with = "texts")]
    pub remote_graph: Vec<RemoteGraph>,
    /// Folder or s3:// prefix of models in Triton's layout, MODEL/[config.pbtxt], MODEL/VERSION/FILE; may be repeated
    #[arg(long, env = "SENSORIUM_MODEL_REPOSITORY", value_name = "DIR|URI", help_heading = "Models")]
    pub model_repository: Vec<String>,
    /// Who loads models of the repositories: nobody after the start, clients, or changes in the repository
    /// [default: none]
    #[arg(long, env = "SENSORIUM_MODEL_CONTROL_MODE", value_enum, value_name = "MODE", help_heading = "Models")]
    pub model_control_mode: Option<ControlModeName>,
    /// Seconds between looks at the repositories in mode poll [default: 15]
    #[arg(
        long,
        env = "SENSORIUM_REPOSITORY_POLL_SECS",
        value_name = "SECONDS",
        value_parser = positive::<NonZeroU32>,
        help_heading = "Models"
    )]
    pub repository_poll_secs: Option<NonZeroU32>,
    /// Model to load at the start in mode explicit, `*` for all; may be repeated
    #[arg(long, value_name = "NAME", help_heading = "Models")]
    pub load_model: Vec<String>,
    /// Folder where the claim of pvc:// URIs is mounted; may be repeated
    #[arg(long = "volume", value_name = "CLAIM=DIR", help_heading = "Models")]
    #[serde(deserialize_with = "texts")]
    pub volume: Vec<Volume>,
    /// Where artifacts of remote stores are kept [default: sensorium-artifacts in the temporary folder]
    #[arg(long, env = "SENSORIUM_ARTIFACT_CACHE", value_name = "DIR", help_heading = "Models")]
    pub artifact_cache: Option<PathBuf>,

    /// Where gRPC listens; HTTP is answered too [default: 127.0.0.1:8001]
    #[arg(long, env = "SENSORIUM_GRPC_ADDR", value_name = "HOST:PORT", help_heading = "Network")]
    #[serde(deserialize_with = "text")]
    pub grpc_addr: Option<Address>,
    /// Where HTTP listens, health included; gRPC is answered too [default: 127.0.0.1:8000]
    #[arg(long, env = "SENSORIUM_HTTP_ADDR", value_name = "HOST:PORT", help_heading = "Network")]
    #[serde(deserialize_with = "text")]
    pub http_addr: Option<Address>,
    /// Where Prometheus reads /metrics, without TLS or token [default: 127.0.0.1:8002]
    #[arg(long, env = "SENSORIUM_METRICS_ADDR", value_name = "HOST:PORT", help_heading = "Network")]
    #[serde(deserialize_with = "text")]
    pub metrics_addr: Option<Address>,
    /// Bytes of a request at most; raise it for large tensors [default: 64 MiB]
    #[arg(
        long,
        env = "SENSORIUM_MAX_REQUEST_BYTES",
        value_name = "BYTES",
        value_parser = bytes,
        help_heading = "Network"
    )]
    pub max_request_bytes: Option<u64>,
    /// Bytes of all requests that are read and not answered yet, decompressed; more are refused with RESOURCE_EXHAUSTED
    /// (429). Lower it where models need the memory [default: a quarter of the memory
    /// that this process may use; at least twice --max-request-bytes]
    #[arg(
        long,
        env = "SENSORIUM_MAX_INFLIGHT_BYTES",
        value_name = "BYTES",
        value_parser = bytes,
        help_heading = "Network"
    )]
    pub max_inflight_bytes: Option<u64>,
    /// Connections of clients at a time, over both ports; one more is closed at once. Each is an open file: the limit of those
    /// is raised for it as far as it may be. Probes are connections too, but those to the metrics port are not counted
    /// [default: seven eighths of the files that this process may open]
    #[arg(
        long,
        env = "SENSORIUM_MAX_CONNECTIONS",
        value_name = "N",
        value_parser = positive::<NonZeroU32>,
        help_heading = "Network"
    )]
    pub max_connections: Option<NonZeroU32>,
    /// Whether clients on this machine may pass tensors through /dev/shm [default: true]
    #[arg(long, env = "SENSORIUM_SHARED_MEMORY", value_name = "BOOL", help_heading = "Network")]
    pub shared_memory: Option<bool>,

    /// Certificate of this server with those between it and its authority, PEM; read again when it changes
    #[arg(long, env = "SENSORIUM_TLS_CERT", value_name = "FILE", requires = "tls_key", help_heading = "Security")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate, PEM
    #[arg(long, env = "SENSORIUM_TLS_KEY", value_name = "FILE", requires = "tls_cert", help_heading = "Security")]
    pub tls_key: Option<PathBuf>,
    /// Authorities of clients, PEM: every client then has to show a certificate of one of them
    #[arg(
        long,
        env = "SENSORIUM_TLS_CLIENT_CA",
        value_name = "FILE",
        requires = "tls_cert",
        help_heading = "Security"
    )]
    pub tls_client_ca: Option<PathBuf>,
    /// Tokens of clients, one line NAME TOKEN each, of at least 16 characters: requests then need `authorization: Bearer
    /// TOKEN`; read again when it changes
    #[arg(long, env = "SENSORIUM_AUTH_TOKENS", value_name = "FILE", help_heading = "Security")]
    pub auth_tokens: Option<PathBuf>,
    /// Authorities of the servers of --remote-graph, PEM: these are called over TLS then, and see the certificate of
    /// --tls-cert if they ask for one. Where there is no such file, the certificates of --tls-cert are trusted instead
    #[arg(long, env = "SENSORIUM_REMOTE_TLS_CA", value_name = "FILE", help_heading = "Security")]
    pub remote_tls_ca: Option<PathBuf>,
    /// Name that the certificates of the servers of --remote-graph have to be for [default: the host of each]
    #[arg(
        long,
        env = "SENSORIUM_REMOTE_TLS_NAME",
        value_name = "NAME",
        requires = "remote_tls_ca",
        help_heading = "Security"
    )]
    pub remote_tls_name: Option<String>,
    /// Tokens for the servers of --remote-graph, a file as for --auth-tokens: calls carry the first one, and the next
    /// where that is refused
    #[arg(long, env = "SENSORIUM_REMOTE_TOKENS", value_name = "FILE", help_heading = "Security")]
    pub remote_tokens: Option<PathBuf>,
    /// Requests per second of one client (its token's name, else its address) at most [default: no limit]
    #[arg(
        long,
        env = "SENSORIUM_CLIENT_REQUESTS_PER_SECOND",
        value_name = "N",
        value_parser = positive::<NonZeroU32>,
        help_heading = "Security"
    )]
    pub client_requests_per_second: Option<NonZeroU32>,
    /// Requests of one client at a time at most; a stream is one request [default: no limit]
    #[arg(
        long,
        env = "SENSORIUM_CLIENT_CONCURRENCY",
        value_name = "N",
        value_parser = positive::<NonZeroU32>,
        help_heading = "Security"
    )]
    pub client_concurrency: Option<NonZeroU32>,

    /// Rows of a batch at most, where a model does not say; raise it for throughput while memory and latency allow
    /// [default: 32]
    #[arg(long, env = "SENSORIUM_MAX_BATCH_SIZE", value_name = "ROWS", help_heading = "Scheduling")]
    pub max_batch_size: Option<u32>,
    /// Rows that may wait in the queue of a graph; lower it to refuse overload earlier [default: 1024]
    #[arg(long, env = "SENSORIUM_MAX_QUEUE_SIZE", value_name = "ROWS", help_heading = "Scheduling")]
    pub max_queue_size: Option<u32>,
    /// How long a busy engine's next batch waits to be filled; an idle engine never waits [default: 500]
    #[arg(
        long,
        env = "SENSORIUM_MAX_QUEUE_DELAY_MICROSECONDS",
        value_name = "MICROSECONDS",
        help_heading = "Scheduling"
    )]
    pub max_queue_delay_microseconds: Option<u64>,
    /// Threads of each engine; lower it when several models share the cores [default: one per core]
    #[arg(
        long,
        env = "SENSORIUM_ENGINE_THREADS",
        value_name = "THREADS",
        value_parser = threads,
        help_heading = "Scheduling"
    )]
    pub engine_threads: Option<NonZeroUsize>,
    /// What runs the graphs, where a model's instance_group does not say: cpu, cuda or tensorrt, the last two with the index of a GPU where
    /// it is not the first (cuda:1) [default: cpu]
    #[arg(long, env = "SENSORIUM_ENGINE_DEVICE", value_name = "DEVICE", help_heading = "Scheduling")]
    #[serde(deserialize_with = "text")]
    pub engine_device: Option<Device>,
    /// Threads that decode images and split texts [default: one per core]
    #[arg(
        long,
        env = "SENSORIUM_PREPARE_THREADS",
        value_name = "THREADS",
        value_parser = threads,
        help_heading = "Scheduling"
    )]
    pub prepare_threads: Option<NonZeroUsize>,
    /// Memory for answers of models that turn response_cache on; 0 keeps none [default: 64 MiB]
    #[arg(
        long,
        env = "SENSORIUM_RESPONSE_CACHE_BYTES",
        value_name = "BYTES",
        value_parser = bytes,
        help_heading = "Scheduling"
    )]
    pub response_cache_bytes: Option<u64>,
    /// How long requests in flight may take to finish after SIGTERM; below the pod's grace period [default: 25]
    #[arg(long, env = "SENSORIUM_DRAIN_SECONDS", value_name = "SECONDS", help_heading = "Scheduling")]
    pub drain_seconds: Option<u64>,

    /// Collector of traces, by OTLP over gRPC, such as http://127.0.0.1:4317 [default: none, no traces]
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL", help_heading = "Telemetry")]
    pub otlp_endpoint: Option<String>,
    /// One request of so many is traced, of those that belong to no trace yet [default: 1, all]
    #[arg(
        long,
        env = "SENSORIUM_TRACE_RATE",
        value_name = "N",
        value_parser = positive::<NonZeroU32>,
        help_heading = "Telemetry"
    )]
    pub trace_rate: Option<NonZeroU32>,
}

/// Where to listen: an address, or a name of this machine such as localhost, and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub(super) SocketAddr);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &dyn std::fmt::Display| {
            format!("{text:?} is no HOST:PORT such as 0.0.0.0:8000 or localhost:8000: {why}")
        };
        let found: Vec<_> = text.to_socket_addrs().map_err(|error| wrong(&error))?.collect();
        let first = found.iter().find(|address| address.is_ipv4()).or(found.first());
        first.copied().map(Self).ok_or_else(|| wrong(&"nothing has that name"))
    }
}

/// A number of at least 1.
fn positive<T: FromStr<Err = ParseIntError>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: ParseIntError| match error.kind() {
        IntErrorKind::Zero => "must be at least 1".to_owned(),
        _ => error.to_string(),
    })
}

fn threads(text: &str) -> Result<NonZeroUsize, String> {
    const MOST: usize = 1024; // far above the cores of a machine, and below what its limits of threads are
    let threads: NonZeroUsize = positive(text)?;
    if threads.get() > MOST { Err(format!("must be at most {MOST}")) } else { Ok(threads) }
}

fn bytes(text: &str) -> Result<u64, String> {
    text.parse::<u64>().map_err(|error| format!("{error}; write a number of bytes, such as 67108864"))
}

/// Triton's names of who loads models.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ControlModeName {
    /// All models, once, at the start.
    #[default]
    None,
    /// Clients load and unload.
    Explicit,
    /// Models come and go with the files of the repositories.
    Poll,
}

/// A list of texts that are read as flags are.
fn texts<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: Display>,
{
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
}

/// A text that is read as a flag is.
fn text<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: Display>,
{
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| text.parse().map_err(D::Error::custom)).transpose()
}

/// What a flag has when nobody gave it.
trait Unset {
    fn or(self, other: Self) -> Self;
}

impl<T> Unset for Option<T> {
    fn or(self, other: Self) -> Self {
        Option::or(self, other)
    }
}

impl<T> Unset for Vec<T> {
    fn or(self, other: Self) -> Self {
        if self.is_empty() { other } else { self }
    }
}

impl ServerArgs {
    /// Fills what was not given from the settings file, if there is one.
    ///
    /// # Errors
    /// [`ConfigError::Read`], [`ConfigError::Settings`].
    pub fn with_settings(self) -> Result<Self, ConfigError> {
        let Some(path) = &self.settings else { return Ok(self) };
        let file = Self::read(path)?;
        Ok(self.over(file))
    }

    fn read(path: &Path) -> Result<Self, ConfigError> {
        let path = path.to_owned();
        let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        serde_yaml_ng::from_str(&text).map_err(|source| ConfigError::Settings { path, source })
    }

    /// These, and what they leave open from `under`.
    fn over(self, under: Self) -> Self {
        macro_rules! filled {
            ($($field:ident),* $(,)?) => {{
                // Naming every field here is what makes a new one a compile error until it is added.
                let Self { settings, check, $($field),* } = self;
                Self { settings, check, $($field: Unset::or($field, under.$field)),* }
            }};
        }
        filled!(
            config,
            model,
            graph,
            remote_graph,
            model_repository,
            model_control_mode,
            repository_poll_secs,
            load_model,
            volume,
            artifact_cache,
            grpc_addr,
            http_addr,
            metrics_addr,
            max_request_bytes,
            max_inflight_bytes,
            max_connections,
            shared_memory,
            tls_cert,
            tls_key,
            tls_client_ca,
            auth_tokens,
            remote_tls_ca,
            remote_tls_name,
            remote_tokens,
            client_requests_per_second,
            client_concurrency,
            max_batch_size,
            max_queue_size,
            max_queue_delay_microseconds,
            engine_threads,
            engine_device,
            prepare_threads,
            response_cache_bytes,
            drain_seconds,
            otlp_endpoint,
            trace_rate,
        )
    }
}

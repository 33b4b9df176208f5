//! What the operator typed, and what it means.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    time::Duration,
};

use clap::{ArgGroup, Parser};
use sensorium_api::{ServingJobSpec, run::RunConfig};
use sensorium_artifact::{Volume, Volumes};
use sensorium_engine::Options;
use sensorium_modality::Limits;

use crate::{repository::ModelSource, scheduler::Batching};

/// Serves models over gRPC: the Open Inference Protocol v2 and sensorium.v1.MultimodalService.
#[derive(Clone, Debug, Parser)]
#[command(group = ArgGroup::new("what to serve").required(true).multiple(true).args(["config", "models"]))]
#[command(
    name = "sensorium-server",
    version,
    after_help = "Examples:
  sensorium-server --model vqa=pvc://artifacts/vqa-int8 --volume artifacts=/srv/artifacts
  sensorium-server --config serving.json --volume artifacts=/srv/artifacts --grpc-addr 0.0.0.0:8001

A flag wins over the configuration file. SENSORIUM_LOG chooses what is logged (info, debug, sensorium_server=trace)."
)]
pub struct ServerArgs {
    /// Configuration of a ServingJob, as JSON; its model is served under the job's name
    #[arg(long, env = "SENSORIUM_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Serve the artifact at URI (STORE/NAME or STORE/objects/HEX) as NAME; may be repeated
    #[arg(long = "model", value_name = "NAME=URI")]
    pub models: Vec<ModelSource>,
    /// Folder where the claim of pvc:// URIs is mounted; may be repeated
    #[arg(long = "volume", value_name = "CLAIM=DIR")]
    pub volumes: Vec<Volume>,
    /// Where artifacts of remote stores are kept [default: sensorium-artifacts in the temporary folder]
    #[arg(long, env = "SENSORIUM_ARTIFACT_CACHE", value_name = "DIR")]
    pub artifact_cache: Option<PathBuf>,
    /// Where gRPC listens [default: 127.0.0.1:8001]
    #[arg(long, env = "SENSORIUM_GRPC_ADDR", value_name = "HOST:PORT")]
    pub grpc_addr: Option<SocketAddr>,
    /// Where HTTP health listens: /livez and /readyz [default: 127.0.0.1:8000]
    #[arg(long, env = "SENSORIUM_HTTP_ADDR", value_name = "HOST:PORT")]
    pub http_addr: Option<SocketAddr>,
    /// Where Prometheus reads /metrics [default: 127.0.0.1:8002]
    #[arg(long, env = "SENSORIUM_METRICS_ADDR", value_name = "HOST:PORT")]
    pub metrics_addr: Option<SocketAddr>,
    /// Rows of a batch at most; raise it for throughput while memory and latency allow [default: 32]
    #[arg(long, env = "SENSORIUM_MAX_BATCH_SIZE", value_name = "ROWS")]
    pub max_batch_size: Option<u32>,
    /// Rows that may wait in the queue of a graph; lower it to refuse overload earlier [default: 1024]
    #[arg(long, env = "SENSORIUM_MAX_QUEUE_SIZE", value_name = "ROWS")]
    pub max_queue_size: Option<u32>,
    /// How long a busy engine's next batch waits to be filled; an idle engine never waits [default: 500]
    #[arg(long, env = "SENSORIUM_MAX_QUEUE_DELAY_MICROSECONDS", value_name = "MICROSECONDS")]
    pub max_queue_delay_microseconds: Option<u64>,
    /// Bytes of a request message at most; raise it for large tensors [default: 64 MiB]
    #[arg(long, env = "SENSORIUM_MAX_REQUEST_BYTES", value_name = "BYTES")]
    pub max_request_bytes: Option<u64>,
    /// Threads of each engine; lower it when several models share the cores [default: one per core]
    #[arg(long, env = "SENSORIUM_ENGINE_THREADS", value_name = "THREADS")]
    pub engine_threads: Option<NonZeroUsize>,
    /// Threads that decode images and split texts [default: one per core]
    #[arg(long, env = "SENSORIUM_PREPARE_THREADS", value_name = "THREADS")]
    pub prepare_threads: Option<NonZeroUsize>,
    /// How long requests in flight may take to finish after SIGTERM; below the pod's grace period
    #[arg(long, env = "SENSORIUM_DRAIN_SECONDS", value_name = "SECONDS", default_value_t = 25)]
    pub drain_seconds: u64,
}

/// What the arguments and the file mean, checked.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// What is served; names differ.
    pub models: Vec<ModelSource>,
    /// Where claims are mounted.
    pub volumes: Volumes,
    /// Where artifacts of remote stores are kept.
    pub artifact_cache: PathBuf,
    /// Where it listens.
    pub addresses: Addresses,
    /// How requests are put together.
    pub batching: Batching,
    /// Bytes of a request message at most.
    pub max_request_bytes: usize,
    /// What is accepted of media and texts.
    pub limits: Limits,
    /// Threads of each engine.
    pub engine: Options,
    /// Threads that prepare inputs.
    pub prepare_threads: NonZeroUsize,
    /// How long requests in flight may take to finish.
    pub drain: Duration,
}

/// Where a server listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// gRPC.
    pub grpc: SocketAddr,
    /// HTTP health.
    pub http: SocketAddr,
    /// Prometheus metrics.
    pub metrics: SocketAddr,
}

/// Why the configuration makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("could not read configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file is not the configuration of a ServingJob.
    #[error("configuration {} is not that of a ServingJob", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Two models of one name.
    #[error("model {name:?} is given twice; give each a name of its own")]
    DuplicateModel {
        /// The name.
        name: String,
    },
    /// A number that cannot work.
    #[error("{setting} is {value}, it must be {wanted}")]
    OutOfRange {
        /// As the flag is called.
        setting: &'static str,
        /// What it was set to.
        value: u64,
        /// What would be right.
        wanted: String,
    },
}

impl TryFrom<ServerArgs> for ServerConfig {
    type Error = ConfigError;

    /// Reads the file and lays the flags over it.
    fn try_from(args: ServerArgs) -> Result<Self, ConfigError> {
        let mut models = args.models;
        let mut spec = None;
        if let Some(path) = args.config {
            let bytes = std::fs::read(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            let run: RunConfig<ServingJobSpec> =
                serde_json::from_slice(&bytes).map_err(|source| ConfigError::Parse { path, source })?;
            let (store, artifact) = (run.spec.model.store.clone(), run.spec.model.artifact.clone());
            models.insert(0, ModelSource { name: run.job.name, store, artifact });
            spec = Some(run.spec);
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = models.iter().find(|model| !names.insert(&model.name)) {
            return Err(ConfigError::DuplicateModel { name: twice.name.clone() });
        }
        let (ports, batching, limits) = spec.map(|spec| (spec.ports, spec.batching, spec.limits)).unwrap_or_default();
        let max_rows = args.max_batch_size.unwrap_or(batching.max_batch_size);
        let max_waiting_rows = args.max_queue_size.unwrap_or(batching.max_queue_size);
        check("--max-batch-size", max_rows.into(), max_rows >= 1, || "at least 1".to_owned())?;
        check("--max-queue-size", max_waiting_rows.into(), max_waiting_rows >= max_rows, || {
            format!("at least --max-batch-size, {max_rows}")
        })?;
        let max_request_bytes = args.max_request_bytes.unwrap_or(limits.max_request_bytes);
        // gRPC counts a message with 32 bits.
        let range = 1024..=u64::from(u32::MAX);
        check("--max-request-bytes", max_request_bytes, range.contains(&max_request_bytes), || {
            "1024 to 4294967295".to_owned()
        })?;
        let delay = args.max_queue_delay_microseconds.unwrap_or(batching.max_queue_delay_microseconds);
        let mut accepted = Limits::default();
        accepted.image.max_bytes = limits.max_image_bytes;
        accepted.image.max_pixels = limits.max_image_pixels;
        let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let here = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        Ok(Self {
            models,
            volumes: args.volumes.into_iter().collect(),
            artifact_cache: args.artifact_cache.unwrap_or_else(|| std::env::temp_dir().join("sensorium-artifacts")),
            addresses: Addresses {
                grpc: args.grpc_addr.unwrap_or_else(|| here(ports.grpc)),
                http: args.http_addr.unwrap_or_else(|| here(ports.http)),
                metrics: args.metrics_addr.unwrap_or_else(|| here(ports.metrics)),
            },
            batching: Batching {
                max_rows: max_rows as usize,
                max_waiting_rows: max_waiting_rows as usize,
                max_delay: Duration::from_micros(delay),
            },
            max_request_bytes: max_request_bytes as usize,
            limits: accepted,
            engine: Options { threads: args.engine_threads.unwrap_or(cores) },
            prepare_threads: args.prepare_threads.unwrap_or(cores),
            drain: Duration::from_secs(args.drain_seconds),
        })
    }
}

fn check(setting: &'static str, value: u64, holds: bool, wanted: impl FnOnce() -> String) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError::OutOfRange { setting, value, wanted: wanted() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(arguments: &[&str]) -> Result<ServerConfig, ConfigError> {
        ServerArgs::try_parse_from([&["sensorium-server"], arguments].concat()).unwrap().try_into()
    }

    /// A configuration file with this spec.
    fn file(spec: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let job = r#"{"kind": "ServingJob", "namespace": "default", "name": "vqa"}"#;
        std::fs::write(file.path(), format!(r#"{{"job": {job}, "specHash": "sha256:00", "spec": {spec}}}"#)).unwrap();
        file
    }

    #[test]
    fn the_model_of_a_file_is_served_under_the_jobs_name_with_the_files_settings() {
        let file = file(
            r#"{"model": {"artifact": "vqa-int8", "store": "s3://models"}, "batching": {"maxBatchSize": 8},
                "ports": {"grpc": 9001}, "limits": {"maxImagePixels": 64}}"#,
        );
        let config = config(&["--config", file.path().to_str().unwrap()]).unwrap();
        let source =
            ModelSource { name: "vqa".to_owned(), store: "s3://models".to_owned(), artifact: "vqa-int8".to_owned() };
        assert_eq!(config.models, [source]);
        assert_eq!((config.batching.max_rows, config.batching.max_waiting_rows), (8, 1024));
        assert_eq!(config.addresses.grpc, "127.0.0.1:9001".parse().unwrap());
        assert_eq!((config.limits.image.max_pixels, config.max_request_bytes), (64, 64 << 20));
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let file = file(r#"{"model": {"artifact": "a"}, "batching": {"maxBatchSize": 8}}"#);
        let path = file.path().to_str().unwrap();
        let config = config(&["--config", path, "--max-batch-size", "4", "--grpc-addr", "0.0.0.0:1"]).unwrap();
        assert_eq!(config.batching.max_rows, 4);
        assert_eq!(config.addresses.grpc, "0.0.0.0:1".parse().unwrap());
    }

    #[test]
    fn without_a_file_or_a_model_there_is_nothing_to_serve() {
        let error = ServerArgs::try_parse_from(["sensorium-server"]).unwrap_err().to_string();
        assert!(error.contains("--config <FILE>|--model <NAME=URI>"), "{error}");
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused_by_name() {
        let model = ["--model", "a=file:///s/x"];
        let error = config(&[&model[..], &["--max-batch-size", "9", "--max-queue-size", "8"]].concat()).unwrap_err();
        assert_eq!(error.to_string(), "--max-queue-size is 8, it must be at least --max-batch-size, 9");
        let error = config(&[&model[..], &["--max-request-bytes", "9"]].concat()).unwrap_err();
        assert!(matches!(error, ConfigError::OutOfRange { setting: "--max-request-bytes", .. }), "{error}");
        let error = config(&[model, model].concat()).unwrap_err();
        assert!(matches!(error, ConfigError::DuplicateModel { name } if name == "a"));
    }

    #[test]
    fn a_file_with_a_field_that_nobody_knows_is_refused() {
        let file = file(r#"{"model": {"artifact": "a"}, "batchign": {}}"#);
        let error = config(&["--config", file.path().to_str().unwrap()]).unwrap_err();
        assert!(matches!(error, ConfigError::Parse { .. }), "{error}");
    }
}

//! What the operator set, and what it means.

mod args;
mod descriptors;
mod memory;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use sensorium_api::{ServingJobSpec, run::RunConfig};
use sensorium_artifact::Volumes;
use sensorium_engine::Options;
use sensorium_modality::Limits;

pub use args::{Address, ControlModeName, ServerArgs};

use crate::{
    repository::{ControlMode, GraphPlaces, ModelSource, Openers, RepositoryConfig},
    scheduler::Batching,
    security::{self, OutgoingFiles, PeerTls, TlsFiles},
};

/// What the arguments and the file mean, checked.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// What is served; names of artifacts differ.
    pub repository: RepositoryConfig,
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
    /// Bytes of all requests at a time at most.
    pub max_inflight_bytes: usize,
    /// Connections of clients at a time at most.
    pub max_connections: NonZeroU32,
    /// Whether clients may pass tensors through shared memory.
    pub shared_memory: bool,
    /// Certificates, where connections are encrypted.
    pub tls: Option<TlsFiles>,
    /// File of tokens, where clients need one.
    pub auth_tokens: Option<PathBuf>,
    /// How the servers of graphs that run elsewhere are called.
    pub outgoing: OutgoingFiles,
    /// What one client may ask.
    pub client_limits: security::Limits,
    /// What is accepted of media and texts.
    pub limits: Limits,
    /// Threads of each engine.
    pub engine: Options,
    /// The engines that there are.
    pub openers: Openers,
    /// Which graphs of artifacts are served, and which of them run elsewhere.
    pub graphs: GraphPlaces,
    /// Threads that prepare inputs.
    pub prepare_threads: NonZeroUsize,
    /// Memory for answers that are kept, in bytes.
    pub response_cache_bytes: u64,
    /// How long requests in flight may take to finish.
    pub drain: Duration,
}

impl ServerConfig {
    /// Gives this process the open files that its connections take, where it has been given fewer and may have more.
    ///
    /// # Errors
    /// What the system says.
    pub fn make_room(&self) -> std::io::Result<()> {
        descriptors::make_room_for(self.max_connections)
    }
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
    /// The settings file is not one.
    #[error("settings {} cannot be used", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_yaml_ng::Error,
    },
    /// There is nothing to serve.
    #[error("there is nothing to serve; give --model-repository, --model or --config")]
    Nothing,
    /// Half of a pair of settings.
    #[error("{given} needs {missing} too")]
    Alone {
        /// What was given.
        given: &'static str,
        /// What belongs to it.
        missing: &'static str,
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

    /// Reads the files and lays the flags over them.
    fn try_from(args: ServerArgs) -> Result<Self, ConfigError> {
        let args = args.with_settings()?;
        let mut models = args.model;
        let mut spec = None;
        if let Some(path) = args.config {
            let bytes = std::fs::read(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            let run: RunConfig<ServingJobSpec> =
                serde_json::from_slice(&bytes).map_err(|source| ConfigError::Parse { path, source })?;
            let (store, artifact) = (run.spec.model.store.clone(), run.spec.model.artifact.clone());
            models.insert(0, ModelSource { name: run.job.name, store, artifact });
            spec = Some(run.spec);
        }
        if models.is_empty() && args.model_repository.is_empty() {
            return Err(ConfigError::Nothing);
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
        // A compressed request is held in both forms for a moment.
        let least = max_request_bytes.saturating_mul(2);
        let max_inflight_bytes = args.max_inflight_bytes.unwrap_or_else(|| least.max(memory::available() / 4));
        check("--max-inflight-bytes", max_inflight_bytes, max_inflight_bytes >= least, || {
            format!("at least twice --max-request-bytes, {least}")
        })?;
        let delay = args.max_queue_delay_microseconds.unwrap_or(batching.max_queue_delay_microseconds);
        let mut accepted = Limits::default();
        accepted.image.max_bytes = limits.max_image_bytes;
        accepted.image.max_pixels = limits.max_image_pixels;
        let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let listen = |address: Option<Address>, port| {
            address.map_or_else(|| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port), |address| address.0)
        };
        let tls = match (args.tls_cert, args.tls_key, args.tls_client_ca) {
            (Some(certificate), Some(key), client_authorities) => {
                Some(TlsFiles { certificate, key, client_authorities })
            }
            (Some(_), None, _) => return Err(ConfigError::Alone { given: "--tls-cert", missing: "--tls-key" }),
            (None, Some(_), _) => return Err(ConfigError::Alone { given: "--tls-key", missing: "--tls-cert" }),
            (None, None, Some(_)) => {
                return Err(ConfigError::Alone { given: "--tls-client-ca", missing: "--tls-cert" });
            }
            (None, None, None) => None,
        };
        let outgoing = match (args.remote_tls_ca, args.remote_tls_name) {
            (None, Some(_)) => {
                return Err(ConfigError::Alone { given: "--remote-tls-name", missing: "--remote-tls-ca" });
            }
            (authorities, name) => OutgoingFiles {
                tls: authorities.map(|authorities| PeerTls { authorities, name, own: tls.clone() }),
                tokens: args.remote_tokens,
            },
        };
        let max_connections = args.max_connections.unwrap_or_else(descriptors::connections);
        let most = descriptors::most_connections();
        check("--max-connections", max_connections.get().into(), max_connections <= most, || {
            format!(
                "at most {most}, so that the files that this process may open are enough for everything else as well; raise \
                 that limit (ulimit -Hn, systemd's LimitNOFILE, default-ulimits of the container runtime), or let fewer connect"
            )
        })?;
        let drain = args.drain_seconds.unwrap_or(25);
        check("--drain-seconds", drain, drain <= LONGEST_DRAIN, || format!("at most {LONGEST_DRAIN}, a week"))?;
        let poll = Duration::from_secs(args.repository_poll_secs.map_or(15, NonZeroU32::get).into());
        let mode = match args.model_control_mode.unwrap_or_default() {
            ControlModeName::None => ControlMode::None,
            ControlModeName::Explicit => ControlMode::Explicit,
            ControlModeName::Poll => ControlMode::Poll(poll),
        };
        let repository = RepositoryConfig { models, repositories: args.model_repository, mode, load: args.load_model };
        Ok(Self {
            repository,
            volumes: args.volume.into_iter().collect(),
            artifact_cache: args.artifact_cache.unwrap_or_else(|| std::env::temp_dir().join("sensorium-artifacts")),
            addresses: Addresses {
                grpc: listen(args.grpc_addr, ports.grpc),
                http: listen(args.http_addr, ports.http),
                metrics: listen(args.metrics_addr, ports.metrics),
            },
            batching: Batching {
                max_rows: max_rows as usize,
                max_waiting_rows: max_waiting_rows as usize,
                max_delay: Duration::from_micros(delay),
            },
            max_request_bytes: max_request_bytes as usize,
            max_inflight_bytes: usize::try_from(max_inflight_bytes).unwrap_or(usize::MAX),
            max_connections,
            shared_memory: args.shared_memory.unwrap_or(true),
            tls,
            auth_tokens: args.auth_tokens,
            outgoing,
            client_limits: security::Limits {
                per_second: args.client_requests_per_second,
                at_once: args.client_concurrency,
            },
            limits: accepted,
            graphs: GraphPlaces { only: args.graph, remote: args.remote_graph },
            engine: Options {
                threads: args.engine_threads.unwrap_or(cores),
                device: args.engine_device.unwrap_or_default(),
                ..Options::default()
            },
            openers: Openers::default(),
            prepare_threads: args.prepare_threads.unwrap_or(cores),
            response_cache_bytes: args.response_cache_bytes.unwrap_or(64 << 20),
            drain: Duration::from_secs(drain),
        })
    }
}

/// Seconds that a drain may take at most.
const LONGEST_DRAIN: u64 = 7 * 24 * 60 * 60;

fn check(setting: &'static str, value: u64, holds: bool, wanted: impl FnOnce() -> String) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError::OutOfRange { setting, value, wanted: wanted() }) }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

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
        assert_eq!(config.repository.models, [source]);
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
    fn an_address_may_be_a_name_of_this_machine() {
        let config = config(&["--model-repository", "/m", "--http-addr", "localhost:8123", "--grpc-addr", "[::1]:1"]);
        let addresses = config.unwrap().addresses;
        assert!(addresses.http.ip().is_loopback() && addresses.http.port() == 8123, "{addresses:?}");
        assert_eq!(addresses.grpc, "[::1]:1".parse().unwrap());
        for wrong in ["8000", "localhost", "localhost:http", ":99999"] {
            let said = ServerArgs::try_parse_from(["sensorium-server", "--http-addr", wrong]).unwrap_err().to_string();
            assert!(said.contains("is no HOST:PORT such as 0.0.0.0:8000 or localhost:8000"), "{said}");
        }
    }

    #[test]
    fn a_drain_without_end_is_refused() {
        let drain = |seconds: &str| config(&["--model-repository", "/models", "--drain-seconds", seconds]);
        assert_eq!(drain("604800").unwrap().drain, Duration::from_secs(LONGEST_DRAIN));
        let error = drain("18446744073709551615").unwrap_err().to_string();
        assert!(error.contains("--drain-seconds") && error.contains("604800"), "{error}");
    }

    #[test]
    fn without_a_file_or_a_model_there_is_nothing_to_serve() {
        assert!(matches!(config(&[]), Err(ConfigError::Nothing)));
        assert!(config(&["--model-repository", "/models"]).is_ok());
    }

    #[test]
    fn a_settings_file_is_under_the_flags_and_over_the_job() {
        let job = file(r#"{"model": {"artifact": "a"}, "batching": {"maxBatchSize": 8, "maxQueueSize": 99}}"#);
        let settings = tempfile::NamedTempFile::new().unwrap();
        let text = format!(
            "config: {}\nmax-batch-size: 16\ngrpc-addr: 0.0.0.0:1\nmodel: [b=file:///s/x]\nmodel-control-mode: explicit\n",
            job.path().display()
        );
        std::fs::write(settings.path(), text).unwrap();
        let path = settings.path().to_str().unwrap();
        let config = config(&["--settings", path, "--grpc-addr", "0.0.0.0:2"]).unwrap();
        assert_eq!((config.batching.max_rows, config.batching.max_waiting_rows), (16, 99));
        assert_eq!(config.addresses.grpc, "0.0.0.0:2".parse().unwrap());
        assert_eq!(config.repository.models.len(), 2);
        assert_eq!(config.repository.mode, ControlMode::Explicit);
    }

    #[test]
    fn a_setting_that_nobody_knows_is_refused_by_name() {
        let settings = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(settings.path(), "max-batch-sise: 1").unwrap();
        let error = config(&["--settings", settings.path().to_str().unwrap()]).unwrap_err();
        assert!(
            sensorium_telemetry::error_line(&error).contains("max-batch-sise"),
            "{}",
            sensorium_telemetry::error_line(&error)
        );
    }

    #[test]
    fn connections_are_bounded_by_the_files_that_may_be_open_where_nobody_says_by_what() {
        let repository = ["--model-repository", "/m"];
        assert_eq!(config(&repository).unwrap().max_connections, descriptors::connections());
        let seven = config(&[&repository[..], &["--max-connections", "7"]].concat()).unwrap();
        assert_eq!(seven.max_connections.get(), 7);
        let none = [&["sensorium-server"], &repository[..], &["--max-connections", "0"]].concat();
        assert!(ServerArgs::try_parse_from(none).unwrap_err().to_string().contains("--max-connections"));
    }

    #[test]
    fn a_number_that_a_flag_does_not_take_is_answered_with_one_that_it_takes() {
        for (flag, value, words) in [
            ("--engine-threads", "100000", "must be at most 1024"),
            ("--prepare-threads", "0", "must be at least 1"),
            ("--client-concurrency", "0", "must be at least 1"),
            ("--trace-rate", "x", "invalid digit"),
            ("--max-request-bytes", "64M", "write a number of bytes, such as 67108864"),
        ] {
            let said = ServerArgs::try_parse_from(["sensorium-server", flag, value]).unwrap_err().to_string();
            assert!(said.contains(flag) && said.contains(words), "{said}");
        }
    }

    #[test]
    fn a_certificate_needs_its_key() {
        let arguments = ["sensorium-server", "--model-repository", "/m", "--tls-cert", "c"];
        assert!(ServerArgs::try_parse_from(arguments).unwrap_err().to_string().contains("--tls-key"));
        let settings = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(settings.path(), "model-repository: [/m]\ntls-key: k").unwrap();
        let error = config(&["--settings", settings.path().to_str().unwrap()]).unwrap_err();
        assert_eq!(error.to_string(), "--tls-key needs --tls-cert too");
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused_by_name() {
        let model = ["--model", "a=file:///s/x"];
        let error = config(&[&model[..], &["--max-batch-size", "9", "--max-queue-size", "8"]].concat()).unwrap_err();
        assert_eq!(error.to_string(), "--max-queue-size is 8, it must be at least --max-batch-size, 9");
        let error = config(&[&model[..], &["--max-request-bytes", "9"]].concat()).unwrap_err();
        assert!(matches!(error, ConfigError::OutOfRange { setting: "--max-request-bytes", .. }), "{error}");
        let error = config(&[&model[..], &["--max-request-bytes", "4096", "--max-inflight-bytes", "8191"]].concat());
        let wanted = "--max-inflight-bytes is 8191, it must be at least twice --max-request-bytes, 8192";
        assert_eq!(error.unwrap_err().to_string(), wanted);
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

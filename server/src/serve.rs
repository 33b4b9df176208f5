//! Binding, serving, and ending well.
//!
//! On the way down the order is fixed: readiness goes off, no connection or call is admitted any more, calls in flight
//! finish up to a deadline, engines close, and health and metrics go last, so that the end can be watched.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use sensorium_proto::{
    inference::grpc_inference_service_server::GrpcInferenceServiceServer,
    multimodal::multimodal_service_server::MultimodalServiceServer,
};
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinHandle,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code,
    codec::CompressionEncoding,
    codegen::http::{HeaderValue, Response},
    server::NamedService,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::server::HealthReporter;
use tower::util::MapResponseLayer;

use crate::{
    config::{Addresses, ServerConfig},
    health, http,
    metrics::Metrics,
    model::{self, LoadError, Opening, Repository},
    pool::CpuPool,
    service::Service,
};

/// Why serving ended before it was asked to, or never began.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address is taken, or not this machine's.
    #[error("could not listen on {address} for {purpose}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// "gRPC", "health" or "metrics".
        purpose: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A model cannot be served.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The gRPC server failed.
    #[error("gRPC ended")]
    Grpc(#[source] tonic::transport::Error),
    /// A task that never ends did.
    #[error("{task} ended unasked")]
    Ended {
        /// Which one.
        task: &'static str,
    },
    /// An engine's thread died.
    #[error("an engine died; the log says which")]
    EngineLost,
}

/// Bound addresses: whoever connects before serving begins waits, and is not refused.
#[derive(Debug)]
pub struct Listeners {
    grpc: TcpListener,
    http: TcpListener,
    metrics: TcpListener,
    addresses: Addresses,
}

impl Listeners {
    /// Binds all three. Port 0 lets the system choose.
    ///
    /// # Errors
    /// [`ServeError::Bind`], which names the address.
    pub async fn bind(addresses: Addresses) -> Result<Self, ServeError> {
        let (grpc, grpc_address) = bind(addresses.grpc, "gRPC").await?;
        let (http, http_address) = bind(addresses.http, "health").await?;
        let (metrics, metrics_address) = bind(addresses.metrics, "metrics").await?;
        let addresses = Addresses { grpc: grpc_address, http: http_address, metrics: metrics_address };
        Ok(Self { grpc, http, metrics, addresses })
    }

    /// Where it listens, with the ports that the system chose.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }
}

async fn bind(address: SocketAddr, purpose: &'static str) -> Result<(TcpListener, SocketAddr), ServeError> {
    let failed = |source| ServeError::Bind { address, purpose, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Loads the models of `config` and serves them until `shutdown` completes and what is in flight is done.
///
/// # Errors
/// [`ServeError`]; a drain that is cut short by its deadline is none.
pub async fn serve(
    config: ServerConfig,
    listeners: Listeners,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let metrics = Metrics::new();
    let lost = CancellationToken::new();
    let (ready, is_ready) = watch::channel(false);
    // Health and metrics answer while models load.
    let side = CancellationToken::new();
    let _side_ends_with_this = side.clone().drop_guard();
    let health = spawn_http(listeners.http, http::health(is_ready.clone()), side.clone());
    let scrapes = spawn_http(listeners.metrics, http::metrics(metrics.clone()), side.clone());

    let opening = Opening {
        volumes: config.volumes.clone(),
        cache: config.artifact_cache.clone(),
        engine: config.engine,
        batching: config.batching,
        limits: config.limits,
        // Preparing takes about as long as a row in an engine, so as much of it may wait.
        pool: CpuPool::new(config.prepare_threads.get(), config.batching.max_waiting_rows),
        metrics: metrics.clone(),
        lost: lost.clone(),
    };
    tokio::pin!(shutdown);
    let repository = tokio::select! {
        loaded = model::load(&config.models, &opening) => Arc::new(loaded?),
        () = &mut shutdown => return Ok(()),
    };

    let drain = CancellationToken::new();
    let (reporter, grpc) = spawn_grpc(&config, listeners.grpc, &repository, &metrics, &is_ready, drain.clone());
    let mut grpc = Abort(grpc);
    let Addresses { grpc: address, http, metrics: scrape } = listeners.addresses;
    tracing::info!(grpc = %address, %http, metrics = %scrape, models = ?repository.names().collect::<Vec<_>>(), "serving");
    tokio::select! {
        () = &mut shutdown => {}
        () = lost.cancelled() => return Err(ServeError::EngineLost),
        ended = &mut grpc.0 => return Err(ended_early(ended)),
        () = ended(health) => return Err(ServeError::Ended { task: "the health endpoint" }),
        () = ended(scrapes) => return Err(ServeError::Ended { task: "the metrics endpoint" }),
        never = health::watch(&repository, &ready, &metrics) => never,
        () = report(&reporter, is_ready.clone()) => return Err(ServeError::Ended { task: "the health report" }),
    }

    tracing::info!(deadline_seconds = config.drain.as_secs(), "draining");
    ready.send_replace(false);
    metrics.set_ready(false);
    end_report(reporter).await;
    drain.cancel();
    let deadline = Instant::now() + config.drain;
    match time::timeout_at(deadline, &mut grpc.0).await {
        Ok(Ok(Ok(()))) => tracing::info!("drained"),
        Ok(ended) => return Err(ended_early(ended)),
        Err(_) => tracing::warn!("the deadline passed before every request was answered"),
    }
    // Nothing waits for these engines any more, but one may be in a run that nobody can interrupt.
    if time::timeout_at(deadline.max(Instant::now() + Duration::from_secs(1)), repository.stop()).await.is_err() {
        tracing::warn!("an engine did not finish its last run");
    }
    Ok(())
}

type GrpcTask = JoinHandle<Result<(), tonic::transport::Error>>;

/// The task ends with whoever waits for it.
struct Abort(GrpcTask);

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn spawn_grpc(
    config: &ServerConfig,
    listener: TcpListener,
    repository: &Arc<Repository>,
    metrics: &Metrics,
    is_ready: &watch::Receiver<bool>,
    drain: CancellationToken,
) -> (HealthReporter, GrpcTask) {
    let service = Service::new(repository.clone(), metrics.clone(), is_ready.clone());
    let (reporter, health) = tonic_health::server::health_reporter();
    // Compressed answers cost more time than they save on the networks of a cluster, so requests alone may be.
    let inference = GrpcInferenceServiceServer::new(service.clone())
        .max_decoding_message_size(config.max_request_bytes)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate);
    let multimodal = MultimodalServiceServer::new(service)
        .max_decoding_message_size(config.max_request_bytes)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate);
    let server = Server::builder()
        // A client that vanished without a word frees its requests after this and the timeout of 20 s.
        .http2_keepalive_interval(Some(Duration::from_mins(1)))
        .layer(MapResponseLayer::new(as_other_servers_say))
        .add_service(health)
        .add_service(inference)
        .add_service(multimodal)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), drain.cancelled_owned());
    (reporter, tokio::spawn(server))
}

/// A message over the limit is RESOURCE_EXHAUSTED in every gRPC library but tonic, which says OUT_OF_RANGE. Nothing
/// else of this server says that.
fn as_other_servers_say<Body>(mut response: Response<Body>) -> Response<Body> {
    const STATUS: &str = "grpc-status";
    let headers = response.headers_mut();
    if headers.get(STATUS).is_some_and(|status| Code::from_bytes(status.as_bytes()) == Code::OutOfRange) {
        headers.insert(STATUS, HeaderValue::from(Code::ResourceExhausted as i32));
    }
    response
}

/// Names of the services that `grpc.health.v1` reports on; empty is the server as a whole.
const SERVICES: [&str; 3] = ["", GrpcInferenceServiceServer::<Service>::NAME, MultimodalServiceServer::<Service>::NAME];

/// Repeats `is_ready` to clients of `grpc.health.v1`. Ends when its sender does.
async fn report(reporter: &HealthReporter, mut is_ready: watch::Receiver<bool>) {
    loop {
        let ready = *is_ready.borrow_and_update();
        let status = if ready { tonic_health::ServingStatus::Serving } else { tonic_health::ServingStatus::NotServing };
        for service in SERVICES {
            reporter.set_service_status(service, status).await;
        }
        if is_ready.changed().await.is_err() {
            return;
        }
    }
}

/// Tells clients that watch, and ends their streams: a call that never ends would hold the drain to its deadline.
async fn end_report(mut reporter: HealthReporter) {
    for service in SERVICES {
        reporter.set_service_status(service, tonic_health::ServingStatus::NotServing).await;
    }
    for service in SERVICES {
        reporter.clear_service_status(service).await;
    }
}

fn spawn_http(listener: TcpListener, router: axum::Router, stop: CancellationToken) -> JoinHandle<std::io::Result<()>> {
    tokio::spawn(async move { axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await })
}

async fn ended(task: JoinHandle<std::io::Result<()>>) {
    match task.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "an HTTP endpoint failed"),
        Err(error) => tracing::error!(%error, "an HTTP endpoint was cut short"),
    }
}

fn ended_early(ended: Result<Result<(), tonic::transport::Error>, tokio::task::JoinError>) -> ServeError {
    match ended {
        Ok(Err(error)) => ServeError::Grpc(error),
        Ok(Ok(())) | Err(_) => ServeError::Ended { task: "gRPC" },
    }
}

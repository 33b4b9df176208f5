//! Binding, serving, and ending well.
//!
//! On the way down the order is fixed: readiness goes off, no connection or call is admitted any more, calls in flight
//! finish up to a deadline, engines close, and health and metrics go last, so that the end can be watched.

use std::{net::SocketAddr, num::NonZeroU32, time::Duration};

use sensorium_telemetry::{LogControl, TraceControl};
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinHandle,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use crate::{
    budget::Budget,
    config::{Addresses, ServerConfig},
    front::{self, App, Door, Places},
    health,
    metrics::Metrics,
    pool::CpuPool,
    repository::{IndexEntry, LoadError, Opening, Registry},
    rest,
    scheduler::Slots,
    scrape,
    security::{Admission, Outgoing, ReloadError, Reloaded, Tls, Tokens},
    service::Service,
    shared_memory::SharedMemory,
};

/// How long after the deadline of a drain it waits for an engine that is in a run, and then for those who are still reading.
const LAST: Duration = Duration::from_millis(500);
/// Connections to the metrics port at a time: its own, and a few of those who look on.
const ONLOOKERS: NonZeroU32 = NonZeroU32::new(32).unwrap();
/// How long before the end of a drain requests of many steps end.
const LAST_STEPS: Duration = Duration::from_secs(1);

/// Why serving ended before it was asked to, or never began.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address is taken, or not this machine's.
    #[error("could not listen on {address} for {purpose}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// "gRPC", "HTTP" or "metrics".
        purpose: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A model cannot be served.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Certificates or tokens cannot be read.
    #[error("nobody can be talked to safely")]
    Security(#[from] ReloadError),
    /// A task that never ends did.
    #[error("{task} ended unasked")]
    Ended {
        /// Which one.
        task: &'static str,
    },
    /// An engine's thread died, or its GPU is of no more use to this process.
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
        let (http, http_address) = bind(addresses.http, "HTTP").await?;
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

/// What can be changed while the server runs, beside its models.
#[derive(Clone, Debug)]
pub struct Controls {
    /// The log level.
    pub logs: LogControl,
    /// Which requests are traced.
    pub traces: TraceControl,
}

/// Loads the models of `config` and serves them until `shutdown` completes and what is in flight is done.
///
/// # Errors
/// [`ServeError`]; a drain that is cut short by its deadline is none.
pub async fn serve(
    config: ServerConfig,
    listeners: Listeners,
    controls: Controls,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let metrics = Metrics::new();
    let lost = CancellationToken::new();
    let (ready, is_ready) = watch::channel(false);
    let budget = Budget::new(config.max_inflight_bytes, metrics.budget());
    let memory = SharedMemory::new(config.shared_memory, budget.clone());
    let service = Service::new(metrics.clone(), is_ready, memory, budget.clone(), controls.logs, controls.traces);
    let admission = admission(&config)?;
    // Only limits ask who it is.
    let tells_peers = admission.is_some();
    let app = front::app(service.clone(), config.max_request_bytes, admission);
    let tls = config.tls.clone().map(Tls::watch).transpose()?;
    let places = Places::new(config.max_connections, metrics.connections());

    // Everything is answered from now on, with "not ready" while models load, so that the start can be watched.
    let (drain, close) = (CancellationToken::new(), CancellationToken::new());
    let door = |listener, app: &App, drain: &CancellationToken, close: &CancellationToken| Door {
        listener,
        tls: tls.clone(),
        app: app.clone(),
        budget: budget.clone(),
        max_message_bytes: config.max_request_bytes,
        places: Some(places.clone()),
        tells_peers,
        drain: drain.clone(),
        close: close.clone(),
    };
    let mut grpc = Task::spawn("gRPC", door(listeners.grpc, &app, &drain, &drain));
    // Health is asked for over HTTP until the end, by connections that are made meanwhile.
    let mut http = Task::spawn("HTTP", door(listeners.http, &app, &drain, &close));
    let measured = App::from(scrape::metrics(metrics.clone(), service.clone()).merge(rest::health(service.clone())));
    // Who looks on takes nothing from those whom it looks at: two answers of metrics at a time refused a request that had room.
    let budget = Budget::new(config.max_inflight_bytes, Metrics::new().budget());
    // Nor do their connections take the files of those that are served.
    let onlookers = Some(Places::new(ONLOOKERS, Metrics::new().connections()));
    let scrapes = Door { tls: None, places: onlookers, budget, ..door(listeners.metrics, &measured, &close, &close) };
    let mut scrapes = Task::spawn("the metrics endpoint", scrapes);

    let opening = opening(&config, &metrics, &lost)?;
    tokio::pin!(shutdown);
    let repository = tokio::select! {
        opened = Registry::open(config.repository.clone(), opening) => opened?,
        () = &mut shutdown => return Ok(()),
    };
    service.open(repository.clone());
    if repository.names().is_empty() {
        tracing::warn!(repositories = ?config.repository.repositories, "no model is served");
    }
    let Addresses { grpc: address, http: http_address, metrics: scrape } = listeners.addresses;
    tracing::info!(grpc = %address, http = %http_address, metrics = %scrape, models = ?repository.names(), "serving");
    let outcome = tokio::select! {
        () = &mut shutdown => Ok(()),
        // Requests are still told why they fail, and those of other models are answered.
        () = lost.cancelled() => Err(ServeError::EngineLost),
        ended = grpc.ended() => return Err(ended),
        ended = http.ended() => return Err(ended),
        ended = scrapes.ended() => return Err(ended),
        never = health::watch(&repository, &ready, &metrics) => never,
    };

    tracing::info!(deadline_seconds = config.drain.as_secs(), "draining");
    ready.send_replace(false);
    metrics.set_ready(false);
    // Who watches health hears of it while connections still stand.
    service.end_streams();
    drain.cancel();
    repository.end_changes();
    let deadline = Instant::now() + config.drain;
    let finished = async {
        // What came over connections made before is answered; only then is anything refused.
        grpc.ended().await;
        service.drain().await;
    };
    // What has many steps is told of the end, as long as there is time for it.
    let cut_short = async {
        time::sleep_until(deadline - config.drain.min(LAST_STEPS)).await;
        service.cut_short();
        std::future::pending::<()>().await;
    };
    let finished = async {
        tokio::select! {
            () = finished => {}
            () = cut_short => {}
        }
    };
    if time::timeout_at(deadline, finished).await.is_ok() {
        tracing::info!("drained");
    } else {
        tracing::warn!("the deadline passed before every request was answered");
    }
    // Nothing waits for these engines any more, but one may be in a run that nobody can interrupt.
    if time::timeout_at(deadline.max(Instant::now() + LAST), repository.stop()).await.is_err() {
        tracing::warn!("an engine did not finish its last run");
    }
    close.cancel();
    let last_words = async {
        http.ended().await;
        scrapes.ended().await;
    };
    // An answer that is being read is sent to its end.
    if time::timeout_at(deadline.max(Instant::now() + LAST), last_words).await.is_err() {
        tracing::debug!("connections of HTTP were cut");
    }
    outcome
}

/// Loads the models of `config` as [`serve`] would, and returns the index of the repository instead.
///
/// # Errors
/// [`ServeError::Load`] when there is no index, [`ServeError::Security`].
pub async fn check(config: &ServerConfig) -> Result<Vec<IndexEntry>, ServeError> {
    // Nobody comes in; this is for what they say of their files.
    config.tls.clone().map(Tls::watch).transpose()?;
    admission(config)?;
    let opening = opening(config, &Metrics::new(), &CancellationToken::new())?;
    let repository = Registry::open(config.repository.clone(), opening).await?;
    let index = repository.index(false);
    repository.stop().await;
    Ok(index)
}

fn opening(config: &ServerConfig, metrics: &Metrics, lost: &CancellationToken) -> Result<Opening, ReloadError> {
    Ok(Opening {
        volumes: config.volumes.clone(),
        cache: config.artifact_cache.clone(),
        engine: config.engine,
        openers: config.openers.clone(),
        graphs: config.graphs.clone(),
        outgoing: Outgoing::watch(config.outgoing.clone())?,
        max_message_bytes: config.max_request_bytes,
        batching: config.batching,
        slots: Slots::new(config.engine.threads.get()),
        responses: crate::model::ResponseCache::new(config.response_cache_bytes),
        limits: config.limits,
        // Preparing takes about as long as a row in an engine, so as much of it may wait; and about as much memory as what is prepared.
        pool: CpuPool::new(
            config.prepare_threads.get(),
            config.batching.max_waiting_rows,
            config.max_inflight_bytes as u64,
        ),
        metrics: metrics.clone(),
        lost: lost.clone(),
    })
}

/// Who is let in; `None` for everybody without limit.
fn admission(config: &ServerConfig) -> Result<Option<Admission>, ReloadError> {
    let tokens = match config.auth_tokens.clone() {
        None => None,
        Some(path) => Some(Reloaded::watch(vec![path.clone()], move || Tokens::read(&path))?),
    };
    let is_free = tokens.is_none() && config.client_limits == crate::security::Limits::default();
    Ok((!is_free).then(|| Admission::new(tokens, config.client_limits)))
}

/// A door that is served until it is closed; it ends with whoever holds this.
struct Task {
    name: &'static str,
    handle: JoinHandle<()>,
}

impl Task {
    fn spawn(name: &'static str, door: Door) -> Self {
        Self { name, handle: tokio::spawn(door.serve()) }
    }

    /// Waits for the end, which before it was asked for is an error.
    async fn ended(&mut self) -> ServeError {
        if let Err(error) = (&mut self.handle).await {
            tracing::error!(task = self.name, %error, "cut short");
        }
        ServeError::Ended { task: self.name }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

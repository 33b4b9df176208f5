//! What a run tells while it goes on: progress as JSON and metrics for Prometheus, over HTTP on rank 0.

use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use sensorium_api::run::Progress;
use sensorium_telemetry::metrics;

use crate::error::TrainError;

/// Shared between the run, which writes, and the server, which reads. Cloning shares.
#[derive(Clone, Debug)]
pub struct Reporter {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    progress: Mutex<Progress>,
    registry: Registry,
    loss: Gauge<f64, AtomicU64>,
    accuracy: Gauge<f64, AtomicU64>,
    rate: Gauge<f64, AtomicU64>,
    step: Gauge,
    checkpoint_failures: Counter,
}

impl Default for Reporter {
    fn default() -> Self {
        let mut registry = Registry::default();
        let (loss, accuracy, rate) = (Gauge::default(), Gauge::default(), Gauge::default());
        let (step, checkpoint_failures) = (Gauge::default(), Counter::default());
        metrics::TRAINER_LOSS.register(&mut registry, Gauge::clone(&loss));
        metrics::TRAINER_ACCURACY.register(&mut registry, Gauge::clone(&accuracy));
        metrics::TRAINER_SAMPLES_PER_SECOND.register(&mut registry, Gauge::clone(&rate));
        metrics::TRAINER_STEP.register(&mut registry, Gauge::clone(&step));
        metrics::TRAINER_CHECKPOINT_FAILURES.register(&mut registry, Counter::clone(&checkpoint_failures));
        let progress = Mutex::new(Progress { state: "starting".to_owned(), ..Progress::default() });
        Self { inner: Arc::new(Inner { progress, registry, loss, accuracy, rate, step, checkpoint_failures }) }
    }
}

impl Reporter {
    /// Changes what is told.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        // A panic while holding the lock leaves numbers that are old at worst.
        let mut progress = self.inner.progress.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut progress);
        self.inner.step.set(progress.step as i64);
        let gauges = [
            (&self.inner.loss, progress.loss),
            (&self.inner.accuracy, progress.accuracy),
            (&self.inner.rate, progress.samples_per_second),
        ];
        for (gauge, value) in gauges {
            if let Some(value) = value {
                gauge.set(value);
            }
        }
    }

    /// Counts a checkpoint that could not be written.
    pub fn checkpoint_failed(&self) {
        self.inner.checkpoint_failures.inc();
    }

    /// What is told now.
    pub fn snapshot(&self) -> Progress {
        self.inner.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Serves `/progress`, `/metrics` and `/livez` on `address` as long as the runtime lives.
    ///
    /// # Errors
    /// When the address can't be bound.
    pub async fn serve(&self, address: SocketAddr) -> Result<(), TrainError> {
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .map_err(|source| TrainError::Serve { address: address.to_string(), source })?;
        let router = Router::new()
            .route("/progress", get(|State(reporter): State<Self>| async move { axum::Json(reporter.snapshot()) }))
            .route("/metrics", get(|State(reporter): State<Self>| async move { reporter.metrics() }))
            .route("/livez", get(|| async { "ok" }))
            .with_state(self.clone());
        tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "the progress server ended");
            }
        });
        Ok(())
    }

    fn metrics(&self) -> ([(axum::http::HeaderName, &'static str); 1], String) {
        let mut text = String::new();
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &self.inner.registry) {
            tracing::error!(%error, "could not encode metrics");
        }
        ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
    }
}

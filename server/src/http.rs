//! Plain HTTP: health for those who run the server, metrics for Prometheus.

use axum::{
    Router,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::sync::watch;

use crate::metrics::Metrics;

/// `/livez` answers while the process runs; `/readyz` is 503 until the server is ready and from the moment it drains.
/// Both also under the names that the Open Inference Protocol gives them.
pub fn health(ready: watch::Receiver<bool>) -> Router {
    let live = get(|| async { "alive\n" });
    let ready = get(move || async move {
        if *ready.borrow() { (StatusCode::OK, "ready\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready\n") }
    });
    Router::new()
        .route("/livez", live.clone())
        .route("/readyz", ready.clone())
        .route("/v2/health/live", live)
        .route("/v2/health/ready", ready)
}

/// `/metrics` in the OpenMetrics text format.
pub fn metrics(metrics: Metrics) -> Router {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let scrape = move || async move {
        match metrics.encode() {
            Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    };
    Router::new().route("/metrics", get(scrape))
}

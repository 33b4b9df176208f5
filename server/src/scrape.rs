//! Metrics for Prometheus.

use crate::{metrics::Metrics, service::Service};
use axum::{
    Router,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};

/// `/metrics` in the OpenMetrics text format.
pub fn metrics(metrics: Metrics, service: Service) -> Router {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let scrape = move || async move {
        match metrics.encode(&service.statistics()) {
            Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    };
    Router::new().route("/metrics", get(scrape))
}

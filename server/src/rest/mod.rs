//! The Open Inference Protocol over HTTP, with Triton's extensions: the operations of [`Service`] once more, from JSON to
//! the messages that gRPC carries and back.

mod body;
mod error;
mod generate;
mod infer;
mod json;
mod manage;
mod request;
mod response;
mod tensor;

use std::sync::Arc;

use axum::{
    Router,
    routing::{get, post},
};
use serde::Deserialize;

pub(crate) use error::Refusal;
pub(crate) use infer::Infer;

use crate::service::Service;

/// What handlers work with.
#[derive(Clone, Debug)]
struct Rest {
    service: Arc<Service>,
    /// Bytes of a body at most, also after it is decompressed.
    max_bytes: usize,
}

/// A model in a path; the empty version is the newest.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Target {
    #[serde(default)]
    model: String,
    #[serde(default)]
    version: String,
}

/// What probes ask alone, for a port that has connections of its own.
pub fn health(service: Service) -> Router {
    let router = Router::new().route("/livez", get(manage::alive)).route("/readyz", get(manage::ready));
    router.with_state(Rest { service: Arc::new(service), max_bytes: 0 })
}

/// All routes. `max_bytes` bounds a request's body, before and after it is decompressed.
pub fn router(service: Service, max_bytes: usize) -> Router {
    let mut router = Router::new()
        .route("/livez", get(manage::alive))
        .route("/readyz", get(manage::ready))
        .route("/v2", get(manage::server_metadata))
        .route("/v2/", get(manage::server_metadata))
        .route("/v2/health/live", get(manage::server_live))
        .route("/v2/health/ready", get(manage::server_ready))
        .route("/v2/models/stats", get(manage::statistics))
        .route("/v2/repository/index", post(manage::repository_index))
        .route("/v2/repository/models/{model}/load", post(manage::load))
        .route("/v2/repository/models/{model}/unload", post(manage::unload))
        .route("/v2/logging", get(manage::log_settings).post(manage::log_settings))
        .route("/v2/trace/setting", get(manage::trace_setting).post(manage::trace_setting))
        .route("/v2/models/{model}/trace/setting", get(manage::trace_setting).post(manage::trace_setting));
    // A model's routes, for its newest version and for one by number.
    for model in ["/v2/models/{model}", "/v2/models/{model}/versions/{version}"] {
        let route = |name: &str| format!("{model}{name}");
        router = router
            .route(&route(""), get(manage::model_metadata))
            .route(&route("/ready"), get(manage::model_ready))
            .route(&route("/config"), get(manage::model_config))
            .route(&route("/stats"), get(manage::statistics))
            .route(&route("/infer"), post(infer::infer))
            .route(&route("/generate"), post(generate::generate))
            .route(&route("/generate_stream"), post(generate::generate_stream));
    }
    for (kind, register) in [("system", post(manage::register_memory)), ("cuda", post(manage::register_cuda_memory))] {
        let route = |name: &str| format!("/v2/{kind}sharedmemory{name}");
        let (status, unregister) = if kind == "system" {
            (get(manage::memory_status), post(manage::unregister_memory))
        } else {
            (get(manage::no_memory), post(manage::nothing))
        };
        router = router
            .route(&route("/status"), status.clone())
            .route(&route("/region/{region}/status"), status)
            .route(&route("/region/{region}/register"), register)
            .route(&route("/unregister"), unregister.clone())
            .route(&route("/region/{region}/unregister"), unregister);
    }
    router.with_state(Rest { service: Arc::new(service), max_bytes })
}

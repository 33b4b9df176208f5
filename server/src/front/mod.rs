//! Where clients come in: connections, TLS, who may do how much, and the routes of gRPC and REST.
//!
//! Both ports serve both: a connection speaks HTTP/1 or HTTP/2, and a path belongs to one of the two.

mod connections;
mod corked;
mod drained;
mod going;
mod guard;
mod impatient;
mod metered;
mod places;
mod readers;
mod unary;

use std::sync::Arc;

use axum::{
    Router,
    extract::Request,
    http::{HeaderMap, HeaderValue, Response, StatusCode},
    middleware::Next,
    response::IntoResponse,
};
use sensorium_proto::{
    FILE_DESCRIPTOR_SET, inference::grpc_inference_service_server::GrpcInferenceServiceServer,
    multimodal::multimodal_service_server::MultimodalServiceServer,
};
use tonic::{Code, Status, codec::CompressionEncoding, service::Routes};
use tonic_health::pb::health_server::HealthServer;
use tower::util::MapResponseLayer;

pub use connections::{Door, Peer};
pub use places::Places;
use unary::Unary;

use crate::{
    rest::{self, Refusal},
    security::Admission,
    service::Service,
};

/// What answers requests: every route, and beside them the one call that is made all the time.
#[derive(Clone, Debug)]
pub struct App {
    routes: Router,
    infer: Option<Arc<Infer>>,
}

/// Inference over gRPC and REST, without what calls in general need.
#[derive(Debug)]
struct Infer {
    service: Service,
    grpc: Unary,
    rest: rest::Infer,
    admission: Option<Admission>,
}

impl From<Router> for App {
    fn from(routes: Router) -> Self {
        Self { routes, infer: None }
    }
}

/// Every route of `service`, behind `admission`.
pub fn app(service: Service, max_request_bytes: usize, admission: Option<Admission>) -> App {
    let health = HealthServer::new(service.health());
    // Compressed answers cost more time than they save on the networks of a cluster, so requests alone may be.
    let inference = GrpcInferenceServiceServer::new(service.clone())
        .max_decoding_message_size(max_request_bytes)
        .max_encoding_message_size(usize::MAX)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate);
    let multimodal = MultimodalServiceServer::new(service.clone())
        .max_decoding_message_size(max_request_bytes)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate);
    let mut grpc = Routes::new(health).add_service(inference).add_service(multimodal);
    let describe = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Old clients know the alpha version alone.
    match (describe().build_v1(), describe().build_v1alpha()) {
        (Ok(new), Ok(old)) => grpc = grpc.add_service(new).add_service(old),
        (Err(error), _) | (_, Err(error)) => tracing::error!(%error, "gRPC reflection is not there"),
    }
    let grpc = grpc.into_axum_router().layer(MapResponseLayer::new(as_other_servers_say));
    let grpc = grpc.route_layer(axum::middleware::from_fn(only_grpc));
    let infer = Infer {
        service: service.clone(),
        grpc: Unary::new(service.clone(), max_request_bytes),
        rest: rest::Infer::new(service.clone(), max_request_bytes),
        admission: admission.clone(),
    };
    let routes = grpc
        .merge(rest::router(service.clone(), max_request_bytes))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(MapResponseLayer::new(as_this_server_says));
    let routes = match admission {
        None => routes,
        Some(admission) => routes.layer(axum::middleware::from_fn_with_state((admission, service), guard::guard)),
    };
    App { routes, infer: Some(Arc::new(infer)) }
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

/// What does not say that it is gRPC is not read as that: nobody would see the messages in it, and hold them against limits.
async fn only_grpc(request: Request, next: Next) -> axum::response::Response {
    if is_grpc(request.headers()) {
        return next.run(request).await;
    }
    let reason = "this path is for gRPC; its content-type is application/grpc";
    Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, reason).into_response()
}

/// A path that is not UTF-8 is refused by axum, as plain text. Nothing else here is a bad request in plain text.
fn as_this_server_says(response: axum::response::Response) -> axum::response::Response {
    let kind = response.headers().get(axum::http::header::CONTENT_TYPE);
    let is_text = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/plain"));
    if response.status() == StatusCode::BAD_REQUEST && is_text {
        Refusal::new(StatusCode::BAD_REQUEST, "what the path has in percent signs is not UTF-8").into_response()
    } else {
        response
    }
}

/// Whether a request with these headers is gRPC's: its body is messages, and it wants to be refused in its way.
fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(axum::http::header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// A refusal in the way of whoever asked.
fn refuse(is_grpc: bool, status: Status) -> axum::response::Response {
    if is_grpc { status.into_http() } else { Refusal::from(status).into_response() }
}

async fn no_such_path(request: Request) -> axum::response::Response {
    let path = crate::wire::excerpt(request.uri().path());
    if is_grpc(request.headers()) {
        refuse(true, Status::unimplemented(format!("this server has no method {path}")))
    } else {
        refuse(false, Status::not_found(format!("this server has no path {path}; {}", instead_of(&path))))
    }
}

/// What there is instead of a path that is none.
fn instead_of(path: &str) -> String {
    let first = |model: &str| model.split(['/', ':']).next().unwrap_or_default().to_owned();
    if let Some(model) = path.strip_prefix("/v1/models/").map(first).filter(|model| !model.is_empty()) {
        return format!("protocol v1 is not there; POST /v2/models/{model}/infer");
    }
    let words = match path.strip_prefix("/v2/models/") {
        Some(_) => "of a model there are infer, generate, generate_stream, ready, config and stats",
        None => "the protocol's begin with /v2",
    };
    words.to_owned()
}

async fn no_such_method(request: Request) -> axum::response::Response {
    let (method, path) = (request.method().clone(), crate::wire::excerpt(request.uri().path()));
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not for {path}")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_none_is_answered_with_what_there_is() {
        assert_eq!(instead_of("/v1/models/m:predict"), "protocol v1 is not there; POST /v2/models/m/infer");
        assert!(instead_of("/v2/models/m/inference").contains("infer, generate, generate_stream, ready"));
        assert!(instead_of("/v2/models/m/versions/1/predict").contains("infer, generate"));
        for other in ["/v1/models", "/v1/models/", "/v2x", "/"] {
            assert_eq!(instead_of(other), "the protocol's begin with /v2", "{other}");
        }
    }
}

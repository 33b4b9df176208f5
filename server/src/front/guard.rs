//! What stands before every route: who asks, and whether that is not too much.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, header},
    middleware::Next,
    response::Response,
};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tonic::{Code, Status};

use super::{Peer, is_grpc, refuse};
use crate::{
    security::{Admission, AdmissionError, Pass},
    service::Service,
};

/// Probes come from the machines that run the server, and carry no tokens.
const FOR_EVERYBODY: [&str; 8] = [
    "/livez",
    "/readyz",
    "/v2/health/live",
    "/v2/health/ready",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
];

/// How the paths of inference end, whose refusals are counted as those of requests.
const INFERENCE: [&str; 5] = ["/infer", "/generate", "/generate_stream", "/ModelInfer", "/ModelStreamInfer"];

pub(super) async fn guard(
    State((admission, service)): State<(Admission, Service)>,
    request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    if FOR_EVERYBODY.contains(&path) {
        return next.run(request).await;
    }
    let is_inference = INFERENCE.iter().any(|end| path.ends_with(end));
    let (peer, is_grpc) = (request.extensions().get::<Arc<Peer>>().cloned(), is_grpc(request.headers()));
    let pass = admit(Some(&admission), request.headers(), peer.as_deref());
    if let (true, Err(status)) = (is_inference, &pass) {
        service.refused(status.code());
    }
    behind(pass, is_grpc, next.run(request)).await
}

/// Says why there is no pass; else gives `answer`, and keeps the pass until it is sent: a stream counts as long as it lasts.
pub(super) async fn behind(
    pass: Result<Option<Pass>, Status>,
    is_grpc: bool,
    answer: impl Future<Output = Response>,
) -> Response {
    match pass {
        Ok(None) => answer.await,
        Ok(Some(pass)) => answer.await.map(|body| Body::new(Held { body, _pass: pass })),
        Err(status) => {
            let code = status.code();
            let mut response = refuse(is_grpc, status);
            challenge(code, response.headers_mut());
            response
        }
    }
}

/// An answer that refuses for want of a token says what kind of one it wants.
pub(super) fn challenge(code: Code, headers: &mut HeaderMap) {
    if code == Code::Unauthenticated {
        headers.insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    }
}

/// A pass for a request with these headers, where one is needed.
pub(super) fn admit(
    admission: Option<&Admission>,
    headers: &HeaderMap,
    peer: Option<&Peer>,
) -> Result<Option<Pass>, Status> {
    let Some(admission) = admission else { return Ok(None) };
    let authorization = headers.get(header::AUTHORIZATION).map(header::HeaderValue::as_bytes);
    admission.admit(authorization, peer.map(|peer| peer.address)).map(Some).map_err(|error| {
        let message = error.to_string();
        match error {
            AdmissionError::NoToken | AdmissionError::WrongToken => Status::unauthenticated(message),
            AdmissionError::TooFast { .. } | AdmissionError::TooMany { .. } => Status::resource_exhausted(message),
        }
    })
}

/// A body that keeps a pass until it is sent or given up.
#[derive(Debug)]
struct Held {
    body: Body,
    _pass: Pass,
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

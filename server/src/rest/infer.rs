//! `POST /v2/models/MODEL[/versions/VERSION]/infer`.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, Method, request::Parts},
    response::{IntoResponse as _, Response},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use sensorium_artifact::{DType, TensorSpec};
use sensorium_proto::inference::{ModelInferRequest, model_infer_request::InferInputTensor};

use super::{
    Refusal, Rest, Target,
    body::{self, Arriving, HEADER_LENGTH},
    request,
    response::{self, Wanted},
    tensor::Growth,
};
use crate::{blocking::aside, budget::Tally, model::ModelVersion, service::Service, wire};

/// The handler by itself, for whoever spares the request its way through the router: of a dozen routes this is the one that
/// is called all the time.
#[derive(Debug)]
pub(crate) struct Infer(Rest);

impl Infer {
    pub(crate) fn new(service: Service, max_bytes: usize) -> Self {
        Self(Rest { service: Arc::new(service), max_bytes })
    }

    /// Which model a request of this kind is for; `None` is for the router.
    pub(crate) fn target(head: &Parts) -> Option<Target> {
        let path = head.uri.path().strip_prefix("/v2/models/")?.strip_suffix("/infer")?;
        let (model, version) = path.split_once("/versions/").unwrap_or((path, ""));
        let is_plain = |name: &str| !name.contains(['/', '%']);
        let is_whole = !model.is_empty() && version.is_empty() == (model.len() == path.len());
        (head.method == Method::POST && is_plain(model) && is_plain(version) && is_whole)
            .then(|| Target { model: model.to_owned(), version: version.to_owned() })
    }

    /// Answers a request for `target`.
    pub(crate) async fn answer(&self, target: Target, headers: &HeaderMap, body: Body, tally: Tally) -> Response {
        let answer = answer(&self.0, target, headers, Arriving::new(body, tally));
        answer.await.unwrap_or_else(Refusal::into_response)
    }
}

pub(super) async fn infer(
    State(rest): State<Rest>,
    Path(target): Path<Target>,
    headers: HeaderMap,
    body: Arriving,
) -> Result<Response, Refusal> {
    answer(&rest, target, &headers, body).await
}

async fn answer(rest: &Rest, target: Target, headers: &HeaderMap, body: Arriving) -> Result<Response, Refusal> {
    let call = rest.service.call(headers)?;
    // Until there is an answer.
    let _held = body.tally();
    let read = read(rest, &target, headers, body).await;
    let unread = |refusal: &Refusal| rest.service.unread(&target.model, &target.version, refusal.code());
    let (mut request, wanted) = read.inspect_err(unread)?;
    (request.model_name, request.model_version) = (target.model, target.version);
    let answer = rest.service.infer(request, &call).await?;
    let size = answer.raw_output_contents.iter().map(Bytes::len).sum();
    let written = aside(size, move || response::write(answer, &wanted)).await.map_err(Refusal::invalid)?;
    Ok(body::respond(headers, written).await)
}

/// A request that has arrived. What it takes beyond its bytes on the wire is taken with them.
async fn read(
    rest: &Rest,
    target: &Target,
    headers: &HeaderMap,
    body: Arriving,
) -> Result<(ModelInferRequest, Wanted), Refusal> {
    let growth = Growth::new(body.tally());
    let body = body::read(headers, body, rest.max_bytes).await?;
    let length = headers.get(HEADER_LENGTH).map(|value| value.to_str().unwrap_or("?").to_owned());
    let read = if length.as_deref() == Some("0") {
        // Who sends bytes alone can say nothing of the way back, and reads bytes.
        let wanted = Wanted { all: true, ..Wanted::default() };
        (raw(&*rest.service.model(&target.model, &target.version)?, body)?, wanted)
    } else {
        // Bytes behind the JSON are only pointed at.
        let text = length.as_ref().and_then(|length| length.parse().ok()).unwrap_or(body.len());
        aside(text, move || request::read(&body, length.as_deref(), growth)).await?
    };
    Ok(read)
}

/// A body that is nothing but the one input of a model, whose shape the model's configuration gives up to one size. A
/// BYTES input is one string.
fn raw(model: &ModelVersion, body: Bytes) -> Result<ModelInferRequest, Refusal> {
    let [spec] = model.inputs() else {
        let message = "a request of raw bytes needs a model with exactly one input, this one has";
        return Err(Refusal::invalid(format!("{message} {}", model.inputs().len())));
    };
    let (elements, data) = if let Some(size) = sensorium_engine::element_size(spec.dtype) {
        (body.len() / size, body)
    } else {
        debug_assert_eq!(spec.dtype, DType::Bytes, "everything else has a size");
        let mut string = BytesMut::with_capacity(body.len() + 4);
        string.put_u32_le(body.len() as u32); // bodies of 4 GiB are not accepted
        string.extend_from_slice(&body);
        (1, string.freeze())
    };
    let (shape, open) = one_row(model, spec, elements);
    if open > 1 {
        let message = "a request of raw bytes needs a model whose input has at most one variable size";
        return Err(Refusal::invalid(message));
    }
    let input = InferInputTensor {
        name: spec.name.clone(),
        datatype: wire::datatype_name(spec.dtype).to_owned(),
        shape,
        ..InferInputTensor::default()
    };
    Ok(ModelInferRequest { inputs: vec![input], raw_input_contents: vec![data], ..ModelInferRequest::default() })
}

/// The shape of so many elements of an input as one row, and how many sizes the model leaves open: the last of them is what the fixed
/// ones leave, the others are 1.
pub(super) fn one_row(model: &ModelVersion, spec: &TensorSpec, elements: usize) -> (Vec<i64>, usize) {
    let mut shape: Vec<i64> = spec.shape.iter().map(|size| size.map_or(-1, |size| size as i64)).collect();
    if model.config().max_batch_size > 0
        && let Some(rows) = shape.first_mut()
    {
        *rows = 1;
    }
    let known = shape.iter().filter(|size| **size > 0).fold(1_i64, |product, size| product.saturating_mul(*size));
    let open = shape.iter().filter(|size| **size < 0).count();
    for (index, size) in shape.iter_mut().filter(|size| **size < 0).enumerate() {
        *size = if index + 1 == open { elements as i64 / known } else { 1 };
    }
    (shape, open)
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    #[test]
    fn only_what_is_certainly_an_inference_is_spared_the_router() {
        let target = |method: Method, path: &str| {
            let (head, ()) = Request::builder().method(method).uri(path).body(()).unwrap().into_parts();
            Infer::target(&head).map(|target| (target.model, target.version))
        };
        let found = |model: &str, version: &str| Some((model.to_owned(), version.to_owned()));
        assert_eq!(target(Method::POST, "/v2/models/m/infer"), found("m", ""));
        assert_eq!(target(Method::POST, "/v2/models/m/infer?x=1"), found("m", ""));
        assert_eq!(target(Method::POST, "/v2/models/m/versions/3/infer"), found("m", "3"));
        for path in [
            "/v2/models//infer",
            "/v2/models/m/versions//infer",
            "/v2/models//versions/3/infer",
            "/v2/models/m/versions/3/4/infer",
            "/v2/models/m/x/infer",
            "/v2/models/m%20n/infer",
            "/v2/models/m/infer/",
            "/v2/models/m/generate",
            "/v2/models/infer",
            "/infer",
        ] {
            assert_eq!(target(Method::POST, path), None, "{path}");
        }
        assert_eq!(target(Method::GET, "/v2/models/m/infer"), None);
    }
}

//! `POST /v2/models/MODEL[/versions/VERSION]/generate[_stream]`: inputs and outputs as plain fields of JSON, one row at a
//! time; the answer as one object, or as server-sent events.

use std::{convert::Infallible, sync::Arc};

use axum::{
    extract::{Path, State},
    http::{HeaderMap, header::CONTENT_TYPE},
    response::{
        IntoResponse, Response,
        sse::{Event, Sse},
    },
};
use bytes::Bytes;
use sensorium_proto::inference::{ModelInferRequest, ModelInferResponse, model_infer_request::InferInputTensor};
use serde_json::{Value, json};
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use super::{
    Refusal, Rest, Target,
    body::{self, Arriving},
    infer::one_row,
    json::Reader,
    request::Parameters,
    response,
    tensor::{self, Growth, ReadError},
};
use crate::{
    blocking::{aside, in_place},
    model::ModelVersion,
    service::mark,
};

pub(super) async fn generate(
    State(rest): State<Rest>,
    Path(target): Path<Target>,
    headers: HeaderMap,
    body: Arriving,
) -> Result<Response, Refusal> {
    let call = rest.service.call(&headers)?;
    // Until there is an answer.
    let held = body.tally();
    let (_, request) = read(&rest, target, &headers, body).await?;
    let answer = rest.service.infer(request, &call).await?;
    let size = answer.raw_output_contents.iter().map(Bytes::len).sum();
    drop(held);
    let text = aside(size, move || answer_object(answer)).await?;
    Ok(([(CONTENT_TYPE, "application/json")], text).into_response())
}

/// An event for each response; of a decoupled model each says whether it is the last. An error before the first event is a
/// plain refusal, and one after it is an event.
pub(super) async fn generate_stream(
    State(rest): State<Rest>,
    Path(target): Path<Target>,
    headers: HeaderMap,
    body: Arriving,
) -> Result<Response, Refusal> {
    let call = rest.service.call(&headers)?;
    let held = body.tally();
    let (model, request) = read(&rest, target, &headers, body).await?;
    if !model.iterates() {
        let is_decoupled = model.is_decoupled();
        let mut answer = rest.service.infer_one(model, request, &call).await?;
        if is_decoupled {
            mark(&mut answer, true);
        }
        return Ok(events(tokio_stream::once(Ok(answer))));
    }
    let mut answers = rest.service.infer_many(model, request, call);
    let first = answers.next().await.ok_or_else(|| Status::internal("the request ended without an answer"))??;
    let all = tokio_stream::once(Ok(first)).chain(answers);
    // The request's tensors are there until its last step.
    Ok(events(all.map(move |answer| {
        let _held = &held;
        answer
    })))
}

fn events(answers: impl Stream<Item = Result<ModelInferResponse, Status>> + Send + 'static) -> Response {
    let event = |answer: Result<ModelInferResponse, Status>| {
        let size = answer.iter().flat_map(|answer| &answer.raw_output_contents).map(Bytes::len).sum();
        let text = match answer.map_err(Refusal::from).and_then(|answer| in_place(size, || answer_object(answer))) {
            Ok(answer) => answer,
            Err(refusal) => json!({ "error": refusal.message() }).to_string(),
        };
        Ok::<_, Infallible>(Event::default().data(text))
    };
    Sse::new(answers.map(event)).into_response()
}

/// The model that is asked, and what. What that takes beyond its bytes on the wire is taken with them.
type Asked = (Arc<ModelVersion>, ModelInferRequest);

async fn read(rest: &Rest, target: Target, headers: &HeaderMap, body: Arriving) -> Result<Asked, Refusal> {
    let read = try_read(rest, &target, headers, body).await;
    let unread = |refusal: &Refusal| rest.service.unread(&target.model, &target.version, refusal.code());
    let (model, mut request) = read.inspect_err(unread)?;
    (request.model_name, request.model_version) = (target.model, target.version);
    Ok((model, request))
}

async fn try_read(rest: &Rest, target: &Target, headers: &HeaderMap, body: Arriving) -> Result<Asked, Refusal> {
    let growth = Growth::new(body.tally());
    let body = body::read(headers, body, rest.max_bytes).await?;
    let model = rest.service.model(&target.model, &target.version)?;
    let own = model.clone();
    let request = aside(body.len(), move || fields(&own, &body, growth)).await?;
    Ok((model, request))
}

/// Fields that are named like inputs are those, wherever they are, `id` is itself, and the rest are parameters.
fn fields(model: &ModelVersion, body: &[u8], mut growth: Growth) -> Result<ModelInferRequest, ReadError> {
    let mut request = ModelInferRequest::default();
    let mut parameters = Parameters::default();
    let mut reader = Reader::new(body);
    reader.object(|reader, key| match key {
        _ if input(model, reader, key, &mut request, &mut growth)? => Ok(()),
        "id" => {
            request.id = reader.string()?.into_owned();
            Ok(())
        }
        "parameters" => reader.object(|reader, key| {
            if !input(model, reader, key, &mut request, &mut growth)? {
                parameters.read(reader, key, &mut request.parameters)?;
            }
            Ok::<_, ReadError>(())
        }),
        _ => Ok(parameters.read(reader, key, &mut request.parameters)?),
    })?;
    reader.end()?;
    Ok(request)
}

/// Reads the field `key` if the model has an input of that name; whether it has.
fn input(
    model: &ModelVersion,
    reader: &mut Reader<'_>,
    key: &str,
    request: &mut ModelInferRequest,
    growth: &mut Growth,
) -> Result<bool, ReadError> {
    let Some(spec) = model.inputs().iter().find(|spec| spec.name == key) else { return Ok(false) };
    if request.inputs.iter().any(|input| input.name == key) {
        return Err(reader.error("this input comes twice").into());
    }
    let (data, elements) = tensor::read_row(reader, spec.dtype, growth)?;
    if spec.shape.is_empty() && elements != 1 {
        return Err(reader.error("this input is a single element").into());
    }
    let (mut shape, open) = one_row(model, spec, elements);
    // Where nothing else takes more elements than one row has, they are more rows.
    if let ([rows, row @ ..], 0, true) = (&mut shape[..], open, model.config().max_batch_size > 0) {
        let row = row.iter().product::<i64>();
        if row > 0 && elements > 0 && elements as i64 % row == 0 {
            *rows = elements as i64 / row;
        }
    }
    request.inputs.push(InferInputTensor {
        name: key.to_owned(),
        datatype: crate::wire::datatype_name(spec.dtype).to_owned(),
        shape,
        ..InferInputTensor::default()
    });
    request.raw_input_contents.push(data);
    Ok(true)
}

/// The outputs as fields of one object: an element alone, or a flat array. Floats may be `NaN`, `Infinity` and `-Infinity`, which JSON
/// lacks and Triton's clients read.
fn answer_object(answer: ModelInferResponse) -> Result<String, Refusal> {
    let mut text = Vec::with_capacity(256);
    let mut field = |name: &str, value: &[u8]| {
        text.push(if text.is_empty() { b'{' } else { b',' });
        text.extend_from_slice(Value::from(name).to_string().as_bytes());
        text.push(b':');
        text.extend_from_slice(value);
    };
    if !answer.id.is_empty() {
        field("id", Value::from(answer.id).to_string().as_bytes());
    }
    field("model_name", Value::from(answer.model_name).to_string().as_bytes());
    field("model_version", Value::from(answer.model_version).to_string().as_bytes());
    for (name, parameter) in response::parameters(answer.parameters).as_object().into_iter().flatten() {
        field(name, parameter.to_string().as_bytes());
    }
    for (output, raw) in answer.outputs.iter().zip(&answer.raw_output_contents) {
        let mut elements = Vec::new();
        let dtype = tensor::dtype(&output.datatype).ok_or("its datatype is unknown");
        let written = dtype.and_then(|dtype| tensor::write(&mut elements, dtype, raw));
        written.map_err(|reason| Refusal::invalid(format!("output {:?} cannot be sent: {reason}", output.name)))?;
        let is_one = output.shape.iter().product::<i64>() == 1;
        field(&output.name, if is_one { &elements[1..elements.len() - 1] } else { &elements });
    }
    text.push(b'}');
    String::from_utf8(text).map_err(|error| Refusal::invalid(error.to_string()))
}

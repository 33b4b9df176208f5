//! Everything of the protocol that is not inference: JSON in, the service's message, JSON out.

use std::collections::HashMap;

use axum::{
    Json,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use sensorium_proto::{
    inference::{
        LogSettingsRequest, ModelConfigRequest, ModelMetadataRequest, ModelReadyRequest, ModelRepositoryParameter,
        ModelStatisticsRequest, RepositoryIndexRequest, RepositoryModelLoadRequest, RepositoryModelUnloadRequest,
        SystemSharedMemoryRegisterRequest, SystemSharedMemoryStatusRequest, SystemSharedMemoryUnregisterRequest,
        TraceSettingRequest, log_settings_request, log_settings_response, model_repository_parameter,
        trace_setting_request,
    },
    to_json,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    Refusal, Rest, Target,
    body::{self, Arriving},
    json::{Reader, Scalar},
    request::MAX_PARAMETERS,
};
use crate::blocking::aside;

/// Bytes of a body of settings at most.
const SMALL: usize = 1 << 20;

type Answer = Result<Json<Value>, Refusal>;

pub(super) async fn alive() -> &'static str {
    "alive\n"
}

pub(super) async fn ready(State(rest): State<Rest>) -> Response {
    if rest.service.is_ready() { "ready\n".into_response() } else { (unready(), "not ready\n").into_response() }
}

pub(super) async fn server_live() -> Json<Value> {
    Json(json!({ "live": true }))
}

pub(super) async fn server_ready(State(rest): State<Rest>) -> Response {
    let ready = rest.service.is_ready();
    (if ready { StatusCode::OK } else { unready() }, Json(json!({ "ready": ready }))).into_response()
}

pub(super) async fn model_ready(State(rest): State<Rest>, Path(target): Path<Target>) -> Response {
    let Target { model, version } = target;
    let ready = rest.service.model_ready(&ModelReadyRequest { name: model.clone(), version });
    (if ready { StatusCode::OK } else { unready() }, Json(json!({ "name": model, "ready": ready }))).into_response()
}

/// What waits for readiness looks at this code alone.
fn unready() -> StatusCode {
    StatusCode::SERVICE_UNAVAILABLE
}

pub(super) async fn server_metadata(State(rest): State<Rest>) -> Json<Value> {
    Json(to_json(&rest.service.server_metadata()))
}

pub(super) async fn model_metadata(State(rest): State<Rest>, Path(target): Path<Target>) -> Answer {
    let request = ModelMetadataRequest { name: target.model, version: target.version };
    Ok(Json(to_json(&rest.service.model_metadata(request)?)))
}

pub(super) async fn model_config(State(rest): State<Rest>, Path(target): Path<Target>) -> Answer {
    let request = ModelConfigRequest { name: target.model, version: target.version };
    let mut response = to_json(&rest.service.model_config(&request)?);
    // Over HTTP the configuration comes without a frame.
    Ok(Json(response["config"].take()))
}

/// Of one model, or of all.
pub(super) async fn statistics(State(rest): State<Rest>, target: Option<Path<Target>>) -> Answer {
    let target = target.map(|Path(target)| target).unwrap_or_default();
    let request = ModelStatisticsRequest { name: target.model, version: target.version };
    Ok(Json(to_json(&rest.service.model_statistics(&request)?)))
}

#[derive(Default, Deserialize)]
struct Index {
    #[serde(default)]
    ready: bool,
}

pub(super) async fn repository_index(State(rest): State<Rest>, headers: HeaderMap, body: Arriving) -> Answer {
    let Index { ready } = body::read_json(&headers, body, SMALL).await?;
    let request = RepositoryIndexRequest { repository_name: String::new(), ready };
    let mut response = to_json(&rest.service.repository_index(&request).await?);
    Ok(Json(response["models"].take()))
}

/// The parameters of a load or unload as gRPC sends them: text, truth, and files as bytes, which JSON carries in base64. Models
/// come in them, so no tree is made of the text.
fn change(body: &[u8]) -> Result<HashMap<String, ModelRepositoryParameter>, Refusal> {
    use model_repository_parameter::ParameterChoice;
    let mut parameters = HashMap::new();
    if body.trim_ascii().is_empty() {
        return Ok(parameters);
    }
    let mut parameter = |reader: &mut Reader<'_>, name: &str| {
        if parameters.len() == MAX_PARAMETERS {
            return Err(Refusal::invalid(format!("there are more than {MAX_PARAMETERS} parameters")));
        }
        let neither = || Refusal::invalid(format!("parameter {name:?} is neither text nor bool nor integer"));
        let choice = match reader.peek() {
            // A configuration may come as what it is.
            b'{' => ParameterChoice::StringParam(String::from_utf8_lossy(reader.raw()?).into_owned()),
            b'[' => return Err(neither()),
            _ => match reader.scalar()? {
                Scalar::Bool(value) => ParameterChoice::BoolParam(value),
                Scalar::Number(value) => ParameterChoice::Int64Param(value.parse().map_err(|_| neither())?),
                Scalar::Text(text) if name.starts_with("file:") => {
                    // In lines, as Triton's own client and `base64` write it.
                    let is_in_lines = text.bytes().any(|byte| byte.is_ascii_whitespace());
                    let text = if is_in_lines { text.split_ascii_whitespace().collect() } else { text };
                    let bytes = BASE64.decode(text.as_bytes()).map_err(|error| {
                        Refusal::invalid(format!("parameter {name:?} is no base64, as files must be: {error}"))
                    })?;
                    ParameterChoice::BytesParam(bytes.into())
                }
                Scalar::Text(text) => ParameterChoice::StringParam(text.into_owned()),
                Scalar::Null => return Err(neither()),
            },
        };
        parameters.insert(name.to_owned(), ModelRepositoryParameter { parameter_choice: Some(choice) });
        Ok(())
    };
    let mut reader = Reader::new(body);
    reader.object(|reader, key| match key {
        "parameters" => reader.object(&mut parameter),
        _ => Ok(reader.skip().map(drop)?),
    })?;
    reader.end()?;
    Ok(parameters)
}

pub(super) async fn load(
    State(rest): State<Rest>,
    Path(target): Path<Target>,
    headers: HeaderMap,
    body: Arriving,
) -> Answer {
    // Before anybody reads what may be a model.
    rest.service.models_may_change()?;
    let body = body::read_settings(&headers, body, rest.max_bytes).await?;
    let parameters = aside(body.len(), move || change(&body)).await?;
    let request =
        RepositoryModelLoadRequest { model_name: target.model, parameters, ..RepositoryModelLoadRequest::default() };
    Ok(Json(to_json(&rest.service.repository_model_load(request).await?)))
}

pub(super) async fn unload(
    State(rest): State<Rest>,
    Path(target): Path<Target>,
    headers: HeaderMap,
    body: Arriving,
) -> Answer {
    let parameters = change(&body::read_settings(&headers, body, SMALL).await?)?;
    let request = RepositoryModelUnloadRequest {
        model_name: target.model,
        parameters,
        ..RepositoryModelUnloadRequest::default()
    };
    Ok(Json(to_json(&rest.service.repository_model_unload(request).await?)))
}

#[derive(Default, Deserialize)]
struct Registration {
    key: String,
    #[serde(default)]
    offset: u64,
    byte_size: u64,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct RegionTarget {
    #[serde(default)]
    region: String,
}

pub(super) async fn register_memory(
    State(rest): State<Rest>,
    Path(target): Path<RegionTarget>,
    headers: HeaderMap,
    body: Arriving,
) -> Answer {
    let Registration { key, offset, byte_size } = body::read_json(&headers, body, SMALL).await?;
    let request = SystemSharedMemoryRegisterRequest { name: target.region, key, offset, byte_size };
    rest.service.register_memory(request)?;
    Ok(Json(json!({})))
}

pub(super) async fn unregister_memory(State(rest): State<Rest>, target: Option<Path<RegionTarget>>) -> Json<Value> {
    let name = target.map(|Path(target)| target.region).unwrap_or_default();
    rest.service.unregister_memory(&SystemSharedMemoryUnregisterRequest { name });
    Json(json!({}))
}

pub(super) async fn memory_status(State(rest): State<Rest>, target: Option<Path<RegionTarget>>) -> Answer {
    let name = target.map(|Path(target)| target.region).unwrap_or_default();
    let status = rest.service.memory_status(&SystemSharedMemoryStatusRequest { name })?;
    let mut regions: Vec<_> = status.regions.into_values().collect();
    regions.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(Json(regions.iter().map(to_json).collect()))
}

pub(super) async fn register_cuda_memory() -> Refusal {
    Refusal::new(StatusCode::NOT_IMPLEMENTED, crate::service::NO_CUDA_MEMORY)
}

pub(super) async fn no_memory() -> Json<Value> {
    Json(json!([]))
}

pub(super) async fn nothing() -> Json<Value> {
    Json(json!({}))
}

pub(super) async fn log_settings(State(rest): State<Rest>, headers: HeaderMap, body: Arriving) -> Answer {
    use log_settings_request::{SettingValue, setting_value::ParameterChoice as Asked};
    use log_settings_response::setting_value::ParameterChoice as Said;
    let asked: Map<String, Value> = body::read_json(&headers, body, SMALL).await?;
    let setting = |(name, value): (String, Value)| {
        let choice = match value {
            Value::Bool(value) => Some(Asked::BoolParam(value)),
            Value::Number(value) => value.as_u64().and_then(|value| value.try_into().ok()).map(Asked::Uint32Param),
            Value::String(value) => Some(Asked::StringParam(value)),
            _ => None,
        };
        (name, SettingValue { parameter_choice: choice })
    };
    // As with Triton, a setting that is null is left as it is.
    let settings = asked.into_iter().filter(|(_, value)| !value.is_null()).map(setting).collect();
    let said = rest.service.log_settings(LogSettingsRequest { settings })?.settings;
    let value = |(name, value): (String, log_settings_response::SettingValue)| {
        let value = match value.parameter_choice? {
            Said::BoolParam(value) => value.into(),
            Said::Uint32Param(value) => value.into(),
            Said::StringParam(value) => value.into(),
        };
        Some((name, value))
    };
    Ok(Json(Value::Object(said.into_iter().filter_map(value).collect())))
}

pub(super) async fn trace_setting(
    State(rest): State<Rest>,
    target: Option<Path<Target>>,
    headers: HeaderMap,
    body: Arriving,
) -> Answer {
    /// The one setting that is a list.
    const LEVEL: &str = "trace_level";
    let asked: Map<String, Value> = body::read_json(&headers, body, SMALL).await?;
    let text = |value: Value| match value {
        Value::String(text) => text,
        value => value.to_string(),
    };
    let setting = |(name, value)| {
        let value = match value {
            Value::Null => Vec::new(),
            Value::Array(values) => values.into_iter().map(text).collect(),
            value => vec![text(value)],
        };
        (name, trace_setting_request::SettingValue { value })
    };
    let settings = asked.into_iter().map(setting).collect();
    let model_name = target.map(|Path(target)| target.model).unwrap_or_default();
    let said = rest.service.trace_setting(TraceSettingRequest { settings, model_name })?.settings;
    let value = |(name, setting): (String, sensorium_proto::inference::trace_setting_response::SettingValue)| {
        let value = if name == LEVEL { json!(setting.value) } else { json!(setting.value.first()) };
        (name, value)
    };
    Ok(Json(Value::Object(said.into_iter().map(value).collect())))
}

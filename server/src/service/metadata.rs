//! What there is: the server, its models, their configurations and what they have done.

use sensorium_artifact::TensorSpec;
use sensorium_proto::inference::{
    ModelConfigRequest, ModelConfigResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest,
    ModelStatisticsRequest, ModelStatisticsResponse, ServerMetadataResponse, model_metadata_response::TensorMetadata,
};
use tonic::Status;

use super::Service;
use crate::{metrics::Counted, model::ARTIFACT_DIGEST, wire};

/// What `ServerMetadata` calls this server.
const SERVER_NAME: &str = "sensorium";
/// Extensions that are always served. Clients act on this list, so nothing is in it that does not
/// work.
const EXTENSIONS: [&str; 11] = [
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "logging",
    "generate",
];

impl Service {
    /// Whether a model is ready. One that is not here is not ready: clients poll this while it is being brought up.
    pub(crate) fn model_ready(&self, request: &ModelReadyRequest) -> bool {
        self.repository.get().is_some_and(|repository| repository.ready(&request.name, &request.version))
    }

    pub(crate) fn server_metadata(&self) -> ServerMetadataResponse {
        let mut extensions: Vec<_> = EXTENSIONS.map(str::to_owned).to_vec();
        if self.memory.is_allowed() {
            extensions.push("system_shared_memory".to_owned());
        }
        if self.traces.is_exported() {
            extensions.push("trace".to_owned());
        }
        ServerMetadataResponse {
            name: SERVER_NAME.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions,
        }
    }

    pub(crate) fn model_metadata(&self, request: ModelMetadataRequest) -> Result<ModelMetadataResponse, Status> {
        let ModelMetadataRequest { name, version } = request;
        let repository = self.repository()?;
        let model = repository.model(&name, &version).map_err(|error| error.into_status(&name))?;
        Ok(ModelMetadataResponse {
            versions: if version.is_empty() { repository.versions(&name) } else { vec![model.version().to_owned()] },
            platform: model.platform().to_owned(),
            inputs: model.inputs().iter().map(tensor).collect(),
            outputs: model.outputs().iter().map(tensor).collect(),
            name,
            properties: model
                .artifact()
                .map(|digest| (ARTIFACT_DIGEST.to_owned(), digest.to_owned()))
                .into_iter()
                .collect(),
        })
    }

    pub(crate) fn model_config(&self, request: &ModelConfigRequest) -> Result<ModelConfigResponse, Status> {
        let model = self.repository()?.model(&request.name, &request.version);
        let model = model.map_err(|error| error.into_status(&request.name))?;
        Ok(ModelConfigResponse { config: Some(model.config().clone()) })
    }

    /// What is counted beside the metrics.
    pub(crate) fn scraped(&self) -> Counted {
        let counted = self.repository.get().map(crate::repository::Registry::counted).unwrap_or_default();
        Counted { dropped_lines: self.logs.dropped_lines(), ..counted }
    }

    pub(crate) fn model_statistics(&self, request: &ModelStatisticsRequest) -> Result<ModelStatisticsResponse, Status> {
        let statistics = self.repository()?.statistics(&request.name, &request.version);
        let model_stats = statistics.map_err(|error| error.into_status(&request.name))?;
        Ok(ModelStatisticsResponse { model_stats })
    }
}

fn tensor(spec: &TensorSpec) -> TensorMetadata {
    // A fixed size beyond 2^63 does not exist.
    let shape = spec.shape.iter().map(|size| size.map_or(-1, |size| size as i64)).collect();
    TensorMetadata { name: spec.name.clone(), datatype: wire::datatype_name(spec.dtype).to_owned(), shape }
}

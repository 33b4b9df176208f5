//! The Open Inference Protocol: its six core calls.

use sensorium_artifact::TensorSpec;
use sensorium_proto::inference::{
    CudaSharedMemoryRegisterRequest, CudaSharedMemoryRegisterResponse, CudaSharedMemoryStatusRequest,
    CudaSharedMemoryStatusResponse, CudaSharedMemoryUnregisterRequest, CudaSharedMemoryUnregisterResponse,
    LogSettingsRequest, LogSettingsResponse, ModelConfigRequest, ModelConfigResponse, ModelInferRequest,
    ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse,
    ModelStatisticsRequest, ModelStatisticsResponse, ModelStreamInferResponse, RepositoryIndexRequest,
    RepositoryIndexResponse, RepositoryModelLoadRequest, RepositoryModelLoadResponse, RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest,
    ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse, SystemSharedMemoryRegisterRequest,
    SystemSharedMemoryRegisterResponse, SystemSharedMemoryStatusRequest, SystemSharedMemoryStatusResponse,
    SystemSharedMemoryUnregisterRequest, SystemSharedMemoryUnregisterResponse, TraceSettingRequest,
    TraceSettingResponse, grpc_inference_service_server::GrpcInferenceService, model_metadata_response::TensorMetadata,
};
use tonic::{Request, Response, Status, Streaming, async_trait};
use tracing::Instrument as _;

use super::{Service, unsupported::unsupported};
use crate::{error::InferError, metrics::VERSION, wire};

/// What `ServerMetadata` calls this server.
const SERVER_NAME: &str = "sensorium";
/// Extensions beyond the core that are served. Clients act on this list, so nothing is in it that does not work.
const EXTENSIONS: [&str; 0] = [];

#[async_trait]
impl GrpcInferenceService for Service {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: *self.ready.borrow() }))
    }

    /// A model that is not here is not ready: clients poll this while a model is being brought up.
    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let ready = *self.ready.borrow() && self.repository.model(&name, &version).is_ok();
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: SERVER_NAME.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: EXTENSIONS.map(str::to_owned).to_vec(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let model = self.repository.model(&name, &version).map_err(|error| error.into_status(&name))?;
        Ok(Response::new(ModelMetadataResponse {
            versions: vec![VERSION.to_owned()],
            platform: model.platform.to_owned(),
            inputs: model.inputs.iter().map(metadata).collect(),
            outputs: model.outputs.iter().map(metadata).collect(),
            name,
            ..ModelMetadataResponse::default()
        }))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let request = request.into_inner();
        let name = request.model_name.clone();
        let model = self.repository.model(&name, &request.model_version);
        let span = tracing::info_span!("infer", model = wire::excerpt(&name), id = wire::excerpt(&request.id));
        let is_served = model.is_ok();
        let answer = async {
            let id = request.id.clone();
            let model = model?;
            let work = wire::decode(request, &model.inputs, &model.outputs, model.max_rows)?;
            let outputs = model.infer(work).await?;
            Ok(wire::encode(name.clone(), VERSION.to_owned(), id, outputs))
        };
        let answer = async { answer.await.map_err(|error: InferError| error.into_status(&name)) };
        self.observed(&name, is_served, answer).instrument(span).await
    }

    type ModelStreamInferStream = tokio_stream::Empty<Result<ModelStreamInferResponse, Status>>;

    unsupported! {
        model_stream_infer(Streaming<ModelInferRequest>) -> Self::ModelStreamInferStream, "call ModelInfer for each request";
        model_config(ModelConfigRequest) -> ModelConfigResponse, "ModelMetadata has the inputs and outputs";
        model_statistics(ModelStatisticsRequest) -> ModelStatisticsResponse, "GET /metrics on the metrics port has them";
        repository_index(RepositoryIndexRequest) -> RepositoryIndexResponse, "models are given when the server starts";
        repository_model_load(RepositoryModelLoadRequest) -> RepositoryModelLoadResponse, "models are given when the server starts";
        repository_model_unload(RepositoryModelUnloadRequest) -> RepositoryModelUnloadResponse, "models stay until the server ends";
        system_shared_memory_status(SystemSharedMemoryStatusRequest) -> SystemSharedMemoryStatusResponse, "send tensors in the message";
        system_shared_memory_register(SystemSharedMemoryRegisterRequest) -> SystemSharedMemoryRegisterResponse, "send tensors in the message";
        system_shared_memory_unregister(SystemSharedMemoryUnregisterRequest) -> SystemSharedMemoryUnregisterResponse, "send tensors in the message";
        cuda_shared_memory_status(CudaSharedMemoryStatusRequest) -> CudaSharedMemoryStatusResponse, "send tensors in the message";
        cuda_shared_memory_register(CudaSharedMemoryRegisterRequest) -> CudaSharedMemoryRegisterResponse, "send tensors in the message";
        cuda_shared_memory_unregister(CudaSharedMemoryUnregisterRequest) -> CudaSharedMemoryUnregisterResponse, "send tensors in the message";
        trace_setting(TraceSettingRequest) -> TraceSettingResponse, "set SENSORIUM_LOG when the server starts";
        log_settings(LogSettingsRequest) -> LogSettingsResponse, "set SENSORIUM_LOG when the server starts";
    }
}

fn metadata(spec: &TensorSpec) -> TensorMetadata {
    // A fixed dimension beyond 2^63 does not exist.
    let shape = spec.shape.iter().map(|dim| dim.map_or(-1, |dim| dim as i64)).collect();
    TensorMetadata { name: spec.name.clone(), datatype: wire::datatype_name(spec.dtype).to_owned(), shape }
}

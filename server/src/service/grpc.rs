//! The Open Inference Protocol over gRPC: each method of the service is one operation of [`Service`].

use std::pin::Pin;

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
    TraceSettingResponse, grpc_inference_service_server::GrpcInferenceService,
};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{Call, Service};
use crate::budget::Tally;

/// What registering CUDA memory is answered with, over gRPC and REST.
pub(crate) const NO_CUDA_MEMORY: &str =
    "this server does not read CUDA shared memory; send tensors in messages, or through system shared memory";

/// Metadata of a stream, `true` where an error is to end it with its status, as those of other gRPC services do.
const GRPC_ERROR: &str = "triton_grpc_error";

type Answer<T> = Result<Response<T>, Status>;

#[async_trait]
impl GrpcInferenceService for Service {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Answer<ServerLiveResponse> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Answer<ServerReadyResponse> {
        Ok(Response::new(ServerReadyResponse { ready: self.is_ready() }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Answer<ModelReadyResponse> {
        Ok(Response::new(ModelReadyResponse { ready: Self::model_ready(self, request.get_ref()) }))
    }

    async fn server_metadata(&self, _: Request<ServerMetadataRequest>) -> Answer<ServerMetadataResponse> {
        Ok(Response::new(Self::server_metadata(self)))
    }

    async fn model_metadata(&self, request: Request<ModelMetadataRequest>) -> Answer<ModelMetadataResponse> {
        Self::model_metadata(self, request.into_inner()).map(Response::new)
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Answer<ModelInferResponse> {
        let call = Call::new(request.metadata().as_ref());
        let request = request.into_inner();
        let _grown = self.claim_growth(&request).inspect_err(|status| self.refused(status.code()))?;
        self.infer(request, &call).await.map(Response::new)
    }

    type ModelStreamInferStream = Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Answer<Self::ModelStreamInferStream> {
        let call = Call::new(request.metadata().as_ref());
        let tally = request.extensions().get::<Tally>().cloned();
        let ends_on_error = request.metadata().get(GRPC_ERROR).is_some_and(|wanted| wanted == "true");
        Ok(Response::new(Box::pin(self.clone().infer_stream(request.into_inner(), call, tally, ends_on_error))))
    }

    async fn model_config(&self, request: Request<ModelConfigRequest>) -> Answer<ModelConfigResponse> {
        Self::model_config(self, request.get_ref()).map(Response::new)
    }

    async fn model_statistics(&self, request: Request<ModelStatisticsRequest>) -> Answer<ModelStatisticsResponse> {
        Self::model_statistics(self, request.get_ref()).map(Response::new)
    }

    async fn repository_index(&self, request: Request<RepositoryIndexRequest>) -> Answer<RepositoryIndexResponse> {
        Self::repository_index(self, request.get_ref()).await.map(Response::new)
    }

    async fn repository_model_load(
        &self,
        request: Request<RepositoryModelLoadRequest>,
    ) -> Answer<RepositoryModelLoadResponse> {
        Self::repository_model_load(self, request.into_inner()).await.map(Response::new)
    }

    async fn repository_model_unload(
        &self,
        request: Request<RepositoryModelUnloadRequest>,
    ) -> Answer<RepositoryModelUnloadResponse> {
        Self::repository_model_unload(self, request.into_inner()).await.map(Response::new)
    }

    async fn system_shared_memory_status(
        &self,
        request: Request<SystemSharedMemoryStatusRequest>,
    ) -> Answer<SystemSharedMemoryStatusResponse> {
        self.memory_status(request.get_ref()).map(Response::new)
    }

    async fn system_shared_memory_register(
        &self,
        request: Request<SystemSharedMemoryRegisterRequest>,
    ) -> Answer<SystemSharedMemoryRegisterResponse> {
        self.register_memory(request.into_inner())?;
        Ok(Response::new(SystemSharedMemoryRegisterResponse {}))
    }

    async fn system_shared_memory_unregister(
        &self,
        request: Request<SystemSharedMemoryUnregisterRequest>,
    ) -> Answer<SystemSharedMemoryUnregisterResponse> {
        self.unregister_memory(request.get_ref());
        Ok(Response::new(SystemSharedMemoryUnregisterResponse {}))
    }

    /// There are no regions, which is also what clients want to hear that clear them before they begin.
    async fn cuda_shared_memory_status(
        &self,
        _: Request<CudaSharedMemoryStatusRequest>,
    ) -> Answer<CudaSharedMemoryStatusResponse> {
        Ok(Response::new(CudaSharedMemoryStatusResponse::default()))
    }

    async fn cuda_shared_memory_register(
        &self,
        _: Request<CudaSharedMemoryRegisterRequest>,
    ) -> Answer<CudaSharedMemoryRegisterResponse> {
        Err(Status::unimplemented(NO_CUDA_MEMORY))
    }

    async fn cuda_shared_memory_unregister(
        &self,
        _: Request<CudaSharedMemoryUnregisterRequest>,
    ) -> Answer<CudaSharedMemoryUnregisterResponse> {
        Ok(Response::new(CudaSharedMemoryUnregisterResponse {}))
    }

    async fn trace_setting(&self, request: Request<TraceSettingRequest>) -> Answer<TraceSettingResponse> {
        Self::trace_setting(self, request.into_inner()).map(Response::new)
    }

    async fn log_settings(&self, request: Request<LogSettingsRequest>) -> Answer<LogSettingsResponse> {
        Self::log_settings(self, request.into_inner()).map(Response::new)
    }
}

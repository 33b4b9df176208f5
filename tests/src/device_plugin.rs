//! A device plugin that offers GPUs which do not exist, through the kubelet's real interface: what asks for them is
//! scheduled, counted and started as if they did.

use std::path::Path;

use anyhow::{Context, Result};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use api::device_plugin_server::{DevicePlugin, DevicePluginServer};
use api::registration_client::RegistrationClient;

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the documentation is in the .proto file"
)]
mod api {
    tonic::include_proto!("v1beta1");
}

/// The version of the interface, as a kubelet wants to hear it.
const VERSION: &str = "v1beta1";

/// GPUs on offer, until this is dropped.
pub struct FakeGpus {
    _runtime: Runtime,
}

impl FakeGpus {
    /// Offers `devices` under the name `resource`, such as `nvidia.com/gpu`, to the kubelet whose socket is in `folder`.
    ///
    /// A container that gets some finds their names in `NVIDIA_VISIBLE_DEVICES`, parted by commas, as NVIDIA's plugin
    /// has it.
    ///
    /// # Errors
    /// When there is no kubelet, or it refuses.
    pub fn offer(folder: &Path, resource: &str, devices: &[&str]) -> Result<Self> {
        let runtime = Runtime::new()?;
        let endpoint = format!("{}.sock", resource.replace('/', "_"));
        let plugin = Plugin(devices.iter().map(|&device| device.to_owned()).collect());
        runtime.block_on(async {
            let listener = UnixListener::bind(folder.join(&endpoint)).context("the plugin's socket")?;
            let connections = stream::unfold(listener, async |listener| {
                let connection = listener.accept().await.map(|(connection, _)| connection);
                Some((connection, listener))
            });
            let server = Server::builder().add_service(DevicePluginServer::new(plugin));
            tokio::spawn(server.serve_with_incoming(connections));
            let kubelet = format!("unix://{}", folder.join("kubelet.sock").display());
            let request =
                api::RegisterRequest { version: VERSION.to_owned(), endpoint, resource_name: resource.to_owned() };
            RegistrationClient::connect(kubelet).await.context("the kubelet's socket")?.register(request).await?;
            anyhow::Ok(())
        })?;
        Ok(Self { _runtime: runtime })
    }
}

/// The names of the devices.
struct Plugin(Vec<String>);

#[tonic::async_trait]
impl DevicePlugin for Plugin {
    type ListAndWatchStream = BoxStream<'static, Result<api::ListAndWatchResponse, Status>>;

    async fn get_device_plugin_options(
        &self,
        _: Request<api::Empty>,
    ) -> Result<Response<api::DevicePluginOptions>, Status> {
        Ok(Response::new(api::DevicePluginOptions {}))
    }

    /// The devices, and then nothing: they never change.
    async fn list_and_watch(&self, _: Request<api::Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let device = |id: &String| api::Device { id: id.clone(), health: "Healthy".to_owned() };
        let devices = api::ListAndWatchResponse { devices: self.0.iter().map(device).collect() };
        // The kubelet takes the end of the stream for the end of the plugin.
        Ok(Response::new(stream::iter([Ok(devices)]).chain(stream::pending()).boxed()))
    }

    async fn allocate(
        &self,
        request: Request<api::AllocateRequest>,
    ) -> Result<Response<api::AllocateResponse>, Status> {
        let container = |request: &api::ContainerAllocateRequest| api::ContainerAllocateResponse {
            envs: [("NVIDIA_VISIBLE_DEVICES".to_owned(), request.device_ids.join(","))].into(),
        };
        let container_responses = request.get_ref().container_requests.iter().map(container).collect();
        Ok(Response::new(api::AllocateResponse { container_responses }))
    }
}

//! The kubelet's side: the Container Storage Interface for volumes inside of a pod's spec, and how a plugin makes itself known.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;
use tonic::{Request, Response, Status};

use crate::Failure;
use crate::api::csi;
use crate::api::csi::identity_server::{Identity, IdentityServer};
use crate::api::csi::node_server::{Node, NodeServer};
use crate::api::csi::volume_capability::AccessType;
use crate::api::registration;
use crate::api::registration::registration_server::{Registration, RegistrationServer};
use crate::cache::Cache;
use crate::mounts::Mounts;
use crate::volume::Wanted;

/// Name of the driver, in CSIDrivers and in the volumes of pods.
pub const DRIVER: &str = "node-cache.sensorium.dev";
/// The oldest version of the interface that has all that is used here.
const VERSION: &str = "1.0.0";

/// What answers the kubelet of one node.
#[derive(Clone)]
pub struct Plugin {
    /// The artifacts.
    pub cache: Cache,
    /// How pods see them.
    pub mounts: Mounts,
    /// Name of the node.
    pub node: String,
    /// Stores, other than AWS itself, that volumes may name.
    pub endpoints: Vec<String>,
    /// Where the kubelet finds the plugin.
    pub socket: PathBuf,
}

/// The plugin's socket among the kubelet's plugins.
///
/// The kubelet, as any program with grpc-go, puts the socket's path into the request where a host's name belongs, with its
/// slashes as `%2F`. Where a host belongs there can be no such sign, except in a user's name before an `@`; Rust's HTTP insists
/// on that. So the path ends in what looks like a host.
pub fn socket(plugins: &Path) -> PathBuf {
    plugins.join(format!("{DRIVER}@localhost"))
}

/// Listens on `socket`, and gives the number of its file. Whoever watches its folder sees it appear in one step, in the place of
/// one that a dead process left.
///
/// # Errors
/// When the folder is not there, or not ours to write.
pub fn listen(socket: &Path) -> std::io::Result<(UnixListener, u64)> {
    // The kubelet looks at no name that begins with a dot.
    let hidden = socket.with_file_name(".sensorium");
    match std::fs::remove_file(&hidden) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&hidden)?;
    let number = std::fs::metadata(&hidden)?.ino();
    std::fs::rename(&hidden, socket)?;
    Ok((listener, number))
}

/// Takes the socket away, so that the kubelet calls nobody, unless another process has put its own in its place.
///
/// # Errors
/// When the folder is not ours to write.
pub fn leave(socket: &Path, number: u64) -> std::io::Result<()> {
    match std::fs::metadata(socket) {
        Ok(metadata) if metadata.ino() == number => std::fs::remove_file(socket),
        _ => Ok(()),
    }
}

/// Answers until `stop` completes.
///
/// # Errors
/// When the connections fail as a whole.
pub async fn serve(
    plugin: Plugin,
    listener: UnixListener,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let connections = futures::stream::unfold(listener, async |listener| {
        let connection = listener.accept().await.map(|(connection, _)| connection);
        Some((connection, listener))
    });
    tonic::transport::Server::builder()
        .add_service(IdentityServer::new(plugin.clone()))
        .add_service(NodeServer::new(plugin.clone()))
        .add_service(RegistrationServer::new(plugin))
        .serve_with_incoming_shutdown(connections, stop)
        .await
}

#[tonic::async_trait]
impl Registration for Plugin {
    async fn get_info(
        &self,
        _: Request<registration::InfoRequest>,
    ) -> Result<Response<registration::PluginInfo>, Status> {
        Ok(Response::new(registration::PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: DRIVER.to_owned(),
            endpoint: self.socket.display().to_string(),
            supported_versions: vec![VERSION.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<registration::RegistrationStatus>,
    ) -> Result<Response<registration::RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if status.plugin_registered {
            tracing::info!(driver = DRIVER, "the kubelet knows this plugin");
        } else {
            tracing::error!(driver = DRIVER, error = status.error, "the kubelet does not want this plugin");
        }
        Ok(Response::new(registration::RegistrationStatusResponse {}))
    }
}

#[tonic::async_trait]
impl Identity for Plugin {
    async fn get_plugin_info(
        &self,
        _: Request<csi::GetPluginInfoRequest>,
    ) -> Result<Response<csi::GetPluginInfoResponse>, Status> {
        let vendor_version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(csi::GetPluginInfoResponse { name: DRIVER.to_owned(), vendor_version }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<csi::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<csi::GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(csi::GetPluginCapabilitiesResponse {}))
    }

    async fn probe(&self, _: Request<csi::ProbeRequest>) -> Result<Response<csi::ProbeResponse>, Status> {
        Ok(Response::new(csi::ProbeResponse { ready: Some(true) }))
    }
}

#[tonic::async_trait]
impl Node for Plugin {
    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        Ok(Response::new(csi::NodeGetInfoResponse { node_id: self.node.clone() }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        Ok(Response::new(csi::NodeGetCapabilitiesResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let said = |name: &str| request.volume_context.get(name).map_or("", String::as_str);
        let (namespace, pod) = (said("csi.storage.k8s.io/pod.namespace"), said("csi.storage.k8s.io/pod.name"));
        match self.publish(&request).await {
            Ok(()) => {
                tracing::info!(namespace, pod, volume = request.volume_id, "a pod has its artifact");
                Ok(Response::new(csi::NodePublishVolumeResponse {}))
            }
            Err(failure) => {
                tracing::warn!(namespace, pod, volume = request.volume_id, %failure, "a pod does not get its artifact");
                Err(Status::from(&failure))
            }
        }
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let (mounts, target) = (self.mounts.clone(), PathBuf::from(request.into_inner().target_path));
        blocking(move || mounts.unpublish(&target)).await.map_err(|failure| Status::from(&failure))?;
        Ok(Response::new(csi::NodeUnpublishVolumeResponse {}))
    }
}

impl Plugin {
    async fn publish(&self, request: &csi::NodePublishVolumeRequest) -> Result<(), Failure> {
        if !request.readonly {
            return Err(Failure::Invalid("artifacts never change; set readOnly: true in the volume".to_owned()));
        }
        if let Some(AccessType::Block(_)) = request.volume_capability.as_ref().and_then(|c| c.access_type.as_ref()) {
            return Err(Failure::Invalid("an artifact is a folder, not a device".to_owned()));
        }
        let wanted = Wanted::read(&request.volume_context, &request.secrets, &self.endpoints)?;
        let held = self.cache.take(&wanted).await?;
        let (mounts, target) = (self.mounts.clone(), PathBuf::from(&request.target_path));
        // Held until it is mounted, also when nobody waits for that any more.
        blocking(move || mounts.publish(held.key(), &target)).await
    }
}

/// Runs work on files off the async threads.
async fn blocking(work: impl FnOnce() -> Result<(), Failure> + Send + 'static) -> Result<(), Failure> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|error| Err(Failure::Node(format!("the work on files was cut short: {error}"))))
}

#[cfg(test)]
mod tests {
    use hyper_util::rt::TokioIo;
    use tonic::transport::{Channel, Endpoint};

    use super::*;
    use crate::api::registration::registration_client::RegistrationClient;

    /// A connection as the kubelet makes it: the socket's path, escaped, in the place of a host.
    async fn dial(socket: PathBuf) -> Channel {
        let authority = socket.display().to_string().replace('/', "%2F");
        let endpoint = Endpoint::from_static("http://kubelet").origin(format!("http://{authority}").parse().unwrap());
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        endpoint.connect_with_connector(connect).await.unwrap()
    }

    #[tokio::test]
    async fn a_kubelet_finds_the_plugin_and_another_one_takes_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let socket = socket(folder.path());
        let cache = Cache::open(&folder.path().join("cache"), 1, Box::new(|| Ok([].into()))).unwrap();
        let mounts = Mounts { view: "/view".into(), pods: "/pods".into() };
        let plugin = Plugin { cache, mounts, node: "node0".to_owned(), endpoints: vec![], socket: socket.clone() };
        // Both live until the end, as when one takes over before the other has gone.
        let (mut numbers, mut servers) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            let (listener, number) = listen(&socket).unwrap();
            numbers.push(number);
            servers.push(tokio::spawn(serve(plugin.clone(), listener, std::future::pending())));
            let mut kubelet = RegistrationClient::new(dial(socket.clone()).await);
            let info = kubelet.get_info(registration::InfoRequest {}).await.unwrap().into_inner();
            assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", DRIVER));
            assert_eq!(info.endpoint, socket.display().to_string());
        }
        leave(&socket, numbers[0]).unwrap();
        assert!(socket.exists(), "the first one leaves, and the second stays");
        leave(&socket, numbers[1]).unwrap();
        assert!(!socket.exists());
        servers.iter().for_each(tokio::task::JoinHandle::abort);
    }

    #[tokio::test]
    async fn a_volume_that_could_be_written_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path(), 1, Box::new(|| Ok([].into()))).unwrap();
        let mounts = Mounts { view: "/view".into(), pods: "/pods".into() };
        let plugin = Plugin { cache, mounts, node: String::new(), endpoints: vec![], socket: "/socket".into() };
        let refused = plugin.node_publish_volume(Request::new(csi::NodePublishVolumeRequest::default())).await;
        assert!(refused.unwrap_err().message().contains("readOnly: true"));
    }
}

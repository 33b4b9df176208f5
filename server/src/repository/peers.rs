//! The servers behind some addresses, one connection to each.
//!
//! A name on a cluster stands for as many machines as there are pods just now, so it is looked up again and again. One
//! connection would stay with one of them; here every call goes to the next.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper_util::rt::TokioIo;
use sensorium_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use tokio::{net::lookup_host, time};
use tonic::{
    codegen::http::Uri,
    transport::{Channel, Endpoint},
};

use crate::security::TlsClient;

/// Time between looks at the addresses: new machines are found, and old ones left alone, this soon.
const INTERVAL: Duration = Duration::from_secs(2);
/// A machine of the same cluster that has not accepted a connection by then is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A machine that vanished is noticed this much later at most, twice.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// A way to ask one server.
pub(super) type Client = GrpcInferenceServiceClient<Channel>;

/// Servers that can stand in for each other.
#[derive(Debug, Default)]
pub(super) struct Peers {
    addresses: Vec<String>,
    /// Makes the connections, where they are encrypted.
    tls: Option<TlsClient>,
    known: Mutex<Vec<(SocketAddr, Client)>>,
    turn: AtomicUsize,
}

impl Peers {
    /// The servers at `addresses`, looked up from now on until the last handle goes. Must be called inside a Tokio runtime.
    pub(super) fn watch(addresses: Vec<String>, tls: Option<TlsClient>) -> Arc<Self> {
        let peers = Arc::new(Self { addresses, tls, ..Self::default() });
        // Ends with the last handle.
        tokio::spawn(watch(Arc::downgrade(&peers)));
        peers
    }

    /// The server whose turn it is; none where no address is known.
    pub(super) fn next(&self) -> Option<Client> {
        let known = self.known();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let index = turn.checked_rem(known.len())?;
        known.get(index).map(|(_, client)| client.clone())
    }

    /// The addresses as they were given.
    pub(super) fn text(&self) -> String {
        self.addresses.join(", ")
    }

    /// Looks all addresses up. One that cannot be is logged; if none can, those that are known stay.
    async fn refresh(&self) {
        let mut found = Vec::new();
        for address in &self.addresses {
            match lookup_host(address).await {
                Ok(addresses) => found.extend(addresses.map(|found| (found, host(address)))),
                Err(error) => tracing::warn!(address, %error, "the servers of a graph could not be looked up"),
            }
        }
        if !found.is_empty() {
            self.meet(found);
        }
    }

    /// Makes `found` the servers that are known; connections to those that were before stay.
    fn meet(&self, mut found: Vec<(SocketAddr, &str)>) {
        found.sort_unstable();
        found.dedup_by_key(|(address, _)| *address);
        let mut known = self.known();
        let client = |(address, host): (SocketAddr, &str)| {
            let old = known.iter().find(|(other, _)| *other == address);
            (address, old.map_or_else(|| self.client(address, host), |(_, client)| client.clone()))
        };
        let now = found.into_iter().map(client).collect();
        *known = now;
    }

    /// Connects when it is first used, and again whenever the connection breaks.
    fn client(&self, address: SocketAddr, host: &str) -> Client {
        #[expect(clippy::expect_used, reason = "an IP address and a port are always a valid URL")]
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .expect("an IP address and a port")
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let channel = match self.tls.clone() {
            None => endpoint.connect_lazy(),
            Some(tls) => {
                let name: Arc<str> = tls.name_of(host).into();
                let connect = move |_: Uri| {
                    let (tls, name) = (tls.clone(), Arc::clone(&name));
                    async move { tls.connect(address, &name).await.map(TokioIo::new) }
                };
                endpoint.connect_with_connector_lazy(tower::service_fn(connect))
            }
        };
        // Answers are as large as a batch makes them, and come from ourselves.
        GrpcInferenceServiceClient::new(channel).max_decoding_message_size(usize::MAX)
    }

    /// Only this module's few lines run under the lock.
    fn known(&self) -> MutexGuard<'_, Vec<(SocketAddr, Client)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn watch(peers: Weak<Peers>) {
    while let Some(peers) = peers.upgrade() {
        peers.refresh().await;
        drop(peers);
        time::sleep(INTERVAL).await;
    }
}

/// The host of `HOST:PORT`, without the brackets of an IPv6 address.
fn host(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    #[tokio::test]
    async fn every_call_goes_to_the_next_server_and_those_that_are_gone_are_left_alone() {
        let peers = Peers::default();
        assert!(peers.next().is_none());
        let found = |ports: &[u16]| ports.iter().map(|port| (address(*port), "encoders")).collect();
        peers.meet(found(&[2, 1, 2]));
        let ports = |peers: &Peers| peers.known().iter().map(|(address, _)| address.port()).collect::<Vec<_>>();
        assert_eq!(ports(&peers), [1, 2]);
        assert!(peers.next().is_some() && peers.next().is_some());
        peers.meet(found(&[2, 3]));
        assert_eq!(ports(&peers), [2, 3]);
    }

    #[test]
    fn a_host_is_what_is_before_the_port() {
        assert_eq!(["encoders:8001", "10.0.0.1:1", "[::1]:9"].map(host), ["encoders", "10.0.0.1", "::1"]);
    }

    #[tokio::test]
    async fn names_are_looked_up_and_what_is_known_stays_while_they_cannot_be() {
        let peers = Peers { addresses: vec!["127.0.0.1:7".to_owned()], ..Peers::default() };
        peers.refresh().await;
        assert_eq!(peers.known()[0].0, address(7));
        let lost = Peers { addresses: vec!["no-such-name.invalid:1".to_owned()], ..peers };
        lost.refresh().await;
        assert_eq!(lost.known()[0].0, address(7));
    }
}

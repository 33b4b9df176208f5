//! The bound on the number of connections.

use std::time::Duration;

use tokio::{io::AsyncReadExt as _, net::TcpStream, time};

use crate::harness::{Server, eventually};

const OPEN: &str = "sensorium_server_connections";
const REFUSALS: &str = "sensorium_server_connections_refusals_total";

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_closed_at_once_and_counted_and_a_place_that_comes_free_is_used() {
    let server = Server::start(&["--max-connections", "3"]).await;
    let (first, second) =
        (TcpStream::connect(server.http).await.unwrap(), TcpStream::connect(server.http).await.unwrap());
    // Both ports have the same places.
    let _third = TcpStream::connect(server.grpc).await.unwrap();
    eventually("all places are taken", async || server.sample(OPEN).await == Some(3.0)).await;
    for address in [server.http, server.grpc] {
        let mut extra = TcpStream::connect(address).await.unwrap();
        let heard = time::timeout(Duration::from_secs(20), extra.read(&mut [0; 1])).await;
        // The end of it, or a reset.
        let heard = heard.expect("it is closed, not left waiting");
        assert!(matches!(heard, Ok(0) | Err(_)), "{heard:?}");
    }
    assert_eq!(server.sample(REFUSALS).await, Some(2.0));
    assert_eq!(server.sample("sensorium_server_connections_limit").await, Some(3.0));
    // Whoever watches it is not kept out.
    for path in ["/livez", "/readyz"] {
        assert_eq!(server.get(server.metrics, path).await.0, 200, "{path}");
        assert_eq!(server.get(server.http, path).await.0, 0, "{path}");
    }
    drop((first, second));
    eventually("there is a place again", async || server.get(server.http, "/readyz").await.0 == 200).await;
}

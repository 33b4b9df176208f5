//! A GET over plain HTTP/1.1 to a process of this machine. Nothing here follows redirects, keeps connections or speaks TLS.

use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// The answer must come within this time: the peer is on this machine, and polled often.
const TIMEOUT: Duration = Duration::from_secs(2);
/// More than any status document.
const MAX_BODY_BYTES: usize = 1 << 20;

/// The status code and body of `GET http://ADDRESS/PATH`, or `None` when there is no such answer (yet).
pub async fn get(address: &str, path: &str) -> Option<(u16, Bytes)> {
    tokio::time::timeout(TIMEOUT, request(address, path)).await.ok()?
}

async fn request(address: &str, path: &str) -> Option<(u16, Bytes)> {
    let stream = TokioIo::new(TcpStream::connect(address).await.ok()?);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.ok()?;
    let request = hyper::Request::get(path).header("host", address).body(Empty::<Bytes>::new()).ok()?;
    let exchange = async {
        let response = sender.send_request(request).await.ok()?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await.ok()?.to_bytes();
        Some((status, body))
    };
    // The connection is driven here and dropped with the exchange, so that no task is left behind.
    tokio::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        _ = connection => exchange.await,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    async fn answer_once(response: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let read = stream.read(&mut request).await.unwrap();
            assert!(request[..read].starts_with(b"GET /progress HTTP/1.1\r\n"));
            stream.write_all(response.as_bytes()).await.unwrap();
        });
        address
    }

    #[tokio::test]
    async fn a_body_is_read_whether_its_length_is_known_or_it_comes_in_chunks() {
        for response in [
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}",
        ] {
            let address = answer_once(response).await;
            let (status, body) = get(&address, "/progress").await.expect(response);
            assert_eq!((status, body.as_ref()), (200, b"{}".as_slice()), "{response}");
        }
    }

    #[tokio::test]
    async fn a_status_that_is_not_success_is_told() {
        let address = answer_once("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").await;
        assert_eq!(get(&address, "/progress").await.unwrap().0, 503);
    }

    #[tokio::test]
    async fn nobody_listening_is_no_answer() {
        let port = crate::local::ports::FreePorts::default().take().unwrap();
        assert!(get(&format!("127.0.0.1:{port}"), "/").await.is_none());
    }
}

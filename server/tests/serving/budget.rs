//! The bound on the bytes of all requests: it holds, it is answered at once, and nobody waits for anybody.

use std::{io::Write as _, net::SocketAddr, time::Duration};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use sensorium_proto::inference::ModelInferRequest;

use crate::harness::{INFER, Server, eventually, floats, frame, http, input, post, raw_request, refusal};

const ENCODER: &str = "/v2/models/tiny.image_encoder/infer";
const HELD: &str = "sensorium_server_request_bytes";

/// A server that holds 128 KiB of requests at most, and 64 KiB of one.
async fn server() -> Server {
    Server::start(&["--max-request-bytes", "65536", "--max-inflight-bytes", "131072"]).await
}

/// A good request with a name of this length.
fn sized(bytes: usize) -> ModelInferRequest {
    let pixels = (input("pixel_values", "FP32", &[1, 3, 8, 8]), floats(&[0.5; 192]));
    ModelInferRequest { id: "x".repeat(bytes), ..raw_request("tiny.image_encoder", vec![pixels]) }
}

/// The same as JSON, filled up with spaces.
fn json(bytes: usize) -> Vec<u8> {
    let input =
        serde_json::json!({"name": "pixel_values", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": vec![0.5; 192]});
    let mut body = serde_json::json!({"inputs": [input]}).to_string().into_bytes();
    body.resize(bytes.max(body.len()), b' ');
    body
}

fn gzipped(body: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(body).unwrap();
    packed.finish().unwrap()
}

/// A connection that has sent `sent` of the 60,000 bytes that it announced.
async fn half(address: SocketAddr, sent: usize) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("POST {ENCODER} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 60000\r\n\r\n");
    stream.write_all(&[head.as_bytes(), &json(60_000)[..sent]].concat()).await.unwrap();
    stream
}

async fn held(server: &Server) -> f64 {
    server.sample(HELD).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_half_here_are_counted_and_others_are_refused_at_once() {
    let server = server().await;
    let mut halves = [half(server.http, 50_000).await, half(server.grpc, 50_000).await];
    eventually("both halves are held", async || held(&server).await >= 100_000.0).await;

    let answer = server.post(ENCODER, &[], &json(40_000)).await;
    assert_eq!((answer.status, answer.header("retry-after")), (429, Some("1")), "{answer:?}");
    assert!(answer.json()["error"].as_str().unwrap().contains("may hold 131072; try again later"), "{answer:?}");
    // A few bytes that want to be many.
    let answer = server.post(ENCODER, &[("content-encoding", "gzip")], &gzipped(&json(40_000))).await;
    assert_eq!(answer.status, 429, "{answer:?}");
    let mut channel = server.channel().await;
    let message = sized(40_000).encode_to_vec();
    let packed = [&[1][..], &frame(&gzipped(&message))[1..]].concat();
    for (encoding, body) in [(None, frame(&message)), (Some("gzip"), Bytes::from(packed))] {
        let response = post(&mut channel, INFER, encoding, axum::body::Body::from(body)).await.unwrap();
        let status = refusal(&response);
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert!(status.message().contains("try again later"), "{status:?}");
    }
    assert!(server.sample("sensorium_server_request_bytes_refusals_total").await.unwrap() >= 4.0);
    // Over HTTP the path says for which model they were. What is compressed in gRPC is tonic's to unpack, which refuses it itself.
    for (model, count) in [("tiny.image_encoder", 2.0), ("unknown", 1.0)] {
        let refused = format!("sensorium_server_requests_total{{model=\"{model}\",code=\"RESOURCE_EXHAUSTED\"}}");
        assert_eq!(server.sample(&refused).await, Some(count), "{model}");
    }
    assert_eq!(server.post(ENCODER, &[], &json(0)).await.status, 200, "what finds room is answered");

    // One finishes, one leaves: all of it comes back.
    halves[0].write_all(&json(60_000)[50_000..]).await.unwrap();
    let mut answer = [0; 12];
    halves[0].read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    drop(halves);
    eventually("nothing is held", async || held(&server).await == 0.0).await;
    assert_eq!(server.post(ENCODER, &[], &json(40_000)).await.status, 200);
    assert!(server.inference().await.model_infer(sized(40_000)).await.is_ok());
    eventually("nothing is held", async || held(&server).await == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_halves_together_are_refused_and_never_wait_for_each_other() {
    let server = server().await;
    let mut clients = JoinSet::new();
    for client in 0..32 {
        let (http, mut channel) = (server.http, server.channel().await);
        clients.spawn(async move {
            if client % 2 == 0 {
                let mut stream = half(http, 20_000).await;
                tokio::time::sleep(Duration::from_millis(50)).await;
                // A server that has refused may have closed already.
                let _ = stream.write_all(&json(60_000)[20_000..]).await;
                let mut status = [0; 12];
                return match stream.read_exact(&mut status).await {
                    Ok(_) => std::str::from_utf8(&status[9..]).unwrap().parse::<u16>().unwrap(),
                    Err(_) => 429,
                };
            }
            let mut rest = frame(&sized(50_000).encode_to_vec());
            let first = rest.split_to(20_000);
            let (body, pieces) = mpsc::channel(2);
            let stream = axum::body::Body::from_stream(ReceiverStream::new(pieces));
            let answer = tokio::spawn(async move { post(&mut channel, INFER, None, stream).await });
            body.send(Ok::<_, std::convert::Infallible>(first)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            let _ = body.send(Ok(rest)).await;
            drop(body);
            match refusal(&answer.await.unwrap().unwrap()).code() {
                Code::Ok => 200,
                Code::ResourceExhausted => 429,
                code => panic!("{code:?}"),
            }
        });
    }
    let statuses = tokio::time::timeout(Duration::from_secs(30), clients.join_all()).await.expect("nobody waits");
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    assert!(statuses.contains(&429), "{statuses:?}");
    eventually("nothing is held", async || held(&server).await == 0.0).await;
    assert_eq!(http(server.http, "POST", ENCODER, &[], &json(0)).await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_gives_the_bytes_of_each_message_back_when_it_is_answered() {
    let server = server().await;
    let (requests, stream) = mpsc::channel(1);
    let mut client = server.inference().await;
    let mut answers = client.model_stream_infer(ReceiverStream::new(stream)).await.unwrap().into_inner();
    for _ in 0..10 {
        // More than the budget in all, and less of it at a time.
        requests.send(sized(50_000)).await.unwrap();
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!(answer.error_message, "");
        eventually("nothing is held", async || held(&server).await == 0.0).await;
    }
}

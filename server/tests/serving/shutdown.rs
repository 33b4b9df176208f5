//! SIGTERM: what was accepted is answered, nothing else is accepted, and the exit code is 0.

use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use sensorium_engine::fixture::{self, QUESTION};
use sensorium_proto::inference::{ModelInferResponse, grpc_inference_service_client::GrpcInferenceServiceClient};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, codegen::http::Response, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::harness::{INFER, Server, answer, bytes_tensor, endpoint, eventually, frame, post, tensor_question};

/// A request whose second half has not been sent yet.
struct Half {
    /// Bytes of the first one.
    sent: usize,
    rest: Bytes,
    body: mpsc::Sender<Result<Bytes, std::convert::Infallible>>,
    response: JoinHandle<Result<Response<tonic::body::Body>, tonic::transport::Error>>,
}

async fn send_half(mut channel: Channel) -> Half {
    let mut first = frame(&tensor_question(&fixture::png([0, 200, 0]), QUESTION).encode_to_vec());
    let rest = first.split_off(first.len() / 2);
    let sent = first.len();
    let (body, chunks) = mpsc::channel(1);
    let stream = axum::body::Body::from_stream(ReceiverStream::new(chunks));
    let response = tokio::spawn(async move { post(&mut channel, INFER, None, stream).await });
    body.send(Ok(first)).await.unwrap();
    Half { sent, rest, body, response }
}

/// Waits until the server holds so many bytes of requests: what was sent may still be on its way.
async fn holds(server: &Server, bytes: usize) {
    let held = async || server.sample("sensorium_server_request_bytes").await.unwrap();
    eventually("what was sent has arrived", async || held().await >= bytes as f64).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_in_flight_are_answered_after_sigterm_and_new_ones_find_nobody() {
    let mut server = Server::start(&[]).await;
    let mut halves = Vec::new();
    for _ in 0..8 {
        halves.push(send_half(server.channel().await).await);
    }
    let body = br#"{"inputs": [{"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [3, 4]}]}"#;
    let path = "/v2/models/tiny.text_encoder/infer";
    let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
    let mut upload = TcpStream::connect(server.http).await.unwrap();
    upload.write_all(&[head.as_bytes(), &body[..20]].concat()).await.unwrap();
    holds(&server, halves.iter().map(|half| half.sent).sum::<usize>() + 20).await;
    let mut watch = HealthClient::new(server.channel().await)
        .watch(HealthCheckRequest { service: String::new() })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);

    server.terminate();
    eventually("readiness goes off", async || server.get(server.http, "/readyz").await.0 == 503).await;
    assert_eq!(server.get(server.http, "/livez").await.0, 200, "it is alive while it drains");
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert!(watch.message().await.unwrap().is_none(), "a call that never ends would hold the drain");
    eventually("nobody is let in", async || endpoint(server.grpc).connect().await.is_err()).await;
    assert!(server.process.try_wait().unwrap().is_none(), "it waits for what is in flight");

    for half in halves {
        half.body.send(Ok(half.rest)).await.unwrap();
        drop(half.body);
        let response: ModelInferResponse = answer(half.response.await.unwrap().unwrap()).await;
        assert_eq!(response.raw_output_contents[0], bytes_tensor(&[b"green"]));
    }
    eventually("nobody new is answered", async || server.post(path, &[], body).await.status == 503).await;
    upload.write_all(&body[20..]).await.unwrap();
    let mut answered = [0; 12];
    upload.read_exact(&mut answered).await.unwrap();
    assert_eq!(&answered, b"HTTP/1.1 200", "its head had come before");
    assert_eq!(server.exit_code().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_told_to_follow_its_parent_ends_when_its_input_does() {
    let follow = |command: &mut std::process::Command| {
        command.env("SENSORIUM_EXIT_WITH_PARENT", "1").stdin(std::process::Stdio::piped());
    };
    let mut server = Server::start_with(&[], follow).await;
    assert!(server.process.try_wait().unwrap().is_none(), "input that is open, and says nothing, ends nothing");
    drop(server.process.stdin.take());
    assert_eq!(server.exit_code().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_never_ends_holds_the_server_no_longer_than_the_deadline() {
    let mut server = Server::start(&["--drain-seconds", "1"]).await;
    let half = send_half(server.channel().await).await;
    holds(&server, half.sent).await;
    let asked = Instant::now();
    server.terminate();
    assert_eq!(server.exit_code().await, Some(0));
    assert!(asked.elapsed() >= Duration::from_secs(1), "it had a second to finish");
    drop(half);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_and_a_connection_on_which_nothing_happens_do_not_hold_the_server() {
    let mut server = Server::start(&["--drain-seconds", "300"]).await;
    let mut client = GrpcInferenceServiceClient::new(server.channel().await);
    let (requests, stream) = mpsc::channel(1);
    requests.send(tensor_question(&fixture::png([0, 200, 0]), QUESTION)).await.unwrap();
    let mut answers = client.model_stream_infer(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!(answer.error_message, "");
    // One that says what it speaks, and nothing else: it never answers a ping.
    let mut silent = TcpStream::connect(server.grpc).await.unwrap();
    let empty_settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    silent.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &empty_settings[..]].concat()).await.unwrap();

    let asked = Instant::now();
    server.terminate();
    let status = answers.message().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(server.exit_code().await, Some(0));
    assert!(asked.elapsed() < Duration::from_mins(1), "{:?}", asked.elapsed());
    drop((requests, silent));
}

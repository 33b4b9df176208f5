//! Short versions of what `make bench-soak` does for minutes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use prost::Message as _;
use sensorium_bench::{
    attack::{Target, attack},
    fuzz::Random,
    until_refused,
};
use sensorium_onnx::{DType, Dim, GraphBuilder};
use sensorium_proto::inference::{
    ModelInferRequest, RepositoryModelLoadRequest, RepositoryModelUnloadRequest,
    grpc_inference_service_client::GrpcInferenceServiceClient,
};
use serde_json::json;
use tokio::{net::TcpStream, sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;

use crate::harness::{Server, eventually, floats, input, raw_request};

const ENCODER: &str = "/v2/models/tiny.image_encoder";

fn pixels() -> ModelInferRequest {
    raw_request("tiny.image_encoder", vec![(input("pixel_values", "FP32", &[1, 3, 8, 8]), floats(&[0.5; 192]))])
}

fn json_pixels() -> serde_json::Value {
    json!({"inputs": [{"name": "pixel_values", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": vec![0.5; 192]}]})
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_wrong_requests_over_every_port_leave_the_server_as_it_was() {
    let mut server = Server::start(&["--max-request-bytes", "1048576"]).await;
    let target = Target { message: pixels().encode_to_vec(), path: ENCODER.to_owned(), json: json_pixels() };
    let ports = [server.grpc, server.http, server.metrics];
    let mut settled = 0;
    for seed in 0..4 {
        let hangs = attack(&ports, &target, &mut Random::new(seed), 600).await.unwrap();
        assert_eq!(hangs, 0, "connections that do not end, seed {seed}");
        assert!(server.process.try_wait().unwrap().is_none(), "the server ended, seed {seed}");
        server.inference().await.model_infer(pixels()).await.unwrap();
        let answer = server.post(&format!("{ENCODER}/infer"), &[], json_pixels().to_string().as_bytes()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(server.is_ready().await);
        if seed == 1 {
            settled = server.memory().0;
        }
    }
    let after = server.memory().0;
    assert!(after < settled + (24 << 20), "resident memory went from {settled} to {after} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_does_not_notice_that_others_are_cut() {
    let server = Server::start(&[]).await;
    let stop = Arc::<AtomicBool>::default();
    let mut streams = JoinSet::new();
    for connection in 0..10 {
        let is_cut = connection % 2 == 0;
        let channel = server.inference().await;
        for _ in 0..10 {
            let (mut client, stop) = (channel.clone(), stop.clone());
            streams.spawn(async move {
                let mut answered = 0;
                loop {
                    let (requests, stream) = mpsc::channel(1);
                    let mut answers =
                        client.model_stream_infer(ReceiverStream::new(stream)).await.unwrap().into_inner();
                    // One that is cut leaves with a request on its way.
                    for left in (0..if is_cut { 3 } else { usize::MAX }).rev() {
                        requests.send(pixels()).await.unwrap();
                        if left == 0 {
                            break;
                        }
                        let answer = answers.message().await.unwrap().unwrap();
                        assert_eq!(answer.error_message, "");
                        answered += 1;
                        if stop.load(Ordering::Relaxed) {
                            return answered;
                        }
                    }
                }
            });
        }
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);
    assert!(streams.join_all().await.iter().all(|answered| *answered > 0), "every stream gets on");
    eventually("nothing is held", async || server.sample("sensorium_server_request_bytes").await == Some(0.0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_no_answer_keeps_nobody_from_the_model() {
    let server = Server::start(&[]).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc)).unwrap();
    let mut unread = Vec::new();
    for _ in 0..16 {
        // No answer fits in: the server stops to poll the stream as soon as there is one.
        let channel = endpoint.clone().initial_stream_window_size(1).connect().await.unwrap();
        let (requests, received) = mpsc::channel(64);
        let mut client = GrpcInferenceServiceClient::new(channel);
        let stream = client.model_stream_infer(ReceiverStream::new(received)).await.unwrap();
        for _ in 0..64 {
            requests.send(pixels()).await.unwrap();
        }
        unread.push((client, requests, stream));
    }
    let mut client = server.inference().await;
    for _ in 0..50 {
        let answer = tokio::time::timeout(Duration::from_secs(20), client.model_infer(pixels())).await;
        answer.expect("others are not waited for").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_lost_when_the_server_ends_under_load() {
    let mut server = Server::start(&[]).await;
    let answered = Arc::<AtomicUsize>::default();
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        let channel = Endpoint::from_shared(format!("http://{}", server.grpc)).unwrap().connect().await.unwrap();
        let count = answered.clone();
        clients.spawn(async move { until_refused::grpc(channel, &pixels(), &count).await });
        let (stream, count) = (TcpStream::connect(server.http).await.unwrap(), answered.clone());
        clients.spawn(async move {
            let body = json_pixels().to_string();
            let length = body.len();
            let head = format!("POST {ENCODER}/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n");
            until_refused::http(stream, (head + &body).as_bytes(), &count).await
        });
    }
    eventually("all are answered", async || answered.load(Ordering::Relaxed) > 200).await;
    server.terminate();
    assert_eq!(server.exit_code().await, Some(0));
    let ends = tokio::time::timeout(Duration::from_secs(30), clients.join_all()).await;
    for end in ends.expect("every client hears of the end") {
        end.unwrap();
    }
}

/// So many times 10 MiB of weights.
fn weighty(layers: u8) -> Vec<u8> {
    const SIDE: i64 = 1620;
    let mut graph = GraphBuilder::new("weighty");
    let x = graph.input("x", DType::F32, &[Dim::Symbol("batch"), Dim::Fixed(SIDE)]);
    let mut y = x;
    for layer in 0..layers {
        let values: Vec<f32> = (0..SIDE * SIDE).map(|index| (index % 97) as f32 * 1e-4 + f32::from(layer)).collect();
        let weights = graph.initializer_f32(&format!("w{layer}"), &[SIDE, SIDE], values);
        y = graph.node("MatMul", &[&y, &weights], vec![]);
    }
    graph.output("y", &y, DType::F32, &[Dim::Symbol("batch"), Dim::Fixed(SIDE)]);
    graph.finish(20).unwrap().to_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_let_go_gives_its_memory_back() {
    let repository = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(repository.path().join("weighty/1")).unwrap();
    std::fs::write(repository.path().join("weighty/1/model.onnx"), weighty(4)).unwrap();
    let arguments = ["--model-repository", repository.path().to_str().unwrap(), "--model-control-mode", "explicit"];
    let server = Server::start(&arguments).await;
    let mut client = server.inference().await;
    let name = "weighty".to_owned();
    let mut before = server.memory().0;
    for round in 0..3 {
        let load = RepositoryModelLoadRequest { model_name: name.clone(), ..Default::default() };
        client.repository_model_load(load).await.unwrap();
        let tensor = (input("x", "FP32", &[1, 1620]), floats(&[1.0; 1620]));
        client.model_infer(raw_request("weighty", vec![tensor])).await.unwrap();
        let held = server.memory().0;
        assert!(held > before + (30 << 20), "{before} without it, {held} with it");
        let unload = RepositoryModelUnloadRequest { model_name: name.clone(), ..Default::default() };
        client.repository_model_unload(unload).await.unwrap();
        // What the first of all left is paid once.
        let allowed = if round == 0 { 16 << 20 } else { 4 << 20 };
        let limit = before + allowed;
        eventually("its memory comes back", async || server.memory().0 < limit).await;
        // All of it: what is still on its way would be taken for what stays, and the next round begins there.
        let mut last = server.memory().0;
        eventually("no more of it comes back", async || {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = server.memory().0;
            std::mem::replace(&mut last, now) < now + (1 << 20)
        })
        .await;
        before = server.memory().0.max(before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_reloads_under_load_lose_no_request_and_keep_no_memory() {
    const RELOADS: usize = 20;
    /// Loads that pay for what is paid for once.
    const FIRST: usize = 5;
    let repository = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(repository.path().join("weighty/1")).unwrap();
    std::fs::write(repository.path().join("weighty/1/model.onnx"), weighty(2)).unwrap();
    let arguments = ["--model-repository", repository.path().to_str().unwrap(), "--model-control-mode", "explicit"];
    let server = Server::start(&[&arguments[..], &["--load-model", "*"]].concat()).await;
    let (stop, answered) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
    let mut clients = JoinSet::new();
    for _ in 0..4 {
        let (mut client, stop, answered) = (server.inference().await, stop.clone(), answered.clone());
        clients.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let tensor = (input("x", "FP32", &[1, 1620]), floats(&[1.0; 1620]));
                client.model_infer(raw_request("weighty", vec![tensor])).await.unwrap();
                answered.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let mut control = server.inference().await;
    let mut settled = 0;
    for load in 1..=RELOADS {
        // Each of them is met by requests.
        let before = answered.load(Ordering::Relaxed);
        eventually("requests are answered", async || answered.load(Ordering::Relaxed) > before).await;
        let request = RepositoryModelLoadRequest { model_name: "weighty".to_owned(), ..Default::default() };
        control.repository_model_load(request).await.unwrap();
        if load == FIRST {
            settled = server.memory().0;
        }
    }
    // One of the fifteen models since would be 20 MiB.
    let limit = settled + (16 << 20);
    eventually("no more is held than after the first loads", async || server.memory().0 < limit).await;
    stop.store(true, Ordering::Relaxed);
    clients.join_all().await;
}

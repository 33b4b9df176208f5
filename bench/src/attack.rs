//! Wrong requests on their way to a server that has to survive them.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time,
};
use tonic::{
    codegen::{Service as _, http},
    transport::{Channel, Endpoint},
};
use tower::ServiceExt as _;

use crate::fuzz::{self, Random};

/// Requests at a time.
const AT_ONCE: usize = 8;
/// A connection that says and does nothing for so long, although its other end is closed, hangs.
const HANG: Duration = Duration::from_secs(20);
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

/// Right requests, for wrong ones to be made of.
#[derive(Clone, Debug)]
pub struct Target {
    /// A message of `ModelInfer`, encoded.
    pub message: Vec<u8>,
    /// Where the model answers over HTTP, without `/infer`.
    pub path: String,
    /// The same request as JSON.
    pub json: Value,
}

/// Sends `count` wrong requests over these ports, in all that a server has to read: messages of protobuf, texts of JSON, both
/// versions of HTTP, and bytes that are nothing. Returns how many exchanges did not come to an end.
///
/// # Errors
/// An address that is none.
pub async fn attack(ports: &[SocketAddr], target: &Target, random: &mut Random, count: usize) -> anyhow::Result<usize> {
    let mut workers = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (mut random, ports, target) = (Random::new(random.number()), ports.to_owned(), target.clone());
        let mut channels: Vec<Channel> = Vec::new();
        for port in &ports {
            channels.push(Endpoint::from_shared(format!("http://{port}"))?.connect_lazy());
        }
        workers.spawn(async move {
            let mut hangs = 0;
            for _ in 0..count.div_ceil(AT_ONCE) {
                let at = random.below(ports.len());
                let done = match random.below(10) {
                    0..4 => call(&mut channels[at], &target, &mut random).await,
                    _ => raw(ports[at], &target, &mut random).await,
                };
                hangs += usize::from(!done);
            }
            hangs
        });
    }
    let mut hangs = 0;
    while let Some(worker) = workers.join_next().await {
        hangs += worker?;
    }
    Ok(hangs)
}

/// A call of gRPC whose message is wrong, through a client that is right: it has to end.
async fn call(channel: &mut Channel, target: &Target, random: &mut Random) -> bool {
    const OTHERS: [&str; 2] =
        ["/sensorium.v1.MultimodalService/Infer", "/inference.GRPCInferenceService/RepositoryIndex"];
    let path = *random.pick(&[INFER, INFER, INFER, STREAM, OTHERS[0], OTHERS[1]]);
    let mut body = Vec::new();
    for _ in 0..=random.below(2) {
        let message = fuzz::protobuf(random, &target.message);
        body.push(u8::from(random.below(20) == 0));
        body.extend((message.len() as u32).to_be_bytes());
        body.extend(message);
    }
    if random.below(10) == 0 {
        fuzz::mangle(random, &mut body);
    }
    let mut request = http::Request::post(path).header("content-type", "application/grpc").header("te", "trailers");
    if random.below(10) == 0 {
        request = request.header("grpc-encoding", *random.pick(&["gzip", "deflate", "zstd"]));
    }
    let Ok(request) = request.body(tonic::body::Body::new(http_body_util::Full::new(Bytes::from(body)))) else {
        return true;
    };
    let exchange = async {
        let answer = channel.ready().await?.call(request).await?;
        let _ = answer.into_body().collect().await;
        Ok::<_, tonic::transport::Error>(())
    };
    time::timeout(HANG, exchange).await.is_ok()
}

/// Bytes over a connection of their own, which is closed behind them: it has to end.
async fn raw(port: SocketAddr, target: &Target, random: &mut Random) -> bool {
    let infer = format!("{}/infer", target.path);
    let bytes = match random.below(6) {
        0 | 1 => {
            let body = fuzz::json_text(random, &target.json);
            fuzz::http1(random, &infer, &body)
        }
        2 => {
            let body = fuzz::json_text(random, &target.json);
            let generate = format!("{}/generate", target.path);
            let path =
                *random.pick(&[infer.as_str(), generate.as_str(), "/v2/repository/index", "/v2/logging", "/metrics"]);
            let length = body.len();
            let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n");
            [head.as_bytes(), &body].concat()
        }
        3 | 4 => {
            let message = fuzz::protobuf(random, &target.message);
            fuzz::http2(random, INFER, &message)
        }
        _ => fuzz::noise(random),
    };
    let exchange = async {
        let Ok(mut stream) = TcpStream::connect(port).await else { return };
        // A server that has heard enough may close before all is sent.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = [0; 4096];
        while stream.read(&mut answer).await.is_ok_and(|count| count > 0) {}
    };
    time::timeout(HANG, exchange).await.is_ok()
}

//! A closed loop of requests from one thread: so many at a time, each sent when the one before it is answered.
//!
//! Messages are made once, before the clock runs, and answers are not taken apart: what is measured is the server and the
//! way to it.

use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf as _, Bytes};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use sensorium_engine::{RawTensor, dtype_name};
use sensorium_proto::inference::{ModelInferRequest, model_infer_request::InferInputTensor};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::task::LocalSet;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// Requests that share a connection of HTTP/2 at most.
const PER_CONNECTION: usize = 16;
/// Longer answers than any model here gives.
const MAX_MESSAGE: usize = 64 << 20;

/// How a server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Protocol {
    Grpc,
    Http,
}

impl Protocol {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Http => "http",
        }
    }
}

/// A request in the form that it is sent in.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    grpc: Bytes,
    http: Bytes,
    http_header: usize,
    path: String,
}

impl Message {
    pub(crate) fn new(model: &str, inputs: &[(&'static str, RawTensor)]) -> Self {
        let tensor = |(name, tensor): &(&str, RawTensor)| InferInputTensor {
            name: (*name).to_owned(),
            datatype: dtype_name(tensor.dtype()).to_owned(),
            shape: tensor.shape().to_vec(),
            ..InferInputTensor::default()
        };
        let grpc = ModelInferRequest {
            model_name: model.to_owned(),
            inputs: inputs.iter().map(tensor).collect(),
            raw_input_contents: inputs.iter().map(|(_, tensor)| tensor.data().clone()).collect(),
            ..ModelInferRequest::default()
        };
        let described = |(name, tensor): &(&str, RawTensor)| {
            json!({
                "name": name,
                "datatype": dtype_name(tensor.dtype()),
                "shape": tensor.shape(),
                "parameters": {"binary_data_size": tensor.data().len()},
            })
        };
        let header = json!({
            "inputs": inputs.iter().map(described).collect::<Vec<_>>(),
            "parameters": {"binary_data_output": true},
        });
        let mut http = header.to_string().into_bytes();
        let http_header = http.len();
        for (_, tensor) in inputs {
            http.extend_from_slice(tensor.data());
        }
        let path = format!("/v2/models/{model}/infer");
        Self { grpc: grpc.encode_to_vec().into(), http: http.into(), http_header, path }
    }

    /// A line that describes the tensors, as HTTP has it, and their bytes.
    pub(crate) fn line_and_bytes(&self) -> Vec<u8> {
        let (line, bytes) = self.http.split_at(self.http_header);
        [line, b"\n", bytes].concat()
    }
}

/// What a closed loop showed. A request at an end of the measured time counts by its part within: where answers come in batches
/// of a tenth of that time, whole ones would be a tenth more or less by chance.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// Requests per second.
    pub(crate) per_second: f64,
    /// Seconds from sending to the last byte of the answer, ascending.
    latencies: Vec<f64>,
    /// What these requests weigh, by what the caller gave each message.
    pub(crate) weight_per_second: f64,
}

impl Sample {
    /// The latency that `share` of the requests do not exceed, in seconds.
    pub(crate) fn latency(&self, share: f64) -> f64 {
        quantile(&self.latencies, share)
    }

    /// The same for all requests of several samples: one alone may have too few for its slowest to say anything.
    pub(crate) fn latency_of_all(samples: &[Self], share: f64) -> f64 {
        let mut all: Vec<f64> = samples.iter().flat_map(|sample| &sample.latencies).copied().collect();
        all.sort_by(f64::total_cmp);
        quantile(&all, share)
    }
}

/// What `share` of `ascending` figures do not exceed.
fn quantile(ascending: &[f64], share: f64) -> f64 {
    let last = ascending.len().saturating_sub(1);
    ascending.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}

/// Sends `messages`, each with its weight, in turn to a port of this machine, and counts what is answered from `warm_up`
/// on for `time`.
pub(crate) fn closed_loop(
    port: u16,
    protocol: Protocol,
    messages: &[(f64, Message)],
    concurrency: usize,
    (warm_up, time): (Duration, Duration),
) -> Result<Sample> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = LocalSet::new();
    tasks.block_on(&runtime, async {
        let messages: Rc<[(f64, Message)]> = messages.into();
        let mut clients = Vec::new();
        let mut shared = None;
        for index in 0..concurrency {
            if protocol == Protocol::Grpc && index.is_multiple_of(PER_CONNECTION) {
                shared = Some(connect_grpc(port).await?);
            }
            clients.push(match &shared {
                Some(client) => Client::Grpc(client.clone()),
                None => Client::Http(connect_http(port).await?),
            });
        }
        let begin = Instant::now() + warm_up;
        let end = begin + time;
        let workers: Vec<_> = clients
            .into_iter()
            .enumerate()
            .map(|(index, client)| tokio::task::spawn_local(work(client, index, messages.clone(), begin, end)))
            .collect();
        let (mut latencies, mut requests, mut weight) = (Vec::new(), 0.0, 0.0);
        for worker in workers {
            let own = worker.await??;
            latencies.extend(own.latencies);
            requests += own.requests;
            weight += own.weight;
        }
        ensure!(!latencies.is_empty(), "nothing was answered in {time:?}");
        latencies.sort_by(f64::total_cmp);
        let seconds = time.as_secs_f64();
        Ok(Sample { per_second: requests / seconds, latencies, weight_per_second: weight / seconds })
    })
}

/// What one client of a [`closed_loop`] counted.
#[derive(Default)]
struct Counted {
    /// Of those that were answered in time.
    latencies: Vec<f64>,
    requests: f64,
    weight: f64,
}

/// One request after the other, until `end`.
async fn work(
    mut client: Client,
    first: usize,
    messages: Rc<[(f64, Message)]>,
    begin: Instant,
    end: Instant,
) -> Result<Counted> {
    let mut counted = Counted::default();
    for index in first.. {
        // A prime step: neighbours do not send the same at the same time.
        let (own, message) = &messages[index * 61 % messages.len()];
        let sent = Instant::now();
        if sent >= end {
            break;
        }
        client.ask(message).await?;
        let answered = Instant::now();
        let within = answered.min(end).saturating_duration_since(sent.max(begin));
        let share = within.as_secs_f64() / (answered - sent).as_secs_f64();
        counted.requests += share;
        counted.weight += own * share;
        if answered >= begin && answered < end {
            counted.latencies.push((answered - sent).as_secs_f64());
        }
    }
    Ok(counted)
}

/// Asks once: the bytes of the answer, as the protocol has them.
pub(crate) fn ask_once(port: u16, protocol: Protocol, message: &Message) -> Result<Bytes> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = match protocol {
            Protocol::Grpc => Client::Grpc(connect_grpc(port).await?),
            Protocol::Http => Client::Http(connect_http(port).await?),
        };
        client.ask(message).await
    })
}

enum Client {
    Grpc(Grpc<Channel>),
    Http(SendRequest<Full<Bytes>>),
}

impl Client {
    async fn ask(&mut self, message: &Message) -> Result<Bytes> {
        match self {
            Self::Grpc(client) => {
                client.ready().await?;
                let path = PathAndQuery::from_static("/inference.GRPCInferenceService/ModelInfer");
                Ok(client.unary(Request::new(message.grpc.clone()), path, AsTheyAre).await?.into_inner())
            }
            Self::Http(client) => {
                let request = hyper::Request::post(&message.path)
                    .header("host", "localhost")
                    .header("content-type", "application/octet-stream")
                    .header("inference-header-content-length", message.http_header)
                    .body(Full::new(message.http.clone()))?;
                client.ready().await?;
                let answer = client.send_request(request).await?;
                let status = answer.status();
                let body = answer.into_body().collect().await?.to_bytes();
                if status != hyper::StatusCode::OK {
                    bail!("{status}: {}", String::from_utf8_lossy(&body));
                }
                Ok(body)
            }
        }
    }
}

async fn connect_grpc(port: u16) -> Result<Grpc<Channel>> {
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}"))?.tcp_nodelay(true);
    let client = Grpc::new(endpoint.connect().await.context("gRPC")?);
    Ok(client.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE))
}

async fn connect_http(port: u16) -> Result<SendRequest<Full<Bytes>>> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.context("HTTP")?;
    stream.set_nodelay(true)?;
    let (client, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the client; an error is what the client's next request says.
    drop(tokio::spawn(connection));
    Ok(client)
}

/// Messages that are bytes on both sides.
#[derive(Clone, Copy, Debug)]
struct AsTheyAre;

impl Codec for AsTheyAre {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for AsTheyAre {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put(buffer, item);
        Ok(())
    }
}

impl Decoder for AsTheyAre {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

//! What no server can beat: the same session in process, and the same messages without a model.

use std::convert::Infallible;
use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use sensorium_engine::{Device, Engine as _, OnnxRuntime, Options};
use sensorium_proto::inference::{ModelInferRequest, ModelInferResponse};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tonic::server::{Grpc, UnaryService};
use tonic::{Response, Status};
use tonic_prost::ProstCodec;

use crate::cases::Case;
use crate::load::Message;
use crate::servers::Setting;

/// Batches that are tried to find the best.
const BATCHES: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
/// The largest of them that a core is asked for.
const LARGEST_ON_A_CORE: usize = 32;
const WARM_UP: Duration = Duration::from_millis(200);

/// What a session did in process.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct InProcess {
    /// Rows of a batch.
    pub(crate) batch: usize,
    pub(crate) rows_per_second: f64,
    /// Seconds of a run, in the middle.
    pub(crate) median: f64,
}

/// Runs the model in this process and prints what it did.
pub(crate) fn run(case: &Case, models: &Path, device: Device, batch: usize, time: Duration) -> Result<()> {
    let mut engine = OnnxRuntime::open(&case.path(models), Options { device, ..Options::default() })?;
    let outputs: Vec<usize> = (0..engine.signature().outputs().len()).collect();
    let inputs = case.graph_inputs(batch)?;
    let mut once = || -> Result<f64> {
        let started = Instant::now();
        engine.run_raw(&inputs, &outputs)?;
        Ok(started.elapsed().as_secs_f64())
    };
    let warm = Instant::now();
    while warm.elapsed() < WARM_UP {
        once()?;
    }
    let started = Instant::now();
    let mut runs = Vec::new();
    while started.elapsed() < time {
        runs.push(once()?);
    }
    let rows_per_second = (runs.len() * batch) as f64 / started.elapsed().as_secs_f64();
    runs.sort_by(f64::total_cmp);
    let found = InProcess { batch, rows_per_second, median: runs[runs.len() / 2] };
    println!("{}", serde_json::to_string(&found)?);
    Ok(())
}

/// The model without a server, in a process of its own where servers are: [`run`], or for TorchScript what a line of Python
/// calls, which needs no libtorch in this program.
pub(crate) fn in_process(case: &Case, setting: &Setting, batch: usize, time: Duration) -> Result<InProcess> {
    let seconds = time.as_secs_f64().to_string();
    let (mut command, input);
    if case.is_torchscript() {
        input = Message::new(case.name, &case.request(batch)?).line_and_bytes();
        command = setting.cores.server(&setting.python);
        command.arg(setting.scripts.join("in_process.py")).arg(case.path(&setting.models)).arg(seconds);
    } else {
        input = Vec::new();
        command = setting.cores.server(&std::env::current_exe()?);
        command.arg("in-process").arg(case.name).arg(&setting.models).args([batch.to_string(), seconds]);
    }
    command.arg(setting.device.to_string());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut pipe) = child.stdin.take() {
        // One that ends before it has read everything says why.
        let _ = pipe.write_all(&input);
    }
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "in process: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("in process")
}

/// The batch of the most rows per second.
pub(crate) fn best_batch(case: &Case, setting: &Setting, time: Duration) -> Result<usize> {
    if !case.batches {
        return Ok(1);
    }
    let mut best: Option<InProcess> = None;
    for batch in BATCHES.into_iter().filter(|batch| setting.device != Device::Cpu || *batch <= LARGEST_ON_A_CORE) {
        let found = in_process(case, setting, batch, time)?;
        eprintln!("  in process, {batch} at a time: {:.0} rows/s", found.rows_per_second);
        if best.is_none_or(|best| found.rows_per_second > best.rows_per_second) {
            best = Some(found);
        }
    }
    Ok(best.map_or(1, |best| best.batch))
}

/// Answers every request with the same message: gRPC with that of file `grpc`, HTTP with that of file `http`.
pub(crate) fn echo(grpc: &Path, http: &Path, grpc_port: u16, http_port: u16) -> Result<()> {
    let answer = ModelInferResponse::decode(&*fs::read(grpc)?)?;
    let body = Bytes::from(fs::read(http)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let grpc = serve(grpc_port, move |request| {
            let answer = answer.clone();
            async move {
                let codec = ProstCodec::<ModelInferResponse, ModelInferRequest>::default();
                let mut grpc = Grpc::new(codec).max_decoding_message_size(64 << 20);
                Ok::<_, Infallible>(grpc.unary(Answer(answer), request).await)
            }
        });
        let http = serve(http_port, move |request: hyper::Request<Incoming>| {
            let body = body.clone();
            async move {
                request.into_body().collect().await?;
                Ok::<_, hyper::Error>(hyper::Response::new(Full::new(body)))
            }
        });
        tokio::try_join!(grpc, http).map(|_| ())
    })
}

struct Answer(ModelInferResponse);

impl UnaryService<ModelInferRequest> for Answer {
    type Response = ModelInferResponse;
    type Future = std::future::Ready<Result<Response<ModelInferResponse>, Status>>;

    fn call(&mut self, _: tonic::Request<ModelInferRequest>) -> Self::Future {
        std::future::ready(Ok(Response::new(self.0.clone())))
    }
}

/// Answers on a port for ever.
async fn serve<A, F, B, E>(port: u16, answer: A) -> Result<()>
where
    A: Fn(hyper::Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Result<hyper::Response<B>, E>> + Send + 'static,
    B: hyper::body::Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], port))).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let answer = answer.clone();
        tokio::spawn(async move {
            let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            // A connection that breaks is its client's affair.
            let _ = server.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
        });
    }
}

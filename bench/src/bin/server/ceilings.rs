//! What no server can beat: the same session in process, and the same messages without a model.

use std::convert::Infallible;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use sensorium_engine::{Device, Engine as _, OnnxRuntime, Options, RawTensor};
use sensorium_proto::inference::{ModelInferRequest, ModelInferResponse};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tonic::server::{Grpc, UnaryService};
use tonic::{Response, Status};
use tonic_prost::ProstCodec;

use crate::cases::Case;
use crate::load::Message;
use crate::median;
use crate::servers::Setting;

/// Batches that are tried to find the best.
const BATCHES: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
/// The largest of them that a core is asked for.
const LARGEST_ON_A_CORE: usize = 32;
const WARM_UP: Duration = Duration::from_millis(50);
/// TorchScript looks at its first runs before it settles.
const WARM_UP_RUNS: usize = 4;
/// Times that each batch is tried, in turn.
const TRIALS: usize = 3;

/// What a session did in process.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Runs {
    pub(crate) rows_per_second: f64,
    /// Seconds of a run, in the middle.
    pub(crate) median: f64,
}

/// A session that gives all outputs.
struct Model {
    engine: OnnxRuntime,
    outputs: Vec<usize>,
}

impl Model {
    fn open(case: &Case, models: &Path, device: Device) -> Result<Self> {
        let engine = OnnxRuntime::open(&case.path(models), Options { device, ..Options::default() })?;
        let outputs = (0..engine.signature().outputs().len()).collect();
        Ok(Self { engine, outputs })
    }

    fn run(&mut self, inputs: &[RawTensor]) -> Result<()> {
        self.engine.run_raw(inputs, &self.outputs)?;
        Ok(())
    }
}

/// Runs the model in this process each time that a line of the standard input says so, `BATCH SECONDS`, and prints what it did.
pub(crate) fn run(case: &Case, models: &Path, device: Device) -> Result<()> {
    let mut model = Model::open(case, models, device)?;
    for line in io::stdin().lines() {
        let line = line?;
        let (batch, seconds) = line.split_once(' ').context("a batch and seconds")?;
        let (batch, seconds): (usize, f64) = (batch.parse()?, seconds.parse()?);
        let inputs = case.graph_inputs(batch)?;
        let mut once = || -> Result<f64> {
            let started = Instant::now();
            model.run(&inputs)?;
            Ok(started.elapsed().as_secs_f64())
        };
        let (warm, mut runs) = (Instant::now(), 0);
        while warm.elapsed() < WARM_UP || runs < WARM_UP_RUNS {
            once()?;
            runs += 1;
        }
        let started = Instant::now();
        let mut runs = Vec::new();
        while started.elapsed().as_secs_f64() < seconds {
            runs.push(once()?);
        }
        let rows_per_second = (runs.len() * batch) as f64 / started.elapsed().as_secs_f64();
        runs.sort_by(f64::total_cmp);
        println!("{}", serde_json::to_string(&Runs { rows_per_second, median: runs[runs.len() / 2] })?);
    }
    Ok(())
}

/// The model without a server, in a process of its own where servers are: [`run`], or for TorchScript what a line of Python calls,
/// which needs no libtorch in this program. It ends when this is dropped.
pub(crate) struct InProcess {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl InProcess {
    /// Loads the model of `case`.
    pub(crate) fn start(case: &Case, setting: &Setting) -> Result<Self> {
        let mut command;
        if case.is_torchscript() {
            command = setting.cores.server(&setting.python);
            command.arg(setting.scripts.join("in_process.py")).arg(case.path(&setting.models));
        } else {
            command = setting.cores.server(&std::env::current_exe()?);
            command.arg("in-process").arg(case.name).arg(&setting.models);
        }
        command.arg(setting.device.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut orders = child.stdin.take().context("its standard input")?;
        let answers = BufReader::new(child.stdout.take().context("its standard output")?);
        if case.is_torchscript() {
            // One that ends before it has read everything says why.
            let _ = orders.write_all(&Message::new(case.name, &case.request(1)?).line_and_bytes());
        }
        Ok(Self { child, orders, answers })
    }

    /// Runs batches of `batch` rows for `time`.
    pub(crate) fn run(&mut self, batch: usize, time: Duration) -> Result<Runs> {
        writeln!(self.orders, "{batch} {}", time.as_secs_f64()).context("in process")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("in process: {line:?}"))
    }

    /// The batch of the most rows per second.
    pub(crate) fn best_batch(&mut self, case: &Case, device: Device, time: Duration) -> Result<usize> {
        let is_tried = |batch: &usize| {
            if case.batches { device != Device::Cpu || *batch <= LARGEST_ON_A_CORE } else { *batch == 1 }
        };
        let mut trials: Vec<(usize, Vec<f64>)> =
            BATCHES.into_iter().filter(is_tried).map(|batch| (batch, Vec::new())).collect();
        for _ in 0..TRIALS {
            for (batch, found) in &mut trials {
                found.push(self.run(*batch, time)?.rows_per_second);
            }
        }
        let found: Vec<_> = trials.into_iter().map(|(batch, found)| (batch, median(found.into_iter()))).collect();
        for (batch, rows_per_second) in &found {
            eprintln!("  in process, {batch} at a time: {rows_per_second:.0} rows/s");
        }
        Ok(found.into_iter().max_by(|one, other| one.1.total_cmp(&other.1)).map_or(1, |(batch, _)| batch))
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        // Fails where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What an echo answers, and what it runs before, if anything.
#[derive(Clone)]
struct Echo {
    grpc: ModelInferResponse,
    http: Bytes,
    model: Option<Arc<Mutex<Model>>>,
    /// Those of the model.
    inputs: Arc<[RawTensor]>,
}

impl Echo {
    /// Runs the model on the thread that reads and writes: nothing is handed over, and nobody waits for anybody else.
    fn run(&self) -> Result<()> {
        let Some(model) = &self.model else { return Ok(()) };
        model.lock().unwrap_or_else(PoisonError::into_inner).run(&self.inputs)
    }
}

/// Answers every request with the same message: gRPC with that of file `grpc`, HTTP with that of file `http`. With a model it runs
/// one row of that each time before it answers: what no server can beat whose model has a request alone.
pub(crate) fn echo(grpc: &Path, http: &Path, ports: [u16; 2], model: Option<(&Case, &Path)>) -> Result<()> {
    let mut echo = Echo {
        grpc: ModelInferResponse::decode(&*fs::read(grpc)?)?,
        http: fs::read(http)?.into(),
        model: None,
        inputs: Arc::new([]),
    };
    if let Some((case, models)) = model {
        echo.model = Some(Arc::new(Mutex::new(Model::open(case, models, Device::Cpu)?)));
        echo.inputs = case.graph_inputs(1)?.into();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let own = echo.clone();
        let grpc = serve(ports[0], move |request| {
            let echo = own.clone();
            async move {
                let codec = ProstCodec::<ModelInferResponse, ModelInferRequest>::default();
                let mut grpc = Grpc::new(codec).max_decoding_message_size(64 << 20);
                Ok::<_, Infallible>(grpc.unary(echo, request).await)
            }
        });
        let http = serve(ports[1], move |request: hyper::Request<Incoming>| {
            let echo = echo.clone();
            async move {
                request.into_body().collect().await?;
                echo.run()?;
                Ok::<_, anyhow::Error>(hyper::Response::new(Full::new(echo.http)))
            }
        });
        tokio::try_join!(grpc, http).map(|_| ())
    })
}

impl UnaryService<ModelInferRequest> for Echo {
    type Response = ModelInferResponse;
    type Future = std::future::Ready<Result<Response<ModelInferResponse>, Status>>;

    fn call(&mut self, _: tonic::Request<ModelInferRequest>) -> Self::Future {
        let ran = self.run().map_err(|error| Status::internal(error.to_string()));
        std::future::ready(ran.map(|()| Response::new(self.grpc.clone())))
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

//! The released server, as a process of its own, and what can be seen of it from outside.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use sensorium_onnx::{DType, Dim, GraphBuilder};
use sensorium_proto::inference::{
    ModelInferRequest, grpc_inference_service_client::GrpcInferenceServiceClient, model_infer_request::InferInputTensor,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::transport::{Channel, Endpoint};

/// Longest wait for anything that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// Killed when it is dropped.
pub(crate) struct Server {
    process: Child,
    pub(crate) grpc: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) metrics: SocketAddr,
    /// Lines of its log that tell of a panic.
    panics: Arc<AtomicUsize>,
}

impl Server {
    /// Starts it on a repository, and waits until it is ready.
    pub(crate) async fn start(repository: &Path, arguments: &[&str]) -> Result<Self> {
        let program = std::env::current_exe()?.with_file_name("sensorium-server");
        let mut command = Command::new(&program);
        command.arg("--model-repository").arg(repository).args([
            "--model-control-mode",
            "explicit",
            "--load-model",
            "*",
        ]);
        for port in ["--grpc-addr", "--http-addr", "--metrics-addr"] {
            command.args([port, "127.0.0.1:0"]);
        }
        command.args(arguments).env("SENSORIUM_LOG", "info").stdin(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().with_context(|| program.display().to_string())?;
        let mut lines = BufReader::new(process.stderr.take().context("no log")?).lines();
        let serving = loop {
            let Some(line) = lines.next() else { bail!("{} ended", program.display()) };
            let line = line?;
            let said: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
            if said["message"] == "serving" {
                break said;
            }
        };
        let panics = Arc::<AtomicUsize>::default();
        let counted = panics.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok).filter(|line| line.contains("panicked")) {
                counted.fetch_add(1, Ordering::Relaxed);
                eprintln!("{line}");
            }
        });
        let address = |name: &str| {
            let text = serving[name].as_str().with_context(|| format!("the server does not say its {name} address"))?;
            text.parse::<SocketAddr>().with_context(|| text.to_owned())
        };
        let (grpc, http, metrics) = (address("grpc")?, address("http")?, address("metrics")?);
        let server = Self { process, grpc, http, metrics, panics };
        let started = Instant::now();
        while exchange(server.http, &get("/readyz")).await.map_or(0, |answer| answer.0) != 200 {
            ensure!(started.elapsed() < PATIENCE, "the server is not ready");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(server)
    }

    pub(crate) fn panics(&self) -> usize {
        self.panics.load(Ordering::Relaxed)
    }

    pub(crate) fn is_running(&mut self) -> Result<bool> {
        Ok(self.process.try_wait()?.is_none())
    }

    /// Resident memory, in MiB.
    pub(crate) fn memory(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    }

    /// Files and sockets that it has open.
    pub(crate) fn files(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.process.id()))?.count())
    }

    pub(crate) fn terminate(&self) -> Result<()> {
        let pid = Pid::from_raw(self.process.id().try_into()?).context("no such process")?;
        Ok(kill_process(pid, Signal::TERM)?)
    }

    pub(crate) async fn ended(&mut self) -> Result<ExitStatus> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait()? {
                return Ok(status);
            }
            ensure!(started.elapsed() < PATIENCE, "the server does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn channel(&self) -> Result<Channel> {
        Ok(Endpoint::from_shared(format!("http://{}", self.grpc))?.connect().await?)
    }

    pub(crate) async fn client(&self) -> Result<GrpcInferenceServiceClient<Channel>> {
        Ok(GrpcInferenceServiceClient::new(self.channel().await?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").into_bytes()
}

pub(crate) fn post(path: &str, body: &str, keep: bool) -> Vec<u8> {
    let connection = if keep { "keep-alive" } else { "close" };
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: {connection}\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Sends bytes over a connection of their own: the status of the answer, 0 for none that is HTTP/1, and all of it.
pub(crate) async fn exchange(address: SocketAddr, request: &[u8]) -> std::io::Result<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let status = answer.get(9..12).and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    Ok((status.unwrap_or(0), answer))
}

/// A request of one row of one number to `model`.
pub(crate) fn one(model: &str, value: f32) -> ModelInferRequest {
    let input =
        InferInputTensor { name: "x".to_owned(), datatype: "FP32".to_owned(), shape: vec![1, 1], ..Default::default() };
    ModelInferRequest {
        model_name: model.to_owned(),
        inputs: vec![input],
        raw_input_contents: vec![value.to_le_bytes().to_vec().into()],
        ..Default::default()
    }
}

/// The same as JSON.
pub(crate) fn one_json(value: f32) -> Value {
    serde_json::json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [value]}]})
}

const BATCH: Dim<'static> = Dim::Symbol("batch");

/// `y = 2 * x`.
fn twice() -> Result<Vec<u8>> {
    let mut graph = GraphBuilder::new("twice");
    let x = graph.input("x", DType::F32, &[BATCH, Dim::Fixed(1)]);
    let two = graph.scalar_f32(2.0);
    let y = graph.node("Mul", &[&x, &two], vec![]);
    graph.output("y", &y, DType::F32, &[BATCH, Dim::Fixed(1)]);
    Ok(graph.finish(20)?.to_bytes())
}

/// `y = x` by way of matrix products that take some milliseconds for each row.
fn work() -> Result<Vec<u8>> {
    const SIDE: i64 = 192;
    let mut graph = GraphBuilder::new("work");
    let x = graph.input("x", DType::F32, &[BATCH, Dim::Fixed(1)]);
    let ones = graph.initializer_f32("ones", &[SIDE, SIDE], vec![1.0; (SIDE * SIDE) as usize]);
    let mean = graph.initializer_f32("mean", &[SIDE, SIDE], vec![1.0 / SIDE as f32; (SIDE * SIDE) as usize]);
    let axis = graph.vector_i64(&[2]);
    let wide = graph.node("Unsqueeze", &[&x, &axis], vec![]);
    let mut square = graph.node("Mul", &[&wide, &ones], vec![]);
    for _ in 0..10 {
        square = graph.node("MatMul", &[&square, &mean], vec![]);
    }
    let rest = graph.vector_i64(&[1]);
    let rows = graph.node("ReduceMean", &[&square, &axis], vec![sensorium_onnx::Attribute::int("keepdims", 0)]);
    let y = graph.node("ReduceMean", &[&rows, &rest], vec![]);
    graph.output("y", &y, DType::F32, &[BATCH, Dim::Fixed(1)]);
    Ok(graph.finish(20)?.to_bytes())
}

/// 100 MiB of weights in eight matrices.
fn large() -> Result<Vec<u8>> {
    const SIDE: i64 = 1810;
    let mut graph = GraphBuilder::new("large");
    let x = graph.input("x", DType::F32, &[BATCH, Dim::Fixed(1)]);
    let first = graph.initializer_f32("first", &[1, SIDE], vec![1.0; SIDE as usize]);
    let mut y = graph.node("MatMul", &[&x, &first], vec![]);
    for layer in 0..8 {
        let values: Vec<f32> = (0..SIDE * SIDE).map(|index| (index % 97) as f32 * 1e-4 + layer as f32).collect();
        let weights = graph.initializer_f32(&format!("w{layer}"), &[SIDE, SIDE], values);
        y = graph.node("MatMul", &[&y, &weights], vec![]);
        y = graph.node("Tanh", &[&y], vec![]);
    }
    let last = graph.initializer_f32("last", &[SIDE, 1], vec![1.0; SIDE as usize]);
    let y = graph.node("MatMul", &[&y, &last], vec![]);
    graph.output("y", &y, DType::F32, &[BATCH, Dim::Fixed(1)]);
    Ok(graph.finish(20)?.to_bytes())
}

/// Writes the models that are served here into a repository; `with_large` adds one of 100 MiB.
pub(crate) fn repository(folder: &Path, with_large: bool) -> Result<()> {
    let write = |name: &str, config: &str, model: Vec<u8>| -> Result<()> {
        let version = folder.join(name).join("1");
        fs::create_dir_all(&version)?;
        fs::write(version.join("model.onnx"), model)?;
        Ok(fs::write(folder.join(name).join("config.pbtxt"), config)?)
    };
    write("twice", "max_batch_size: 32", twice()?)?;
    write("work", "max_batch_size: 8", work()?)?;
    if with_large {
        write("large", "max_batch_size: 8", large()?)?;
    }
    Ok(())
}

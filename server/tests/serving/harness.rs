//! Servers to test against, and ways to talk to them that no proper client offers.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message;
use sensorium_artifact::{Store, Volumes};
use sensorium_engine::fixture;
use sensorium_proto::{
    inference::{
        ModelInferRequest, ModelInferResponse, grpc_inference_service_client::GrpcInferenceServiceClient,
        model_infer_request::InferInputTensor,
    },
    multimodal::{Image, InferRequest, Part, Text, multimodal_service_client::MultimodalServiceClient, part::Content},
};
use tempfile::TempDir;
use tonic::{
    Code, Status,
    codegen::{
        Service as _,
        http::{Request, Response},
    },
    transport::{Channel, Endpoint},
};
use tower::ServiceExt as _;

pub(crate) const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
pub(crate) const MULTIMODAL: &str = "/sensorium.v1.MultimodalService/Infer";

/// Longest wait for anything that must happen; a loaded machine needs a while.
const PATIENCE: Duration = Duration::from_mins(1);

/// A store that has the tiny model, as `tiny`; its digest is in `digest`.
pub(crate) struct Artifacts {
    folder: TempDir,
    pub(crate) digest: String,
}

impl Artifacts {
    /// The one of this test program: it is only read.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: OnceLock<Artifacts> = OnceLock::new();
        SHARED.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let uri = format!("file://{}", folder.path().display());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            // On a thread of its own, because the caller may be inside a runtime already.
            let digest = std::thread::spawn(move || {
                runtime.block_on(async {
                    let store = Store::open(&uri, &Volumes::default()).unwrap();
                    fixture::commit(&store, "tiny").await.unwrap().digest.to_string()
                })
            });
            Self { folder, digest: digest.join().unwrap() }
        })
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.folder.path()
    }
}

/// `sensorium-server` as a process of its own, on ports that the system chose. Killed when it is dropped.
pub(crate) struct Server {
    pub(crate) process: Child,
    pub(crate) grpc: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) metrics: SocketAddr,
    log: Arc<Mutex<Vec<serde_json::Value>>>,
}

impl Server {
    /// Starts a server of the tiny model with more arguments, and waits until it is ready.
    pub(crate) async fn start(arguments: &[&str]) -> Self {
        Self::start_with(arguments, |_| {}).await
    }

    /// As [`Server::start`], with more to say about the process.
    pub(crate) async fn start_with(arguments: &[&str], adjust: impl FnOnce(&mut Command)) -> Self {
        let server = Self::launch(Artifacts::shared().path(), arguments, adjust);
        // Where no certificate or token is in the way.
        eventually("the server is ready", async || server.is_ready().await).await;
        server
    }

    /// Starts a server of the artifact `tiny` of a store, which may not be ready yet.
    pub(crate) fn launch(store: &std::path::Path, arguments: &[&str], adjust: impl FnOnce(&mut Command)) -> Self {
        let (server, lines) = Self::launch_unread(store, arguments, adjust);
        let kept = server.log.clone();
        // Read as it comes.
        std::thread::spawn(move || lines.for_each(|line| kept.lock().unwrap().push(line)));
        server
    }

    /// The same, of whose log nobody reads more than it says until it serves: the rest comes with it.
    pub(crate) fn launch_unread(
        store: &std::path::Path,
        arguments: &[&str],
        adjust: impl FnOnce(&mut Command),
    ) -> (Self, Box<dyn Iterator<Item = serde_json::Value> + Send>) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sensorium-server"));
        command.arg("--model").arg(format!("tiny=file://{}/tiny", store.display()));
        // Not as flags, which may be among the arguments.
        for port in ["SENSORIUM_GRPC_ADDR", "SENSORIUM_HTTP_ADDR", "SENSORIUM_METRICS_ADDR"] {
            command.env(port, "127.0.0.1:0");
        }
        command.args(arguments).env("SENSORIUM_LOG", "info").stdin(Stdio::null()).stderr(Stdio::piped());
        adjust(&mut command);
        let mut process = command.spawn().unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut lines = lines.map_while(Result::ok).map(|line| {
            // Stores of logs refuse a line that has one of these twice.
            for key in ["\"message\":", "\"level\":"] {
                assert_eq!(line.matches(key).count(), 1, "{line}");
            }
            serde_json::from_str::<serde_json::Value>(&line).expect("every line of a log is JSON")
        });
        let mut log = Vec::new();
        let serving = lines.by_ref().find(|line| {
            log.push(line.clone());
            line["message"] == "serving"
        });
        let serving = serving.expect("the server says where it serves");
        let address = |name: &str| serving[name].as_str().unwrap().parse().unwrap();
        let (grpc, http, metrics, log) =
            (address("grpc"), address("http"), address("metrics"), Arc::new(Mutex::new(log)));
        (Self { process, grpc, http, metrics, log }, Box::new(lines))
    }

    /// The lines of its log so far with this message.
    pub(crate) fn said(&self, message: &str) -> Vec<serde_json::Value> {
        self.log.lock().unwrap().iter().filter(|line| line["message"] == message).cloned().collect()
    }

    /// What its metrics say, where no certificate or token is in the way.
    pub(crate) async fn is_ready(&self) -> bool {
        self.sample("sensorium_server_ready").await == Some(1.0)
    }

    pub(crate) async fn channel(&self) -> Channel {
        endpoint(self.grpc).connect().await.unwrap()
    }

    pub(crate) async fn inference(&self) -> GrpcInferenceServiceClient<Channel> {
        GrpcInferenceServiceClient::new(self.channel().await)
    }

    pub(crate) async fn multimodal(&self) -> MultimodalServiceClient<Channel> {
        MultimodalServiceClient::new(self.channel().await)
    }

    /// Status and body of a plain HTTP request; status 0 when nobody listens.
    pub(crate) async fn get(&self, address: SocketAddr, path: &str) -> (u16, String) {
        match http(address, "GET", path, &[], b"").await {
            Ok(answer) => (answer.status, String::from_utf8(answer.body).unwrap()),
            Err(_) => (0, String::new()),
        }
    }

    /// The answer to a POST on the HTTP port.
    pub(crate) async fn post(&self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> HttpAnswer {
        http(self.http, "POST", path, headers, body).await.unwrap()
    }

    /// The JSON that a path of the HTTP port answers with 200.
    pub(crate) async fn json(&self, path: &str) -> serde_json::Value {
        let (status, body) = self.get(self.http, path).await;
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// The value of one sample on the metrics page, such as `sensorium_server_ready`; labels included in the name.
    pub(crate) async fn sample(&self, name: &str) -> Option<f64> {
        let (status, page) = self.get(self.metrics, "/metrics").await;
        assert_eq!(status, 200);
        page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// Memory of the process in bytes: what is resident now, and the most that ever was.
    pub(crate) fn memory(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let kilobytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
        };
        (kilobytes("VmRSS:"), kilobytes("VmHWM:"))
    }

    pub(crate) fn terminate(&self) {
        let pid = rustix::process::Pid::from_raw(self.process.id().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Waits for the process to end; its exit code.
    pub(crate) async fn exit_code(&mut self) -> Option<i32> {
        let mut code = None;
        eventually("the server ends", async || match self.process.try_wait().unwrap() {
            Some(status) => {
                code = status.code();
                true
            }
            None => false,
        })
        .await;
        code
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What came back over HTTP/1.
#[derive(Debug)]
pub(crate) struct HttpAnswer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl HttpAnswer {
    /// A header by its name in small letters.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }
}

/// One exchange over a connection of its own, written by hand: no client stands between the test and the bytes.
pub(crate) async fn http(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> std::io::Result<HttpAnswer> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let mut head = vec![format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close")];
    head.extend(headers.iter().map(|(name, value)| format!("{name}: {value}")));
    if method == "POST" && !headers.iter().any(|(name, _)| *name == "content-length") {
        head.push(format!("content-length: {}", body.len()));
    }
    stream.write_all(&[head.join("\r\n").as_bytes(), b"\r\n\r\n", body].concat()).await?;
    let mut response = Vec::new();
    stream.read_to_end(&mut response).await?;
    let end = response.windows(4).position(|window| window == b"\r\n\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
    let head = String::from_utf8(response[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|status| status.parse().ok());
    let headers =
        lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let is_chunked = head.to_lowercase().contains("\r\ntransfer-encoding: chunked");
    let body = &response[end + 4..];
    let body = if is_chunked { joined(body) } else { body.to_vec() };
    Ok(HttpAnswer { status: status.unwrap(), headers: headers.collect(), body })
}

/// The chunks of a body, which are for the connection and mean nothing.
fn joined(mut chunks: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(line) = chunks.windows(2).position(|window| window == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&chunks[..line]).unwrap(), 16).unwrap();
        body.extend_from_slice(&chunks[line + 2..line + 2 + size]);
        chunks = &chunks[line + 2 + size + 2..];
    }
    body
}

pub(crate) fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).unwrap()
}

/// Polls until `holds`, and fails after a while.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !holds().await {
        assert!(started.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A gRPC frame: flag, length, message.
pub(crate) fn frame(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(message.len() + 5);
    frame.put_u8(0);
    frame.put_u32(message.len().try_into().unwrap());
    frame.extend_from_slice(message);
    frame.freeze()
}

/// Sends any bytes at all as the body of a call.
pub(crate) async fn post(
    channel: &mut Channel,
    path: &str,
    encoding: Option<&str>,
    body: axum::body::Body,
) -> Result<Response<tonic::body::Body>, tonic::transport::Error> {
    let mut request = Request::post(path).header("content-type", "application/grpc").header("te", "trailers");
    if let Some(encoding) = encoding {
        request = request.header("grpc-encoding", encoding);
    }
    channel.ready().await?.call(request.body(tonic::body::Body::new(body)).unwrap()).await
}

/// The refusal of a call, from the headers, where a server puts it when there is no message.
pub(crate) fn refusal(response: &Response<tonic::body::Body>) -> Status {
    Status::from_header_map(response.headers()).unwrap_or_else(|| Status::new(Code::Ok, "the call was answered"))
}

/// The one message of a response that was answered.
pub(crate) async fn answer<M: Message + Default>(response: Response<tonic::body::Body>) -> M {
    let body = axum::body::to_bytes(axum::body::Body::new(response.into_body()), 1 << 24).await.unwrap();
    M::decode(&body[5..]).unwrap()
}

pub(crate) fn input(name: &str, datatype: &str, shape: &[i64]) -> InferInputTensor {
    InferInputTensor {
        name: name.to_owned(),
        datatype: datatype.to_owned(),
        shape: shape.to_vec(),
        ..Default::default()
    }
}

pub(crate) fn raw_request(model: &str, tensors: Vec<(InferInputTensor, Vec<u8>)>) -> ModelInferRequest {
    let (inputs, contents): (Vec<_>, Vec<Vec<u8>>) = tensors.into_iter().unzip();
    ModelInferRequest {
        model_name: model.to_owned(),
        inputs,
        raw_input_contents: contents.into_iter().map(Bytes::from).collect(),
        ..Default::default()
    }
}

/// A BYTES tensor on the wire.
pub(crate) fn bytes_tensor(items: &[&[u8]]) -> Vec<u8> {
    items.iter().flat_map(|item| [&u32::try_from(item.len()).unwrap().to_le_bytes(), *item].concat()).collect()
}

pub(crate) fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// An output of a response as floats.
pub(crate) fn output_floats(response: &ModelInferResponse, name: &str) -> Vec<f32> {
    let position = response.outputs.iter().position(|output| output.name == name).unwrap();
    assert_eq!(response.outputs[position].datatype, "FP32");
    response.raw_output_contents[position].as_chunks().0.iter().copied().map(f32::from_le_bytes).collect()
}

/// A question to the whole model over the Open Inference Protocol.
pub(crate) fn tensor_question(image: &[u8], text: &str) -> ModelInferRequest {
    let column = |name: &str, item: &[u8]| (input(name, "BYTES", &[1]), bytes_tensor(&[item]));
    raw_request("tiny", vec![column("image", image), column("text", text.as_bytes())])
}

pub(crate) fn image_part(data: &[u8], media_type: &str) -> Part {
    let image = Image { data: Bytes::copy_from_slice(data), media_type: media_type.to_owned() };
    Part { content: Some(Content::Image(image)) }
}

pub(crate) fn text_part(text: &str) -> Part {
    Part { content: Some(Content::Text(Text { text: text.to_owned() })) }
}

/// A request of the multimodal service.
pub(crate) fn parts_request(task: &str, parts: Vec<Part>) -> InferRequest {
    InferRequest { model: "tiny".to_owned(), task: task.to_owned(), parts, ..Default::default() }
}

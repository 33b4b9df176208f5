//! The program itself, and what other people's clients make of it.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
};

use sensorium_engine_torch::Attribute;

use crate::{
    bench::{Bench, f32s},
    voice::python,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_sensorium-server-torch");

#[test]
fn it_checks_a_repository_and_goes_by_its_own_name() {
    let bench = Bench::new();
    bench.compile("good", "def forward(self, x):\n    return x\n", &[]);
    let config = r#"input { name: "x" data_type: TYPE_FP32 dims: -1 } output { name: "OUTPUT__0" data_type: TYPE_FP32 dims: -1 }"#;
    bench.write("good", "config.pbtxt", config);
    let check = || {
        let output = Command::new(PROGRAM).arg("--check").arg("--model-repository").arg(bench.path()).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let (is_well, said) = check();
    assert!(is_well && said.contains("good") && said.contains("READY"), "{said}");
    bench.compile("vague", "def forward(self, x):\n    return x\n", &[]);
    let (is_well, said) = check();
    assert!(!is_well && said.contains("write it in config.pbtxt"), "{said}");
    let output = Command::new(PROGRAM).arg("--version").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("sensorium-server-torch "), "{said}");
}

/// A server that ends with its test.
struct Server {
    process: Child,
    grpc: String,
    http: String,
}

impl Server {
    fn start(repository: &Path) -> Self {
        let any = "127.0.0.1:0";
        let mut command = Command::new(PROGRAM);
        command.arg("--model-repository").arg(repository).env("SENSORIUM_LOG", "info").stderr(Stdio::piped());
        command.args(["--grpc-addr", any, "--http-addr", any, "--metrics-addr", any]);
        let mut process = command.spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
        let serving = lines.find(|line| line.contains(r#""message":"serving""#)).expect("it serves");
        std::thread::spawn(move || lines.for_each(drop));
        let address = |protocol: &str| {
            let key = format!(r#""{protocol}":""#);
            serving.split(&key).nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned()
        };
        Self { process, grpc: address("grpc"), http: address("http") }
    }

    /// What it answers over REST, status line and all.
    fn post(&self, path: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(&self.http).unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\ncontent-length: {}", body.len());
        write!(stream, "{head}\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn tritonclient_streams_sequences_to_rows_that_keep_their_state() {
    let bench = Bench::new();
    let zeros = Attribute::Tensor(f32s(&[4, 1], &[0.0; 4]));
    let source = "
def forward(self, INPUT__0, start, ready):
    kept = torch.where(start > 0, torch.zeros_like(self.total), self.total)
    self.total = torch.where(ready > 0, kept + INPUT__0, self.total)
    return self.total
";
    bench.compile("adder", source, &[("total", zeros)]).write(
        "adder",
        "config.pbtxt",
        r#"
        platform: "pytorch_libtorch"
        max_batch_size: 4
        input { name: "INPUT__0" data_type: TYPE_FP32 dims: 1 }
        output { name: "OUTPUT__0" data_type: TYPE_FP32 dims: 1 }
        sequence_batching {
          max_sequence_idle_microseconds: 60000000
          direct { }
          control_input { name: "start" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } }
          control_input { name: "ready" control { kind: CONTROL_SEQUENCE_READY fp32_false_true: [ 0, 1 ] } }
        }
        "#,
    );
    let server = Server::start(bench.path());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/sequences.py");
    let output = Command::new(python()).args([script, &server.grpc]).output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.ends_with("ok\n"), "{said}\n{complained}");
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_that_is_lost_is_told_to_who_asked_and_ends_the_program() {
    let bench = Bench::new();
    let weights = Attribute::Tensor(f32s(&[4], &[1.0, 2.0, 3.0, 4.0]));
    let config = r#"
        input { name: "x" data_type: TYPE_INT64 dims: -1 }
        output { name: "OUTPUT__0" data_type: TYPE_FP32 dims: -1 }
        instance_group { kind: KIND_GPU }
    "#;
    bench.compile("pick", "def forward(self, x):\n    return torch.index_select(self.w, 0, x)\n", &[("w", weights)]);
    bench.write("pick", "config.pbtxt", config);
    let mut server = Server::start(bench.path());
    let pick = |server: &Server, index: i64| {
        let body = format!(r#"{{"inputs": [{{"name": "x", "datatype": "INT64", "shape": [1], "data": [{index}]}}]}}"#);
        server.post("/v2/models/pick/infer", &body)
    };
    let answer = pick(&server, 2);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(r#""data":[3.0]"#), "{answer}");
    let answer = pick(&server, 77);
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("the GPU is lost to this process"), "{answer}");
    let status = server.process.wait().unwrap();
    assert!(!status.success(), "who starts programs has to see that this one wants it: {status}");
}

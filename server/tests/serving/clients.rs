//! The Python clients that users of Triton and KServe have, unchanged. The scripts are in `tests/clients`.

use std::{fs, path::Path, process::Command};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use prost_reflect::{DescriptorPool, FieldDescriptor, MessageDescriptor};
use sensorium_engine::fixture;
use sensorium_onnx::{DType, Dim, GraphBuilder};
use tempfile::TempDir;

use crate::harness::Server;

/// Python with the pinned clients: `SENSORIUM_TEST_PYTHON`, or what `scripts/test-env` prints.
fn python() -> String {
    if let Ok(python) = std::env::var("SENSORIUM_TEST_PYTHON") {
        return python;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/test-env");
    let output = Command::new(script).output().expect("scripts/test-env can be run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "scripts/test-env could not make the Python clients' environment:\n{said}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// What a script prints. It must end well.
async fn run(server: Option<&Server>, script: &str, arguments: &[&str]) -> String {
    let python = python();
    let mut command = Command::new(&python);
    command.arg(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients")).join(script));
    if let Some(server) = server {
        command.args(["--grpc", &server.grpc.to_string(), "--http", &server.http.to_string()]);
    }
    command.args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap();
    let output = output.unwrap_or_else(|error| panic!("{python} could not be started ({error}); run scripts/test-env"));
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script} {arguments:?} failed:\n{said}\n{complained}");
    said.into_owned()
}

pub(crate) async fn passes(server: &Server, script: &str, arguments: &[&str]) {
    let said = run(Some(server), script, arguments).await;
    assert!(said.ends_with("ok\n"), "{said}");
}

/// A repository of models that return their input, one for each datatype that engines hold.
pub(crate) fn identities() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, dtype) in [
        ("fp32", DType::F32),
        ("fp64", DType::F64),
        ("fp16", DType::F16),
        ("uint8", DType::U8),
        ("int8", DType::I8),
        ("int32", DType::I32),
        ("int64", DType::I64),
        ("bool", DType::Bool),
    ] {
        let shape = [Dim::Symbol("batch"), Dim::Symbol("length")];
        let mut graph = GraphBuilder::new("identity");
        let x = graph.input("x", dtype, &shape);
        let y = graph.node("Identity", &[&x], vec![]);
        graph.output("y", &y, dtype, &shape);
        let file = folder.path().join(format!("identity_{name}/1/model.onnx"));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, graph.finish(20).unwrap().to_bytes()).unwrap();
    }
    folder
}

/// A server of [`identities`], which clients may load and unload.
pub(crate) async fn serve(models: &TempDir, more: &[&str]) -> Server {
    let repository = models.path().to_str().unwrap();
    let models = ["--model-repository", repository, "--model-control-mode", "explicit", "--load-model", "*"];
    Server::start(&[&models[..], more].concat()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient_asks_questions_about_pictures() {
    let server = Server::start(&[]).await;
    let image = tempfile::NamedTempFile::with_suffix(".png").unwrap();
    fs::write(image.path(), fixture::png([0, 0, 200])).unwrap();
    let image = image.path().to_str().unwrap();
    passes(&server, "triton_questions.py", &["--image", image, "--question", fixture::QUESTION]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient_makes_every_call_over_grpc() {
    passes(&serve(&identities(), &[]).await, "triton_sync.py", &["--protocol", "grpc"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient_makes_every_call_over_http() {
    passes(&serve(&identities(), &[]).await, "triton_sync.py", &["--protocol", "http"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient_works_with_asyncio_over_grpc_and_http() {
    passes(&serve(&identities(), &[]).await, "triton_aio.py", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient_streams_in_order_and_past_errors() {
    passes(&serve(&identities(), &[]).await, "triton_stream.py", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kserves_clients_speak_to_it_over_rest_and_grpc() {
    let models = identities();
    let server = serve(&models, &[]).await;
    passes(&server, "kserve_v2.py", &[]).await;
    passes(&server, "kserve_repository.py", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_describe_themselves() {
    passes(&Server::start(&[]).await, "reflect.py", &[]).await;
}

/// `(number, name, type, cardinality)` of a field, with the type's own name where it has one.
fn described(field: &FieldDescriptor) -> String {
    format!("{} {} {:?} {:?}", field.number(), field.name(), field.kind(), field.cardinality())
}

#[tokio::test(flavor = "multi_thread")]
async fn tritons_messages_are_a_part_of_ours() {
    let said = run(None, "descriptors.py", &[]).await;
    let theirs = DescriptorPool::decode(BASE64.decode(said.trim()).unwrap().as_slice()).unwrap();
    let ours = sensorium_proto::descriptor_pool();
    let find = |message: &MessageDescriptor| {
        let name = message.full_name();
        ours.get_message_by_name(name).unwrap_or_else(|| panic!("there is no message {name}"))
    };
    for message in theirs.all_messages() {
        let own = find(&message);
        for field in message.fields() {
            let found = own.get_field(field.number()).map(|field| described(&field));
            assert_eq!(found, Some(described(&field)), "{}", message.full_name());
        }
    }
    for values in theirs.all_enums() {
        let own = ours.get_enum_by_name(values.full_name()).unwrap_or_else(|| panic!("no {}", values.full_name()));
        for value in values.values() {
            let found = own.get_value(value.number()).map(|value| value.name().to_owned());
            assert_eq!(found.as_deref(), Some(value.name()), "{}", values.full_name());
        }
    }
    let service = ours.services().find(|service| service.full_name() == "inference.GRPCInferenceService").unwrap();
    for method in theirs.services().flat_map(|service| service.methods().collect::<Vec<_>>()) {
        let own = service.methods().find(|own| own.name() == method.name());
        let own = own.unwrap_or_else(|| panic!("there is no method {}", method.name()));
        assert_eq!(own.input().full_name(), method.input().full_name());
        assert_eq!(own.output().full_name(), method.output().full_name());
        assert_eq!(
            (own.is_client_streaming(), own.is_server_streaming()),
            (method.is_client_streaming(), method.is_server_streaming())
        );
    }
}

/// NVIDIA's load generator, where its binary can be had. Without it this test says so and passes, because the binary needs
/// a package of Debian; with `SENSORIUM_REQUIRE_PERF_ANALYZER`, which CI sets, it fails.
#[tokio::test(flavor = "multi_thread")]
async fn perf_analyzer_measures_it_over_grpc_http_and_streams() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/perf-analyzer");
    let output = Command::new(script).output().expect("scripts/perf-analyzer can be run");
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let required = std::env::var_os("SENSORIUM_REQUIRE_PERF_ANALYZER").is_some();
        assert!(!required, "SENSORIUM_REQUIRE_PERF_ANALYZER is set, and scripts/perf-analyzer failed:\n{said}");
        eprintln!("not run: {said}");
        return;
    }
    let analyzer = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let models = identities();
    let server = serve(&models, &[]).await;
    let (grpc, http) = (server.grpc.to_string(), server.http.to_string());
    for arguments in [
        vec!["-i", "grpc", "-u", &grpc],
        vec!["-i", "grpc", "-u", &grpc, "-b", "4", "--async"],
        vec!["-i", "grpc", "-u", &grpc, "--streaming", "--async"],
        vec!["-i", "grpc", "-u", &grpc, "--shared-memory", "system", "--output-shared-memory-size", "1024"],
        vec!["-i", "http", "-u", &http],
        vec!["-i", "http", "-u", &http, "--shared-memory", "system", "--output-shared-memory-size", "1024"],
    ] {
        let mut command = Command::new(&analyzer);
        // It is satisfied when three windows one after the other differ by less than a factor of ten. A machine that stands
        // still for a moment makes a short window as slow as that, so they are not too short and there may be many.
        command.args(["-m", "identity_fp32", "--shape", "x:16", "--concurrency-range", "2", "-s", "999", "-r", "30"]);
        command.args(["--measurement-mode", "count_windows", "--measurement-request-count", "200"]).args(&arguments);
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{arguments:?}:\n{said}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(said.contains("Inferences/Second vs. Client"), "{arguments:?}:\n{said}");
        // It shows the server's side only where it could read statistics.
        assert!(said.contains("Inference count:") && said.contains("compute infer"), "{arguments:?}:\n{said}");
    }
}

//! What those who run the server use: checking a repository, files of settings.

use std::{fs, path::Path, process::Command, time::Duration};

use sensorium_onnx::{DType, Dim, GraphBuilder};
use tokio_util::sync::CancellationToken;

use crate::{
    clients::identities,
    counter,
    harness::{Artifacts, Server, eventually, http},
};

/// The exit code and output of the server, which is expected to end by itself.
async fn ended(arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sensorium-server"));
    command.args(arguments).args(["--grpc-addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0"]);
    command.args(["--metrics-addr", "127.0.0.1:0"]);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_is_checked_without_being_served() {
    let models = identities();
    let repository = models.path().to_str().unwrap();
    let (code, said) = ended(&["--model-repository", repository, "--check"]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.lines().any(|line| line.starts_with("identity_fp32 ") && line.contains("READY")), "{said}");

    fs::write(models.path().join("identity_int8/1/model.onnx"), b"no model").unwrap();
    let (code, said) = ended(&["--model-repository", repository, "--check"]).await;
    assert_eq!(code, Some(1), "{said}");
    let broken = said.lines().find(|line| line.starts_with("identity_int8 ")).unwrap_or_else(|| panic!("{said}"));
    assert!(broken.contains("UNAVAILABLE") && broken.trim_end().len() > "UNAVAILABLE".len() + 64, "{broken}");
    assert!(said.lines().any(|line| line.starts_with("identity_fp32 ") && line.contains("READY")), "{said}");
}

/// A bucket with the models `good` and `bad`, of which it does not give the latter's file, until it is told to be silent.
async fn half_a_bucket(model: Vec<u8>, silent: CancellationToken) -> String {
    use axum::{extract::Request, http::StatusCode, response::IntoResponse as _};
    let answer = move |request: Request| {
        let (model, silent) = (model.clone(), silent.clone());
        async move {
            if silent.is_cancelled() {
                return std::future::pending().await;
            }
            let object = |name: &str| {
                let size = model.len();
                format!(
                    "<Contents><Key>models/{name}/1/model.onnx</Key><Size>{size}</Size><ETag>\"{name}\"</ETag>\
                     <LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                )
            };
            match request.uri().path() {
                path if path.ends_with("/bad/1/model.onnx") => StatusCode::FORBIDDEN.into_response(),
                path if path.ends_with("/good/1/model.onnx") => model.into_response(),
                _ => {
                    let objects = object("bad") + &object("good");
                    format!("<ListBucketResult><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>")
                        .into_response()
                }
            }
        }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(answer)).await });
    format!("http://{address}")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_cannot_be_had_keeps_its_model_alone_from_being_served() {
    let model = fs::read(identities().path().join("identity_fp32/1/model.onnx")).unwrap();
    let endpoint = half_a_bucket(model, CancellationToken::new()).await;
    let cache = tempfile::tempdir().unwrap();
    for mode in ["none", "poll"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sensorium-server"));
        command.args(["--model-repository", "s3://bucket/models", "--check", "--model-control-mode", mode]);
        command.arg("--artifact-cache").arg(cache.path().join(mode));
        command.env("AWS_ENDPOINT_URL", &endpoint).env("AWS_ACCESS_KEY_ID", "a").env("AWS_SECRET_ACCESS_KEY", "b");
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        let line = |name: &str| said.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{said}"));
        assert!(line("good ").contains("READY"), "{said}");
        assert!(line("bad ").contains("UNAVAILABLE") && line("bad ").contains("403"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_falls_silent_holds_neither_loads_of_other_repositories_nor_the_end() {
    let (models, cache, silent) = (identities(), tempfile::tempdir().unwrap(), CancellationToken::new());
    let model = fs::read(models.path().join("identity_fp32/1/model.onnx")).unwrap();
    let endpoint = half_a_bucket(model, silent.clone()).await;
    let (here, cache) = (models.path().to_str().unwrap(), cache.path().to_str().unwrap());
    let repositories = ["--model-repository", here, "--model-repository", "s3://bucket/models"];
    let explicit = ["--model-control-mode", "explicit", "--artifact-cache", cache];
    let mut server = Server::start_with(&[repositories, explicit].concat(), |command| {
        command.env("AWS_ENDPOINT_URL", endpoint).env("AWS_ACCESS_KEY_ID", "a").env("AWS_SECRET_ACCESS_KEY", "b");
    })
    .await;
    let port = server.http;
    let load = |name: &'static str| async move {
        http(port, "POST", &format!("/v2/repository/models/{name}/load"), &[], b"").await.unwrap()
    };
    assert_eq!(load("good").await.status, 200);
    silent.cancel();
    let waiting = tokio::spawn(load("good"));
    let again = tokio::spawn(load("good"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(load("identity_fp32").await.status, 200, "whose folder comes first");
    assert_eq!(server.post("/v2/repository/models/good/unload", &[], b"").await.status, 200);
    server.terminate();
    for waiting in [waiting, again] {
        let answer = waiting.await.unwrap();
        assert!(answer.status >= 400 && answer.json()["error"].to_string().contains("this server ends"), "{answer:?}");
    }
    assert_eq!(server.exit_code().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_keeps_neither_requests_nor_the_end_waiting() {
    let loud = |command: &mut Command| {
        command.env("SENSORIUM_LOG", "trace");
    };
    let (mut server, unread) = Server::launch_unread(Artifacts::shared().path(), &["--drain-seconds", "1"], loud);
    // Each refusal is some lines of two hundred bytes or more, a pipe takes 64 KiB, and 8,192 lines may wait.
    let mut asked = 0;
    while server.sample("sensorium_server_log_lines_dropped_total").await == Some(0.0) {
        asked += 500;
        assert!(asked < 20_000, "lines are dropped and nobody counts them");
        for _ in 0..500 {
            let body = br#"{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}"#;
            assert_eq!(server.post("/v2/models/nothing/infer", &[], body).await.status, 404);
        }
    }
    assert_eq!(server.get(server.http, "/livez").await.0, 200);
    server.terminate();
    assert_eq!(server.exit_code().await, Some(0));
    assert!(unread.count() > 100, "what there was room for is there");
}

/// A graph whose inputs are returned, each with the rest of its shape behind the batch, or behind nothing.
fn copies(inputs: &[(&str, DType, &[Dim<'_>])]) -> Vec<u8> {
    let mut graph = GraphBuilder::new("copies");
    for (name, dtype, shape) in inputs {
        let input = graph.input(name, *dtype, shape);
        let output = graph.node("Identity", &[&input], vec![]);
        graph.output(&format!("{name}_out"), &output, *dtype, shape);
    }
    graph.finish(20).unwrap().to_bytes()
}

fn write(repository: &Path, model: &str, graph: &[u8], config: &str) {
    fs::create_dir_all(repository.join(model).join("1")).unwrap();
    fs::write(repository.join(model).join("1/model.onnx"), graph).unwrap();
    fs::write(repository.join(model).join("config.pbtxt"), config).unwrap();
}

/// For each option a model that uses it well, how that configuration is spoiled, and what is said then.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_loads_what_uses_each_option_and_says_what_is_wrong_with_it() {
    const RAGGED: &str = r#"max_batch_size: 8
        input { name: "x" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }
        output { name: "x_out" dims: -1 }
        batch_input { kind: BATCH_ACCUMULATED_ELEMENT_COUNT target_name: "ends" data_type: TYPE_INT32 source_input: "x" }
        batch_output { target_name: "x_out" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "x" }"#;
    const SEATED: &str = r#"max_batch_size: 4
        sequence_batching {
          direct { }
          control_input { name: "ready" control { kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] } }
          state { input_name: "kept" output_name: "kept_out" data_type: TYPE_FP32 dims: [ 1 ] }
        }"#;
    const WARM: &str = r#"max_batch_size: 4
        model_warmup { name: "file" batch_size: 1
          inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 1 ] input_data_file: "one" } } }"#;
    let batch = [Dim::Symbol("batch"), Dim::Fixed(1)];
    let flat = [Dim::Symbol("total")];
    let ragged = copies(&[("x", DType::F32, &flat), ("ends", DType::I32, &[Dim::Symbol("ends")])]);
    let seated = copies(&[("x", DType::F32, &batch), ("ready", DType::I32, &batch), ("kept", DType::F32, &batch)]);
    let warm = copies(&[("x", DType::F32, &batch)]);
    let (iterating, bounded) = (counter::counter(1), counter::config("direct { }", 9));
    let cases = [
        ("ragged", &ragged, RAGGED, "source_input: \"x\" }", "source_input: \"z\" }", "`z`"),
        ("seated", &seated, SEATED, "\"ready\"", "\"redy\"", "control_input `redy`, which its file has not"),
        ("seated-state", &seated, SEATED, "dims: [ 1 ]", "dims: [ 3 ]", "begins as [1, 3], which does not fit"),
        ("warm", &warm, WARM, "\"one\"", "\"two\"", "warmup/two"),
        ("warm-size", &warm, WARM, "dims: [ 1 ]", "dims: [ 2 ]", "its model_warmup \"file\""),
        ("iterating", &iterating, &bounded, "iteration_most_steps", "steps", "nothing bounds it"),
        ("iterating-unary", &iterating, &bounded, "decoupled: true", "decoupled: false", "decoupled: true } as well"),
    ];
    let models = tempfile::tempdir().unwrap();
    let repository = models.path().to_str().unwrap();
    for (model, graph, config, ..) in &cases {
        write(models.path(), model, graph, config);
        let warmup = models.path().join(model).join("warmup");
        fs::create_dir(&warmup).unwrap();
        fs::write(warmup.join("one"), 1_f32.to_le_bytes()).unwrap();
    }
    let (code, said) = ended(&["--model-repository", repository, "--check"]).await;
    assert_eq!((code, said.matches(" READY ").count()), (Some(0), cases.len()), "{said}");

    for (model, graph, config, right, wrong, _) in &cases {
        assert!(config.contains(right), "{model}: {right} is not in {config}");
        write(models.path(), model, graph, &config.replace(right, wrong));
    }
    let (code, said) = ended(&["--model-repository", repository, "--check"]).await;
    assert_eq!(code, Some(1), "{said}");
    for (model, .., words) in &cases {
        let line = said.lines().find(|line| line.starts_with(&format!("{model} "))).unwrap_or_else(|| panic!("{said}"));
        assert!(line.contains("UNAVAILABLE") && line.contains(words), "{words:?} is not in {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_come_from_a_file_and_a_wrong_one_is_named() {
    let models = identities();
    let settings = models.path().join("settings.yaml");
    fs::write(&settings, format!("model-repository: [{}]\nshared-memory: false\n", models.path().display())).unwrap();
    let server = Server::start(&["--settings", settings.to_str().unwrap()]).await;
    assert_eq!(server.get(server.http, "/v2/models/identity_fp32/ready").await.0, 200);
    let extensions = server.json("/v2").await["extensions"].take();
    assert!(!extensions.as_array().unwrap().contains(&"system_shared_memory".into()), "{extensions}");
    let refused =
        server.post("/v2/systemsharedmemory/region/r/register", &[], br#"{"key": "/k", "byte_size": 1}"#).await;
    assert_eq!(refused.status, 501, "{refused:?}");

    fs::write(&settings, "model-repositry: [x]").unwrap();
    let (code, said) = ended(&["--settings", settings.to_str().unwrap()]).await;
    assert_eq!(code, Some(1));
    assert!(said.contains("model-repositry") && said.contains("settings.yaml"), "{said}");
    let (code, said) = ended(&["--model-repository", "/models", "--auth-tokens", "/nowhere/tokens"]).await;
    assert_eq!(code, Some(1));
    assert!(said.contains("/nowhere/tokens"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_tells_nobody_about_the_machine_and_leaves_nothing_in_the_home_folder() {
    let home = tempfile::tempdir().unwrap();
    let chosen = "glibc.malloc.hugetlb=0";
    let server = Server::start_with(&[], |command| {
        command.env("HOME", home.path()).env_remove("ORT_DISABLE_TELEMETRY").env("GLIBC_TUNABLES", chosen);
    })
    .await;
    let environment = fs::read(format!("/proc/{}/environ", server.process.id())).unwrap();
    let variables: Vec<_> = environment.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let has = |variable: &str| variables.iter().any(|own| own == variable);
    assert!(has("ORT_DISABLE_TELEMETRY=1"), "{variables:?}");
    assert!(has(&format!("GLIBC_TUNABLES={chosen}")), "what is set stays: {variables:?}");
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0, "it has loaded a model, and written nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_another_repository_hides_is_named_in_the_log() {
    let (first, second) = (identities(), identities());
    let repositories = [first.path().to_str().unwrap(), second.path().to_str().unwrap()];
    let server = Server::start(&["--model-repository", repositories[0], "--model-repository", repositories[1]]).await;
    let said = server.said("two repositories have a model of this name, and the first one's is served");
    let hidden = said.iter().find(|line| line["model"] == "identity_fp32").unwrap_or_else(|| panic!("{said:?}"));
    assert_eq!(hidden["served"], format!("{}/identity_fp32", repositories[0]));
    assert_eq!(hidden["hidden"], format!("{}/identity_fp32", repositories[1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_ensemble_brought_is_not_opened_again() {
    let models = tempfile::tempdir().unwrap();
    let graph = copies(&[("x", DType::F32, &[Dim::Symbol("batch"), Dim::Fixed(1)])]);
    write(models.path(), "z", &graph, "max_batch_size: 8");
    fs::create_dir(models.path().join("a")).unwrap();
    let ensemble = r#"platform: "ensemble" max_batch_size: 8
        input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }
        ensemble_scheduling { step {
          model_name: "z" input_map { key: "x" value: "x" } output_map { key: "x_out" value: "y" } } }"#;
    fs::write(models.path().join("a/config.pbtxt"), ensemble).unwrap();
    let repository = models.path().to_str().unwrap();
    let server = Server::start(&["--model-repository", repository]).await;
    eventually("both are there", async || server.get(server.http, "/v2/models/a/ready").await.0 == 200).await;
    let opened = server.said("opened");
    assert_eq!(opened.iter().filter(|line| line["model"] == "z").count(), 1, "{opened:?}");
}

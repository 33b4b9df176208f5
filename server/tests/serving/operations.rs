//! What those who run the server use: checking a repository, files of settings.

use std::{fs, process::Command};

use crate::{clients::identities, harness::Server};

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

//! The Python client that Triton's users have, unchanged.

use std::process::Command;

use sensorium_engine::fixture;

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

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient_reads_metadata_and_infers() {
    let python = python();
    let server = Server::start(&[]).await;
    let image = tempfile::NamedTempFile::with_suffix(".png").unwrap();
    std::fs::write(image.path(), fixture::png([0, 0, 200])).unwrap();
    let mut command = Command::new(&python);
    command
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/triton_client.py"))
        .args([
            "--address",
            &server.grpc.to_string(),
            "--model",
            "tiny",
            "--expect",
            "blue",
            "--question",
            fixture::QUESTION,
        ])
        .arg("--image")
        .arg(image.path());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap();
    let output = output.unwrap_or_else(|error| panic!("{python} could not be started ({error}); run scripts/test-env"));
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "triton_client.py failed:\n{said}\n{complained}");
    assert!(said.ends_with("ok\n"), "{said}");
}

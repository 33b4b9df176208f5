//! Graphs that other servers run, called over TLS and with tokens.

use std::{net::SocketAddr, time::Duration};

use sensorium_engine::fixture;
use sensorium_proto::multimodal::InferResponse;
use tempfile::TempDir;
use tonic::{Code, Status};

use crate::{
    harness::{Artifacts, Server, eventually, image_part, parts_request, text_part},
    security::{NAME, certificates},
};

const RED: [u8; 3] = [200, 30, 30];
const OLD: &str = "old 0123456789abcdef\n";
const NEW: &str = "new fedcba9876543210\n";

/// A folder of certificates, and arguments that name files in it.
struct Files(TempDir);

impl Files {
    /// `arguments`, each `FLAG=FILE`.
    fn arguments(&self, arguments: &[&str]) -> Vec<String> {
        let path = |argument: &&str| match argument.split_once('=') {
            Some((flag, file)) => format!("{flag}={}", self.0.path().join(file).display()),
            None => (*argument).to_owned(),
        };
        arguments.iter().map(path).collect()
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.0.path().join(name), text).unwrap();
    }

    /// A server of the image encoder alone, which is ready.
    async fn encoder(&self, arguments: &[&str]) -> Server {
        let encoder = launch(&["--graph=image_encoder"], &self.arguments(arguments));
        eventually("the encoder is ready", async || encoder.is_ready().await).await;
        encoder
    }

    /// A server that calls the image encoder at this address.
    fn caller(&self, address: SocketAddr, arguments: &[&str]) -> Server {
        launch(&[&format!("--remote-graph=image_encoder={address}")], &self.arguments(arguments))
    }
}

fn launch(own: &[&str], more: &[String]) -> Server {
    let more = more.iter().map(String::as_str);
    let arguments: Vec<&str> = own.iter().copied().chain(more).collect();
    Server::launch(Artifacts::shared().path(), &arguments, |_| {})
}

async fn ask(server: &Server) -> Result<InferResponse, Status> {
    let parts = vec![image_part(&fixture::png(RED), ""), text_part(fixture::QUESTION)];
    server.multimodal().await.infer(parts_request("vqa", parts)).await.map(tonic::Response::into_inner)
}

async fn answers(server: &Server) {
    eventually("the server is ready", async || server.is_ready().await).await;
    assert_eq!(ask(server).await.unwrap().answers[0].text, "red");
}

/// Asks until the models are loaded, and gives the refusal.
async fn refusal(server: &Server) -> Status {
    eventually("the models are loaded", async || server.get(server.http, "/v2/models/tiny").await.0 == 200).await;
    ask(server).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encoder_has_to_prove_the_name_that_it_is_called_for() {
    let files = Files(certificates());
    let encoder = files.encoder(&["--tls-cert=named.pem", "--tls-key=named.key"]).await;
    let name = format!("--remote-tls-name {NAME}");
    let name: Vec<&str> = name.split(' ').collect();
    answers(&files.caller(encoder.grpc, &[&["--remote-tls-ca=ca.pem"], &name[..]].concat())).await;

    // Without a name it is that of the address, and the certificate is for another.
    let status = refusal(&files.caller(encoder.grpc, &["--remote-tls-ca=ca.pem"])).await;
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("not valid for name"), "{status}");
    // One of another authority is nobody.
    let strange = Files(certificates());
    let status = refusal(&strange.caller(encoder.grpc, &[&["--remote-tls-ca=ca.pem"], &name[..]].concat())).await;
    assert!(status.message().contains("invalid peer certificate"), "{status}");
    // Nothing is sent in plain text to whoever asks for more, and nothing over TLS is answered in plain text.
    assert_eq!(refusal(&files.caller(encoder.grpc, &[])).await.code(), Code::Unavailable);
    let open = files.encoder(&[]).await;
    assert_eq!(refusal(&files.caller(open.grpc, &["--remote-tls-ca=ca.pem"])).await.code(), Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_share_a_certificate_know_each_other_without_an_authority() {
    let files = Files(tempfile::tempdir().unwrap());
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap();
    files.write("tls.crt", &made.cert.pem());
    files.write("tls.key", &made.signing_key.serialize_pem());
    let own = ["--tls-cert=tls.crt", "--tls-key=tls.key"];
    let encoder = files.encoder(&own).await;
    let called = ["--remote-tls-ca=ca.crt", "--remote-tls-name", NAME];
    let server = files.caller(encoder.grpc, &[&own[..], &called].concat());
    eventually("the server is ready", async || server.is_ready().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encoder_that_asks_for_a_certificate_and_a_token_is_shown_both() {
    let files = Files(certificates());
    files.write("tokens", OLD);
    let own = ["--tls-cert=named.pem", "--tls-key=named.key"];
    let asks = ["--tls-client-ca=ca.pem", "--auth-tokens=tokens"];
    let encoder = files.encoder(&[&own[..], &asks].concat()).await;
    let called = ["--remote-tls-ca=ca.pem", "--remote-tls-name", NAME, "--remote-tokens=tokens"];
    let server = files.caller(encoder.grpc, &[&own[..], &called].concat());
    eventually("the server is ready", async || server.is_ready().await).await;
    // Without a certificate of its own it is let in nowhere.
    let stranger = files.caller(encoder.grpc, &called);
    assert_eq!(refusal(&stranger).await.code(), Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_rotated_is_never_missed_by_either_side() {
    let files = Files(tempfile::tempdir().unwrap());
    files.write("accepted", OLD);
    files.write("shown", OLD);
    let encoder = files.encoder(&["--auth-tokens=accepted"]).await;
    let server = files.caller(encoder.grpc, &["--remote-tokens=shown"]);
    answers(&server).await;
    let status = refusal(&files.caller(encoder.grpc, &[])).await;
    assert!(status.message().contains("the request has no token"), "{status}");

    // The encoder has read the file without the old token before the server has: it is shown the next one.
    files.write("shown", &[OLD, NEW].concat());
    tokio::time::sleep(Duration::from_secs(6)).await;
    files.write("accepted", NEW);
    let refused = async || {
        let metadata = sensorium_proto::inference::ServerMetadataRequest {};
        let mut request = tonic::Request::new(metadata);
        request.metadata_mut().insert("authorization", "Bearer 0123456789abcdef".parse().unwrap());
        encoder.inference().await.server_metadata(request).await.is_err()
    };
    eventually("the old token is refused", refused).await;
    answers(&server).await;
    files.write("accepted", "other 00000000000000000000\n");
    eventually("the last token is refused", async || {
        ask(&server).await.is_err_and(|status| status.message().contains("not one of this server's"))
    })
    .await;
}

#[test]
fn tokens_and_keys_are_named_and_not_shown_when_a_server_starts() {
    let files = Files(certificates());
    files.write("tokens", OLD);
    let server = env!("CARGO_BIN_EXE_sensorium-server");
    let model = format!("tiny=file://{}/tiny", Artifacts::shared().path().display());
    let arguments = files.arguments(&["--remote-tls-ca=named.key", "--remote-tokens=tokens"]);
    let remote = ["--remote-graph=image_encoder=127.0.0.1:1", "--grpc-addr=127.0.0.1:0", "--http-addr=127.0.0.1:0"];
    let mut command = std::process::Command::new(server);
    command.args(["--model", &model, "--metrics-addr=127.0.0.1:0"]).args(remote).args(&arguments);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("named.key cannot be used"), "{said}");
    assert!(!said.contains("0123456789abcdef") && !said.contains("PRIVATE KEY"), "{said}");
}

//! Graphs that other servers run.

use std::{net::SocketAddr, path::Path, time::Duration};

use sensorium_artifact::{Store, Volumes};
use sensorium_engine::fixture;
use sensorium_proto::{
    inference::{
        InferParameter, ModelMetadataRequest, ModelStatisticsRequest, RepositoryIndexRequest,
        infer_parameter::ParameterChoice,
    },
    multimodal::InferResponse,
};
use tonic::{Code, Status};

use crate::harness::{Artifacts, Server, eventually, floats, image_part, input, parts_request, raw_request, text_part};

const COLORS: [[u8; 3]; 3] = [[200, 30, 30], [10, 180, 90], [0, 60, 240]];

/// A server of the image encoder alone, of the artifact `tiny` of a store.
fn encoder(store: &Path, address: &str) -> Server {
    Server::launch(store, &["--graph", "image_encoder", "--grpc-addr", address], |_| {})
}

/// A server that calls the image encoder at these addresses.
fn caller(addresses: &[SocketAddr]) -> Server {
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let remote = format!("image_encoder={}", addresses.join(","));
    Server::launch(Artifacts::shared().path(), &["--remote-graph", &remote], |_| {})
}

async fn ready(server: &Server) {
    eventually("the server is ready", async || server.is_ready().await).await;
}

async fn ask(server: &Server, color: [u8; 3]) -> Result<InferResponse, Status> {
    let parts = vec![image_part(&fixture::png(color), ""), text_part(fixture::QUESTION)];
    server.multimodal().await.infer(parts_request("vqa", parts)).await.map(tonic::Response::into_inner)
}

/// Requests to the encoder's graph that were answered; probes are none.
async fn answered(encoder: &Server) -> u64 {
    let request = ModelStatisticsRequest { name: "tiny.image_encoder".to_owned(), ..Default::default() };
    let statistics = encoder.inference().await.model_statistics(request).await.unwrap().into_inner();
    statistics.model_stats[0].inference_stats.as_ref().unwrap().success.as_ref().unwrap().count
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encoder_elsewhere_changes_no_answer() {
    let store = Artifacts::shared().path();
    let encoders = [encoder(store, "127.0.0.1:0"), encoder(store, "127.0.0.1:0")];
    for encoder in &encoders {
        ready(encoder).await;
    }
    let apart = caller(&[encoders[0].grpc, encoders[1].grpc]);
    ready(&apart).await;
    let together = Server::start(&[]).await;
    for color in COLORS {
        let (apart, together) = (ask(&apart, color).await.unwrap(), ask(&together, color).await.unwrap());
        assert_eq!(apart.model_digest, together.model_digest);
        assert_eq!(apart.answers[0].text, together.answers[0].text);
        // Kernels add in another order where memory begins at another place; f32 keeps seven digits.
        assert!((apart.answers[0].score - together.answers[0].score).abs() < 1e-6);
    }
    for encoder in &encoders {
        assert!(answered(encoder).await > 0, "both are asked");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_one_graph_has_that_one_and_says_of_which_artifact() {
    let encoder = Server::start(&["--graph", "image_encoder"]).await;
    let mut client = encoder.inference().await;
    let index = client.repository_index(RepositoryIndexRequest::default()).await.unwrap().into_inner();
    let names: Vec<&str> = index.models.iter().map(|model| model.name.as_str()).collect();
    assert_eq!(names, ["tiny.image_encoder"]);
    let request = ModelMetadataRequest { name: "tiny.image_encoder".to_owned(), ..Default::default() };
    let metadata = client.model_metadata(request).await.unwrap().into_inner();
    assert_eq!(metadata.properties["artifact_digest"], Artifacts::shared().digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_meant_for_another_artifact_is_refused() {
    let server = Server::start(&[]).await;
    let infer = async |digest: &str| {
        let pixels = (input("pixel_values", "FP32", &[1, 3, 8, 8]), floats(&[0.5; 192]));
        let mut request = raw_request("tiny.image_encoder", vec![pixels]);
        let digest = InferParameter { parameter_choice: Some(ParameterChoice::StringParam(digest.to_owned())) };
        request.parameters.insert("artifact_digest".to_owned(), digest);
        server.inference().await.model_infer(request).await
    };
    let own = &Artifacts::shared().digest;
    infer(own).await.unwrap();
    let status = infer("sha256:00").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains(own.as_str()) && status.message().contains("sha256:00"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_too_large_for_a_message_to_its_encoder_goes_in_several() {
    // Two rows of 768 bytes each and what is around them, but not three.
    let limit = ["--max-request-bytes", "2300"];
    let store = Artifacts::shared().path();
    let encoder = Server::launch(store, &[&limit[..], &["--graph", "image_encoder"]].concat(), |_| {});
    let remote = format!("image_encoder={}", encoder.grpc);
    let more = ["--remote-graph", &remote, "--max-queue-delay-microseconds", "100000", "--max-batch-size", "8"];
    let server = Server::launch(store, &[&limit[..], &more].concat(), |_| {});
    ready(&server).await;
    let answers = futures::future::join_all(COLORS.iter().cycle().take(12).map(|color| ask(&server, *color))).await;
    for (answer, text) in answers.into_iter().zip(["red", "green", "blue"].into_iter().cycle()) {
        assert_eq!(answer.unwrap().answers[0].text, text);
    }
    let batches = async |most: &str| {
        let name = format!("sensorium_server_batch_rows_bucket{{le=\"{most}\",model=\"tiny.image_encoder\"}}");
        server.sample(&name).await.unwrap()
    };
    assert!(batches("2.0").await < batches("+Inf").await, "some of them were larger");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encoder_of_another_artifact_makes_no_server_ready() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("file://{}", folder.path().display()), &Volumes::default()).unwrap();
    // The same graphs under another name are another artifact.
    let other = fixture::commit(&store, "other").await.unwrap();
    store.promote("tiny", &other.digest).await.unwrap();
    let encoder = encoder(folder.path(), "127.0.0.1:0");
    ready(&encoder).await;
    let server = caller(&[encoder.grpc]);
    eventually("the models are loaded", async || server.get(server.http, "/v2/models/tiny").await.0 == 200).await;
    let status = ask(&server, COLORS[0]).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains(&other.digest.to_string()), "{status}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!server.is_ready().await, "probes run through the encoder, too");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_ready_once_its_encoder_answers_and_goes_on_when_that_comes_back() {
    let store = Artifacts::shared().path();
    let first = encoder(store, "127.0.0.1:0");
    let address = first.grpc;
    drop(first);
    let server = caller(&[address]);
    eventually("the models are loaded", async || server.get(server.http, "/v2/models/tiny").await.0 == 200).await;
    let status = ask(&server, COLORS[0]).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains(&address.to_string()), "{status}");
    assert!(!server.is_ready().await);

    let second = encoder(store, &address.to_string());
    ready(&server).await;
    assert_eq!(ask(&server, COLORS[0]).await.unwrap().answers[0].text, "red");
    drop(second);
    let third = encoder(store, &address.to_string());
    ready(&third).await;
    assert_eq!(ask(&server, COLORS[1]).await.unwrap().answers[0].text, "green");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graph_that_the_artifact_has_not_is_refused_with_those_it_has() {
    let store = Artifacts::shared().path();
    for flag in ["--graph=sound_encoder", "--remote-graph=sound_encoder=127.0.0.1:1"] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_sensorium-server"));
        command.arg("--model").arg(format!("tiny=file://{}/tiny", store.display())).args([flag, "--check"]);
        let output = command.output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        assert!(
            errors.contains("no graph \\\"sound_encoder\\\"; it has") && errors.contains("image_encoder"),
            "{errors}"
        );
    }
}

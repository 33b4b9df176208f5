//! What a proper client gets: the six core calls, typed parts, health and metrics.

use std::time::Duration;

use sensorium_engine::fixture::{self, QUESTION};
use sensorium_proto::{
    inference::{
        CudaSharedMemoryRegisterRequest, CudaSharedMemoryStatusRequest, CudaSharedMemoryUnregisterRequest,
        InferTensorContents, ModelInferRequest, ModelMetadataRequest, ModelReadyRequest, ServerLiveRequest,
        ServerMetadataRequest, ServerReadyRequest, model_infer_request::InferRequestedOutputTensor,
    },
    multimodal::{InferParameters, InferRequest},
};
use tonic::{Code, codec::CompressionEncoding};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::harness::{
    Artifacts, Server, bytes_tensor, eventually, floats, image_part, input, output_floats, parts_request, raw_request,
    tensor_question, text_part,
};

#[tokio::test(flavor = "multi_thread")]
async fn the_six_core_calls_are_answered() {
    let server = Server::start(&[]).await;
    let mut client = server.inference().await;

    assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    for (name, version, ready) in
        [("tiny", "", true), ("tiny.fusion", "1", true), ("tiny", "2", false), ("other", "", false)]
    {
        let request = ModelReadyRequest { name: name.to_owned(), version: version.to_owned() };
        assert_eq!(client.model_ready(request).await.unwrap().into_inner().ready, ready, "{name} {version}");
    }
    let metadata = client.server_metadata(ServerMetadataRequest {}).await.unwrap().into_inner();
    assert_eq!(metadata.name, "sensorium");
    // perf_analyzer reads statistics only where this says so.
    assert!(metadata.extensions.iter().any(|extension| extension == "statistics"));
    assert!(!metadata.extensions.iter().any(|extension| extension == "trace"), "without a collector there is none");

    let metadata = async |name: &str| {
        let request = ModelMetadataRequest { name: name.to_owned(), version: String::new() };
        let metadata = client.clone().model_metadata(request).await.unwrap().into_inner();
        let tensors = metadata.inputs.into_iter().chain(metadata.outputs);
        tensors.map(|tensor| format!("{} {} {:?}", tensor.name, tensor.datatype, tensor.shape)).collect::<Vec<_>>()
    };
    assert_eq!(metadata("tiny").await, ["image BYTES [-1]", "text BYTES [-1]", "answer BYTES [-1]", "score FP32 [-1]"]);
    assert_eq!(
        metadata("tiny.image_encoder").await,
        ["pixel_values FP32 [-1, 3, 8, 8]", "image_features FP32 [-1, 1, 4]", "image_embedding FP32 [-1, 3]"]
    );

    let request =
        ModelInferRequest { id: "seven".to_owned(), ..tensor_question(&fixture::png([10, 20, 200]), QUESTION) };
    let response = client.model_infer(request).await.unwrap().into_inner();
    assert_eq!(
        (response.model_name.as_str(), response.model_version.as_str(), response.id.as_str()),
        ("tiny", "1", "seven")
    );
    assert_eq!(response.raw_output_contents[0], bytes_tensor(&[b"blue"]));
    assert!(output_floats(&response, "score")[0] > 0.9);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_questions_is_answered_row_by_row() {
    let server = Server::start(&[]).await;
    let (red, green) = (fixture::png([200, 0, 0]), fixture::png([0, 200, 0]));
    let column = |name: &str, items: &[&[u8]]| (input(name, "BYTES", &[3]), bytes_tensor(items));
    let request = raw_request(
        "tiny",
        vec![
            column("text", &[QUESTION.as_bytes(), b"What shape is it?", QUESTION.as_bytes()]),
            column("image", &[&red, &red, &green]),
        ],
    );
    let response = server.inference().await.model_infer(request).await.unwrap().into_inner();
    assert_eq!(response.raw_output_contents[0], bytes_tensor(&[b"red", b"unsure", b"green"]));
    assert_eq!(response.outputs[1].shape, [3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graph_takes_raw_and_typed_tensors_and_returns_the_outputs_asked_for() {
    let server = Server::start(&[]).await;
    let mut client = server.inference().await;
    let pixels: Vec<f32> = (0..192).map(|pixel| pixel as f32 / 192.0).collect();
    let tensor = || input("pixel_values", "FP32", &[1, 3, 8, 8]);
    let raw = raw_request("tiny.image_encoder", vec![(tensor(), floats(&pixels))]);
    let mut typed = ModelInferRequest { raw_input_contents: vec![], ..raw.clone() };
    typed.inputs[0].contents = Some(InferTensorContents { fp32_contents: pixels, ..Default::default() }.into());
    typed.outputs = vec![InferRequestedOutputTensor { name: "image_embedding".to_owned(), ..Default::default() }];
    let raw = client.model_infer(raw).await.unwrap().into_inner();
    let typed = client.model_infer(typed).await.unwrap().into_inner();
    assert_eq!(raw.outputs.len(), 2);
    assert_eq!(typed.outputs.len(), 1);
    // Kernels add in another order where memory begins at another place; f32 keeps seven digits.
    for (raw, typed) in output_floats(&raw, "image_embedding").iter().zip(output_floats(&typed, "image_embedding")) {
        assert!((raw - typed).abs() < 1e-6, "{raw} is not {typed}");
    }
    assert!(output_floats(&raw, "image_features")[2] > output_floats(&raw, "image_features")[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_requests_are_understood() {
    let server = Server::start(&[]).await;
    for encoding in [CompressionEncoding::Gzip, CompressionEncoding::Deflate] {
        let mut client = server.inference().await.send_compressed(encoding);
        let request = tensor_question(&fixture::png([200, 0, 0]), QUESTION);
        let response = client.model_infer(request).await.unwrap().into_inner();
        assert_eq!(response.raw_output_contents[0], bytes_tensor(&[b"red"]), "{encoding:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn typed_parts_are_answered_with_ranked_answers_and_the_artifacts_digest() {
    let server = Server::start(&[]).await;
    let mut client = server.multimodal().await;
    let green = fixture::png([0, 200, 180]);
    let mut request = parts_request("", vec![text_part(QUESTION), image_part(&green, "image/png")]);
    request.id = "seven".to_owned();
    let one = client.infer(request.clone()).await.unwrap().into_inner();
    assert_eq!((one.model.as_str(), one.id.as_str(), one.task.as_str()), ("tiny", "seven", "vqa"));
    assert_eq!(one.model_digest, Artifacts::shared().digest);
    assert_eq!(one.answers.len(), 1);
    request.parameters = Some(InferParameters { top_k: 100 });
    let all = client.infer(request).await.unwrap().into_inner();
    let names: Vec<_> = all.answers.iter().map(|answer| answer.text.as_str()).collect();
    assert_eq!(names[..2], ["green", "blue"]);
    assert_eq!(names.len(), fixture::ANSWERS.len());
    let sum: f32 = all.answers.iter().map(|answer| answer.score).sum();
    assert!((sum - 1.0).abs() < 1e-5, "{sum}");
    assert!(all.answers.is_sorted_by(|a, b| a.score >= b.score));
    assert!((all.answers[0].score - one.answers[0].score).abs() < 1e-6);
}

#[tokio::test(flavor = "multi_thread")]
async fn typed_parts_count_as_requests_to_their_model_which_may_not_be_ready_or_take_tensors() {
    let server = Server::start(&["--model-control-mode", "explicit"]).await;
    let ask = async |model: &str| {
        let parts = vec![text_part(QUESTION), image_part(&fixture::png([0, 200, 180]), "")];
        let request = InferRequest { model: model.to_owned(), ..parts_request("", parts) };
        server.multimodal().await.infer(request).await
    };
    ask("tiny").await.unwrap();
    let two_images = vec![image_part(&fixture::png([0, 200, 180]), ""); 2];
    server.multimodal().await.infer(parts_request("vqa", two_images)).await.unwrap_err();
    let statistics = server.json("/v2/models/tiny/stats").await["model_stats"][0].clone();
    let counts = |name: &str| statistics["inference_stats"][name]["count"].as_u64();
    assert_eq!((counts("success"), counts("fail")), (Some(1), Some(1)), "{statistics}");
    assert_eq!((statistics["inference_count"].as_u64(), statistics["execution_count"].as_u64()), (Some(1), Some(1)));

    let status = ask("tiny.fusion").await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::InvalidArgument, "model \"tiny.fusion\" takes tensors: call ModelInfer")
    );
    assert_eq!(ask("other").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(server.post("/v2/repository/models/tiny/unload", &[], b"").await.status, 200);
    let status = ask("tiny").await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "model \"tiny\" is not ready: unloaded"));
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_are_embedded_in_their_own_order() {
    let server = Server::start(&[]).await;
    let (red, blue) = (fixture::png([255, 0, 0]), fixture::png([0, 0, 255]));
    let parts = vec![text_part("a blue image"), image_part(&red, ""), image_part(&blue, ""), text_part("a red image")];
    let response = server.multimodal().await.infer(parts_request("embed", parts)).await.unwrap().into_inner();
    let modalities: Vec<_> = response.embeddings.iter().map(|embedding| embedding.modality.as_str()).collect();
    assert_eq!(modalities, ["text", "image", "image", "text"]);
    let similarity = |a: usize, b: usize| -> f32 {
        response.embeddings[a].values.iter().zip(&response.embeddings[b].values).map(|(a, b)| a * b).sum()
    };
    assert!(similarity(0, 2) > similarity(0, 1) && similarity(3, 1) > similarity(3, 2), "{:?}", response.embeddings);
}

#[tokio::test(flavor = "multi_thread")]
async fn cuda_memory_is_not_here_and_says_so() {
    let server = Server::start(&[]).await;
    let mut client = server.inference().await;
    let status = client.cuda_shared_memory_register(CudaSharedMemoryRegisterRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().contains("does not read CUDA shared memory"), "{status:?}");
    // Clients clear regions before they begin, whether they use any or not.
    client.cuda_shared_memory_unregister(CudaSharedMemoryUnregisterRequest::default()).await.unwrap();
    let regions = client.cuda_shared_memory_status(CudaSharedMemoryStatusRequest::default()).await.unwrap();
    assert!(regions.into_inner().regions.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_metrics_are_told_by_every_means() {
    let server = Server::start(&[]).await;
    for path in ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready"] {
        assert_eq!(server.get(server.http, path).await.0, 200, "{path}");
    }
    let mut health = HealthClient::new(server.channel().await);
    for service in ["", "inference.GRPCInferenceService", "sensorium.v1.MultimodalService"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let status = health.check(request).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::Serving, "{service:?}");
    }
    let other = || HealthCheckRequest { service: "other".to_owned() };
    assert_eq!(health.check(other()).await.unwrap_err().code(), Code::NotFound);
    let mut watched = health.watch(other()).await.unwrap().into_inner();
    assert_eq!(watched.message().await.unwrap().unwrap().status(), ServingStatus::ServiceUnknown);
    let more = tokio::time::timeout(Duration::from_millis(200), watched.message()).await;
    assert!(more.is_err(), "it waits for the service, and does not end: {more:?}");
    let request = tensor_question(&fixture::png([200, 0, 0]), QUESTION);
    server.inference().await.model_infer(request.clone()).await.unwrap();
    let unknown = ModelInferRequest { model_name: "elsewhere".to_owned(), ..request };
    assert_eq!(server.inference().await.model_infer(unknown).await.unwrap_err().code(), Code::NotFound);
    for (sample, value) in [
        ("sensorium_server_ready", 1.0),
        ("sensorium_server_requests_total{model=\"tiny\",code=\"OK\"}", 1.0),
        ("sensorium_server_requests_total{model=\"unknown\",code=\"NOT_FOUND\"}", 1.0),
        ("nv_inference_request_success{model=\"tiny\",version=\"1\"}", 1.0),
    ] {
        assert_eq!(server.sample(sample).await, Some(value), "{sample}");
    }
    // A request is answered before it is counted. The probes of health count nowhere.
    let runs = "sensorium_server_run_seconds_count{model=\"tiny.fusion\"}";
    eventually("the run is counted", async || server.sample(runs).await == Some(1.0)).await;
}

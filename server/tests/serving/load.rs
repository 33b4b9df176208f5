//! Many clients at once: batches form, and nobody gets another's answer.

use std::sync::Arc;

use sensorium_artifact::{Store, Volumes};
use sensorium_engine::{LocalPipeline, Options, fixture};
use tokio::{sync::Barrier, task::JoinSet};

use crate::harness::{
    Artifacts, Server, floats, image_part, input, output_floats, parts_request, raw_request, text_part,
};

const CLIENTS: usize = 200;
const REQUESTS_EACH: usize = 5;
/// Kernels sum in another order for another number of rows; f32 keeps seven digits.
const TOLERANCE: f32 = 1e-5;

/// What the model says about each image when it is asked alone, in process.
async fn alone(images: &[Vec<u8>]) -> Vec<(String, f32)> {
    let store = Store::open(&format!("file://{}", Artifacts::shared().path().display()), &Volumes::default()).unwrap();
    let artifact = store.resolve("tiny").await.unwrap();
    let folder = store.fetch(&artifact, Artifacts::shared().path()).await.unwrap();
    let pipeline = LocalPipeline::open(&folder, &artifact.manifest, Options::default()).unwrap();
    images
        .iter()
        .map(|image| {
            let answer = pipeline.vqa(&[(image, fixture::QUESTION)]).unwrap().remove(0);
            (answer.answer, answer.score)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_clients_get_their_own_answers_out_of_shared_batches() {
    let server = Server::start(&["--max-batch-size", "16"]).await;
    // Every image is another colour, so every score is another number.
    let images: Vec<Vec<u8>> = (0..CLIENTS)
        .map(|client| fixture::png([client as u8, (client * 7 % 256) as u8, (client * 31 % 256) as u8]))
        .collect();
    let expected = Arc::new(alone(&images).await);
    let start = Arc::new(Barrier::new(CLIENTS));
    let mut clients = JoinSet::new();
    for (client, image) in images.into_iter().enumerate() {
        let (start, expected) = (start.clone(), expected.clone());
        let mut multimodal = server.multimodal().await;
        let mut inference = server.inference().await;
        clients.spawn(async move {
            start.wait().await;
            for request in 0..REQUESTS_EACH {
                let parts = vec![image_part(&image, "image/png"), text_part(fixture::QUESTION)];
                let response = multimodal.infer(parts_request("vqa", parts)).await.unwrap().into_inner();
                let (answer, score) = &expected[client];
                assert_eq!(&response.answers[0].text, answer, "client {client}");
                assert!(
                    (response.answers[0].score - score).abs() < TOLERANCE,
                    "client {client}: {} is not {score}",
                    response.answers[0].score
                );

                // A graph by itself, with another number of rows each time: an image of one value has that average.
                let rows = 1 + (client + request) % 4;
                let value = |row: usize| (client * 10 + row) as f32;
                let pixels: Vec<f32> = (0..rows).flat_map(|row| vec![value(row); 192]).collect();
                let tensor = input("pixel_values", "FP32", &[rows as i64, 3, 8, 8]);
                let request = raw_request("tiny.image_encoder", vec![(tensor, floats(&pixels))]);
                let response = inference.model_infer(request).await.unwrap().into_inner();
                let features = output_floats(&response, "image_features");
                assert_eq!(features.len(), rows * 4);
                for (row, features) in features.chunks(4).enumerate() {
                    let own = features[..3].iter().all(|mean| (mean - value(row)).abs() <= value(row) * TOLERANCE);
                    assert!(own, "client {client}, row {row}: {features:?}");
                }
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    let sample = async |name: &str| server.sample(&format!("{name}{{model=\"tiny.image_encoder\"}}")).await.unwrap();
    let (rows, runs) =
        (sample("sensorium_server_batch_rows_sum").await, sample("sensorium_server_batch_rows_count").await);
    assert!(rows >= (CLIENTS * REQUESTS_EACH * 2) as f64, "{rows} rows");
    assert!(runs < (CLIENTS * REQUESTS_EACH * 2) as f64, "{runs} runs: no batch ever formed");
}

#[tokio::test(flavor = "multi_thread")]
async fn under_overload_every_request_is_answered_or_refused_with_the_limit() {
    let server = Server::start(&["--max-batch-size", "1", "--max-queue-size", "1"]).await;
    let mut clients = JoinSet::new();
    for _ in 0..64 {
        let mut client = server.multimodal().await;
        clients.spawn(async move {
            let mut outcomes = Vec::new();
            for _ in 0..5 {
                let parts = vec![image_part(&fixture::png([0, 0, 200]), ""), text_part(fixture::QUESTION)];
                outcomes.push(client.infer(parts_request("vqa", parts)).await.map(tonic::Response::into_inner));
            }
            outcomes
        });
    }
    let (mut answered, mut refused) = (0, 0);
    while let Some(outcomes) = clients.join_next().await {
        for outcome in outcomes.unwrap() {
            match outcome {
                Ok(response) => {
                    assert_eq!(response.answers[0].text, "blue");
                    answered += 1;
                }
                Err(status) => {
                    assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status:?}");
                    assert!(status.message().contains("try again later"), "{status:?}");
                    refused += 1;
                }
            }
        }
    }
    assert!(answered > 0 && refused > 0, "{answered} answered, {refused} refused");
    let rejected = server.sample(r#"sensorium_server_requests_total{model="tiny",code="RESOURCE_EXHAUSTED"}"#).await;
    assert_eq!(rejected, Some(f64::from(refused)));
}

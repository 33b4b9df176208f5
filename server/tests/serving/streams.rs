//! Streams of gRPC whose requests wait for each other, and how they end.

use std::{fs, time::Duration};

use sensorium_onnx::{DType, Dim, GraphBuilder};
use sensorium_proto::inference::{InferParameter, ModelInferRequest, infer_parameter::ParameterChoice};
use tempfile::TempDir;
use tokio::time;
use tonic::{Code, Request};

use crate::harness::{Server, floats, input, output_floats, raw_request};

/// `y` is the sum of all `x` of a sequence. There are four seats, in which sequences may rest for a minute.
fn sums() -> TempDir {
    const CONFIG: &str = r#"max_batch_size: 4
        sequence_batching {
          max_sequence_idle_microseconds: 60000000
          direct { }
          state { input_name: "kept" output_name: "kept_out" data_type: TYPE_FP32 dims: [ 1 ] }
        }"#;
    let one = [Dim::Symbol("batch"), Dim::Fixed(1)];
    let mut graph = GraphBuilder::new("sums");
    let (x, kept) = (graph.input("x", DType::F32, &one), graph.input("kept", DType::F32, &one));
    let sum = graph.node("Add", &[&x, &kept], vec![]);
    let out = graph.node("Identity", &[&sum], vec![]);
    graph.output("y", &sum, DType::F32, &one);
    graph.output("kept_out", &out, DType::F32, &one);
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("sums/1")).unwrap();
    fs::write(folder.path().join("sums/1/model.onnx"), graph.finish(20).unwrap().to_bytes()).unwrap();
    fs::write(folder.path().join("sums/config.pbtxt"), CONFIG).unwrap();
    folder
}

fn step(sequence: i64, value: f32, [start, end]: [bool; 2]) -> ModelInferRequest {
    let request = raw_request("sums", vec![(input("x", "FP32", &[1, 1]), floats(&[value]))]);
    let parameters = [
        ("sequence_id", ParameterChoice::Int64Param(sequence)),
        ("sequence_start", ParameterChoice::BoolParam(start)),
        ("sequence_end", ParameterChoice::BoolParam(end)),
    ];
    let parameters =
        parameters.map(|(name, value)| (name.to_owned(), InferParameter { parameter_choice: Some(value) }));
    ModelInferRequest { parameters: parameters.into(), ..request }
}

#[tokio::test(flavor = "multi_thread")]
async fn sequences_that_wait_for_a_seat_do_not_keep_the_ends_of_others_from_being_read() {
    const SEQUENCES: i64 = 100;
    const STEPS: usize = 4;
    let models = sums();
    let server = Server::start(&["--model-repository", models.path().to_str().unwrap()]).await;
    // All that begins before anything that ends.
    let all = (0..STEPS).flat_map(|index| {
        (1..=SEQUENCES).map(move |sequence| step(sequence, sequence as f32, [index == 0, index == STEPS - 1]))
    });
    let requests = tokio_stream::iter(all.collect::<Vec<_>>());
    let mut answers = server.inference().await.model_stream_infer(requests).await.unwrap().into_inner();
    let mut found = Vec::new();
    let all = async {
        while let Some(answer) = answers.message().await.unwrap() {
            assert_eq!(answer.error_message, "");
            found.push(output_floats(answer.infer_response.as_ref().unwrap(), "y")[0]);
        }
    };
    time::timeout(Duration::from_secs(40), all).await.expect("nobody waits for what is not read");
    let sums = (1..=STEPS).flat_map(|count| (1..=SEQUENCES).map(move |sequence| (count * sequence as usize) as f32));
    assert_eq!(found, sums.collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_ends_a_stream_whose_client_wants_that_and_no_other() {
    let models = sums();
    let server = Server::start(&["--model-repository", models.path().to_str().unwrap()]).await;
    let ask = async |wanted: Option<&'static str>| {
        let requests = [step(1, 1.0, [false, false]), step(1, 1.0, [true, true])];
        let mut request = Request::new(tokio_stream::iter(requests));
        if let Some(wanted) = wanted {
            request.metadata_mut().insert("triton_grpc_error", wanted.parse().unwrap());
        }
        server.inference().await.model_stream_infer(request).await.unwrap().into_inner()
    };
    for wanted in [None, Some("false")] {
        let mut answers = ask(wanted).await;
        let first = answers.message().await.unwrap().unwrap();
        assert!(first.error_message.contains("must specify the START flag"), "{first:?}");
        let second = answers.message().await.unwrap().unwrap();
        assert_eq!(output_floats(second.infer_response.as_ref().unwrap(), "y"), [1.0]);
        assert!(answers.message().await.unwrap().is_none());
    }
    let status = ask(Some("true")).await.message().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("must specify the START flag"), "{status:?}");
}

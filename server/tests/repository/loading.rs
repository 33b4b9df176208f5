//! What a repository holds and what is made of it.

use sensorium_engine::{RawTensor, fixture};
use sensorium_onnx::{DType as OnnxDType, Dim, GraphBuilder};
use sensorium_proto::inference::{DataType, model_config::SchedulingChoice};
use sensorium_server::{
    error::InferError,
    model::{NamedTensor, Request},
    repository::{ControlMode, LoadParameters},
};

use crate::bench::{Bench, answer, f32s, index, infer, request, scale, scale_three, write_artifact};

#[tokio::test]
async fn a_file_without_a_configuration_is_completed_from_its_signature() {
    let bench = Bench::new();
    bench.write("scale", "1/model.onnx", scale(2.0, Some(2)));
    let registry = bench.open_all().await;
    assert_eq!(answer(&registry, "scale", &[2, 2], &[1.0, 2.0, 3.0, 4.0]).await, [2.0, 4.0, 6.0, 8.0]);
    let model = registry.model("scale", "").unwrap();
    let config = model.config();
    assert_eq!((config.name.as_str(), config.platform.as_str()), ("scale", "onnxruntime_onnx"));
    assert_eq!((config.backend.as_str(), config.max_batch_size), ("onnxruntime", 32));
    assert_eq!((config.input[0].dims.as_slice(), config.input[0].data_type()), (&[2][..], DataType::TypeFp32));
    assert!(matches!(config.scheduling_choice, Some(SchedulingChoice::DynamicBatching(_))));
    assert_eq!(model.inputs()[0].shape, [None, Some(2)], "clients see the batch");
}

#[tokio::test]
async fn a_model_without_a_batch_axis_takes_tensors_as_they_are() {
    let bench = Bench::new();
    bench.write("three", "1/model.onnx", scale_three(3.0));
    let registry = bench.open_all().await;
    assert_eq!(registry.model("three", "").unwrap().config().max_batch_size, 0);
    assert_eq!(answer(&registry, "three", &[3], &[1.0, 2.0, 3.0]).await, [3.0, 6.0, 9.0]);
    let error = infer(&registry, "three", request(f32s(&[1, 3], &[0.0; 3]))).await.unwrap_err();
    assert!(matches!(error, InferError::Invalid(_)), "{error}");
}

#[tokio::test]
async fn a_configuration_narrows_reshapes_and_renames_nothing() {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", scale(2.0, None)).write(
        "m",
        "config.pbtxt",
        r#"
        max_batch_size: 4
        input { name: "x" data_type: TYPE_FP32 dims: [ 2, 2 ] reshape { shape: 4 } }
        output { name: "y" data_type: TYPE_FP32 dims: [ 2, 2 ] reshape { shape: [ 4 ] } label_filename: "labels.txt" }
        instance_group [ { count: 2 kind: KIND_CPU } ]
        "#,
    );
    bench.write("m", "labels.txt", "cat\ndog\n");
    let registry = bench.open_all().await;
    let response = infer(&registry, "m", request(f32s(&[1, 2, 2], &[1.0; 4]))).await.unwrap();
    assert_eq!(response.outputs[0].tensor, f32s(&[1, 2, 2], &[2.0; 4]));
    let error = infer(&registry, "m", request(f32s(&[1, 4], &[1.0; 4]))).await.unwrap_err();
    assert!(matches!(error, InferError::Invalid(_)), "{error}");
    assert_eq!(registry.model("m", "").unwrap().label("y", 1), Some("dog"));
}

#[tokio::test]
async fn versions_are_served_as_the_policy_says() {
    let bench = Bench::new();
    bench.write("latest", "1/model.onnx", scale(1.0, None)).write("latest", "3/model.onnx", scale(3.0, None));
    bench.write("all", "1/model.onnx", scale(1.0, None)).write("all", "2/model.onnx", scale(2.0, None));
    bench.write("all", "config.pbtxt", "version_policy: { all { } }");
    let registry = bench.open_all().await;
    assert_eq!(
        (registry.versions("latest"), registry.versions("all")),
        (vec!["3".to_owned()], vec!["1".to_owned(), "2".to_owned()])
    );
    assert_eq!(answer(&registry, "all", &[1, 1], &[5.0]).await, [10.0], "the newest answers where none is named");
    let old = registry.model("all", "1").unwrap().infer(request(f32s(&[1, 1], &[5.0]))).await.unwrap();
    assert_eq!(old.outputs[0].tensor, f32s(&[1, 1], &[5.0]));
    let error = registry.model("latest", "1").unwrap_err();
    assert!(matches!(error, InferError::UnknownVersion { .. }), "{error}");
}

#[tokio::test]
async fn a_model_that_fails_says_why_and_harms_no_other() {
    let bench = Bench::new();
    bench.write("good", "1/model.onnx", scale(2.0, None));
    bench.write("typo", "1/model.onnx", scale(2.0, None)).write("typo", "config.pbtxt", "max_batch_size: 4\nfoo: 1");
    bench.write("broken", "1/model.onnx", "not a model");
    bench.write("empty", "config.pbtxt", "");
    bench.write("other", "1/model.onnx", scale_three(1.0)).write("other", "config.pbtxt", "max_batch_size: 8");
    bench.write("type", "1/model.onnx", scale(1.0, None));
    bench.write("type", "config.pbtxt", "input { name: \"x\" data_type: TYPE_INT64 dims: -1 }");
    bench.write("backend", "1/model.onnx", scale(1.0, None)).write(
        "backend",
        "config.pbtxt",
        "backend: \"tensorflow\"",
    );
    bench.write("crowd", "1/model.onnx", scale(1.0, None));
    bench.write("crowd", "config.pbtxt", "instance_group [ { count: 1000 }, { count: 1000000 } ]");
    let registry = bench.open_all().await;
    assert_eq!(answer(&registry, "good", &[1, 1], &[5.0]).await, [10.0]);
    let index = index(&registry);
    let line = |name: &str| index.iter().find(|line| line.starts_with(name)).unwrap().as_str();
    assert_eq!(line("good"), "good 1 READY");
    for (name, reason) in [
        ("typo", "config.pbtxt, line 2: "),
        ("broken", "model.onnx cannot be opened"),
        ("empty", "no folder of a version"),
        ("other", "max_batch_size 8, but the first size of `x` in its file is 3"),
        ("type", "input `x` is TYPE_INT64 in its configuration and TYPE_FP32 in its file"),
        ("crowd", "its instance_group has 1001000 instances, it may have 1024 at most"),
        ("backend", "asks for backend \"tensorflow\"; this server has onnxruntime"),
    ] {
        assert!(line(name).contains("UNAVAILABLE") && line(name).contains(reason), "{}", line(name));
    }
    let error = registry.model("typo", "").unwrap_err();
    assert!(matches!(&error, InferError::NotReady { reason, .. } if reason.contains("line 2")), "{error}");
    assert_eq!(registry.index(true).len(), 1);
}

#[tokio::test]
async fn a_model_is_warm_before_it_is_ready() {
    let bench = Bench::new();
    let warm = |data: &str| {
        format!(
            "max_batch_size: 4 model_warmup {{ name: \"w\" batch_size: 2 count: 3 inputs {{ key: \"x\" value {{ \
             data_type: TYPE_FP32 dims: 3 {data} }} }} }} parameters {{ key: \"enable_mem_arena\" value {{ string_value: \"0\" }} }}"
        )
    };
    bench.write("zero", "1/model.onnx", scale(2.0, None)).write("zero", "config.pbtxt", warm("zero_data: true"));
    bench.write("file", "1/model.onnx", scale(2.0, None)).write("file", "config.pbtxt", warm("input_data_file: \"x\""));
    bench.write("file", "warmup/x", [0; 24]);
    bench.write("none", "1/model.onnx", scale(2.0, None)).write("none", "config.pbtxt", warm("input_data_file: \"x\""));
    let registry = bench.open_all().await;
    assert!(registry.ready("zero", "") && registry.ready("file", ""), "{:?}", index(&registry));
    let none = registry.model("none", "").unwrap_err().to_string();
    assert!(none.contains("its model_warmup \"w\" input `x`") && none.contains("No such file"), "{none}");
    assert_eq!(registry.statistics("zero", "").unwrap()[0].execution_count, 0, "only requests are counted");
}

#[tokio::test]
async fn a_warm_up_that_no_memory_could_hold_is_a_reason_and_harms_no_other_model() {
    let bench = Bench::new();
    let warm = |rows: &str, size: &str, dtype: &str| {
        format!(
            "max_batch_size: 4 model_warmup {{ name: \"w\" batch_size: {rows} inputs {{ key: \"x\" value {{ \
             data_type: TYPE_{dtype} dims: {size} zero_data: true }} }} }}"
        )
    };
    let wide = "100000000000000";
    for (name, rows, size, dtype) in
        [("wide", "1", wide, "FP32"), ("words", "1", wide, "STRING"), ("many", "4000000000", "3", "FP32")]
    {
        bench.write(name, "1/model.onnx", scale(2.0, None)).write(name, "config.pbtxt", warm(rows, size, dtype));
    }
    bench.write("other", "1/model.onnx", scale(2.0, None));
    let registry = bench.open_all().await;
    let reason = |name: &str| registry.model(name, "").unwrap_err().to_string();
    for name in ["wide", "words"] {
        assert!(reason(name).contains("come to more than the 1073741824 bytes"), "{}", reason(name));
    }
    assert!(
        reason("many").contains("has batch_size 4000000000, and the model's max_batch_size is 4"),
        "{}",
        reason("many")
    );
    assert!(registry.ready("other", ""));
}

/// `y = x`, by way of rows of `width` numbers: fails where their number is no multiple of it.
fn picky(width: i64) -> Vec<u8> {
    let mut graph = GraphBuilder::new("picky");
    let x = graph.input("x", OnnxDType::F32, &[Dim::Symbol("batch"), Dim::Symbol("length")]);
    let inner = graph.vector_i64(&[-1, width]);
    let rows = graph.node("Reshape", &[&x, &inner], vec![]);
    let shape = graph.node("Shape", &[&x], vec![]);
    let y = graph.node("Reshape", &[&rows, &shape], vec![]);
    graph.output("y", &y, OnnxDType::F32, &[Dim::Symbol("batch"), Dim::Symbol("length")]);
    graph.finish(20).unwrap().to_bytes()
}

#[tokio::test]
async fn a_model_that_fails_at_all_it_is_given_says_so_and_does_not_replace_one_that_runs() {
    let bench = Bench::new();
    bench.write("patches", "1/model.onnx", picky(32));
    bench.write("broken", "1/model.onnx", picky(1009));
    bench.write("odd", "1/model.onnx", picky(1009)).write(
        "odd",
        "config.pbtxt",
        r#"max_batch_size: 4 model_warmup { name: "w" batch_size: 2 inputs { key: "x" value {
           data_type: TYPE_FP32 dims: 1009 zero_data: true } } }"#,
    );
    let registry = bench.open(ControlMode::Explicit, &["*"]).await;
    let index = index(&registry);
    let line = |name: &str| index.iter().find(|line| line.starts_with(name)).unwrap().as_str();
    assert_eq!(line("patches"), "patches 1 READY", "some shape of those that are tried is right");
    assert!(
        line("odd").starts_with("odd 1 READY its requests run one by one"),
        "its warm-up is proof: {}",
        line("odd")
    );
    assert!(line("broken").contains("READY") && line("broken").contains("model_warmup"), "{}", line("broken"));
    infer(&registry, "broken", request(f32s(&[1, 1], &[5.0]))).await.unwrap_err();
    assert_eq!(answer(&registry, "broken", &[1, 1009], &[5.0; 1009]).await, [5.0; 1009], "nobody guessed that");
    // One that takes the place of a good one does not get it.
    bench.write("patches", "1/model.onnx", picky(1013));
    registry.load("patches", LoadParameters::default()).await.unwrap_err();
    assert_eq!(answer(&registry, "patches", &[1, 32], &[5.0; 32]).await, [5.0; 32]);
    for graph in registry.graphs() {
        graph.probe(std::time::Duration::ZERO).await.expect("its engine answers, if only to refuse");
    }
}

#[tokio::test]
async fn instances_are_opened_side_by_side_and_all_serve() {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", scale(2.0, None)).write(
        "m",
        "config.pbtxt",
        "max_batch_size: 1 instance_group { count: 5 kind: KIND_CPU }",
    );
    let registry = bench.open_all().await;
    let all = (0..20).map(|value| infer(&registry, "m", request(f32s(&[1, 1], &[value as f32]))));
    for (value, response) in futures::future::join_all(all).await.into_iter().enumerate() {
        assert_eq!(response.unwrap().outputs[0].tensor, f32s(&[1, 1], &[value as f32 * 2.0]));
    }
}

#[tokio::test]
async fn an_artifact_in_a_version_folder_is_served_whole_and_verified() {
    let bench = Bench::new();
    write_artifact(&bench, &["tiny/2", "bad/1"]).await;
    bench.write("bad", "1/graphs/fusion.onnx", "another");
    let registry = bench.open_all().await;
    assert!(index(&registry).contains(&"tiny 2 READY".to_owned()), "{:?}", index(&registry));
    assert!(registry.ready("tiny.fusion", "2") && registry.multimodal("tiny").is_ok());
    let question = |name: &str, item: &[u8]| NamedTensor {
        name: name.to_owned(),
        tensor: RawTensor::from_strings(vec![1], &[item]).unwrap(),
    };
    let image = fixture::png([200, 30, 30]);
    let inputs = vec![question("image", &image), question("text", fixture::QUESTION.as_bytes())];
    let response = infer(&registry, "tiny", Request { inputs, ..Request::default() }).await.unwrap();
    assert_eq!(response.outputs[0].tensor.strings().collect::<Vec<_>>(), [b"red"]);
    let bad = registry.model("bad", "").unwrap_err().to_string();
    assert!(bad.contains("its file graphs/fusion.onnx is not the one that its manifest names"), "{bad}");
}

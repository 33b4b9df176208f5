//! Options of `dynamic_batching`, and what statistics say about them.

use std::time::Duration;

use futures::future::join_all;
use sensorium_onnx::{Attribute, DType as OnnxDType, Dim, GraphBuilder};
use sensorium_proto::inference::model_config::SchedulingChoice;
use sensorium_server::{error::InferError, model::Request, repository::Registry, scheduler::ScheduleError};

use crate::bench::{Bench, f32s, index, infer, request, scale};

async fn serve(config: &str) -> Registry {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", scale(2.0, None)).write("m", "config.pbtxt", config);
    let registry = bench.open_all().await;
    assert!(registry.ready("m", ""), "{:?}", registry.index(false));
    registry
}

fn one(values: &[f32]) -> Request {
    request(f32s(&[1, values.len() as i64], values))
}

/// Sizes of the batches that ran, with how many of each.
fn batches(registry: &Registry) -> Vec<(u64, u64)> {
    let statistics = registry.statistics("m", "").unwrap().remove(0);
    statistics.batch_stats.iter().map(|batch| (batch.batch_size, batch.compute_infer.unwrap().count)).collect()
}

#[tokio::test]
async fn a_preferred_size_is_sent_as_soon_as_it_is_there() {
    let registry =
        serve("max_batch_size: 8 dynamic_batching { preferred_batch_size: 4 max_queue_delay_microseconds: 20000000 }")
            .await;
    let four = (0..4).map(|value| infer(&registry, "m", one(&[value as f32])));
    for (value, response) in join_all(four).await.into_iter().enumerate() {
        let response = response.unwrap();
        assert_eq!(response.outputs[0].tensor, f32s(&[1, 1], &[value as f32 * 2.0]));
    }
    assert_eq!(batches(&registry), [(4, 1)]);
}

#[tokio::test]
async fn without_a_full_batch_the_delay_is_waited_for() {
    let registry = serve("max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 50000 }").await;
    let started = std::time::Instant::now();
    let three = (0..3).map(|value| infer(&registry, "m", one(&[value as f32])));
    assert!(join_all(three).await.iter().all(Result::is_ok));
    assert!(started.elapsed() >= Duration::from_millis(50));
    assert_eq!(batches(&registry), [(3, 1)]);
}

#[tokio::test]
async fn a_full_queue_and_a_timeout_are_answered_as_triton_does() {
    let registry = serve(
        "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 300000 default_queue_policy {
             max_queue_size: 1 default_timeout_microseconds: 200000 allow_timeout_override: true } }",
    )
    .await;
    let quick = Request { timeout: Some(Duration::from_millis(20)), ..one(&[1.0]) };
    let answers = join_all([infer(&registry, "m", quick), infer(&registry, "m", one(&[2.0]))]).await;
    let Err(InferError::Schedule(error)) = &answers[0] else { panic!("{:?}", answers[0]) };
    assert!(matches!(error, ScheduleError::TimedOut { .. }) && error.to_string().ends_with("Request timeout expired"));
    let Err(InferError::Schedule(error)) = &answers[1] else { panic!("{:?}", answers[1]) };
    assert!(matches!(error, ScheduleError::QueueFull { limit: 1, .. }), "{error}");
    assert!(error.to_string().contains("Exceeds maximum queue size"));
    assert_eq!(batches(&registry), [], "neither reached the engine");
    let statistics = registry.statistics("m", "1").unwrap().remove(0).inference_stats.unwrap();
    assert_eq!(statistics.fail.unwrap().count, 2);
}

#[tokio::test]
async fn requests_of_unequal_length_run_together_where_padding_is_right() {
    let registry = serve(
        r#"max_batch_size: 8
           dynamic_batching { preferred_batch_size: 2 max_queue_delay_microseconds: 20000000 }
           parameters { key: "padding" value { string_value: "x=0" } }"#,
    )
    .await;
    let (short, long) = (one(&[1.0, 2.0, 3.0, 4.0, 5.0]), one(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    let answers = join_all([infer(&registry, "m", short), infer(&registry, "m", long)]).await;
    let tensors: Vec<_> = answers.into_iter().map(|answer| answer.unwrap().outputs.remove(0).tensor).collect();
    assert_eq!(tensors[0], f32s(&[1, 5], &[2.0, 4.0, 6.0, 8.0, 10.0]), "what padding added is cut off");
    assert_eq!(tensors[1], f32s(&[1, 6], &[2.0, 4.0, 6.0, 8.0, 10.0, 12.0]));
    assert_eq!(batches(&registry), [(2, 1)]);
}

/// Twice `x`, as exporters write it that give each size a name of its own; and a convolution, whose output is shorter by two.
fn unnamed(is_shorter: bool) -> Vec<u8> {
    let mut graph = GraphBuilder::new("unnamed");
    let x = graph.input("x", OnnxDType::F32, &[Dim::Symbol("rows"), Dim::Symbol("length")]);
    let two = graph.scalar_f32(2.0);
    let mut y = graph.node("Mul", &[&x, &two], vec![]);
    if is_shorter {
        let slice = [("start", 2), ("end", i64::MAX), ("axis", 1)];
        let [start, end, axis] = slice.map(|(name, value)| graph.initializer_i64(name, &[1], [value]));
        y = graph.node("Slice", &[&y, &start, &end, &axis], vec![]);
    }
    graph.output("y", &y, OnnxDType::F32, &[Dim::Symbol("rows"), Dim::Symbol("Muly_dim_1")]);
    graph.finish(20).unwrap().to_bytes()
}

#[tokio::test]
async fn what_padding_adds_is_cut_off_also_where_no_name_says_where_it_is_and_refused_where_it_cannot_be() {
    let config = r#"max_batch_size: 8
        dynamic_batching { preferred_batch_size: 2 max_queue_delay_microseconds: 20000000 }
        parameters { key: "padding" value { string_value: "x=0" } }"#;
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", unnamed(false)).write("m", "config.pbtxt", config);
    bench.write("shorter", "1/model.onnx", unnamed(true)).write("shorter", "config.pbtxt", config);
    let registry = bench.open_all().await;
    let (short, long) = (one(&[1.0, 2.0, 3.0, 4.0, 5.0]), one(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    let answers = join_all([infer(&registry, "m", short), infer(&registry, "m", long)]).await;
    let tensors: Vec<_> = answers.into_iter().map(|answer| answer.unwrap().outputs.remove(0).tensor).collect();
    assert_eq!(tensors[0], f32s(&[1, 5], &[2.0, 4.0, 6.0, 8.0, 10.0]));
    assert_eq!(tensors[1], f32s(&[1, 6], &[2.0, 4.0, 6.0, 8.0, 10.0, 12.0]));
    assert_eq!(batches(&registry), [(2, 1)]);
    let refused = registry.index(false).into_iter().find(|entry| entry.name == "shorter").unwrap().reason;
    assert!(refused.contains("a size of output `y` is") && refused.contains("leave padding out"), "{refused}");
}

/// A softmax over all rows: the first size is open, and no batch.
fn shares() -> Vec<u8> {
    let sizes = [Dim::Symbol("rows"), Dim::Symbol("length")];
    let mut graph = GraphBuilder::new("shares");
    let x = graph.input("x", OnnxDType::F32, &sizes);
    let y = graph.node("Softmax", &[&x], vec![Attribute::int("axis", 0)]);
    graph.output("y", &y, OnnxDType::F32, &sizes);
    graph.finish(20).unwrap().to_bytes()
}

/// What is over or under the mean of all rows.
fn centred() -> Vec<u8> {
    let sizes = [Dim::Symbol("rows"), Dim::Fixed(512)];
    let mut graph = GraphBuilder::new("centred");
    let x = graph.input("x", OnnxDType::F32, &sizes);
    let mean = graph.node("ReduceMean", &[&x], vec![Attribute::int("keepdims", 0)]);
    let y = graph.node("Sub", &[&x, &mean], vec![]);
    graph.output("y", &y, OnnxDType::F32, &sizes);
    graph.finish(20).unwrap().to_bytes()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_put_together_unasked_only_where_rows_have_nothing_to_do_with_each_other() {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", shares()).write("apart", "1/model.onnx", scale(2.0, None));
    bench.write("centred", "1/model.onnx", centred());
    let registry = bench.open_all().await;
    let many = (0..50).map(|value| infer(&registry, "m", one(&[value as f32])));
    for response in join_all(many).await {
        assert_eq!(response.unwrap().outputs[0].tensor, f32s(&[1, 1], &[1.0]), "a row alone is all there is");
    }
    assert_eq!(batches(&registry), [(1, 50)]);
    let is_dynamic = |name: &str| {
        let model = registry.model(name, "").unwrap();
        matches!(model.config().scheduling_choice, Some(SchedulingChoice::DynamicBatching(_)))
    };
    assert!(is_dynamic("apart") && !is_dynamic("m") && !is_dynamic("centred"), "and the configuration says so");
    let two = infer(&registry, "m", request(f32s(&[2, 1], &[0.0, 0.0]))).await.unwrap();
    assert_eq!(two.outputs[0].tensor, f32s(&[2, 1], &[0.5, 0.5]), "rows of a request stay together");
    let many = infer(&registry, "m", request(f32s(&[100, 1], &[0.0; 100]))).await.unwrap();
    assert_eq!(many.outputs[0].tensor, f32s(&[100, 1], &[0.01; 100]), "however many they are: they are no batch");
    let index = index(&registry);
    assert_eq!(index[0], "apart 1 READY");
    assert!(index[2].starts_with("m 1 READY its requests run one by one"), "{}", index[2]);
    assert!(index[2].contains("rows of output `y`"), "{}", index[2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_writes_that_entangled_rows_are_put_together_has_it_and_hears_of_it() {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", shares()).write("m", "config.pbtxt", "max_batch_size: 8 dynamic_batching { }");
    let registry = bench.open_all().await;
    let line = &index(&registry)[0];
    assert!(line.starts_with("m 1 READY rows of output `y`") && line.contains("max_batch_size: 0"), "{line}");
    assert_eq!(registry.model("m", "").unwrap().config().max_batch_size, 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_that_says_all_but_how_to_put_requests_together_does_not_want_it() {
    let registry = serve(
        r#"max_batch_size: 8
           input { name: "x" data_type: TYPE_FP32 dims: -1 }
           output { name: "y" data_type: TYPE_FP32 dims: -1 }"#,
    )
    .await;
    let many = (0..50).map(|value| infer(&registry, "m", one(&[value as f32])));
    assert!(join_all(many).await.iter().all(Result::is_ok));
    infer(&registry, "m", request(f32s(&[3, 1], &[0.0; 3]))).await.unwrap();
    assert_eq!(batches(&registry), [(1, 50), (3, 1)]);
}

#[tokio::test]
async fn options_that_make_no_sense_are_reasons() {
    for (config, reason) in [
        (
            "max_batch_size: 4 dynamic_batching { preferred_batch_size: 8 }",
            "preferred_batch_size 8, which must be 1 to",
        ),
        ("max_batch_size: 4 dynamic_batching { priority_levels: 2 }", "no default_priority_level"),
        ("max_batch_size: 4 instance_group { count: -1 }", "count -1, it must be at least 1"),
        ("parameters { key: \"intra_op_thread_count\" value { string_value: \"all\" } }", "it must be a number"),
        ("parameters { key: \"padding\" value { string_value: \"z=0\" } }", "padding names input `z`"),
    ] {
        let bench = Bench::new();
        bench.write("m", "1/model.onnx", scale(2.0, None)).write("m", "config.pbtxt", config);
        let index = bench.open_all().await.index(false);
        assert!(index[0].reason.contains(reason), "{index:?}");
    }
}

//! Models whose requests belong together.

use std::time::Duration;

use futures::{future::join_all, poll};
use sensorium_onnx::{Attribute, DType, Dim, GraphBuilder};
use sensorium_proto::inference::model_config::SchedulingChoice;
use sensorium_server::{
    error::InferError,
    model::{Request, Sequence, SequenceError, SequenceId},
    repository::Registry,
    scheduler::ScheduleError,
};

use crate::bench::{Bench, f32s, infer, request, scale};

/// `total' = total * (1 - start) + x`, where `total` is the sequence's state; `y` is the new total, `id` who asks.
fn accumulator() -> Vec<u8> {
    const BATCH: Dim<'static> = Dim::Symbol("batch");
    let one = [BATCH, Dim::Fixed(1)];
    let mut graph = GraphBuilder::new("accumulator");
    let x = graph.input("x", DType::F32, &one);
    let start = graph.input("start", DType::F32, &one);
    let corrid = graph.input("corrid", DType::I64, &one);
    let total = graph.input("total", DType::F32, &one);
    let unit = graph.scalar_f32(1.0);
    let kept = graph.node("Sub", &[&unit, &start], vec![]);
    let kept = graph.node("Mul", &[&total, &kept], vec![]);
    let sum = graph.node("Add", &[&kept, &x], vec![]);
    let total = graph.node("Identity", &[&sum], vec![]);
    let id = graph.node("Cast", &[&corrid], vec![Attribute::int("to", i64::from(DType::F32.code()))]);
    graph.output("y", &sum, DType::F32, &one);
    graph.output("total_out", &total, DType::F32, &one);
    graph.output("id", &id, DType::F32, &one);
    graph.finish(20).unwrap().to_bytes()
}

fn config(rest: &str) -> String {
    format!(
        r#"max_batch_size: 4
        sequence_batching {{
          {rest}
          control_input [
            {{ name: "start" control [ {{ kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] }} ] }},
            {{ name: "corrid" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT64 }} ] }}
          ]
          state [ {{ input_name: "total" output_name: "total_out" data_type: TYPE_FP32 dims: [ 1 ] }} ]
        }}"#
    )
}

async fn serve(rest: &str) -> Registry {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", accumulator()).write("m", "config.pbtxt", config(rest));
    let registry = bench.open_all().await;
    assert!(registry.ready("m", ""), "{:?}", registry.index(false));
    registry
}

fn step(id: u64, value: f32, start: bool, end: bool) -> Request {
    let sequence = Some(Sequence { id: SequenceId::Number(id), start, end });
    Request { sequence, outputs: vec!["y".to_owned()], ..request(f32s(&[1, 1], &[value])) }
}

async fn total(registry: &Registry, request: Request) -> Result<f32, InferError> {
    Ok(infer(registry, "m", request).await?.outputs[0].tensor.numbers::<f32>()[0])
}

#[tokio::test]
async fn state_is_kept_for_each_sequence_and_begins_anew() {
    let registry = serve("direct { }").await;
    let model = registry.model("m", "").unwrap();
    let names = |specs: &[sensorium_engine::TensorSpec]| specs.iter().map(|spec| spec.name.clone()).collect::<Vec<_>>();
    assert_eq!(
        (names(model.inputs()), names(model.outputs())),
        (vec!["x".to_owned()], vec!["y".to_owned(), "id".to_owned()])
    );
    let Some(SchedulingChoice::SequenceBatching(written)) = &model.config().scheduling_choice else { panic!("it has") };
    assert_eq!(written.max_sequence_idle_microseconds, 1_000_000, "what holds is written down");
    assert_eq!(total(&registry, step(1, 5.0, true, false)).await.unwrap(), 5.0);
    assert_eq!(total(&registry, step(2, 70.0, true, false)).await.unwrap(), 70.0);
    assert_eq!(total(&registry, step(1, 6.0, false, false)).await.unwrap(), 11.0);
    assert_eq!(total(&registry, step(2, 1.0, false, true)).await.unwrap(), 71.0);
    assert_eq!(total(&registry, step(1, 3.0, true, false)).await.unwrap(), 3.0, "a start forgets");
    let id = Request { outputs: vec!["id".to_owned()], ..step(1, 0.0, false, true) };
    assert_eq!(total(&registry, id).await.unwrap(), 1.0, "the model sees the id");
    let error = total(&registry, step(1, 1.0, false, false)).await.unwrap_err();
    assert!(matches!(error, InferError::Sequence(SequenceError::NotStarted { .. })), "{error}");
    let error = total(&registry, request(f32s(&[1, 1], &[1.0]))).await.unwrap_err();
    assert!(matches!(error, InferError::Sequence(SequenceError::NoId { .. })), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_a_sequence_run_in_the_order_of_their_coming_and_share_batches_with_others() {
    let registry = serve("oldest { max_candidate_sequences: 8 max_queue_delay_microseconds: 1000 }").await;
    let steps = (0..50).flat_map(|round| (1..=4_u64).map(move |id| step(id, 1.0 + id as f32, round == 0, round == 49)));
    let totals = join_all(steps.map(|step| total(&registry, step))).await;
    for (index, found) in totals.into_iter().enumerate() {
        let (round, id) = (index / 4, index % 4 + 1);
        assert_eq!(found.unwrap(), (round + 1) as f32 * (1.0 + id as f32), "round {round} of sequence {id}");
    }
    let statistics = registry.statistics("m", "").unwrap().remove(0);
    assert_eq!(statistics.inference_count, 200);
    assert!(statistics.execution_count < 200, "some ran together: {}", statistics.execution_count);
}

#[tokio::test]
async fn a_sequence_beyond_the_candidates_waits_for_an_end_or_an_idle_one() {
    let registry = serve("max_sequence_idle_microseconds: 100000 oldest { max_candidate_sequences: 1 }").await;
    total(&registry, step(1, 5.0, true, false)).await.unwrap();
    let waited = std::time::Instant::now();
    assert_eq!(total(&registry, step(2, 1.0, true, false)).await.unwrap(), 1.0);
    assert!(waited.elapsed() >= Duration::from_millis(50), "sequence 1 was under way");
    let error = total(&registry, step(1, 1.0, false, false)).await.unwrap_err();
    assert!(matches!(error, InferError::Sequence(SequenceError::NotStarted { .. })), "{error}");
}

#[tokio::test]
async fn while_as_many_wait_as_may_a_sequence_begins_again_in_its_seat_and_no_other_begins() {
    let registry = serve("max_sequence_idle_microseconds: 60000000 oldest { max_candidate_sequences: 1 }").await;
    assert_eq!(total(&registry, step(1, 5.0, true, false)).await.unwrap(), 5.0);
    let waiting = (2..=33).map(|id| {
        let registry = registry.clone();
        tokio::spawn(async move { total(&registry, step(id, 1.0, true, true)).await })
    });
    let waiting: Vec<_> = waiting.collect();
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    let error = total(&registry, step(34, 1.0, true, false)).await.unwrap_err();
    assert!(matches!(error, InferError::Sequence(SequenceError::Overloaded { .. })), "{error}");
    assert_eq!(total(&registry, step(1, 6.0, false, false)).await.unwrap(), 11.0);
    assert_eq!(total(&registry, step(1, 9.0, true, false)).await.unwrap(), 9.0);
    assert_eq!(total(&registry, step(1, 6.0, false, true)).await.unwrap(), 15.0);
    for waited in join_all(waiting).await {
        assert_eq!(waited.unwrap().unwrap(), 1.0);
    }
}

#[tokio::test]
async fn a_request_waits_for_a_place_no_longer_than_its_timeout() {
    let registry = serve("max_sequence_idle_microseconds: 60000000 oldest { max_candidate_sequences: 1 }").await;
    total(&registry, step(1, 5.0, true, false)).await.unwrap();
    let impatient = Request { timeout: Some(Duration::from_millis(20)), ..step(2, 1.0, true, true) };
    let error = total(&registry, impatient).await.unwrap_err();
    assert!(matches!(error, InferError::Schedule(ScheduleError::TimedOut { .. })), "{error}");
    assert_eq!(total(&registry, step(1, 6.0, false, true)).await.unwrap(), 11.0);
    assert_eq!(total(&registry, step(2, 1.0, true, true)).await.unwrap(), 1.0);
}

#[tokio::test]
async fn answers_of_an_ensemble_of_sequences_are_not_kept() {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", accumulator()).write("m", "config.pbtxt", config("oldest { }")).write(
        "e",
        "config.pbtxt",
        r#"platform: "ensemble" max_batch_size: 4 response_cache { enable: true }
           input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }
           ensemble_scheduling { step {
             model_name: "m" input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }"#,
    );
    let registry = bench.open_all().await;
    for (wanted, start) in [(1.0, true), (2.0, false), (3.0, false)] {
        let response = infer(&registry, "e", step(1, 1.0, start, false)).await.unwrap();
        assert_eq!(response.outputs[0].tensor, f32s(&[1, 1], &[wanted]));
    }
}

#[tokio::test]
async fn a_caller_that_leaves_does_not_cut_its_sequence_off() {
    let registry = serve("oldest { max_candidate_sequences: 2 max_queue_delay_microseconds: 50000 }").await;
    let first = total(&registry, step(1, 5.0, true, false));
    let second = total(&registry, step(1, 100.0, false, false));
    let third = total(&registry, step(1, 6.0, false, false));
    let leaving = tokio::time::timeout(Duration::from_millis(10), second);
    let (first, second, third) = tokio::join!(first, leaving, third);
    assert!(second.is_err(), "it was waiting for its turn");
    assert_eq!((first.unwrap(), third.unwrap()), (5.0, 11.0));
}

#[tokio::test]
async fn controls_that_do_not_fit_the_file_are_reasons() {
    for (sequence, reason) in [
        (
            "control_input { name: \"begin\" control { kind: CONTROL_SEQUENCE_START } }",
            "control_input `begin`, which its file has not",
        ),
        (
            "control_input { name: \"start\" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }",
            "needs two values of FP32",
        ),
        ("state { input_name: \"total\" output_name: \"total_out\" dims: 3 }", "begins as [1, 3]"),
        (
            "state { input_name: \"total\" output_name: \"total_out\" data_type: TYPE_INT32 dims: 1 }",
            "state `total` is TYPE_INT32 in its configuration and TYPE_FP32 in its file",
        ),
        (
            "state { input_name: \"total\" output_name: \"total_out\" dims: 1 initial_state { data_type: TYPE_INT8 dims: 1 } }",
            "state `total` is TYPE_INT8 in its configuration and TYPE_FP32 in its file",
        ),
        (
            "control_input { name: \"corrid\" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }",
            "control_input `corrid` is TYPE_UINT64 in its configuration and TYPE_INT64 in its file",
        ),
        ("iterative_sequence: true", "iterative"),
    ] {
        let bench = Bench::new();
        bench.write("m", "1/model.onnx", accumulator());
        bench.write("m", "config.pbtxt", format!("max_batch_size: 4 sequence_batching {{ {sequence} }}"));
        let index = bench.open_all().await.index(false);
        assert!(index[0].reason.contains(reason), "{index:?}");
    }
}

const TWICE_INTO_M: &str = r#"
    { model_name: "twice" input_map { key: "x" value: "x" } output_map { key: "y" value: "twice" } },
    { model_name: "m" input_map { key: "x" value: "twice" } output_map { key: "y" value: "y" } }"#;

/// `e` goes through `steps`, among which may be the sequences of `m`, which has `rest`.
async fn serve_ensemble(rest: &str, steps: &str) -> Registry {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", accumulator()).write("m", "config.pbtxt", config(rest));
    bench.write("twice", "1/model.onnx", scale(2.0, None));
    let ensemble = format!(
        r#"platform: "ensemble" max_batch_size: 4
           input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} output {{ name: "y" data_type: TYPE_FP32 dims: 1 }}
           ensemble_scheduling {{ step [ {steps} ] }}"#
    );
    bench.write("e", "config.pbtxt", ensemble);
    let registry = bench.open_all().await;
    assert!(registry.ready("e", ""), "{:?}", registry.index(false));
    registry
}

#[tokio::test]
async fn requests_to_an_ensemble_stand_in_their_sequence_from_the_moment_of_their_coming() {
    let registry = serve_ensemble("direct { }", TWICE_INTO_M).await;
    let model = registry.model("e", "").unwrap();
    let mut requests: Vec<_> =
        (0..20_u8).map(|index| Box::pin(model.infer(step(1, f32::from(index), index == 0, index == 19)))).collect();
    for request in &mut requests {
        assert!(poll!(request).is_pending());
    }
    // Whoever came last is the first to hear of the step before.
    requests.reverse();
    let mut answers = join_all(requests).await;
    answers.reverse();
    let mut sum = 0.0;
    for (index, answer) in answers.into_iter().enumerate() {
        sum += 2.0 * index as f32;
        assert_eq!(answer.unwrap().outputs[0].tensor.numbers::<f32>()[0], sum, "request {index}");
    }
}

#[tokio::test]
async fn a_request_that_fails_before_its_turn_in_an_ensemble_leaves_the_sequence_as_it_was() {
    let registry = serve_ensemble("direct { }", TWICE_INTO_M).await;
    let ask = async |request| infer(&registry, "e", request).await.map(|answer| answer.outputs[0].tensor.clone());
    assert_eq!(ask(step(1, 1.0, true, false)).await.unwrap(), f32s(&[1, 1], &[2.0]));
    let rows = Request { inputs: request(f32s(&[2, 1], &[7.0, 7.0])).inputs, ..step(1, 0.0, false, false) };
    let error = ask(rows).await.unwrap_err().into_status("e").message().to_owned();
    assert!(error.contains("a request of a sequence has one row, this one has 2"), "{error}");
    assert_eq!(ask(step(1, 10.0, false, true)).await.unwrap(), f32s(&[1, 1], &[22.0]));
}

#[tokio::test]
async fn the_timeout_of_a_request_to_an_ensemble_is_that_of_its_steps() {
    let registry =
        serve_ensemble("max_sequence_idle_microseconds: 60000000 oldest { max_candidate_sequences: 1 }", TWICE_INTO_M)
            .await;
    infer(&registry, "e", step(1, 1.0, true, false)).await.unwrap();
    let timeout = Some(Duration::from_millis(50));
    let late = infer(&registry, "e", Request { timeout, ..step(2, 1.0, true, false) });
    let error = tokio::time::timeout(Duration::from_secs(20), late).await.expect("it does not wait for a seat");
    let InferError::Step { source, .. } = error.unwrap_err() else { panic!("it is the second step's") };
    assert!(matches!(*source, InferError::Schedule(ScheduleError::TimedOut { .. })), "{source}");
}

#[tokio::test]
async fn an_ensemble_may_go_through_the_same_sequence_twice_whatever_the_order_of_its_steps() {
    // What runs first is written last.
    let steps = r#"
        { model_name: "m" input_map { key: "x" value: "between" } output_map { key: "y" value: "y" } },
        { model_name: "m" input_map { key: "x" value: "x" } output_map { key: "y" value: "between" } }"#;
    let registry = serve_ensemble("direct { }", steps).await;
    total(&registry, step(1, 1.0, true, false)).await.unwrap();
    for sum in [6.0, 16.0] {
        // The total and 2, and the total with that.
        let asked = infer(&registry, "e", step(1, 2.0, false, false));
        let answer = tokio::time::timeout(Duration::from_secs(20), asked).await.expect("neither waits for the other");
        assert_eq!(answer.unwrap().outputs[0].tensor.numbers::<f32>()[0], sum);
    }
}

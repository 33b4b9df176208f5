//! Models that answer a request with several responses.

use futures::{FutureExt as _, future::join_all};
use sensorium_engine::RawTensor;
use sensorium_proto::inference::ModelStatistics;
use sensorium_server::{
    error::InferError,
    model::{Request, Response, Sequence, SequenceError, SequenceId, Steps},
    repository::Registry,
};

use crate::{
    bench::{Bench, f32s, infer, named},
    counter::{config, counter},
};

async fn serve(sequence: &str, most_steps: usize) -> Registry {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", counter(1)).write("m", "config.pbtxt", config(sequence, most_steps));
    let registry = bench.open_all().await;
    assert!(registry.ready("m", ""), "{:?}", registry.index(false));
    registry
}

fn count(steps: f32, base: f32) -> Request {
    slip(steps, base, 0)
}

fn slip(steps: f32, base: f32, slip: i64) -> Request {
    let slip = RawTensor::from_vec(sensorium_engine::DType::Int64, vec![1, 1], vec![slip]).unwrap();
    let inputs =
        vec![named("steps", f32s(&[1, 1], &[steps])), named("base", f32s(&[1, 1], &[base])), named("slip", slip)];
    Request { inputs, outputs: vec!["y".to_owned()], ..Request::default() }
}

async fn begin(registry: &Registry, request: Request) -> Result<Steps, InferError> {
    registry.model("m", "")?.begin(request).await
}

fn y(response: &Response) -> f32 {
    response.outputs[0].tensor.numbers::<f32>()[0]
}

/// The numbers of all responses, and whether the last one, and no other, said that it was that.
async fn all(registry: &Registry, request: Request) -> Result<Vec<f32>, InferError> {
    let mut steps = begin(registry, request).await?;
    let (mut found, mut is_over) = (Vec::new(), false);
    while let Some(step) = steps.next().await {
        assert!(!is_over, "a response behind the last one");
        let (response, is_last) = step?;
        found.push(y(&response));
        is_over = is_last;
    }
    assert!(is_over, "no response said that it was the last");
    Ok(found)
}

fn statistics(registry: &Registry) -> ModelStatistics {
    registry.statistics("m", "").unwrap().remove(0)
}

const ONE_AT_A_TIME: &str = "oldest { max_candidate_sequences: 1 }";

#[tokio::test]
async fn a_request_is_run_step_by_step_until_the_model_says_that_it_is_done() {
    let registry = serve(ONE_AT_A_TIME, 100).await;
    assert_eq!(all(&registry, count(3.0, 10.0)).await.unwrap(), [11.0, 12.0, 13.0]);
    assert_eq!(all(&registry, count(0.0, 50.0)).await.unwrap(), [51.0], "there is one response at least");
    let known = statistics(&registry);
    let stats = known.inference_stats.unwrap();
    assert_eq!((stats.success.unwrap().count, stats.fail.unwrap().count), (2, 0), "a request counts once");
    assert_eq!((known.inference_count, known.execution_count), (2, 4));
    let made = |index: &str| known.response_stats[index].success.unwrap().count;
    assert_eq!((made("0"), made("1"), made("2"), known.response_stats.len()), (2, 1, 1, 3));
}

#[tokio::test]
async fn the_most_steps_end_what_never_ends_and_the_model_is_told_of_the_last_one() {
    let registry = serve(ONE_AT_A_TIME, 3).await;
    let ended = Request { outputs: vec!["ended".to_owned()], ..count(f32::INFINITY, 0.0) };
    assert_eq!(all(&registry, ended).await.unwrap(), [0.0, 0.0, 1.0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_requests_share_batches_and_each_gets_its_own_numbers() {
    for sequence in ["oldest { max_candidate_sequences: 20 max_queue_delay_microseconds: 1000 }", "direct { }"] {
        let registry = serve(sequence, 100).await;
        let requests = (0..20).map(|index| all(&registry, count(10.0 + index as f32, index as f32 * 1000.0)));
        for (index, found) in join_all(requests).await.into_iter().enumerate() {
            let expected: Vec<f32> = (1..=10 + index).map(|step| (index * 1000 + step) as f32).collect();
            assert_eq!(found.unwrap(), expected, "request {index}, {sequence}");
        }
        let steps: u64 = (0..20).map(|index| 10 + index).sum();
        let runs = statistics(&registry).execution_count;
        assert!(runs < steps, "{runs} runs for {steps} steps: none were together, {sequence}");
    }
}

#[tokio::test]
async fn a_request_that_is_dropped_in_the_middle_gives_its_place_to_the_next() {
    let registry = serve(ONE_AT_A_TIME, 1_000_000).await;
    let mut endless = begin(&registry, count(f32::INFINITY, 0.0)).await.unwrap();
    for expected in [1.0, 2.0] {
        assert_eq!(y(&endless.next().await.unwrap().unwrap().0), expected);
    }
    let (next, ()) = tokio::join!(all(&registry, count(2.0, 7.0)), async {
        tokio::task::yield_now().await;
        let before = statistics(&registry).execution_count;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        assert_eq!(statistics(&registry).execution_count, before, "nothing runs that nobody asks for");
        drop(endless);
    });
    assert_eq!(next.unwrap(), [8.0, 9.0]);
    let known = statistics(&registry);
    assert_eq!(known.inference_stats.unwrap().fail.unwrap().count, 1);
    assert_eq!(known.response_stats["2"].cancel.unwrap().count, 1);
    // Also one that is dropped while it waits for its place, and one in the middle of a step.
    let mut holds = begin(&registry, count(f32::INFINITY, 0.0)).await.unwrap();
    let waits = tokio::time::timeout(std::time::Duration::from_millis(10), begin(&registry, count(1.0, 0.0)));
    assert!(waits.await.is_err());
    drop(holds.next().now_or_never());
    drop(holds);
    assert_eq!(all(&registry, count(1.0, 0.0)).await.unwrap(), [1.0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_in_the_middle_ends_its_request_and_no_other() {
    let registry = serve("oldest { max_candidate_sequences: 8 max_queue_delay_microseconds: 1000 }", 100).await;
    let mut broken = begin(&registry, slip(9.0, 0.0, 1)).await.unwrap();
    let (found, others) = tokio::join!(
        async {
            let mut found = Vec::new();
            while let Some(step) = broken.next().await {
                found.push(step.map(|(response, _)| y(&response)));
            }
            found
        },
        join_all((0..4).map(|_| all(&registry, count(9.0, 0.0)))),
    );
    let (error, made) = found.split_last().unwrap();
    let made: Vec<f32> = made.iter().map(|step| *step.as_ref().unwrap()).collect();
    assert_eq!(made, [1.0, 2.0, 3.0, 4.0]);
    assert!(matches!(error, Err(InferError::Schedule(_))), "{error:?}");
    for other in others {
        assert_eq!(other.unwrap(), (1..=9).map(|step| step as f32).collect::<Vec<_>>());
    }
    assert_eq!(statistics(&registry).response_stats["4"].fail.unwrap().count, 1);
}

#[tokio::test]
async fn more_requests_than_may_wait_are_refused_at_once() {
    let registry = serve(ONE_AT_A_TIME, 100).await;
    let _holds = begin(&registry, count(9.0, 0.0)).await.unwrap();
    let mut waiting = join_all((0..32).map(|_| begin(&registry, count(1.0, 0.0))));
    assert!((&mut waiting).now_or_never().is_none(), "all wait");
    let error = begin(&registry, count(1.0, 0.0)).now_or_never().expect("an answer at once").unwrap_err();
    assert!(matches!(error, InferError::Sequence(SequenceError::Overloaded { limit: 33, .. })), "{error}");
}

#[tokio::test]
async fn what_does_not_fit_such_a_model_is_refused() {
    let registry = serve(ONE_AT_A_TIME, 100).await;
    let error = infer(&registry, "m", count(1.0, 0.0)).await.unwrap_err();
    assert!(matches!(error, InferError::Decoupled { .. }), "{error}");
    let sequence = |start| Some(Sequence { id: SequenceId::Number(7), start, end: true });
    drop(begin(&registry, Request { sequence: sequence(true), ..count(1.0, 0.0) }).await.unwrap());
    let sequence = sequence(false);
    let error = begin(&registry, Request { sequence, ..count(1.0, 0.0) }).await.unwrap_err();
    assert!(matches!(error, InferError::Sequence(SequenceError::NamedId { .. })), "{error}");
    let two = Request {
        inputs: vec![
            named("steps", f32s(&[2, 1], &[1.0, 1.0])),
            named("base", f32s(&[2, 1], &[1.0, 1.0])),
            named("slip", RawTensor::from_vec(sensorium_engine::DType::Int64, vec![2, 1], vec![0_i64, 0]).unwrap()),
        ],
        ..Request::default()
    };
    let error = begin(&registry, two).await.unwrap_err();
    assert!(matches!(error, InferError::Sequence(SequenceError::Rows { rows: 2 })), "{error}");
}

#[tokio::test]
async fn configurations_that_make_no_sense_are_reasons() {
    let whole = config(ONE_AT_A_TIME, 9);
    let state = whole.lines().find(|line| line.contains("state {")).unwrap();
    for (from, to, reason) in [
        ("decoupled: true", "decoupled: false", "write model_transaction_policy { decoupled: true } as well"),
        (state, "", "is iterative and has no state, so that every step would be the first again"),
        ("iterative_sequence: true", "", "its parameter iteration_end is for models whose sequence_batching"),
        ("iteration_most_steps", "most_steps", "nothing bounds it; write the parameter iteration_most_steps"),
        ("\"9\"", "\"many\"", "iteration_most_steps is \"many\", it must be a number"),
        ("\"9\"", "\"0\"", "iteration_most_steps is 0, it must be 1 to 1000000"),
        ("\"9\"", "\"1000001\"", "iteration_most_steps is 1000001, it must be 1 to 1000000"),
        ("\"done\"", "\"over\"", "names `over`, which its file has not; there it has y, done, ended, count_out"),
        ("\"done\"", "\"y\"", "names `y`, of sizes [2]; it must be one element"),
    ] {
        let bench = Bench::new();
        assert!(whole.contains(from), "{from}");
        bench.write("m", "1/model.onnx", counter(2)).write("m", "config.pbtxt", whole.replace(from, to));
        let index = bench.open_all().await.index(false);
        assert!(index[0].reason.contains(reason), "{reason:?} is not in {index:?}");
    }
}

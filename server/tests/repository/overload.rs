//! More requests than a model can answer: it answers as many as ever, in time, and says no to the rest.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use sensorium_engine::{Declared, Engine, EngineError, Opener, Options, RawTensor, Signature};
use sensorium_server::{
    error::InferError,
    model::Request,
    repository::{Openers, Registry},
    scheduler::ScheduleError,
};
use tokio::task::JoinSet;

use crate::bench::{Bench, f32s, infer, request, scale};

/// How long every run takes, whatever else the machine does: it sleeps.
const RUN: Duration = Duration::from_millis(20);
/// What callers are ready to wait: some fifteen runs.
const DEADLINE: Duration = Duration::from_millis(300);
/// Requests of a load that is just as much as can be done.
const COUNT: u32 = 150;

/// An engine whose runs have a fixed length.
struct Paced(Box<dyn Engine>);

impl Engine for Paced {
    fn signature(&self) -> &Signature {
        self.0.signature()
    }

    fn run_raw(&mut self, inputs: &[RawTensor], outputs: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
        std::thread::sleep(RUN);
        self.0.run_raw(inputs, outputs)
    }
}

fn open(path: &Path, options: Options, declared: &Declared) -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(Paced((Opener::ONNXRUNTIME.open)(path, options, declared)?)))
}

const PACED: Opener = Opener { backend: "paced", platform: "paced", file: "model.onnx", open };

/// What came of a load, in requests.
#[derive(Debug, Default)]
struct Outcome {
    in_time: u32,
    late: u32,
    refused: u32,
}

/// Sends `count` requests, one `every` so often, whatever comes back.
async fn offer(registry: &Registry, count: u32, every: Duration) -> Outcome {
    let start = Instant::now();
    let mut requests = JoinSet::new();
    for index in 0..count {
        tokio::time::sleep_until((start + every * index).into()).await;
        let registry = registry.clone();
        requests.spawn(async move {
            let asked = Instant::now();
            let request = Request { deadline: Some(asked + DEADLINE), ..request(f32s(&[1, 1], &[1.0])) };
            (infer(&registry, "m", request).await, asked.elapsed())
        });
    }
    let mut outcome = Outcome::default();
    for (answer, took) in requests.join_all().await {
        match answer {
            Ok(_) if took <= DEADLINE => outcome.in_time += 1,
            Ok(_) | Err(InferError::Schedule(ScheduleError::DeadlineExceeded { .. })) => outcome.late += 1,
            Err(InferError::Schedule(ScheduleError::TooLate { .. })) => outcome.refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    outcome
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twice_the_load_that_can_be_done_leaves_as_many_requests_answered_in_time() {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", scale(2.0, None));
    bench.write("m", "config.pbtxt", "backend: \"paced\" max_batch_size: 1");
    let registry = bench.open_with(Openers::with(&[PACED])).await;
    assert!(registry.ready("m", ""), "{:?}", registry.index(false));
    let once = offer(&registry, COUNT, RUN).await;
    // Both last equally long, so that what else the machine does weighs on both.
    let twice = offer(&registry, 2 * COUNT, RUN / 2).await;
    assert!(once.in_time >= COUNT / 3, "{once:?}");
    assert!(twice.in_time * 10 >= once.in_time * 7, "{once:?} of what can be done, {twice:?} of twice as much");
    assert!(twice.refused > twice.late, "those that cannot be answered in time are told so at once: {twice:?}");
}

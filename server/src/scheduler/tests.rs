//! The scheduler with an engine that stops where the test wants it to.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    task::Poll,
    time::{Duration, Instant},
};

use sensorium_engine::{DType, Engine, EngineError, RawTensor, Signature, Waiters};
use tokio::{runtime::Handle, sync::mpsc as tokio_mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{Batching, Delay, Done, Policy, Reopen, ScheduleError, Scheduler, Setup, Slots, Work, shape::Shapes};
use crate::{
    metrics::{Counted, Metrics},
    model::Statistics,
};

/// Doubles `x`. Fails on a negative number, loses its GPU by an infinite one, dies of a NaN, and says beforehand what it was given.
struct Doubler {
    runs: Arc<Mutex<Vec<Vec<f32>>>>,
    /// A run waits for one message; a closed channel lets all pass.
    gate: mpsc::Receiver<()>,
    /// Names of the threads that ran it, where any may.
    threads: Option<Threads>,
    /// Whether a run of [`SLOW`] does not end.
    is_stuck: Arc<AtomicBool>,
}

/// What takes as long as the test wants it to, among what is quick.
const SLOW: f32 = 0.125;

/// Of nothing: the scheduler takes work that was validated.
static UNKNOWN: LazyLock<Signature> = LazyLock::new(|| Signature::of_manifest(&[], &[]));

impl Engine for Doubler {
    fn signature(&self) -> &Signature {
        &UNKNOWN
    }

    fn run_raw(&mut self, inputs: &[RawTensor], outputs: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
        let x = &inputs[0];
        let values = x.numbers::<f32>();
        if let Some(threads) = &self.threads {
            threads.lock().unwrap().push(std::thread::current().name().map(str::to_owned));
        }
        self.runs.lock().unwrap().push(values.to_vec());
        let _ = self.gate.recv();
        while values.contains(&SLOW) && self.is_stuck.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(values.iter().all(|value| !value.is_nan()), "on purpose");
        if values.iter().any(|value| *value < 0.0) {
            return Err(EngineError::Run { reason: "negative".to_owned() });
        }
        if values.iter().any(|value| value.is_infinite()) {
            return Err(EngineError::DeviceLost { reason: "infinite".to_owned() });
        }
        let result = |output: &usize| {
            let factor = if *output == TWICE { 2.0 } else { 3.0 };
            let values: Vec<f32> = values.iter().map(|value| value * factor).collect();
            RawTensor::from_vec(DType::Fp32, x.shape().to_vec(), values).unwrap()
        };
        Ok(outputs.iter().map(result).collect())
    }

    fn runs_on_any_thread(&self) -> bool {
        self.threads.is_some()
    }
}

/// Names of threads.
type Threads = Arc<Mutex<Vec<Option<String>>>>;

/// The engine's outputs.
const TWICE: usize = 0;
const THRICE: usize = 1;

/// Everything that a scheduler of one engine is made of.
fn setup(engine: Box<dyn Engine>, policy: Policy, reopen: Option<Reopen>, lost: &CancellationToken) -> Setup {
    counted(engine, policy, reopen, lost, &Metrics::new())
}

/// The same, whose counts go to `metrics`.
fn counted(
    engine: Box<dyn Engine>,
    policy: Policy,
    reopen: Option<Reopen>,
    lost: &CancellationToken,
    metrics: &Metrics,
) -> Setup {
    Setup {
        graph: "m".to_owned(),
        engines: vec![engine],
        reopen,
        policy,
        batches: true,
        slots: Slots::new(1),
        threads: 1,
        metrics: metrics.graph("m", "1"),
        statistics: Arc::new(Statistics::default()),
        lost: lost.clone(),
    }
}

/// Sums up all rows: its output has one row, whatever comes in.
struct Summing {
    runs: Arc<Mutex<Vec<Vec<f32>>>>,
}

impl Engine for Summing {
    fn signature(&self) -> &Signature {
        &UNKNOWN
    }

    fn run_raw(&mut self, inputs: &[RawTensor], _: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
        let values = inputs[0].numbers::<f32>().into_owned();
        self.runs.lock().unwrap().push(values.clone());
        Ok(vec![RawTensor::from_vec(DType::Fp32, vec![1, 1], vec![values.iter().sum::<f32>()]).unwrap()])
    }
}

/// Runs until nobody waits any more, having said how long anybody would.
struct Endless {
    runtime: Handle,
    begun: tokio_mpsc::UnboundedSender<Option<Instant>>,
}

impl Engine for Endless {
    fn signature(&self) -> &Signature {
        &UNKNOWN
    }

    fn run_raw(&mut self, _: &[RawTensor], _: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
        unreachable!("the scheduler says who waits")
    }

    fn run_for(&mut self, _: &[RawTensor], _: &[usize], waiters: Waiters<'_>) -> Result<Vec<RawTensor>, EngineError> {
        self.begun.send(waiters.deadline).unwrap();
        self.runtime.block_on(poll_fn(|context| (waiters.poll_gone)(context)));
        Err(EngineError::CutShort)
    }
}

struct Bench {
    scheduler: Arc<Scheduler>,
    runs: Arc<Mutex<Vec<Vec<f32>>>>,
    gate: mpsc::Sender<()>,
    lost: CancellationToken,
    metrics: Metrics,
}

impl Bench {
    fn new(max_rows: usize, max_waiting_rows: usize, max_delay: Duration) -> Self {
        let batching = Batching { max_rows, max_waiting_rows, max_delay };
        Self::with(Policy::of_server(batching), None)
    }

    fn with(policy: Policy, reopen: Option<Reopen>) -> Self {
        Self::run_by(policy, reopen, None, &Slots::new(1))
    }

    /// With an engine that any thread may run, where those that do are to be written down.
    fn run_by(
        policy: Policy,
        reopen: Option<Reopen>,
        quick: Option<(Threads, Arc<AtomicBool>)>,
        slots: &Slots,
    ) -> Self {
        let (gate, receiver) = mpsc::channel();
        let runs = Arc::<Mutex<Vec<_>>>::default();
        let (threads, is_stuck) = quick.unzip();
        let is_stuck = is_stuck.unwrap_or_default();
        let engine = Box::new(Doubler { runs: runs.clone(), gate: receiver, threads, is_stuck });
        let (lost, metrics) = (CancellationToken::new(), Metrics::new());
        let setup = Setup { slots: slots.clone(), ..counted(engine, policy, reopen, &lost, &metrics) };
        let scheduler = Scheduler::start_with(setup, Shapes::tail(1)).unwrap();
        Self { scheduler: Arc::new(scheduler), runs, gate, lost, metrics }
    }

    /// Whether the page of metrics has this line.
    fn shows(&self, line: &str) -> bool {
        self.metrics.encode(&Counted::default()).unwrap().lines().any(|own| own == line)
    }

    /// A caller that waits for its answer, once its work is in the queue or in the engine.
    async fn send(&self, work: Work) -> Caller {
        let scheduler = self.scheduler.clone();
        let caller = tokio::spawn(async move { scheduler.run(work).await });
        // The current-thread runtime of these tests runs the task until it waits for its answer.
        tokio::task::yield_now().await;
        caller
    }

    /// Sends work that the idle engine takes at once, and returns when the engine holds it at the gate.
    async fn occupy(&self) -> Caller {
        let before = self.runs().len();
        let caller = self.send(rows(&[1.0])).await;
        self.wait_for_runs(before + 1).await;
        caller
    }

    async fn wait_for_runs(&self, count: usize) {
        let reached = async {
            while self.runs().len() < count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), reached).await.expect("the engine runs what is sent");
    }

    fn runs(&self) -> Vec<Vec<f32>> {
        self.runs.lock().unwrap().clone()
    }

    fn open_gate(&mut self) {
        self.gate = mpsc::channel().0;
    }
}

type Caller = JoinHandle<Result<Done, ScheduleError>>;

/// Work of one number per row.
fn rows(values: &[f32]) -> Work {
    wide_rows(1, values)
}

fn wide_rows(width: usize, values: &[f32]) -> Work {
    let rows = values.len() / width;
    let x = RawTensor::from_vec(DType::Fp32, vec![rows as i64, width as i64], values.to_vec()).unwrap();
    Work { inputs: vec![x], rows, outputs: vec![TWICE], ..Work::default() }
}

fn values(answer: &Done) -> Vec<Vec<f32>> {
    answer.outputs.iter().map(|tensor| tensor.numbers().into_owned()).collect()
}

#[tokio::test]
async fn what_arrives_while_the_engine_is_busy_forms_one_batch_and_each_gets_its_own_rows() {
    let mut bench = Bench::new(8, 100, Duration::ZERO);
    let first = bench.occupy().await;
    let two = bench.send(rows(&[2.0, 3.0])).await;
    let both = Work { outputs: vec![THRICE, TWICE], ..rows(&[4.0]) };
    let both = bench.send(both).await;
    bench.open_gate();
    assert_eq!(values(&first.await.unwrap().unwrap()), [vec![2.0]]);
    assert_eq!(values(&two.await.unwrap().unwrap()), [vec![4.0, 6.0]]);
    assert_eq!(values(&both.await.unwrap().unwrap()), [vec![12.0], vec![8.0]]);
    assert_eq!(bench.runs(), [vec![1.0], vec![2.0, 3.0, 4.0]]);
}

#[tokio::test]
async fn a_batch_holds_at_most_max_rows_and_the_oldest_goes_first() {
    let mut bench = Bench::new(3, 100, Duration::ZERO);
    let mut callers = vec![bench.occupy().await];
    for work in [rows(&[2.0, 2.5]), rows(&[3.0, 3.5]), rows(&[4.0])] {
        callers.push(bench.send(work).await);
    }
    bench.open_gate();
    for caller in callers {
        caller.await.unwrap().unwrap();
    }
    assert_eq!(bench.runs(), [vec![1.0], vec![2.0, 2.5, 4.0], vec![3.0, 3.5]]);
}

#[tokio::test]
async fn an_answer_does_not_wait_for_a_run_that_may_take_long() {
    let mut bench = Bench::new(1, 100, Duration::ZERO);
    let first = bench.occupy().await;
    let short = bench.send(rows(&[2.0])).await;
    let long = bench.send(wide_rows(3, &[1.0, 2.0, 3.0])).await;
    for _ in 0..2 {
        bench.gate.send(()).unwrap();
    }
    let answer = tokio::time::timeout(Duration::from_secs(20), short).await.expect("its run is over");
    assert_eq!(values(&answer.unwrap().unwrap()), [vec![4.0]]);
    assert!(!long.is_finished());
    bench.open_gate();
    first.await.unwrap().unwrap();
    long.await.unwrap().unwrap();
}

#[tokio::test]
async fn rows_of_different_shapes_never_share_a_batch() {
    let mut bench = Bench::new(8, 100, Duration::ZERO);
    let mut callers = vec![bench.occupy().await];
    for work in [rows(&[2.0]), wide_rows(2, &[3.0, 3.5]), rows(&[4.0])] {
        callers.push(bench.send(work).await);
    }
    bench.open_gate();
    for caller in callers {
        caller.await.unwrap().unwrap();
    }
    assert_eq!(bench.runs(), [vec![1.0], vec![2.0, 4.0], vec![3.0, 3.5]]);
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_names_its_limit() {
    let mut bench = Bench::new(4, 4, Duration::ZERO);
    let first = bench.occupy().await;
    let waiting = bench.send(rows(&[2.0, 3.0, 4.0])).await;
    let error = bench.scheduler.run(rows(&[5.0, 6.0])).await.unwrap_err();
    assert!(matches!(error, ScheduleError::Overloaded { waiting: 3, limit: 4, .. }), "{error:?}");
    bench.open_gate();
    first.await.unwrap().unwrap();
    waiting.await.unwrap().unwrap();
    assert_eq!(bench.scheduler.run(rows(&[5.0, 6.0])).await.unwrap().outputs.len(), 1, "there is room again");
}

#[tokio::test]
async fn a_caller_that_gives_up_frees_its_place_and_its_work_never_reaches_the_engine() {
    let mut bench = Bench::new(4, 2, Duration::ZERO);
    let first = bench.occupy().await;
    let leaver = bench.send(rows(&[66.0, 67.0])).await;
    assert!(bench.scheduler.run(rows(&[2.0])).await.is_err(), "the queue is full");
    leaver.abort();
    assert!(leaver.await.unwrap_err().is_cancelled());
    assert!(bench.shows(r#"sensorium_server_abandoned_total{model="m"} 1"#));
    let next = bench.send(rows(&[2.0])).await;
    bench.open_gate();
    first.await.unwrap().unwrap();
    next.await.unwrap().unwrap();
    assert_eq!(bench.runs(), [vec![1.0], vec![2.0]]);
}

#[tokio::test]
async fn a_request_whose_deadline_passes_in_the_queue_is_counted_and_never_reaches_the_engine() {
    let mut bench = Bench::new(1, 8, Duration::ZERO);
    let first = bench.occupy().await;
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let late = bench.send(Work { deadline, ..rows(&[66.0]) }).await;
    assert!(bench.shows(r#"sensorium_server_queue_requests{model="m"} 1"#));
    let error = tokio::time::timeout(Duration::from_secs(20), late).await.expect("it is told in time").unwrap();
    assert!(matches!(error, Err(ScheduleError::DeadlineExceeded { .. })), "{error:?}");
    bench.open_gate();
    first.await.unwrap().unwrap();
    bench.scheduler.run(rows(&[2.0])).await.unwrap();
    assert_eq!(bench.runs(), [vec![1.0], vec![2.0]]);
    assert!(bench.shows(r#"sensorium_server_abandoned_total{model="m"} 1"#));
    assert!(bench.shows(r#"sensorium_server_queue_requests{model="m"} 0"#));
}

#[tokio::test]
async fn who_waits_for_the_machine_waits_in_the_metrics_too() {
    let slots = Slots::new(1);
    let policy = || Policy::of_server(Batching { max_rows: 8, max_waiting_rows: 100, max_delay: Duration::ZERO });
    let [mut one, mut other] = [(); 2].map(|()| Bench::run_by(policy(), None, None, &slots));
    other.open_gate();
    let holder = one.occupy().await;
    let (begun, waiting) = (Instant::now(), [other.send(rows(&[2.0])).await, other.send(rows(&[3.0])).await]);
    let waits = |count| other.shows(&format!("sensorium_server_queue_requests{{model=\"m\"}} {count}"));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(waits(2) && other.runs().is_empty(), "whether its engine has taken them or not");
    one.open_gate();
    holder.await.unwrap().unwrap();
    for caller in waiting {
        let queue = caller.await.unwrap().unwrap().timings.queue;
        assert!((Duration::from_millis(45)..=begun.elapsed()).contains(&queue), "{queue:?}");
    }
    assert!(waits(0));
}

#[tokio::test]
async fn a_member_whose_values_fail_the_batch_fails_alone() {
    let mut bench = Bench::new(8, 100, Duration::ZERO);
    let first = bench.occupy().await;
    let good = bench.send(rows(&[2.0])).await;
    let bad = bench.send(rows(&[-1.0])).await;
    bench.open_gate();
    first.await.unwrap().unwrap();
    assert_eq!(values(&good.await.unwrap().unwrap()), [vec![4.0]]);
    let error = bad.await.unwrap().unwrap_err();
    let ScheduleError::Engine { source, .. } = error else { panic!("{error:?}") };
    assert!(matches!(*source, EngineError::Run { .. }), "{source:?}");
    assert!(!bench.lost.is_cancelled());
}

#[tokio::test]
async fn a_gpu_that_is_lost_fails_the_batch_at_once_and_the_process_is_to_end() {
    let mut bench = Bench::new(8, 100, Duration::ZERO);
    let first = bench.occupy().await;
    let members = [bench.send(rows(&[2.0])).await, bench.send(rows(&[f32::INFINITY])).await];
    bench.open_gate();
    first.await.unwrap().unwrap();
    for member in members {
        let error = member.await.unwrap().unwrap_err();
        assert!(error.is_everybodys(), "another server may answer it: {error:?}");
    }
    assert_eq!(bench.runs().len(), 2, "there is nothing to find out by running halves");
    assert!(bench.lost.is_cancelled());
}

#[tokio::test]
async fn a_batch_between_two_steps_is_filled_up_and_nobody_sees_what_with() {
    let batching = Batching { max_rows: 8, max_waiting_rows: 100, max_delay: Duration::ZERO };
    let mut bench = Bench::with(Policy::of_server(batching).in_steps(), None);
    let first = bench.occupy().await;
    let pair = bench.send(rows(&[2.0, 3.0])).await;
    let single = bench.send(rows(&[4.0])).await;
    bench.open_gate();
    first.await.unwrap().unwrap();
    assert_eq!(values(&pair.await.unwrap().unwrap()), [vec![4.0, 6.0]]);
    assert_eq!(values(&single.await.unwrap().unwrap()), [vec![8.0]]);
    assert_eq!(bench.runs()[1], [2.0, 3.0, 4.0, 4.0]);
    let alone = bench.send(rows(&[1.0, 2.0, 5.0])).await;
    assert_eq!(values(&alone.await.unwrap().unwrap()), [vec![2.0, 4.0, 10.0]]);
    assert_eq!(bench.runs()[2], [1.0, 2.0, 5.0, 5.0]);
}

#[tokio::test]
async fn outputs_that_are_no_rows_show_that_nothing_may_be_filled_in() {
    let (runs, lost) = (Arc::<Mutex<Vec<_>>>::default(), CancellationToken::new());
    let batching = Batching { max_rows: 8, max_waiting_rows: 100, max_delay: Duration::ZERO };
    let engine = Box::new(Summing { runs: runs.clone() });
    let setup = setup(engine, Policy::of_server(batching).in_steps(), None, &lost);
    let scheduler = Scheduler::start_with(setup, Shapes::tail(1)).unwrap();
    for _ in 0..2 {
        assert_eq!(values(&scheduler.run(rows(&[1.0, 2.0, 3.0])).await.unwrap()), [vec![6.0]]);
    }
    let found = runs.lock().unwrap().clone();
    assert_eq!(found, [vec![1.0, 2.0, 3.0, 3.0], vec![1.0, 2.0, 3.0], vec![1.0, 2.0, 3.0]]);
}

#[tokio::test]
async fn what_an_engine_keeps_of_a_run_is_not_given_to_it_twice_because_its_outputs_are_no_rows() {
    for runs_once in [true, false] {
        let (runs, lost) = (Arc::<Mutex<Vec<_>>>::default(), CancellationToken::new());
        let batching = Batching { max_rows: 2, max_waiting_rows: 100, max_delay: Duration::ZERO };
        let delay = Delay::Always(Duration::from_mins(1));
        let policy = Policy { delay, runs_once, ..Policy::of_server(batching) };
        let setup = setup(Box::new(Summing { runs: runs.clone() }), policy, None, &lost);
        let scheduler = Scheduler::start_with(setup, Shapes::tail(1)).unwrap();
        let (one, other) = tokio::join!(scheduler.run(rows(&[1.0])), scheduler.run(rows(&[2.0])));
        let found = runs.lock().unwrap().clone();
        if runs_once {
            assert!(matches!(one.unwrap_err(), ScheduleError::Outputs { rows: 2, .. }) && other.is_err());
            assert_eq!(found, [vec![1.0, 2.0]]);
        } else {
            assert!(one.is_ok() && other.is_ok());
            assert_eq!(found, [vec![1.0, 2.0], vec![1.0], vec![2.0]]);
        }
    }
}

#[tokio::test]
async fn few_runs_show_whose_values_fail_a_large_batch() {
    let mut bench = Bench::new(16, 100, Duration::ZERO);
    let first = bench.occupy().await;
    let mut sent = Vec::new();
    for value in 0..16 {
        sent.push(bench.send(rows(&[if value == 5 { -1.0 } else { value as f32 }])).await);
    }
    bench.open_gate();
    first.await.unwrap().unwrap();
    for (value, answer) in sent.into_iter().enumerate() {
        match answer.await.unwrap() {
            Ok(done) => assert_eq!(values(&done), [vec![value as f32 * 2.0]]),
            Err(_) => assert_eq!(value, 5),
        }
    }
    assert_eq!(bench.runs().len(), 1 + 9, "the batch, and two halves four times");
}

#[tokio::test]
async fn a_busy_engine_waits_for_a_full_batch_but_an_idle_one_for_nobody() {
    let mut bench = Bench::new(2, 100, Duration::from_mins(10));
    let first = bench.occupy().await; // the engine was idle: no delay
    let second = bench.send(rows(&[2.0])).await;
    bench.open_gate();
    first.await.unwrap().unwrap();
    // The engine is free and `second` has company coming: it leaves when the batch is full, not before.
    let third = bench.send(rows(&[3.0])).await;
    second.await.unwrap().unwrap();
    third.await.unwrap().unwrap();
    assert_eq!(bench.runs(), [vec![1.0], vec![2.0, 3.0]]);
}

#[tokio::test]
async fn a_batch_that_stays_small_leaves_when_its_oldest_request_is_old_enough() {
    let mut bench = Bench::new(2, 100, Duration::from_millis(20));
    let first = bench.occupy().await;
    let second = bench.send(rows(&[2.0])).await;
    bench.open_gate();
    first.await.unwrap().unwrap();
    second.await.unwrap().unwrap();
    assert_eq!(bench.runs(), [vec![1.0], vec![2.0]]);
}

#[tokio::test]
async fn an_engine_that_panics_is_an_answer_to_all_and_reported_as_lost() {
    let mut bench = Bench::new(8, 100, Duration::ZERO);
    let first = bench.occupy().await;
    let last = bench.send(rows(&[f32::NAN])).await;
    bench.open_gate();
    first.await.unwrap().unwrap();
    assert!(matches!(last.await.unwrap().unwrap_err(), ScheduleError::Stopped { .. }));
    tokio::time::timeout(Duration::from_secs(20), bench.lost.cancelled()).await.unwrap();
    assert!(matches!(bench.scheduler.run(rows(&[1.0])).await.unwrap_err(), ScheduleError::Stopped { .. }));
}

#[tokio::test]
async fn stopping_answers_what_waits_and_refuses_what_comes() {
    let mut bench = Bench::new(1, 100, Duration::ZERO);
    let first = bench.occupy().await;
    let waiting = bench.send(rows(&[2.0])).await;
    let scheduler = bench.scheduler.clone();
    let stopped = tokio::spawn(async move { scheduler.stop().await });
    tokio::task::yield_now().await;
    assert!(matches!(bench.scheduler.run(rows(&[3.0])).await.unwrap_err(), ScheduleError::Stopped { .. }));
    bench.open_gate();
    stopped.await.unwrap();
    first.await.unwrap().unwrap();
    waiting.await.unwrap().unwrap();
    assert!(!bench.lost.is_cancelled(), "it was asked to");
}

#[tokio::test]
async fn an_engine_that_dies_is_replaced_and_the_order_of_answers_survives_it() {
    let reopen: Reopen = Arc::new(|| {
        Ok(Box::new(Doubler { runs: Arc::default(), gate: mpsc::channel().1, threads: None, is_stuck: Arc::default() }))
    });
    let batching = Batching { max_rows: 1, max_waiting_rows: 100, max_delay: Duration::ZERO };
    let policy = Policy { preserve_ordering: true, ..Policy::of_server(batching) };
    let mut bench = Bench::with(policy, Some(reopen));
    let first = bench.occupy().await;
    let dying = bench.send(rows(&[f32::NAN])).await;
    let last = bench.send(rows(&[2.0])).await;
    bench.open_gate();
    first.await.unwrap().unwrap();
    assert!(matches!(dying.await.unwrap().unwrap_err(), ScheduleError::Stopped { .. }), "it is told");
    assert_eq!(values(&last.await.unwrap().unwrap()), [vec![4.0]], "the next engine takes what waits");
    assert!(!bench.lost.is_cancelled());
}

#[tokio::test]
async fn what_cannot_be_done_before_its_deadline_is_refused_at_once() {
    let mut bench = Bench::new(1, 100, Duration::ZERO);
    let first = bench.occupy().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    bench.gate.send(()).unwrap();
    first.await.unwrap().unwrap();
    // Now it is known that a run takes a fifth of a second.
    let within = |time: Duration| Work { deadline: Some(std::time::Instant::now() + time), ..rows(&[2.0]) };
    let second = bench.occupy().await;
    let nobody_before = bench.send(within(Duration::from_millis(150))).await;
    let error = bench.scheduler.run(within(Duration::from_millis(150))).await.unwrap_err();
    assert!(
        matches!(error, ScheduleError::TooLate { expected, .. } if expected > Duration::from_millis(150)),
        "{error}"
    );
    let patient = bench.send(within(Duration::from_mins(10))).await;
    let careless = bench.send(rows(&[3.0])).await;
    bench.open_gate();
    for caller in [second, patient, careless] {
        caller.await.unwrap().unwrap();
    }
    // It was let in, because nobody waited: what became of it is a matter of time.
    let _ = nobody_before.await.unwrap();
}

#[tokio::test]
async fn an_engine_is_told_how_long_the_last_of_a_batch_waits_and_when_nobody_does() {
    let (begun, mut runs) = tokio_mpsc::unbounded_channel();
    let engine = Box::new(Endless { runtime: Handle::current(), begun });
    let batching = Batching { max_rows: 2, max_waiting_rows: 8, max_delay: Duration::ZERO };
    let setup = setup(engine, Policy::of_server(batching), None, &CancellationToken::new());
    let scheduler = Arc::new(Scheduler::start_with(setup, Shapes::tail(1)).unwrap());
    let now = Instant::now();
    let at = |seconds| now + Duration::from_secs(seconds);
    let ask = |seconds: Option<u64>| {
        let deadline = seconds.map(at);
        let (scheduler, work) = (scheduler.clone(), Work { deadline, ..rows(&[1.0]) });
        tokio::spawn(async move { scheduler.run(work).await })
    };
    let alone = ask(Some(60));
    assert_eq!(runs.recv().await.unwrap(), Some(at(60)));
    // The next three wait for the engine, and meet there: two in a batch, and one that says nothing with one that does.
    let [short, long] = [ask(Some(70)), ask(Some(80))];
    tokio::task::yield_now().await;
    let [open, other] = [ask(None), ask(Some(90))];
    tokio::task::yield_now().await;
    alone.abort();
    assert_eq!(runs.recv().await.unwrap(), Some(at(80)));
    long.abort();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(runs.try_recv().is_err(), "one of the batch still waits");
    short.abort();
    assert_eq!(runs.recv().await.unwrap(), None, "one of them waits for as long as it takes");
    open.abort();
    other.abort();
    scheduler.stop().await;
}

/// A scheduler whose engine any thread may run, and which threads did.
struct Quick {
    bench: Bench,
    threads: Threads,
    is_stuck: Arc<AtomicBool>,
}

impl Quick {
    fn new(reopen: Option<Reopen>) -> Self {
        let batching = Batching { max_rows: 8, max_waiting_rows: 100, max_delay: Duration::ZERO };
        let threads = Threads::default();
        let is_stuck = Arc::new(AtomicBool::new(true));
        let own = (threads.clone(), is_stuck.clone());
        let mut bench = Bench::run_by(Policy::of_server(batching), reopen, Some(own), &Slots::new(1));
        bench.open_gate();
        Self { bench, threads, is_stuck }
    }

    /// Runs this until its batches are known to be quick, which on a busy machine may take a few tries, and until the
    /// engine's thread sleeps.
    async fn warm_up(&self, values: &[f32]) {
        let work = rows(values);
        for _ in 0..1000 {
            self.bench.scheduler.run(work.clone()).await.unwrap();
            if self.bench.scheduler.runner.queue.is_quick(work.bytes()) {
                return tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        panic!("none of a thousand batches was quick");
    }

    fn was_an_engines_thread(&self) -> bool {
        self.threads.lock().unwrap().last().unwrap().as_deref() == Some("engine")
    }
}

#[tokio::test]
async fn once_batches_are_known_to_be_quick_callers_run_them_together() {
    let quick = Quick::new(None);
    quick.bench.scheduler.run(rows(&[1.0, 2.0, 3.0])).await.unwrap();
    assert!(quick.was_an_engines_thread(), "nothing was known of it");
    quick.warm_up(&[1.0, 2.0, 3.0]).await;
    let before = quick.bench.runs().len();
    let scheduler = &quick.bench.scheduler;
    let (mut one, mut two) = (pin!(scheduler.run(rows(&[1.0]))), pin!(scheduler.run(rows(&[2.0, 3.0]))));
    assert!(futures::poll!(one.as_mut()).is_pending() && futures::poll!(two.as_mut()).is_pending());
    assert_eq!(values(&one.await.unwrap()), [vec![2.0]]);
    assert_eq!(values(&two.await.unwrap()), [vec![4.0, 6.0]]);
    assert_eq!(quick.bench.runs()[before..], [vec![1.0, 2.0, 3.0]]);
    assert!(!quick.was_an_engines_thread());
}

#[tokio::test]
async fn a_batch_that_is_larger_than_those_known_to_be_quick_is_for_a_thread() {
    let quick = Quick::new(None);
    quick.warm_up(&[1.0]).await;
    quick.bench.scheduler.run(rows(&[1.0, 2.0])).await.unwrap();
    assert!(quick.was_an_engines_thread());
}

#[tokio::test]
async fn a_caller_that_leaves_before_its_turn_takes_nobodys_along() {
    let quick = Quick::new(None);
    quick.warm_up(&[1.0, 2.0]).await;
    let scheduler = quick.bench.scheduler.clone();
    let mut leaver = Box::pin(async { scheduler.run(rows(&[66.0])).await });
    assert!(futures::poll!(leaver.as_mut()).is_pending());
    let mut other = Box::pin(async { scheduler.run(rows(&[2.0])).await });
    assert!(futures::poll!(other.as_mut()).is_pending());
    drop(leaver);
    let answer = tokio::time::timeout(Duration::from_secs(20), other).await.expect("somebody runs it");
    assert_eq!(values(&answer.unwrap()), [vec![4.0]]);
    assert!(!quick.bench.runs().concat().contains(&66.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_whose_batch_takes_longer_than_expected_hears_of_its_deadline() {
    let quick = Quick::new(None);
    quick.warm_up(&[1.0]).await;
    let deadline = Some(Instant::now() + Duration::from_millis(100));
    let scheduler = quick.bench.scheduler.clone();
    let work = Work { deadline, ..rows(&[SLOW]) };
    let answer = tokio::spawn(async move { scheduler.run(work).await });
    let answer = tokio::time::timeout(Duration::from_secs(20), answer).await;
    // Before anything is claimed: the runtime ends with its threads.
    let was_stuck = quick.is_stuck.swap(false, Ordering::Relaxed);
    let answer = answer.expect("somebody looks after the timers").unwrap();
    assert!(matches!(answer, Err(ScheduleError::DeadlineExceeded { .. })), "{answer:?}");
    assert!(was_stuck && !quick.was_an_engines_thread(), "a caller's thread is in it");
}

#[tokio::test]
async fn an_engine_that_dies_of_a_callers_batch_is_replaced() {
    let reopen: Reopen = Arc::new(|| {
        Ok(Box::new(Doubler { runs: Arc::default(), gate: mpsc::channel().1, threads: None, is_stuck: Arc::default() }))
    });
    let quick = Quick::new(Some(reopen));
    quick.warm_up(&[1.0]).await;
    let error = quick.bench.scheduler.run(rows(&[f32::NAN])).await.unwrap_err();
    assert!(matches!(error, ScheduleError::Stopped { .. }), "{error:?}");
    let answer = tokio::time::timeout(Duration::from_secs(20), quick.bench.scheduler.run(rows(&[2.0]))).await;
    assert_eq!(values(&answer.expect("another engine takes its place").unwrap()), [vec![4.0]]);
    assert!(!quick.bench.lost.is_cancelled());
    tokio::time::timeout(Duration::from_secs(20), quick.bench.scheduler.stop()).await.expect("all threads end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_caller_is_answered_whoever_runs_its_batch() {
    let quick = Quick::new(None);
    let ask = |caller: u16| {
        let scheduler = quick.bench.scheduler.clone();
        tokio::spawn(async move {
            for turn in 0..500_u16 {
                let value = f32::from(caller) * 1000.0 + f32::from(turn);
                let mut asked = Box::pin(scheduler.run(rows(&[value])));
                let answer = match futures::poll!(asked.as_mut()) {
                    Poll::Ready(answer) => answer,
                    // Some leave in the middle.
                    Poll::Pending if turn % 7 == caller % 7 => {
                        tokio::task::yield_now().await;
                        continue;
                    }
                    Poll::Pending => asked.await,
                };
                assert_eq!(values(&answer.unwrap()), [vec![2.0 * value]]);
            }
        })
    };
    let callers: Vec<_> = (0..12).map(ask).collect();
    for caller in callers {
        tokio::time::timeout(Duration::from_mins(1), caller).await.expect("nobody waits for ever").unwrap();
    }
    tokio::time::timeout(Duration::from_secs(20), quick.bench.scheduler.stop()).await.expect("all threads end");
}

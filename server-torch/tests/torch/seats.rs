//! Sequences of models that keep state inside: each has a row of the batch, or an instance, for its life.

use std::time::Duration;

use futures::future::join_all;
use sensorium_engine_torch::Attribute;
use sensorium_server::{error::InferError, model::SequenceError, repository::Registry};

use crate::bench::{Bench, answer, f32s, named, reason, said, step};

/// Adds up what it is sent, row by row, and counts its runs in `runs`, to show that rows without a request are run.
const ROWS: &str = "
def forward(self, x, start, ready):
    kept = torch.where(start > 0, torch.zeros_like(self.total), self.total)
    self.total = torch.where(ready > 0, kept + x, self.total)
    self.runs.add_(1)
    return self.total, self.runs.expand(3, 1)
";

const ROWS_CONFIG: &str = r#"
max_batch_size: 3
input { name: "x" data_type: TYPE_FP32 dims: 1 }
output { name: "OUTPUT__0" data_type: TYPE_FP32 dims: 1 }
sequence_batching {
  max_sequence_idle_microseconds: IDLE
  direct { }
  control_input { name: "start" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
  control_input { name: "ready" control { kind: CONTROL_SEQUENCE_READY fp32_false_true: [ 0, 1 ] } }
}
"#;

/// No sequence is idle for longer than a slow machine takes for a step, unless a test waits for it.
const PATIENT: &str = "60000000";

async fn rows(idle: &str) -> Registry {
    let bench = Bench::new();
    let zeros = |rows| Attribute::Tensor(f32s(&[rows, 1], &vec![0.0; rows as usize]));
    bench.compile("m", ROWS, &[("total", zeros(3)), ("runs", zeros(1))]);
    bench.write("m", "config.pbtxt", ROWS_CONFIG.replace("IDLE", idle));
    let registry = bench.open().await;
    assert!(registry.ready("m", ""), "{}", reason(&registry));
    registry
}

async fn add(registry: &Registry, id: u64, value: f32, start: bool, end: bool) -> Result<f32, InferError> {
    Ok(answer(registry, "m", step(id, start, end, vec![named("x", f32s(&[1, 1], &[value]))])).await?[0])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_keep_the_state_of_their_sequences_apart() {
    let registry = rows(PATIENT).await;
    // Twelve sequences on three seats, each of them told in order; nine wait for a seat first.
    let sequences = (1..=12_u64).map(|id| {
        let registry = registry.clone();
        async move {
            let mut expected = 0.0;
            for round in 0..20_u64 {
                let value = (id * 100 + round) as f32;
                expected += value;
                let found = add(&registry, id, value, round == 0, round == 19).await.unwrap();
                assert_eq!(found, expected, "round {round} of sequence {id}");
                if round % 7 == id % 7 {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
        }
    });
    join_all(sequences.map(tokio::spawn)).await.into_iter().for_each(|joined| joined.unwrap());
}

#[tokio::test]
async fn a_probe_changes_nothing_of_a_sequence() {
    let registry = rows(PATIENT).await;
    assert_eq!(add(&registry, 1, 5.0, true, false).await.unwrap(), 5.0);
    for _ in 0..3 {
        registry.graphs()[0].probe(Duration::ZERO).await.unwrap();
    }
    assert_eq!(add(&registry, 1, 6.0, false, true).await.unwrap(), 11.0);
}

#[tokio::test]
async fn an_idle_sequence_leaves_its_seat_to_one_that_waits() {
    let registry = rows("1500000").await;
    for id in 1..=3 {
        assert_eq!(add(&registry, id, 1.0, true, false).await.unwrap(), 1.0);
    }
    // 1 stays awake; the others do not, and 4 and 5 get their seats.
    let awake = async {
        for round in 2..=31_u8 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(add(&registry, 1, 1.0, false, false).await.unwrap(), f32::from(round));
        }
    };
    let ((), fourth, fifth) =
        tokio::join!(awake, add(&registry, 4, 40.0, true, false), add(&registry, 5, 50.0, true, false));
    assert_eq!((fourth.unwrap(), fifth.unwrap()), (40.0, 50.0));
    let error = add(&registry, 2, 1.0, false, false).await.unwrap_err();
    assert!(matches!(error, InferError::Sequence(SequenceError::NotStarted { .. })), "{error}");
}

#[tokio::test]
async fn more_sequences_than_may_wait_are_refused_at_once() {
    let registry = rows(PATIENT).await;
    for id in 1..=3 {
        add(&registry, id, 1.0, true, false).await.unwrap();
    }
    let waiting = (0..96).map(|index| add(&registry, 100 + index, 1.0, true, true));
    let one_too_many = async {
        tokio::task::yield_now().await;
        add(&registry, 1000, 1.0, true, true).await
    };
    let end = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        add(&registry, 1, 1.0, false, true).await.unwrap();
    };
    let (waited, refused, ()) = tokio::join!(join_all(waiting), one_too_many, end);
    assert!(waited.into_iter().all(|found| found.unwrap() == 1.0), "each began anew");
    let error = refused.unwrap_err();
    assert!(matches!(error, InferError::Sequence(SequenceError::Overloaded { limit: 99, .. })), "{error}");
}

/// Keeps one total for all that it sees.
const WHOLE: &str = "
def forward(self, x):
    self.total = self.total + x
    return self.total

def forget(self):
    self.total = torch.zeros([1])
";

fn whole_config(rest: &str) -> String {
    format!(
        r#"input {{ name: "x" data_type: TYPE_FP32 dims: 1 }}
        output {{ name: "OUTPUT__0" data_type: TYPE_FP32 dims: 1 }}
        sequence_batching {{ max_sequence_idle_microseconds: {PATIENT} direct {{ }} }}
        parameters {{ key: "reset_method" value {{ string_value: "forget" }} }} {rest}"#
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_that_keeps_one_state_has_an_instance_for_each_sequence() {
    let bench = Bench::new();
    bench.compile("m", WHOLE, &[("total", Attribute::Tensor(f32s(&[1], &[0.0])))]);
    bench.write("m", "config.pbtxt", whole_config("max_batch_size: 0 instance_group { count: 3 }"));
    let registry = bench.open().await;
    assert!(registry.ready("m", ""), "{}", reason(&registry));
    assert_eq!(registry.graphs().len(), 3);
    let add = async |id: u64, value: f32, start, end| {
        answer(&registry, "m", step(id, start, end, vec![named("x", f32s(&[1], &[value]))])).await.unwrap()[0]
    };
    for round in 0..2 {
        for id in 1..=3_u8 {
            assert_eq!(add(id.into(), f32::from(id), true, false).await, f32::from(id), "round {round}");
        }
        // It would change the state, so an instance that is in use is left alone.
        for graph in registry.graphs() {
            graph.probe(Duration::ZERO).await.unwrap();
        }
        for id in 1..=3_u8 {
            assert_eq!(add(id.into(), 10.0, false, true).await, 10.0 + f32::from(id), "round {round}");
        }
    }
}

#[tokio::test]
async fn a_method_that_forgets_all_rows_is_refused_where_there_are_several() {
    let bench = Bench::new();
    bench.compile("m", WHOLE, &[("total", Attribute::Tensor(f32s(&[1], &[0.0])))]);
    bench.write("m", "config.pbtxt", whole_config("max_batch_size: 4"));
    let error = reason(&bench.open().await);
    assert!(error.contains("reset_method forgets all rows of an instance at once; write max_batch_size: 0"), "{error}");
}

#[tokio::test]
async fn a_failed_step_is_an_error_of_that_step() {
    let source = "
def forward(self, x):
    assert bool(x <= 100), 'too much'
    self.total = self.total + x
    return self.total

def forget(self):
    self.total = torch.zeros([1])
";
    let bench = Bench::new();
    bench.compile("m", source, &[("total", Attribute::Tensor(f32s(&[1], &[0.0])))]);
    bench.write("m", "config.pbtxt", whole_config("max_batch_size: 0"));
    let registry = bench.open().await;
    let add = async |value: f32, start| {
        answer(&registry, "m", step(7, start, false, vec![named("x", f32s(&[1], &[value]))])).await
    };
    assert_eq!(add(1.0, true).await.unwrap(), [1.0]);
    let error = add(101.0, false).await.unwrap_err();
    assert!(said(&error).contains("too much"), "{}", said(&error));
    assert_eq!(add(2.0, false).await.unwrap(), [3.0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_failed_is_not_done_again_for_those_whose_state_it_has_changed() {
    let source = "
def forward(self, x, start):
    kept = torch.where(start > 0, torch.zeros_like(self.total), self.total)
    self.total = kept + x
    assert bool((self.total <= 100).all()), 'too much'
    return self.total
";
    let bench = Bench::new();
    bench.compile("m", source, &[("total", Attribute::Tensor(f32s(&[3, 1], &[0.0; 3])))]);
    // All three go together.
    let strategy = "direct { minimum_slot_utilization: 1 max_queue_delay_microseconds: 60000000 }";
    let ready = r#"control_input { name: "ready" control { kind: CONTROL_SEQUENCE_READY fp32_false_true: [ 0, 1 ] } }"#;
    let config = ROWS_CONFIG.replace("IDLE", PATIENT).replace("direct { }", strategy).replace(ready, "");
    bench.write("m", "config.pbtxt", config);
    let registry = bench.open().await;
    assert!(registry.ready("m", ""), "{}", reason(&registry));
    let all = async |values: [f32; 3], starts: [bool; 3]| {
        join_all([0, 1, 2].map(|at| add(&registry, at as u64 + 1, values[at], starts[at], false))).await
    };
    assert_eq!(all([1.0, 2.0, 3.0], [true; 3]).await.into_iter().map(Result::unwrap).sum::<f32>(), 6.0);
    for found in all([10.0, 10.0, 200.0], [false; 3]).await {
        let error = found.unwrap_err();
        assert!(said(&error).contains("too much"), "{}", said(&error));
    }
    let found: Vec<_> = all([0.0, 0.0, 5.0], [false, false, true]).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(found, [11.0, 12.0, 5.0], "the step that failed has been done once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_stays_with_the_instance_that_keeps_its_state_by_id() {
    let source = "
def forward(self, x, corrid, start):
    index = corrid.flatten()
    self.total[index] = self.total[index] * (1 - start) + x
    return self.total[index]
";
    let bench = Bench::new();
    bench.compile("m", source, &[("total", Attribute::Tensor(f32s(&[64, 1], &[0.0; 64])))]);
    let config = r#"
        max_batch_size: 4
        instance_group { count: 2 }
        input { name: "x" data_type: TYPE_FP32 dims: 1 }
        output { name: "OUTPUT__0" data_type: TYPE_FP32 dims: 1 }
        sequence_batching {
          max_sequence_idle_microseconds: 60000000
          oldest { max_candidate_sequences: 4 }
          control_input { name: "corrid" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT64 } }
          control_input { name: "start" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
        }"#;
    bench.write("m", "config.pbtxt", config);
    let registry = bench.open().await;
    assert!(registry.ready("m", ""), "{}", reason(&registry));
    let sequences = (1..=8_u64).map(|id| {
        let registry = registry.clone();
        async move {
            for round in 1..=20_u8 {
                let found = add(&registry, id, id as f32, round == 1, round == 20).await.unwrap();
                assert_eq!(found, id as f32 * f32::from(round), "sequence {id}, round {round}");
            }
        }
    });
    join_all(sequences).await;
}

//! Every operation against a reference that each rank computes for itself.

use std::thread;
use std::time::{Duration, Instant};

use sensorium_dist::{ProcessGroup, ReduceOp};
use tch::{Device, Kind, Tensor};

use crate::ranks::ranks;

const KINDS: [Kind; 6] = [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16, Kind::Int64, Kind::Uint8];
const FLOATS: [Kind; 4] = [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16];

/// `count` small whole numbers that differ by rank, so that every kind holds them and their sums exactly.
fn sample(rank: u32, count: i64, kind: Kind) -> Tensor {
    ((Tensor::arange(count, (Kind::Int64, Device::Cpu)) * 3 + i64::from(rank) * 7).remainder(11) + 1).to_kind(kind)
}

/// The samples of all ranks, `[size, count]`.
fn samples(group: &ProcessGroup, count: i64, kind: Kind) -> Tensor {
    let rows: Vec<_> = (0..group.size()).map(|rank| sample(rank, count, kind)).collect();
    Tensor::stack(&rows, 0)
}

/// Reduces rows in double precision; whole numbers and their halves and quarters stay exact.
fn reduce(rows: &Tensor, op: ReduceOp) -> Tensor {
    let exact = rows.to_kind(Kind::Double);
    let reduced = match op {
        ReduceOp::Sum => exact.sum_dim_intlist([0i64].as_slice(), false, Kind::Double),
        ReduceOp::Avg => exact.mean_dim([0i64].as_slice(), false, Kind::Double),
        ReduceOp::Min => exact.amin([0i64].as_slice(), false),
        ReduceOp::Max => exact.amax([0i64].as_slice(), false),
    };
    reduced.to_kind(rows.kind())
}

fn zeros(count: i64, kind: Kind) -> Tensor {
    Tensor::zeros([count], (kind, Device::Cpu))
}

#[track_caller]
fn assert_equal(found: &Tensor, expected: &Tensor, what: &str) {
    assert!(found.equal(expected), "{what}: found {found:?} {found}\nexpected {expected:?} {expected}");
}

fn ops(kind: Kind) -> Vec<ReduceOp> {
    let whole = [ReduceOp::Sum, ReduceOp::Min, ReduceOp::Max];
    if FLOATS.contains(&kind) { [&whole[..], &[ReduceOp::Avg]].concat() } else { whole.to_vec() }
}

fn check_all_operations(group: &ProcessGroup) {
    let (rank, size) = (group.rank(), i64::from(group.size()));
    for kind in KINDS {
        let each = 5;
        let rows = samples(group, size * each, kind);
        let own = rows.get(i64::from(rank));
        let part = |tensor: &Tensor, rank: u32| tensor.narrow(0, i64::from(rank) * each, each);

        for op in ops(kind) {
            let tensor = own.copy();
            group.all_reduce(&tensor, op).unwrap().wait().unwrap();
            assert_equal(&tensor, &reduce(&rows, op), &format!("all_reduce {op} {kind:?}"));

            let output = zeros(each, kind);
            group.reduce_scatter_into(&output, &own, op).unwrap().wait().unwrap();
            assert_equal(&output, &part(&reduce(&rows, op), rank), &format!("reduce_scatter_into {op} {kind:?}"));
        }
        for root in 0..group.size() {
            let tensor = own.copy();
            group.broadcast(&tensor, root).unwrap().wait().unwrap();
            assert_equal(&tensor, &rows.get(i64::from(root)), &format!("broadcast from {root} {kind:?}"));
        }
        let output = Tensor::zeros([size, size, each], (kind, Device::Cpu));
        group.all_gather_into(&output, &own.view([size, each])).unwrap().wait().unwrap();
        assert_equal(&output.view([size, -1]), &rows, &format!("all_gather_into {kind:?}"));

        let output = zeros(size * each, kind);
        group.all_to_all(&output, &own).unwrap().wait().unwrap();
        let parts: Vec<_> = (0..size).map(|from| part(&rows.get(from), rank)).collect();
        assert_equal(&output, &Tensor::cat(&parts, 0), &format!("all_to_all {kind:?}"));

        // Around the ring, two messages that are received in the other order than they are sent.
        let (next, previous) = ((rank + 1) % group.size(), (rank + group.size() - 1) % group.size());
        let (first, second) = (own.copy(), own.flip([0i64].as_slice()));
        let (got_first, got_second) = (own.zeros_like(), own.zeros_like());
        let works = [
            group.recv(&got_second, previous, 2).unwrap(),
            group.recv(&got_first, previous, 1).unwrap(),
            group.send(&first, next, 1).unwrap(),
            group.send(&second, next, 2).unwrap(),
        ];
        for work in works {
            work.wait().unwrap();
        }
        let expected = rows.get(i64::from(previous));
        assert_equal(&got_first, &expected, &format!("first message {kind:?}"));
        assert_equal(&got_second, &expected.flip([0i64].as_slice()), &format!("second message {kind:?}"));
    }
}

#[test]
fn every_operation_gives_the_reference_values_on_two_ranks() {
    ranks(2).run(|group| {
        check_all_operations(group);
    });
}

#[test]
fn every_operation_gives_the_reference_values_on_four_ranks() {
    ranks(4).run(|group| {
        check_all_operations(group);
    });
}

#[test]
fn operations_in_flight_may_be_many_and_waited_for_in_any_order() {
    ranks(4).run(|group| {
        let size = i64::from(group.size());
        let (mut works, mut checks) = (Vec::new(), Vec::new());
        // Sizes around and beyond the backend's segments, and none of them a round number.
        for count in [1, 3, 1_003, 200_003] {
            let rows = samples(group, count * size, Kind::Float);
            let own = rows.get(i64::from(group.rank()));
            let (sum, part, all) = (own.copy(), zeros(count, Kind::Float), zeros(count * size * size, Kind::Float));
            works.push(group.all_reduce(&sum, ReduceOp::Avg).unwrap());
            works.push(group.reduce_scatter_into(&part, &own, ReduceOp::Sum).unwrap());
            works.push(group.all_gather_into(&all, &own).unwrap());
            let expected_part = reduce(&rows, ReduceOp::Sum).narrow(0, i64::from(group.rank()) * count, count);
            checks.extend([(sum, reduce(&rows, ReduceOp::Avg)), (part, expected_part), (all, rows.view([-1]))]);
        }
        works.push(group.barrier().unwrap());
        for work in works.into_iter().rev() {
            work.wait().unwrap();
        }
        for (found, expected) in checks {
            assert_equal(&found, &expected, "in flight");
        }
    });
}

#[test]
fn all_ranks_get_the_same_bits() {
    ranks(4).run(|group| {
        tch::manual_seed(i64::from(group.rank()));
        for kind in FLOATS {
            let mean = Tensor::randn([10_007], (Kind::Float, Device::Cpu)).to_kind(kind);
            group.all_reduce(&mean, ReduceOp::Avg).unwrap().wait().unwrap();
            let all = Tensor::zeros([4, 10_007], (kind, Device::Cpu));
            group.all_gather_into(&all, &mean).unwrap().wait().unwrap();
            for rank in 0..4 {
                assert_equal(&all.get(rank), &mean, &format!("{kind:?} of rank {rank}"));
            }
        }
    });
}

#[test]
fn a_barrier_waits_for_the_last_rank() {
    ranks(2).run(|group| {
        let nap = Duration::from_millis(400);
        group.barrier().unwrap().wait().unwrap();
        let start = Instant::now();
        if group.rank() == 0 {
            thread::sleep(nap);
        }
        group.barrier().unwrap().wait().unwrap();
        assert!(start.elapsed() > nap * 9 / 10, "{:?}", start.elapsed());
    });
}

#[test]
fn odd_but_legal_uses_are_no_trouble() {
    ranks(2).run(|group| {
        // Nothing to send.
        let nothing = zeros(0, Kind::Float);
        group.all_reduce(&nothing, ReduceOp::Sum).unwrap().wait().unwrap();
        group.all_gather_into(&nothing, &nothing).unwrap().wait().unwrap();

        // A number without a dimension.
        let loss = Tensor::from(f64::from(group.rank()));
        group.all_reduce(&loss, ReduceOp::Avg).unwrap().wait().unwrap();
        assert_equal(&loss, &Tensor::from(0.5), "loss");

        // A parameter under autograd keeps its graph role and gets new data.
        let parameter = sample(group.rank(), 4, Kind::Float).set_requires_grad(true);
        group.broadcast(&parameter, 1).unwrap().wait().unwrap();
        assert!(parameter.requires_grad() && parameter.is_leaf());
        assert_equal(&parameter.detach(), &sample(1, 4, Kind::Float), "parameter");

        // A view in the middle of a buffer: its neighbours stay as they are.
        let buffer = Tensor::ones([6], (Kind::Float, Device::Cpu));
        group.all_reduce(&buffer.narrow(0, 2, 2), ReduceOp::Sum).unwrap().wait().unwrap();
        assert_equal(&buffer, &Tensor::from_slice(&[1.0f32, 1.0, 2.0, 2.0, 1.0, 1.0]), "view");

        // Work that is dropped or forgotten with its tensor still runs, and the next operation is right.
        drop(group.all_reduce(&zeros(100_003, Kind::Float), ReduceOp::Sum).unwrap());
        std::mem::forget(group.all_reduce(&zeros(100_003, Kind::Float), ReduceOp::Avg).unwrap());
        let tensor = sample(group.rank(), 4, Kind::Float);
        group.all_reduce(&tensor, ReduceOp::Sum).unwrap().wait().unwrap();
        assert_equal(&tensor, &reduce(&samples(group, 4, Kind::Float), ReduceOp::Sum), "after dropped work");

        // Another thread may take over.
        let clone = group.clone();
        let moved = sample(group.rank(), 4, Kind::Float);
        thread::spawn(move || clone.all_reduce(&moved, ReduceOp::Max).unwrap().wait().unwrap()).join().unwrap();
    });
}

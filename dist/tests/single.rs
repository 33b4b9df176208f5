//! The group of one, and what every group refuses.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on is to panic")]

use sensorium_dist::{DistError, Problem, ProcessGroup, ReduceOp};
use tch::{Device, Kind, Tensor};

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap()
}

fn zeros(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::zeros(shape, (kind, Device::Cpu))
}

#[test]
fn each_operation_gives_the_ranks_own_values() {
    let group = ProcessGroup::single();
    let own = Tensor::from_slice(&[1.0f32, 2.0]);
    for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max] {
        group.all_reduce(&own, op).unwrap().wait().unwrap();
        let output = zeros(&[2], Kind::Float);
        group.reduce_scatter_into(&output, &own, op).unwrap().wait().unwrap();
        assert_eq!(values(&output), [1.0, 2.0]);
    }
    group.broadcast(&own, 0).unwrap().wait().unwrap();
    group.barrier().unwrap().wait().unwrap();
    assert_eq!(values(&own), [1.0, 2.0]);

    let output = zeros(&[1, 2], Kind::Float);
    group.all_gather_into(&output, &own).unwrap().wait().unwrap();
    assert_eq!(values(&output), [1.0, 2.0]);
    let output = zeros(&[2], Kind::Float);
    group.all_to_all(&output, &own).unwrap().wait().unwrap();
    assert_eq!(values(&output), [1.0, 2.0]);
}

#[test]
fn there_is_nobody_to_talk_to() {
    let group = ProcessGroup::single();
    let tensor = zeros(&[1], Kind::Float);
    let problem = |result: Result<_, DistError>| match result.err().unwrap() {
        DistError::Argument { problem, .. } => problem,
        error => panic!("{error}"),
    };
    assert_eq!(problem(group.send(&tensor, 1, 0)), Problem::Rank { rank: 1, size: 1 });
    assert_eq!(problem(group.recv(&tensor, 0, 0)), Problem::SelfMessage);
}

#[test]
fn a_tensor_that_cannot_be_sent_is_refused_with_the_reason() {
    let group = ProcessGroup::single();
    let transposed = zeros(&[2, 3], Kind::Float).transpose(0, 1);
    for (tensor, expected) in [
        (Tensor::new(), "all_reduce(avg) on rank 0 of 1: the given tensor is undefined"),
        (
            transposed,
            "all_reduce(avg) on rank 0 of 1: the given tensor of shape [3, 2] is not contiguous; call contiguous() first",
        ),
        (
            zeros(&[2], Kind::ComplexFloat),
            "all_reduce(avg) on rank 0 of 1: the given tensor is of kind ComplexFloat; \
             Float, Double, Half, BFloat16, Int64 and Uint8 are supported",
        ),
        (
            zeros(&[2], Kind::Int64),
            "all_reduce(avg) on rank 0 of 1: an average of Int64 has no exact type; \
             use a sum, or a floating-point tensor",
        ),
    ] {
        let error = group.all_reduce(&tensor, ReduceOp::Avg).err().unwrap();
        assert!(matches!(error, DistError::Argument { .. }), "{error}");
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn kinds_that_differ_are_refused() {
    let (output, input) = (zeros(&[2], Kind::Double), zeros(&[2], Kind::Float));
    let error = ProcessGroup::single().all_gather_into(&output, &input).err().unwrap();
    let expected = Problem::KindsDiffer { output: Kind::Double, input: Kind::Float };
    assert!(matches!(&error, DistError::Argument { problem, .. } if *problem == expected), "{error}");
}

#[test]
fn a_group_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<ProcessGroup>();
    shared::<sensorium_dist::Store>();
    sent::<sensorium_dist::Work>();
}

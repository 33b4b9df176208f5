//! Peers that are dead, late, absent or of another opinion: an error in time, with names, and never a hang.

use std::thread;
use std::time::{Duration, Instant};

use sensorium_dist::{DistError, Operation, Patience, Problem, ProcessGroup, ReduceOp};
use tch::{Device, Kind, Tensor};

use crate::ranks::{JOINING, die, ranks};

/// Far beyond what any test takes: where it matters, an error must not come from it.
const LONG: Duration = Duration::from_mins(10);

fn ones(count: i64) -> Tensor {
    Tensor::ones([count], (Kind::Float, Device::Cpu))
}

fn all_reduce(group: &ProcessGroup) -> Result<(), DistError> {
    group.all_reduce(&ones(1_003), ReduceOp::Sum)?.wait()
}

/// Runs until the operation fails; the steps of a training loop whose peer dies.
fn until_it_fails(mut operation: impl FnMut() -> Result<(), DistError>) -> DistError {
    loop {
        if let Err(error) = operation() {
            return error;
        }
    }
}

/// The survivors of rank 1's death name it within seconds, in any operation and on any side of the ring.
fn check_death(group: &ProcessGroup) {
    all_reduce(group).unwrap();
    if group.rank() == 1 {
        die();
    }
    let start = Instant::now();
    let error = until_it_fails(|| all_reduce(group));
    assert!(start.elapsed() < Duration::from_secs(4), "took {:?}", start.elapsed());
    match &error {
        DistError::PeersLost { call, lost, .. } => {
            assert_eq!(call.operation, Operation::AllReduce(ReduceOp::Sum));
            assert_eq!(lost, &[1], "{error}");
        }
        _ => panic!("{error}"),
    }
    let text = error.to_string();
    let expected =
        format!("all_reduce(sum) on rank {} of {}: rank 1 died or left the group", group.rank(), group.size());
    assert!(text.starts_with(&expected), "{text}");

    let later = group.barrier().err().unwrap();
    assert!(matches!(&later, DistError::Broken { cause, .. } if *cause == text), "{later}");
}

#[test]
fn a_death_among_two_is_named_within_seconds() {
    ranks(2).timeout(LONG).dying(1).run(|group| {
        check_death(group);
    });
}

#[test]
fn a_death_among_four_is_named_by_all_survivors_within_seconds() {
    ranks(4).timeout(LONG).dying(1).run(|group| {
        check_death(group);
    });
}

#[test]
fn a_death_ends_sends_and_receives() {
    ranks(3).timeout(LONG).dying(1).run(|group| {
        let message = ones(1 << 20);
        match group.rank() {
            0 => {
                let error = until_it_fails(|| group.recv(&message, 1, 0)?.wait());
                assert!(matches!(&error, DistError::PeersLost { lost, .. } if lost == &[1]), "{error}");
                assert!(error.to_string().starts_with("recv(from 1, tag 0) on rank 0 of 3"), "{error}");
            }
            1 => {
                // The others are to be waiting by then.
                thread::sleep(Duration::from_millis(300));
                die();
            }
            _ => {
                let error = until_it_fails(|| group.send(&message, 1, 7)?.wait());
                assert!(matches!(&error, DistError::PeersLost { lost, .. } if lost == &[1]), "{error}");
            }
        }
    });
}

#[test]
fn a_late_rank_is_named_after_the_timeout() {
    ranks(3).timeout(Duration::from_secs(2)).run(|group| {
        if group.rank() == 1 {
            // Alive and busy, as with a data loader that is stuck.
            thread::sleep(Duration::from_secs(8));
            return;
        }
        let start = Instant::now();
        let error = all_reduce(group).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(6), "took {:?}", start.elapsed());
        assert!(matches!(&error, DistError::Timeout { silent, .. } if silent == &[1]), "{error}");
        let expected =
            format!("all_reduce(sum) on rank {} of 3 did not end within 2s; rank 1 did not take part", group.rank());
        assert!(error.to_string().starts_with(&expected), "{error}");
    });
}

#[test]
fn a_message_that_does_not_come_names_its_sender_after_the_timeout() {
    ranks(2).timeout(Duration::from_secs(2)).run(|group| {
        if group.rank() == 1 {
            thread::sleep(Duration::from_secs(8));
            return;
        }
        let error = group.recv(&ones(4), 1, 3).unwrap().wait().unwrap_err();
        assert!(matches!(&error, DistError::Timeout { silent, .. } if silent == &[1]), "{error}");
        assert!(error.to_string().starts_with("recv(from 1, tag 3) on rank 0 of 2 did not end within 2s"), "{error}");
    });
}

#[test]
fn ranks_that_do_not_show_up_are_named() {
    ranks(3).launch(|launch| {
        if launch.rank == 1 {
            return;
        }
        // Longer than the start of one process may lag behind that of another on a busy machine.
        let error = launch.connect(&Patience::new(Duration::from_secs(15), LONG)).unwrap_err();
        assert!(error.is_wake(), "{error}");
        match &error {
            DistError::Join { missing, .. } => assert_eq!(missing, &[1], "{error}"),
            // Rank 0 serves the store, and may give up first.
            _ => assert_eq!(launch.rank, 2, "{error}"),
        }
    });
}

#[test]
fn a_rank_that_is_cancelled_while_it_waits_for_others_waits_no_longer() {
    ranks(2).launch(|launch| {
        if launch.rank == 1 {
            return;
        }
        let start = Instant::now();
        let cancelled = || start.elapsed() > Duration::from_millis(300);
        let error = launch.connect(&Patience { joining: LONG, operation: LONG, cancelled: &cancelled }).unwrap_err();
        assert!(matches!(&error, DistError::Join { missing, .. } if missing == &[1]), "{error}");
    });
}

#[test]
fn ranks_may_start_in_any_order() {
    ranks(3).launch(|launch| {
        thread::sleep(Duration::from_millis(u64::from(2 - launch.rank) * 300));
        all_reduce(&launch.connect(&Patience::new(JOINING, LONG)).unwrap()).unwrap();
    });
}

#[test]
fn sizes_that_differ_end_all_ranks_in_time() {
    // Gloo aborts a rank that receives more than it expects; one that receives less, or sees the abort, gets an error.
    ranks(3).timeout(Duration::from_secs(2)).aborting().run(|group| {
        let tensor = ones(1_003 * i64::from(group.rank() + 1));
        let error = group.all_reduce(&tensor, ReduceOp::Sum).unwrap().wait().unwrap_err();
        assert!(matches!(error, DistError::PeersLost { .. } | DistError::Timeout { .. }), "{error}");
    });
}

#[test]
fn a_refused_call_names_the_problem_and_leaves_the_group_usable() {
    ranks(2).run(|group| {
        let (two, three, five) = (ones(2), ones(3), ones(5));
        let peer = 1 - group.rank();
        let refused = [
            (group.all_gather_into(&three, &two), Problem::Elements { output: 3, input: 2, expected: 4 }),
            (group.reduce_scatter_into(&two, &five, ReduceOp::Sum), Problem::Uneven { elements: 5, parts: 2 }),
            (group.all_to_all(&three, &three), Problem::Uneven { elements: 3, parts: 2 }),
            (group.broadcast(&two, 2), Problem::Rank { rank: 2, size: 2 }),
            (group.send(&two, group.rank(), 0), Problem::SelfMessage),
            (group.recv(&two, peer, u32::MAX), Problem::Tag { tag: u32::MAX }),
        ];
        for (result, expected) in refused {
            match result.err().unwrap() {
                DistError::Argument { problem, call } => assert_eq!((problem, call.size), (expected, 2)),
                error => panic!("{error}"),
            }
        }
        all_reduce(group).unwrap();
    });
}

//! Producers run before those who need what they make.

use std::collections::BTreeSet;

use crate::fixtures::{COMPRESSION, SERVING, TRAINING, link, plan_of};
use proptest::prelude::*;
use sensorium_operator::plan::{OrderError, WorkloadPlan, order};

fn jobs(plans: &[WorkloadPlan]) -> Vec<String> {
    plans.iter().map(|plan| plan.job.to_string()).collect()
}

fn nothing() -> BTreeSet<String> {
    BTreeSet::new()
}

#[test]
fn the_quick_start_trains_compresses_and_serves_whatever_the_order_of_its_files() {
    let chain = ["TrainingJob/vqa", "CompressionJob/vqa-int8", "ServingJob/vqa"];
    let plans = [TRAINING, COMPRESSION, SERVING].map(plan_of);
    for places in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let given = places.map(|place: usize| plans[place].clone()).to_vec();
        assert_eq!(jobs(&order(given, &nothing()).unwrap()), chain);
    }
}

#[test]
fn jobs_that_do_not_need_each_other_stay_in_the_given_order() {
    let available = BTreeSet::from(["base".to_owned()]);
    let given = vec![link("c", "base", "x"), link("a", "base", "y"), link("b", "base", "z")];
    let names = ["CompressionJob/c", "CompressionJob/a", "CompressionJob/b"];
    assert_eq!(jobs(&order(given, &available).unwrap()), names);
}

#[test]
fn a_missing_producer_is_named_with_what_there_is() {
    let error = order(vec![plan_of(TRAINING), plan_of(SERVING)], &nothing()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "ServingJob/vqa needs artifact vqa-int8, which is in no store and which no given job makes (they make vqa)"
    );
}

#[test]
fn an_artifact_that_exists_or_is_named_by_digest_needs_no_producer() {
    assert!(order(vec![plan_of(SERVING)], &BTreeSet::from(["vqa-int8".to_owned()])).is_ok());
    let exact = link("exact", &format!("sha256:{}", "a".repeat(64)), "small");
    assert!(order(vec![exact], &nothing()).is_ok());
}

#[test]
fn jobs_that_wait_for_each_other_are_named_in_a_circle() {
    let plans = vec![link("a", "z", "x"), link("b", "x", "y"), link("c", "y", "z")];
    let error = order(plans, &nothing()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "these jobs wait for each other: CompressionJob/a needs CompressionJob/c needs CompressionJob/b needs \
         CompressionJob/a"
    );
}

#[test]
fn two_jobs_may_not_make_the_same_artifact_or_bear_the_same_name() {
    let error = order(vec![link("a", "base", "x"), link("b", "base", "x")], &nothing()).unwrap_err();
    let (first, second) = ("CompressionJob/a".to_owned(), "CompressionJob/b".to_owned());
    assert_eq!(error, OrderError::TwoProducers { artifact: "x".to_owned(), first, second });
    let error = order(vec![link("a", "base", "x"), link("a", "base", "y")], &nothing()).unwrap_err();
    assert_eq!(error, OrderError::DuplicateJob { job: "CompressionJob/a".to_owned() });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Job i makes `a<i>` from an artifact of an earlier job, so there is an order; it must be found from any shuffle.
    #[test]
    fn no_job_runs_before_what_it_needs(
        parents in prop::collection::vec(any::<prop::sample::Index>(), 1..12),
        places in any::<prop::sample::Index>(),
    ) {
        let mut plans: Vec<_> = parents
            .iter()
            .enumerate()
            .map(|(i, parent)| link(&format!("j{i}"), &format!("a{}", parent.index(i + 1)), &format!("a{}", i + 1)))
            .collect();
        let turn = places.index(plans.len());
        plans.reverse();
        plans.rotate_left(turn);
        let count = plans.len();
        let ordered = order(plans, &BTreeSet::from(["a0".to_owned()])).unwrap();
        prop_assert_eq!(ordered.len(), count);
        let mut made = BTreeSet::from(["a0".to_owned()]);
        for plan in ordered {
            prop_assert!(made.contains(&plan.requires[0]), "{} comes too early", plan.job);
            made.extend(plan.produces);
        }
    }
}

//! Laws that hold for every plan.

use std::collections::BTreeSet;

use crate::fixtures::{COMPRESSION, ENCODERS, SERVING, TRAINING, plan_of, plan_of_topology};
use proptest::prelude::*;
use sensorium_operator::plan::{Part, Role, Template, WorkloadPlan};

fn templates(role: &Role) -> impl Iterator<Item = &Template> {
    role.args.iter().chain(role.env.values())
}

/// Backends fill holes from the plan alone, so a plan may only ask for what it has.
fn assert_holes_can_be_filled(plan: &WorkloadPlan) {
    let find = |name: &str| plan.roles.iter().find(|role| role.name == name).unwrap();
    for role in &plan.roles {
        for part in templates(role).flat_map(Template::parts) {
            match part {
                Part::Host { role, index } => assert!(*index < find(role).replicas),
                Part::Port { role, name } | Part::Addresses { role, name } => {
                    assert!(find(role).ports.contains_key(name));
                }
                Part::Listen { name } => assert!(role.ports.contains_key(name)),
                Part::MountPath(name) => assert!(role.mounts.iter().any(|mount| mount.name == *name)),
                Part::ResultFile => assert!(role.result),
                Part::Text(_) | Part::Rank | Part::LocalRank | Part::Service => {}
            }
        }
        if let Some(probe) = &role.readiness {
            assert!(role.ports.contains_key(&probe.port));
        }
        let names: BTreeSet<_> = role.mounts.iter().map(|mount| &mount.name).collect();
        assert_eq!(names.len(), role.mounts.len());
    }
}

#[test]
fn the_examples_ask_only_for_what_their_plans_have() {
    for text in [TRAINING, COMPRESSION, SERVING, ENCODERS] {
        assert_holes_can_be_filled(&plan_of(text));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_rank_from_0_to_the_world_size_is_there_once(workers in 1..40_u32, processes in 1..9_u32) {
        let plan = plan_of_topology(workers, processes);
        let role = &plan.roles[0];
        prop_assert_eq!(role.world_size(), workers * processes);
        let ranks: Vec<u32> = role.all_processes().map(|process| process.rank).collect();
        prop_assert_eq!(ranks, (0..workers * processes).collect::<Vec<_>>());
        for process in role.all_processes() {
            prop_assert!(process.replica < workers && process.local_rank < processes);
            prop_assert_eq!(process.replica * processes + process.local_rank, process.rank);
        }
        prop_assert_eq!(role.env["WORLD_SIZE"].to_string(), (workers * processes).to_string());
        prop_assert_eq!(role.env["LOCAL_WORLD_SIZE"].to_string(), processes.to_string());
        assert_holes_can_be_filled(&plan);
    }

    #[test]
    fn the_same_manifest_gives_the_same_plan(workers in 1..9_u32, processes in 1..5_u32) {
        prop_assert_eq!(plan_of_topology(workers, processes), plan_of_topology(workers, processes));
    }
}

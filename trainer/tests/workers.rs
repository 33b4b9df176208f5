//! Runs the real `sensorium-trainer` as worker processes on easy-VQA, and holds it to its promises: the number of workers
//! changes nothing, being killed changes nothing, and a full disk loses nothing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    unreachable_pub,
    reason = "helpers of tests, which clippy does not count as tests"
)]

mod support;

use std::fs;
use std::time::Duration;

use support::{Job, State};

#[test]
fn two_workers_give_the_loss_curve_of_one() {
    let state = State::new();
    let one = Job::new(&state, "one").steps(50).run(1).expect_success();
    let two = Job::new(&state, "two").steps(50).run(2).expect_success();
    assert_eq!(one.losses().len(), 50);
    support::assert_curves_agree(&one.losses(), &two.losses(), 1e-5);
}

#[test]
fn two_weighted_tasks_on_two_workers_give_the_loss_curve_of_one() {
    let state = State::new();
    let tasks = [("vqa", 1.0), ("contrastive", 0.5)];
    let one = Job::new(&state, "one").steps(20).tasks(&tasks).run(1).expect_success();
    let two = Job::new(&state, "two").steps(20).tasks(&tasks).run(2).expect_success();
    support::assert_curves_agree(&one.losses(), &two.losses(), 1e-5);
    assert!(two.result().metrics.contains_key("contrastive_recall_at_1"));
    let (first, last) = (one.losses()[0], one.losses()[19]);
    assert!(last < 0.9 * first, "the loss went from {first} to {last} only");
}

#[test]
fn activation_checkpointing_changes_memory_and_not_one_bit_of_the_result() {
    let state = State::new();
    let kept = Job::new(&state, "same").steps(10).run(1).expect_success();
    let again =
        Job::new(&state, "same").steps(10).activation_checkpointing().checkpoints("other").run(1).expect_success();
    assert_eq!(kept.losses(), again.losses());
    assert_eq!(kept.weights(), again.weights());
}

/// That a run of 40 steps, killed some time after the 15th, went on from a checkpoint: from which is a matter of how long it
/// took to see that step, and to kill.
fn assert_went_on(run: &support::Ended) {
    let from = run.resumed_from();
    assert!(matches!(from, Some(10 | 20 | 30)), "it went on from {from:?}");
}

#[test]
fn a_run_killed_in_the_middle_and_resumed_ends_with_the_same_bits_as_one_never_killed() {
    let state = State::new();
    let never_killed = Job::new(&state, "run").steps(40).checkpoint_every(10).run(2).expect_success();
    let job = Job::new(&state, "run").steps(40).checkpoint_every(10).checkpoints("killed");
    let workers = job.start(2);
    workers.wait_for_step(15);
    workers.kill();
    let resumed = job.run(2).expect_success();
    assert_went_on(&resumed);
    assert_eq!(never_killed.losses(), resumed.losses());
    assert_eq!(never_killed.result().artifact.map(|it| it.digest), resumed.result().artifact.map(|it| it.digest));
}

#[test]
fn a_run_does_not_go_on_from_what_other_data_of_the_same_name_came_to() {
    let state = State::new();
    Job::new(&state, "run").steps(10).run(1).expect_success();
    // The hash of the spec is the same, as it is where data is imported anew.
    let other = Job::new(&state, "run").steps(10).data("pvc://datasets/easy-vqa/test").run(1).expect_success();
    assert_eq!(other.resumed_from(), None);
    assert_eq!(other.checkpoints().len(), 2, "each beside the other's");
    let again = Job::new(&state, "run").steps(10).run(1).expect_success();
    assert_eq!(again.resumed_from(), Some(10));
}

#[test]
fn a_model_that_answers_questions_goes_on_to_when_it_is_trained_on_captions_alone() {
    let state = State::new();
    let base = Job::new(&state, "base").steps(10).tasks(&[("vqa", 1.0), ("contrastive", 1.0)]).run(1).expect_success();
    let tuned = Job::new(&state, "tuned").steps(10).begins_with("base").tasks(&[("contrastive", 1.0)]);
    let tuned = tuned.run(1).expect_success();
    assert_eq!(tuned.pipeline(), base.pipeline());
    assert!(base.pipeline()["tasks"][0]["answers"].as_array().is_some_and(|answers| answers.len() > 1));
}

#[test]
fn a_run_that_goes_on_with_fewer_workers_keeps_the_loss_curve() {
    let state = State::new();
    let undisturbed = Job::new(&state, "run").steps(40).run(2).expect_success();
    let job = Job::new(&state, "run").steps(40).checkpoint_every(10).checkpoints("narrowed");
    let workers = job.start(2);
    workers.wait_for_step(15);
    workers.kill();
    let narrowed = job.run(1).expect_success();
    assert_went_on(&narrowed);
    support::assert_curves_agree(&undisturbed.losses(), &narrowed.losses(), 1e-5);
}

#[test]
fn a_batch_that_the_workers_cannot_share_evenly_is_refused() {
    let state = State::new();
    let ended = Job::new(&state, "run").images(15).run(2);
    assert_eq!(ended.exit_codes(), [Some(2), Some(2)]);
    assert!(ended.result().message.contains("15 images"), "{}", ended.result().message);
}

#[test]
fn workers_of_a_launcher_train_as_those_started_one_by_one() {
    let state = State::new();
    let by_hand = Job::new(&state, "run").steps(20).run(2).expect_success();
    let launched = Job::new(&state, "run").steps(20).checkpoints("launched").launch(2).wait().expect_success();
    assert_eq!(by_hand.losses(), launched.losses());
    let artifact = |ended: &support::Ended| ended.result().artifact.unwrap();
    assert_eq!(artifact(&by_hand), artifact(&launched));
    let record = artifact(&launched).record.unwrap();
    let graphs: Vec<_> = record.signature.iter().map(|graph| graph.name.as_str()).collect();
    assert_eq!(graphs, ["text_encoder", "image_encoder", "fusion"]);
    assert_eq!(record.modalities, ["text", "image"]);
    assert!(record.metrics.contains_key("vqa_accuracy"));
}

#[test]
fn a_launcher_whose_worker_is_killed_ends_the_others_and_says_how() {
    let state = State::new();
    let launcher = Job::new(&state, "run").steps(2_000).launch(2);
    launcher.wait_for_step(5);
    let workers = launcher.launched();
    assert_eq!(workers.len(), 2);
    support::kill(workers[1], "-KILL");
    let ended = launcher.wait_at_most(Duration::from_mins(1));
    assert_eq!(ended.exit_codes(), [Some(128 + 9)]);
    support::wait_for_end(&workers);
}

#[test]
fn a_launcher_asked_to_stop_passes_it_on_and_ends_as_its_workers_do() {
    let state = State::new();
    let launcher = Job::new(&state, "run").steps(2_000).checkpoint_every(1_000).launch(2);
    launcher.wait_for_step(5);
    launcher.terminate();
    let ended = launcher.wait();
    assert_eq!(ended.exit_codes(), [Some(143)]);
    assert!(ended.result().message.contains("stopped at step"), "{}", ended.result().message);
    assert_eq!(ended.checkpoints().len(), 1);
}

#[test]
fn workers_do_not_outlive_a_killed_launcher() {
    let state = State::new();
    let launcher = Job::new(&state, "run").steps(2_000).launch(2);
    launcher.wait_for_step(5);
    let workers = launcher.launched();
    launcher.kill();
    support::wait_for_end(&workers);
}

#[test]
fn a_worker_asked_to_stop_saves_its_step_and_says_so() {
    let state = State::new();
    let job = Job::new(&state, "run").steps(2_000).checkpoint_every(1_000);
    let workers = job.start(2);
    workers.wait_for_step(5);
    workers.terminate();
    let ended = workers.wait();
    assert_eq!(ended.exit_codes(), [Some(143), Some(143)]);
    assert!(ended.result().message.contains("stopped at step"), "{}", ended.result().message);
    assert_eq!(ended.checkpoints().len(), 1);
}

#[test]
fn a_worker_whose_peer_dies_ends_with_an_error_that_names_the_operation() {
    let state = State::new();
    let workers = Job::new(&state, "run").steps(2_000).start(2);
    workers.wait_for_step(5);
    workers.kill_rank(1);
    let ended = workers.wait_at_most(Duration::from_mins(1));
    assert_eq!(ended.exit_codes()[0], Some(75), "it only lost the other");
    let message = ended.result().message;
    assert!(message.contains("all_reduce"), "{message}");
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint_and_artifact_and_says_what_happened() {
    let state = State::new();
    let good = Job::new(&state, "run").steps(10).checkpoint_every(5).run(1).expect_success();
    // The next run of the same name cannot write files beyond 64 KiB: no checkpoint and no graph fits.
    let job = Job::new(&state, "run").steps(20).checkpoint_every(5).file_size_limit_kib(64);
    let full = job.run(1);
    assert_eq!(full.exit_codes(), [Some(1)]);
    assert!(full.result().message.contains("no space left"), "{}", full.result().message);
    assert!(full.log().contains("could not save a checkpoint"), "{}", full.log());
    assert!(full.checkpoints().is_empty());
    assert_eq!(good.checkpoints().len(), 2);
    let named = fs::read_to_string(state.artifacts().join("names/run.json")).unwrap();
    assert!(named.contains(&good.result().artifact.unwrap().digest), "{named}");
}

#[test]
fn data_that_was_never_imported_is_named_with_what_to_do() {
    let state = State::new();
    let ended = Job::new(&state, "run").data("pvc://datasets/nowhere").run(1);
    assert_eq!(ended.exit_codes(), [Some(2)]);
    let message = ended.result().message;
    assert!(message.contains("spec.data.train") && message.contains("sensorium data import"), "{message}");
}

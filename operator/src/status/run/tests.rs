//! A job's life against a cluster in memory: named cases, and random histories with crashes at every point.

use std::cell::RefCell;
use std::collections::HashMap;

use k8s_openapi::api::batch::v1::{JobCondition, JobSpec};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, PodCondition, PodStatus};
use proptest::prelude::*;
use sensorium_api::manifest::parse_documents;
use sensorium_api::run::{ArtifactResult, GateResult, RunResult};
use serde_json::json;

use super::*;
use crate::plan::plan;
use crate::render::{ATTEMPT_LABEL, CONTAINER};

const INDEX: &str = "batch.kubernetes.io/job-completion-index";
const JOB_NAME: &str = "batch.kubernetes.io/job-name";

/// A cluster with one TrainingJob of two workers.
struct World {
    now: Timestamp,
    spec: serde_json::Value,
    status: JobStatus,
    jobs: Vec<Job>,
    pods: Vec<Pod>,
    widths: Vec<u32>,
    inputs: Result<BTreeMap<String, String>, String>,
    expired: bool,
    is_taken: bool,
    last: Vec<Note>,
}

impl World {
    fn new() -> Self {
        let spec = json!({
            "model": {"architecture": {
                "width": 8,
                "text": {"layers": 1, "width": 8, "heads": 1, "maxLength": 4},
                "image": {"size": 8, "stem": [{"channels": 8, "kernel": 8, "stride": 8}], "layers": 1, "width": 8, "heads": 1},
                "fusion": {"layers": 1, "heads": 1},
            }},
            "data": {"train": "pvc://d/train", "evaluation": "pvc://d/test"},
            "tasks": [{"type": "vqa"}],
            "training": {"steps": 10, "batch": {"images": 12}},
            "parallelism": {"data": 2},
            "workers": 2,
            "failurePolicy": {"maxRestarts": 2, "rules": [{"exitCodes": [77], "action": "ignore"}]},
            "output": {"artifact": "m"},
        });
        Self {
            now: Timestamp::from_second(1_800_000_000).unwrap(),
            spec,
            status: JobStatus::default(),
            jobs: Vec::new(),
            pods: Vec::new(),
            widths: Vec::new(),
            inputs: Ok(BTreeMap::new()),
            expired: false,
            is_taken: false,
            last: Vec::new(),
        }
    }

    fn with(mut self, key: &str, value: serde_json::Value) -> Self {
        self.spec[key] = value;
        self
    }

    fn plan(&self) -> WorkloadPlan {
        thread_local! {
            /// Reading a manifest takes longer than thousands of decisions.
            static PLANS: RefCell<HashMap<String, WorkloadPlan>> = RefCell::default();
        }
        let document = json!({
            "apiVersion": "sensorium.dev/v1alpha1", "kind": "TrainingJob", "metadata": {"name": "t"}, "spec": self.spec,
        })
        .to_string();
        PLANS.with_borrow_mut(|plans| {
            let read = || plan(&parse_documents(&document, "test").unwrap()[0]).unwrap();
            plans.entry(document.clone()).or_insert_with(read).clone()
        })
    }

    fn decide(&self) -> Decision {
        let plan = self.plan();
        decide(&Observed {
            now: self.now,
            uid: "uid",
            generation: Some(1),
            plan: Ok(&plan),
            inputs: self.inputs.clone(),
            status: &self.status,
            jobs: &self.jobs,
            is_taken: self.is_taken,
            pods: &self.pods,
            progress: None,
            widths: &self.widths,
        })
    }

    /// One visit that is carried out whole.
    fn visit(&mut self) -> Action {
        let decision = self.decide();
        if decision.action != Action::Remove {
            self.act(&decision.action);
        }
        self.status = decision.status.clone();
        if decision.action == Action::Remove {
            self.act(&decision.action);
        }
        self.last = decision.notes;
        decision.action
    }

    /// Visits until nothing changes.
    fn settle(&mut self) {
        for _ in 0..10 {
            let before = (self.status.clone(), self.jobs.clone());
            self.visit();
            // The removed are gone by the next visit.
            self.jobs.retain(|job| job.metadata.deletion_timestamp.is_none());
            let names: Vec<String> = self.jobs.iter().map(ResourceExt::name_any).collect();
            self.pods.retain(|pod| names.contains(&pod.labels()[JOB_NAME]));
            if before == (self.status.clone(), self.jobs.clone()) {
                return;
            }
        }
        panic!("it does not settle: {:?}", self.status);
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::None => {}
            Action::Expire => self.expired = true,
            Action::Ensure { attempt, workers } => self.ensure(*attempt, *workers),
            Action::Suspend { attempt, hold } => {
                for job in self.jobs.iter_mut().filter(|job| attempt_of(job) == Some(*attempt)) {
                    job.spec.as_mut().unwrap().suspend = Some(*hold);
                    job.status.as_mut().unwrap().start_time = (!hold).then_some(Time(self.now));
                }
                self.pods.clear();
                if !hold {
                    self.start_pods(*attempt, 2);
                }
            }
            Action::Remove => {
                for job in &mut self.jobs {
                    job.metadata.deletion_timestamp.get_or_insert(Time(self.now));
                }
            }
        }
    }

    fn ensure(&mut self, attempt: u32, workers: u32) {
        let name = format!("t-worker-{attempt}");
        if self.jobs.iter().any(|job| job.name_any() == name) {
            return;
        }
        assert!(self.jobs.is_empty(), "attempt {attempt} starts beside another one");
        let mut job = Job::default();
        job.metadata.name = Some(name);
        job.metadata.creation_timestamp = Some(Time(self.now));
        let queue = self.spec["scheduling"]["queueName"].as_str();
        let made_for = Some((MADE_FOR_LABEL.to_owned(), queue.unwrap_or_default().to_owned()));
        let queue = queue.map(|queue| (QUEUE_LABEL.to_owned(), queue.to_owned()));
        job.metadata.labels =
            Some([(ATTEMPT_LABEL.to_owned(), attempt.to_string())].into_iter().chain(queue).chain(made_for).collect());
        job.spec = Some(JobSpec { completions: Some(workers as i32), suspend: Some(false), ..JobSpec::default() });
        job.status =
            Some(k8s_openapi::api::batch::v1::JobStatus { start_time: Some(Time(self.now)), ..Default::default() });
        self.jobs.push(job);
        self.start_pods(attempt, workers);
    }

    fn start_pods(&mut self, attempt: u32, workers: u32) {
        for index in 0..workers {
            let mut pod = Pod::default();
            pod.metadata.name = Some(format!("t-worker-{attempt}-{index}-x"));
            pod.metadata.labels = Some(BTreeMap::from([(JOB_NAME.to_owned(), format!("t-worker-{attempt}"))]));
            pod.metadata.annotations = Some(BTreeMap::from([(INDEX.to_owned(), index.to_string())]));
            pod.status = Some(PodStatus { phase: Some("Pending".to_owned()), ..PodStatus::default() });
            self.pods.push(pod);
        }
    }

    fn run(&mut self, count: usize) {
        for pod in self.pods.iter_mut().take(count) {
            pod.status.as_mut().unwrap().phase = Some("Running".to_owned());
        }
    }

    fn end_pod(&mut self, index: usize, code: i32, message: &str) {
        let Some(pod) = self.pods.get_mut(index) else { return };
        let status = pod.status.as_mut().unwrap();
        status.phase = Some(if code == 0 { "Succeeded" } else { "Failed" }.to_owned());
        let terminated = ContainerStateTerminated {
            exit_code: code,
            message: Some(message.to_owned()),
            finished_at: Some(Time(self.now)),
            ..Default::default()
        };
        status.container_statuses = Some(vec![ContainerStatus {
            name: CONTAINER.to_owned(),
            state: Some(ContainerState { terminated: Some(terminated), ..ContainerState::default() }),
            ..ContainerStatus::default()
        }]);
    }

    fn disrupt(&mut self, index: usize) {
        let Some(pod) = self.pods.get_mut(index) else { return };
        let status = pod.status.as_mut().unwrap();
        status.phase = Some("Failed".to_owned());
        status.conditions = Some(vec![PodCondition {
            type_: "DisruptionTarget".to_owned(),
            status: "True".to_owned(),
            message: Some("the node is drained".to_owned()),
            ..PodCondition::default()
        }]);
    }

    fn job_condition(&mut self, name: &str, reason: &str) {
        for job in &mut self.jobs {
            job.status.get_or_insert_default().conditions.get_or_insert_default().push(JobCondition {
                type_: name.to_owned(),
                status: "True".to_owned(),
                reason: Some(reason.to_owned()),
                last_transition_time: Some(Time(self.now)),
                ..JobCondition::default()
            });
        }
    }

    fn fail(&mut self, index: usize, code: i32, message: &str) {
        self.end_pod(index, code, message);
        self.job_condition("Failed", "BackoffLimitExceeded");
    }

    fn succeed(&mut self) {
        self.end_pod(0, 0, &result(RunState::Succeeded, None));
        self.end_pod(1, 0, "");
        self.job_condition("Complete", "");
    }

    fn pass(&mut self, seconds: i64) {
        self.now += SignedDuration::from_secs(seconds);
    }

    fn is(&self, condition: &str) -> bool {
        is_true(&self.status.conditions, condition)
    }

    fn reason(&self, condition: &str) -> &str {
        &self.status.conditions.iter().find(|c| c.type_ == condition).unwrap().reason
    }
}

fn result(state: RunState, gate: Option<GateResult>) -> String {
    let artifact = ArtifactResult {
        name: "m".to_owned(),
        digest: format!("sha256:{}", "0".repeat(64)),
        bytes: 1,
        uri: "pvc://artifacts/objects/0".to_owned(),
        record: None,
    };
    let result = RunResult {
        state,
        message: "as the program says".to_owned(),
        artifact: Some(artifact),
        metrics: BTreeMap::new(),
        gate,
        seconds: 1.0,
    };
    serde_json::to_string(&result).unwrap()
}

fn running() -> World {
    let mut world = World::new();
    world.settle();
    world.run(2);
    world.settle();
    assert!(world.is("PodsReady"));
    world
}

#[test]
fn a_job_that_runs_well_completes_with_its_result() {
    let mut world = running();
    assert_eq!(world.status.state, Some(JobState::Running));
    world.succeed();
    world.settle();
    assert!(world.is("Complete") && !world.is("Failed"));
    assert_eq!(world.status.artifact.as_ref().unwrap().name, "m");
    assert_eq!((world.status.restarts, world.status.disruptions), (0, 0));
}

#[test]
fn a_job_that_is_let_go_on_is_said_to_start_in_the_same_write() {
    let mut world = running();
    world.spec["suspend"] = json!(true);
    world.settle();
    world.spec["suspend"] = json!(false);
    world.pods.clear();
    assert_eq!(world.visit(), Action::Suspend { attempt: 1, hold: false });
    let said = world.status.clone();
    assert_eq!((said.state, said.message.as_deref()), (Some(JobState::Pending), Some("0 of 2 workers run")));
    world.visit();
    assert_eq!(world.status, said, "nothing is left to be said until pods run");
}

#[test]
fn the_start_of_a_new_job_is_no_event_and_every_later_one_is() {
    let started = |world: &World| world.last.iter().any(|note| note.reason == "Started");
    let mut world = World::new();
    world.visit();
    assert_eq!((world.status.attempt, started(&world)), (1, false));
    world.settle();
    world.run(2);
    world.settle();
    world.fail(1, 1, "out of luck");
    world.settle();
    world.pass(3600);
    world.visit();
    assert_eq!((world.status.attempt, started(&world)), (2, true));
}

#[test]
fn a_worker_that_fails_after_hours_is_judged_by_what_it_ended_with_once_all_have_ended() {
    let mut world = running();
    world.pass(7200);
    world.end_pod(1, 2, "no such data");
    assert_eq!(world.visit(), Action::None, "its Job says more");
    assert_eq!(world.reason("PodsReady"), "Ending");
    world.job_condition("FailureTarget", "BackoffLimitExceeded");
    assert_eq!(world.visit(), Action::None, "the other one has not ended");
    assert!(is_to_be_judged(&world.status, &world.jobs[0]));
    world.end_pod(0, 1, "a peer is gone");
    world.settle();
    assert_eq!((world.reason("Failed"), world.status.disruptions), ("JobFailed", 0));
    assert!(world.status.message.as_ref().unwrap().contains("no such data"), "{:?}", world.status.message);
}

#[test]
fn a_worker_on_a_node_that_is_gone_is_not_waited_for() {
    let mut world = running();
    world.pass(7200);
    world.end_pod(1, 1, "out of luck");
    world.job_condition("FailureTarget", "BackoffLimitExceeded");
    world.pass(59);
    assert_eq!(world.visit(), Action::None);
    world.pass(1);
    assert_eq!(world.visit(), Action::Remove);
    assert_eq!((world.status.restarts, world.status.disruptions), (1, 0));
}

#[test]
fn a_pod_that_was_told_to_go_is_no_worker_that_runs_and_one_that_does_not_go_was_lost() {
    let mut world = running();
    world.pods[1].metadata.deletion_timestamp = Some(Time(world.now));
    assert_eq!(world.visit(), Action::None);
    assert_eq!(world.reason("PodsReady"), "Ending");
    world.pass(60);
    assert_eq!(world.visit(), Action::Remove);
    assert_eq!((world.status.restarts, world.status.disruptions), (0, 1));
    assert!(world.status.message.as_ref().unwrap().contains("its node does not answer"));
}

#[test]
fn a_job_waits_for_what_one_of_its_name_has_left() {
    let mut world = World::new();
    world.is_taken = true;
    assert_eq!(world.visit(), Action::None);
    assert_eq!((world.reason("PodsReady"), world.status.attempt), ("Ending", 0));
    world.is_taken = false;
    world.settle();
    assert_eq!(world.status.attempt, 1);
}

#[test]
fn an_attempt_that_waits_in_a_queue_is_made_again_for_another_one_or_for_none() {
    for queue in [json!({"queueName": "other"}), json!({})] {
        let mut world = World::new().with("scheduling", json!({"queueName": "first"}));
        world.settle();
        let job = &mut world.jobs[0];
        job.spec.as_mut().unwrap().suspend = Some(true);
        assert_eq!(world.visit(), Action::Ensure { attempt: 1, workers: 2 });
        assert_eq!(world.reason("PodsReady"), "Queued");
        world.spec["scheduling"] = queue;
        assert_eq!(world.visit(), Action::Remove);
        world.settle();
        assert_eq!((world.status.attempt, world.status.restarts), (1, 0), "it is the same attempt");
    }
}

#[test]
fn an_attempt_that_kueue_has_given_a_queue_by_itself_waits_for_it_and_stays() {
    let mut world = World::new();
    world.settle();
    let job = &mut world.jobs[0];
    job.spec.as_mut().unwrap().suspend = Some(true);
    job.labels_mut().insert(QUEUE_LABEL.to_owned(), "default".to_owned());
    assert_eq!(world.visit(), Action::Ensure { attempt: 1, workers: 2 });
    assert_eq!(world.reason("PodsReady"), "Queued");
}

#[test]
fn what_the_cluster_refuses_is_said_once_and_the_job_has_not_ended() {
    let (mut world, refusal) = (running(), Refusal::by_cluster("create", "ModelArtifact/m", "no room"));
    world.succeed();
    let (plan, decided) = (world.plan(), world.decide().status);
    assert!(is_true(&decided.conditions, "Complete"));
    for is_first in [true, false] {
        let observed = Observed {
            now: world.now,
            uid: "uid",
            generation: Some(1),
            plan: Ok(&plan),
            inputs: Ok(BTreeMap::new()),
            status: &world.status.clone(),
            jobs: &[],
            is_taken: false,
            pods: &[],
            progress: None,
            widths: &[],
        };
        let (status, note) = refused(&observed, &decided, &refusal);
        assert_eq!(note.is_some(), is_first);
        assert!(is_first || status == world.status, "nothing is written again");
        world.pass(1);
        world.status = status;
    }
    assert_eq!((world.is("Complete"), world.reason("PodsReady")), (false, "RefusedByCluster"));
    assert!(world.status.message.as_ref().unwrap().ends_with("no room"));
}

#[test]
fn every_condition_is_there_after_the_first_visit_and_none_is_unknown() {
    let mut world = World::new();
    world.visit();
    let known: Vec<(&str, &str)> =
        world.status.conditions.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect();
    assert_eq!(
        known,
        [
            ("Admitted", "True"),
            ("ArtifactsReady", "True"),
            ("PodsReady", "False"),
            ("Suspended", "False"),
            ("Restarting", "False"),
            ("Complete", "False"),
            ("Failed", "False")
        ]
    );
}

#[test]
fn a_failed_worker_takes_the_group_down_and_it_starts_again_after_a_while() {
    let mut world = running();
    world.fail(1, 1, "out of luck");
    assert_eq!(world.visit(), Action::Remove);
    assert!(world.is("Restarting"));
    world.settle();
    assert!(world.jobs.is_empty(), "the group is gone while it waits");
    assert!(
        world
            .status
            .message
            .as_ref()
            .unwrap()
            .contains("worker 1 (t-worker-1-1-x) ended with exit code 1: out of luck")
    );
    world.pass(10);
    world.settle();
    assert_eq!(attempt_of(&world.jobs[0]), Some(2));
    assert_eq!((world.status.restarts, world.status.disruptions), (1, 0));
}

#[test]
fn the_budget_counts_the_programs_failures_and_not_the_clusters() {
    let mut world = running();
    for round in 0..6 {
        if round % 2 == 0 {
            world.disrupt(1);
            world.job_condition("Failed", "PodFailurePolicy");
        } else if round == 5 {
            world.fail(0, 77, "a rule says that this is not the program's fault");
        } else {
            world.fail(0, 1, "x");
        }
        world.settle();
        assert!(!world.is("Failed"), "round {round}");
        world.pass(400);
        world.settle();
        world.run(2);
        world.settle();
    }
    assert_eq!((world.status.restarts, world.status.disruptions, world.status.attempt), (2, 4, 7));
    world.fail(0, 1, "x");
    world.settle();
    assert_eq!(world.reason("Failed"), "RestartsExhausted");
    assert_eq!(world.jobs.len(), 1, "the last attempt stays, with its logs");
}

#[test]
fn exit_code_2_fails_the_job_at_once_in_the_programs_own_words() {
    let mut world = running();
    world.fail(0, 2, &result(RunState::Failed, None));
    world.settle();
    assert_eq!((world.reason("Failed"), world.status.message.as_deref()), ("JobFailed", Some("as the program says")));
}

#[test]
fn the_pods_of_an_attempt_are_looked_up_once_when_it_has_ended() {
    let mut world = running();
    assert!(!is_to_be_judged(&world.status, &world.jobs[0]));
    world.fail(0, 1, "");
    let ended = world.jobs[0].clone();
    assert!(is_to_be_judged(&world.status, &ended));
    world.settle();
    assert_eq!(world.status.restarts, 1);
    assert!(!is_to_be_judged(&world.status, &ended), "it is written down");
}

#[test]
fn a_refused_candidate_fails_the_job_with_its_numbers() {
    let mut world = running();
    let gate = GateResult {
        metric: "vqa_accuracy".to_owned(),
        parent: 0.9,
        candidate: 0.512_345,
        drop: 0.387_655,
        speedup: 0.987_654_321,
        size_ratio: 0.287_5,
        promoted: false,
        message: "refused".to_owned(),
    };
    world.fail(0, 1, &result(RunState::Failed, Some(gate)));
    world.settle();
    assert_eq!(world.reason("Failed"), "GateRefused");
    let gate = world.status.gate.as_ref().unwrap();
    let shown =
        [gate.parent, gate.candidate, gate.drop, gate.speedup, gate.size_ratio].map(|figure| figure.to_string());
    assert_eq!(shown, ["0.9", "0.5123", "0.3877", "0.99", "0.29"], "kubectl prints every digit that is there");
    assert_eq!(world.status.restarts, 0);
}

#[test]
fn a_group_that_is_not_whole_in_time_makes_room_and_comes_back_narrower_if_it_may() {
    let mut world = World::new();
    world.widths = vec![1, 2, 3];
    world.settle();
    world.run(1);
    world.pass(599);
    world.settle();
    assert_eq!(world.jobs.len(), 1);
    world.pass(2);
    world.settle();
    assert!(world.jobs.is_empty());
    assert_eq!((world.status.disruptions, world.status.workers), (1, Some(1)));
    world.pass(30);
    world.settle();
    assert_eq!(world.jobs[0].spec.as_ref().unwrap().completions, Some(1));
    world.run(1);
    world.settle();
    assert!(world.is("PodsReady"));
    world.disrupt(0);
    world.job_condition("Failed", "PodFailurePolicy");
    world.settle();
    world.pass(60);
    world.settle();
    assert_eq!(
        world.jobs[0].spec.as_ref().unwrap().completions,
        Some(3),
        "after a disruption it tries to be wide again"
    );
}

#[test]
fn a_suspended_job_gives_its_pods_back_and_its_deadline_starts_anew_when_it_goes_on() {
    let mut world = running().with("activeDeadlineSeconds", json!(100));
    world.pass(90);
    world.spec["suspend"] = json!(true);
    world.settle();
    assert!(world.is("Suspended") && !world.is("PodsReady"));
    assert_eq!((world.status.start_time.clone(), world.jobs[0].spec.as_ref().unwrap().suspend), (None, Some(true)));
    world.pass(1000);
    world.spec["suspend"] = json!(false);
    world.settle();
    world.run(2);
    world.settle();
    assert!(world.is("PodsReady") && !world.is("Suspended"));
    world.pass(99);
    world.settle();
    assert!(!world.is("Failed"));
    world.pass(2);
    world.settle();
    assert_eq!(world.reason("Failed"), "DeadlineExceeded");
    assert!(world.jobs.is_empty(), "its pods are taken away");
}

#[test]
fn a_job_with_a_queue_never_touches_suspend() {
    let mut world = World::new().with("scheduling", json!({"queueName": "team"}));
    world.settle();
    world.jobs[0].spec.as_mut().unwrap().suspend = Some(true);
    world.settle();
    assert_eq!(world.reason("PodsReady"), "Queued");
    assert_eq!(world.jobs[0].spec.as_ref().unwrap().suspend, Some(true));
    world.spec["suspend"] = json!(true);
    assert_eq!(world.visit(), Action::Remove);
}

#[test]
fn a_missing_artifact_is_waited_for_and_named() {
    let mut world = World::new().with("model", json!({"artifact": "base"}));
    world.inputs = Err("waits for artifact base".to_owned());
    world.settle();
    assert_eq!((world.reason("ArtifactsReady"), world.status.state), ("ArtifactNotReady", Some(JobState::Pending)));
    world.inputs = Ok(BTreeMap::from([("base".to_owned(), "sha256:1".to_owned())]));
    world.settle();
    world.inputs = Ok(BTreeMap::from([("base".to_owned(), "sha256:2".to_owned())]));
    world.settle();
    assert_eq!(world.status.inputs["base"], "sha256:1", "a newer one does not change a job that has started");
}

#[test]
fn a_lost_result_is_fetched_by_another_attempt() {
    let mut world = running();
    world.pods.clear();
    world.job_condition("Complete", "");
    world.settle();
    assert!(!world.is("Complete"));
    assert_eq!(world.status.disruptions, 1);
}

#[test]
fn a_job_is_deleted_when_its_time_after_the_end_has_come() {
    let mut world = running().with("ttlSecondsAfterFinished", json!(60));
    world.succeed();
    world.settle();
    world.pass(59);
    world.settle();
    assert!(!world.expired);
    world.pass(1);
    world.visit();
    assert!(world.expired);
}

#[test]
fn an_attempt_that_somebody_deleted_comes_back_and_costs_nothing() {
    let mut world = running();
    world.jobs.clear();
    world.pods.clear();
    world.settle();
    assert_eq!(attempt_of(&world.jobs[0]), Some(1));
    assert_eq!((world.status.restarts, world.status.disruptions), (0, 0));
}

/// What can happen between two visits.
#[derive(Clone, Copy, Debug)]
enum Event {
    Run,
    Fail(i32),
    /// One of the workers fails, and the other has not ended yet.
    FailSlowly,
    Disrupt,
    Succeed,
    DeleteJob,
    LosePods,
    Wait,
    Collect,
    Suspend(bool),
    /// The operator dies after it acted and before it wrote the status, or the other way round.
    Crash {
        acted: bool,
    },
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => Just(Event::Run),
        2 => prop_oneof![Just(1), Just(77), Just(137)].prop_map(Event::Fail),
        2 => Just(Event::FailSlowly),
        2 => Just(Event::Disrupt),
        1 => Just(Event::Succeed),
        1 => Just(Event::DeleteJob),
        1 => Just(Event::LosePods),
        4 => Just(Event::Wait),
        4 => Just(Event::Collect),
        1 => any::<bool>().prop_map(Event::Suspend),
        3 => any::<bool>().prop_map(|acted| Event::Crash { acted }),
    ]
}

impl World {
    fn happen(&mut self, event: Event) {
        let ended =
            self.jobs.iter().any(|job| ["FailureTarget", "Failed", "Complete"].iter().any(|name| has(job, name)));
        match event {
            Event::Run => self.run(2),
            Event::Fail(code) if !ended => self.fail(0, code, "x"),
            Event::FailSlowly if !ended => {
                self.end_pod(0, 1, "x");
                self.job_condition("FailureTarget", "BackoffLimitExceeded");
            }
            Event::Disrupt if !ended => {
                self.disrupt(1);
                self.job_condition("Failed", "PodFailurePolicy");
            }
            Event::Succeed if !ended => self.succeed(),
            Event::DeleteJob => self.act(&Action::Remove),
            Event::LosePods => self.pods.clear(),
            Event::Wait => self.pass(120),
            Event::Collect => {
                self.jobs.retain(|job| job.metadata.deletion_timestamp.is_none());
                let names: Vec<String> = self.jobs.iter().map(ResourceExt::name_any).collect();
                self.pods.retain(|pod| names.contains(&pod.labels()[JOB_NAME]));
            }
            Event::Suspend(hold) => self.spec["suspend"] = json!(hold),
            Event::Crash { acted } => {
                let decision = self.decide();
                if acted && decision.action != Action::Remove {
                    self.act(&decision.action);
                } else {
                    self.status = decision.status;
                }
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_happens_one_group_runs_at_a_time_the_budget_holds_and_the_job_ends(
        events in prop::collection::vec(event(), 1..60)
    ) {
        let mut world = World::new();
        for event in events {
            world.happen(event);
            let ended = world.is_ended();
            world.visit();
            // `ensure` itself asserts that no attempt starts beside another one.
            prop_assert!(world.status.restarts <= 2, "{:?}", world.status);
            prop_assert!(!ended || world.is_ended(), "an ended job went on: {:?}", world.status);
            prop_assert!(!(world.is_true("Complete") && world.is_true("Failed")));
            let mut types: Vec<&str> = world.status.conditions.iter().map(|c| c.type_.as_str()).collect();
            types.sort_unstable();
            types.dedup();
            prop_assert_eq!(types.len(), TYPES.len());
        }
        // Left in peace, it comes to its end.
        world.spec["suspend"] = json!(false);
        for _ in 0..20 {
            world.happen(Event::Collect);
            world.pass(400);
            world.visit();
            world.run(2);
            if world.jobs.iter().any(|job| job.metadata.deletion_timestamp.is_none()) && world.pods.len() == 2 {
                world.happen(Event::Succeed);
            } else if world.pods.is_empty() && !world.jobs.is_empty() {
                world.happen(Event::Disrupt);
            }
        }
        prop_assert!(world.is_ended(), "{:?}", world.status);
    }
}

impl World {
    fn is_true(&self, condition: &str) -> bool {
        is_true(&self.status.conditions, condition)
    }

    fn is_ended(&self) -> bool {
        self.is_true("Complete") || self.is_true("Failed")
    }
}

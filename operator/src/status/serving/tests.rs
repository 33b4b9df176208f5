//! A rollout's decisions, case by case.

use k8s_openapi::api::apps::v1::{DeploymentSpec, DeploymentStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::json;

use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn spec(rollout: &serde_json::Value) -> ServingJobSpec {
    serde_json::from_value(json!({"model": {"artifact": "m"}, "rollout": rollout})).unwrap()
}

fn canary_spec() -> ServingJobSpec {
    spec(&json!({"canary": {"steps": [{"weight": 20, "pauseSeconds": 60}, {"weight": 50, "pauseSeconds": 60}]}}))
}

/// A Deployment of which all servers answer.
fn deployment(revision: &str, replicas: i32) -> Deployment {
    let annotations = [(REVISION_ANNOTATION, revision), (ARTIFACT_ANNOTATION, "sha256:x")];
    let annotations = annotations.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let mut spec = DeploymentSpec { replicas: Some(replicas), ..DeploymentSpec::default() };
    spec.template.metadata = Some(ObjectMeta { annotations: Some(annotations), ..ObjectMeta::default() });
    let status = DeploymentStatus {
        observed_generation: Some(1),
        replicas: Some(replicas),
        updated_replicas: Some(replicas),
        available_replicas: Some(replicas),
        ready_replicas: Some(replicas),
        ..DeploymentStatus::default()
    };
    Deployment { metadata: ObjectMeta { generation: Some(1), ..ObjectMeta::default() }, spec, status: Some(status) }
}

fn load(requests: f64, failures: f64, seconds: f64) -> TrackLoad {
    TrackLoad { requests, failures, seconds }
}

fn decide(
    spec: &ServingJobSpec,
    status: &ServingJobStatus,
    canary: Option<&Deployment>,
    measured: &Measured,
    second: i64,
) -> Plan {
    rollout(spec, "new", status, Some(&deployment("old", 4)), canary, measured, at(second))
}

#[test]
fn the_first_servers_are_simply_started() {
    let plan = rollout(&canary_spec(), "new", &ServingJobStatus::default(), None, None, &Measured::default(), at(0));
    assert_eq!((plan.apply, plan.canaries, plan.rollout), (true, None, None));
}

#[test]
fn without_a_canary_the_stable_servers_roll() {
    let plan = decide(&spec(&json!({})), &ServingJobStatus::default(), None, &Measured::default(), 0);
    assert!(plan.apply && plan.canaries.is_none());
    assert_eq!(plan.rollout.unwrap().previous.as_deref(), Some("old"));
}

#[test]
fn a_canary_goes_through_its_steps_and_then_the_stable_servers_follow() {
    let spec = canary_spec();
    let mut status = ServingJobStatus::default();
    let mut canary = None;
    let mut seen = Vec::new();
    for second in (0..200).step_by(5) {
        let plan = decide(&spec, &status, canary.as_ref(), &Measured::default(), second);
        seen.push((plan.apply, plan.canaries));
        if plan.apply {
            break;
        }
        canary = plan.canaries.map(|count| deployment("new", count as i32));
        status.rollout = plan.rollout;
    }
    seen.dedup();
    assert_eq!(seen, [(false, Some(1)), (false, Some(4)), (true, Some(4))]);
}

#[test]
fn canaries_that_fail_more_than_they_may_are_taken_back_for_good() {
    let spec = canary_spec();
    let mut status = ServingJobStatus::default();
    status.rollout = decide(&spec, &status, None, &Measured::default(), 0).rollout;
    let canary = deployment("new", 1);
    let bad = Measured { stable: load(1000.0, 0.0, 10.0), canary: load(100.0, 2.0, 1.0), crash: None };
    let plan = decide(&spec, &status, Some(&canary), &bad, 5);
    assert_eq!((plan.apply, plan.canaries), (false, None));
    let why = plan.rollout.as_ref().unwrap().failed.clone().unwrap();
    assert_eq!(why, "2 of 100 requests failed (2.0 %), and maxErrorRate allows 1.0 %");
    status.rollout = plan.rollout;
    let later = decide(&spec, &status, None, &Measured::default(), 10_000);
    assert_eq!((later.apply, later.canaries), (false, None), "it is not tried again");
    let other = rollout(&spec, "newer", &status, Some(&deployment("old", 4)), None, &Measured::default(), at(10_001));
    assert_eq!(other.canaries, Some(1), "another revision is");
}

#[test]
fn slow_canaries_are_taken_back_and_few_requests_decide_nothing() {
    let spec = canary_spec();
    let mut status = ServingJobStatus::default();
    status.rollout = decide(&spec, &status, None, &Measured::default(), 0).rollout;
    let canary = deployment("new", 1);
    let few = Measured { stable: load(1000.0, 0.0, 10.0), canary: load(19.0, 19.0, 100.0), crash: None };
    assert!(decide(&spec, &status, Some(&canary), &few, 5).rollout.unwrap().failed.is_none());
    let slow = Measured { stable: load(1000.0, 0.0, 10.0), canary: load(100.0, 0.0, 2.5), crash: None };
    let why = decide(&spec, &status, Some(&canary), &slow, 5).rollout.unwrap().failed.unwrap();
    assert!(why.starts_with("a request took 2.5 times as long"), "{why}");
}

#[test]
fn canaries_that_do_not_answer_in_time_are_taken_back() {
    let spec = spec(&json!({"progressDeadlineSeconds": 30, "canary": {"steps": [{"weight": 20, "pauseSeconds": 60}]}}));
    let mut status = ServingJobStatus::default();
    status.rollout = decide(&spec, &status, None, &Measured::default(), 0).rollout;
    let mut canary = deployment("new", 1);
    canary.status.as_mut().unwrap().available_replicas = Some(0);
    assert_eq!(decide(&spec, &status, Some(&canary), &Measured::default(), 29).canaries, Some(1));
    let plan = decide(&spec, &status, Some(&canary), &Measured::default(), 30);
    assert_eq!(plan.canaries, None);
    assert_eq!(plan.rollout.unwrap().failed.unwrap(), "its servers did not answer within 30 s");
}

/// A rollout whose canary answers since second 5.
fn answering_since_5(spec: &ServingJobSpec) -> ServingJobStatus {
    let mut status = ServingJobStatus::default();
    status.rollout = decide(spec, &status, None, &Measured::default(), 0).rollout;
    status.rollout = decide(spec, &status, Some(&deployment("new", 1)), &Measured::default(), 5).rollout;
    assert_eq!(status.rollout.as_ref().unwrap().step_ready, Some(Time(at(5))));
    status
}

#[test]
fn canaries_that_crash_after_they_answered_are_taken_back_also_if_they_answer_again() {
    let spec = canary_spec();
    let mut status = answering_since_5(&spec);
    let crashed = |second| {
        let pod = json!({
            "metadata": {"name": "canary"},
            "status": {"phase": "Running", "containerStatuses": [{
                "name": "main", "image": "", "imageID": "", "ready": true, "restartCount": 1,
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": at(second).to_string()}},
            }]},
        });
        let pod: Pod = serde_json::from_value(pod).unwrap();
        Measured { crash: last_crash([&pod]), ..Measured::default() }
    };
    let canary = deployment("new", 1);
    let before = decide(&spec, &status, Some(&canary), &crashed(4), 10);
    assert!(before.rollout.unwrap().failed.is_none(), "some start twice before they answer");
    let plan = decide(&spec, &status, Some(&canary), &crashed(7), 10);
    assert_eq!((plan.apply, plan.canaries), (false, None));
    let why = plan.rollout.unwrap().failed.unwrap();
    assert_eq!(why, "pod canary crashes (started again 1 times): exit code 137, OOMKilled");
    // In the next step before all of its servers answer.
    status.rollout = decide(&spec, &status, Some(&canary), &Measured::default(), 65).rollout;
    assert_eq!(status.rollout.as_ref().map(|rollout| (rollout.step, rollout.step_ready.is_none())), Some((1, true)));
    assert!(decide(&spec, &status, Some(&canary), &crashed(70), 70).rollout.unwrap().failed.is_some());
}

#[test]
fn canaries_that_stop_answering_are_taken_back_unless_they_are_back_in_time() {
    let spec =
        spec(&json!({"progressDeadlineSeconds": 30, "canary": {"steps": [{"weight": 20, "pauseSeconds": 600}]}}));
    let mut status = answering_since_5(&spec);
    let mut silent = deployment("new", 1);
    silent.status.as_mut().unwrap().available_replicas = Some(0);
    for (second, canary) in [(10, &silent), (39, &silent), (41, &deployment("new", 1)), (50, &silent), (79, &silent)] {
        let plan = decide(&spec, &status, Some(canary), &Measured::default(), second);
        assert_eq!(plan.canaries, Some(1), "after {second} s");
        status.rollout = plan.rollout;
    }
    let plan = decide(&spec, &status, Some(&silent), &Measured::default(), 80);
    assert_eq!(plan.rollout.unwrap().failed.unwrap(), "its servers have not all answered for 30 s");
}

#[test]
fn canaries_stay_until_the_stable_servers_have_taken_over() {
    let spec = canary_spec();
    let mut stable = deployment("new", 4);
    stable.status.as_mut().unwrap().updated_replicas = Some(1);
    let canary = deployment("new", 4);
    let status = ServingJobStatus::default();
    let plan = rollout(&spec, "new", &status, Some(&stable), Some(&canary), &Measured::default(), at(0));
    assert_eq!((plan.apply, plan.canaries), (true, Some(4)));
    stable.status.as_mut().unwrap().updated_replicas = Some(4);
    let plan = rollout(&spec, "new", &status, Some(&stable), Some(&canary), &Measured::default(), at(0));
    assert_eq!((plan.apply, plan.canaries), (true, None));
}

/// A job whose servers all answer.
fn served<'a>(status: &'a ServingJobStatus, stable: &'a Deployment) -> Observed<'a> {
    Observed {
        now: at(0),
        generation: Some(1),
        status,
        artifact: Ok("sha256:x"),
        refusal: None,
        stable: Some(stable),
        encoders: &[],
        pods: &[],
        endpoints: 2,
        rollout: None,
        awaited: None,
        selector: String::new(),
    }
}

#[test]
fn old_servers_that_answer_do_not_make_a_job_ready_whose_new_ones_crash() {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "vqa-server-x"},
        "status": {"containerStatuses": [{
            "name": "main", "image": "", "imageID": "", "ready": false, "restartCount": 2,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 1, "message": "no such file"}},
        }]},
    }))
    .unwrap();
    let stable = deployment("old", 2);
    let observed = |pods: &[Pod]| serving_status(&Observed { pods, ..served(&ServingJobStatus::default(), &stable) });
    assert!(is_ready(&observed(&[])));
    let status = observed(&[pod]);
    assert!(!is_ready(&status) && is_true(&status.conditions, "Degraded"));
    assert_eq!(status.message.unwrap(), "pod vqa-server-x crashes (started again 2 times): exit code 1, no such file");
}

#[test]
fn a_pod_that_was_evicted_and_replaced_is_no_fault() {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "vqa-server-x"},
        "status": {"phase": "Failed", "reason": "Evicted", "containerStatuses": [{
            "name": "main", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 137, "reason": "Error"}},
        }]},
    }))
    .unwrap();
    let stable = deployment("old", 2);
    let status = serving_status(&Observed { pods: &[pod], ..served(&ServingJobStatus::default(), &stable) });
    assert!(is_ready(&status) && !is_true(&status.conditions, "Degraded"), "{:?}", status.message);
}

/// A running pod of the encoder `vqa-image-encoder-ID`.
fn encoder_pod(id: &str, ready: bool) -> Pod {
    let status = if ready { "True" } else { "False" };
    serde_json::from_value(json!({
        "metadata": {"name": format!("encoder-{id}-pod"), "labels": {ENCODER_LABEL: format!("vqa-image-encoder-{id}")}},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": status}]},
    }))
    .unwrap()
}

/// A server's pod that is ready and calls the encoder `vqa-image-encoder-ID`, or none.
fn calling(id: Option<&str>) -> Pod {
    let annotations = id.map(|id| json!({ENCODERS_ANNOTATION: format!("vqa-image-encoder-{id}")}));
    serde_json::from_value(json!({
        "metadata": {"name": "server", "annotations": annotations},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    }))
    .unwrap()
}

#[test]
fn a_job_is_not_ready_once_no_server_has_an_encoder_to_call_whatever_deployments_have_heard() {
    let stable = deployment("r", 2);
    let encoders = [("vqa-image-encoder-e".to_owned(), Some(Arc::new(deployment("e", 1))))];
    let status = |pods: &[Pod]| {
        let before = ServingJobStatus::default();
        let observed = served(&before, &stable);
        serving_status(&Observed { encoders: &encoders, pods, ..observed })
    };
    assert!(is_ready(&status(&[calling(Some("e")), encoder_pod("e", true)])));
    let dead = status(&[calling(Some("e")), encoder_pod("e", false)]);
    let said = "2 of 2 servers answer; encoder vqa-image-encoder-e: 0 of 1 answer (pod encoder-e-pod is not ready)";
    assert_eq!(dead.message.as_deref(), Some(said));
    let ready = dead.conditions.iter().find(|condition| condition.type_ == "Ready").unwrap();
    assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "EncoderNotAnswering"));
    assert!(is_true(&dead.conditions, "Degraded") && !is_true(&dead.conditions, "WorkloadsReady"));
    assert!(!is_ready(&status(&[calling(Some("e"))])), "its pods were all deleted");
    let mut leaving = encoder_pod("e", true);
    leaving.metadata.deletion_timestamp = Some(Time(at(0)));
    let said = status(&[calling(Some("e")), leaving]).message.unwrap();
    assert!(said.ends_with("0 of 1 answer (pod encoder-e-pod leaves)"), "{said}");
}

#[test]
fn a_job_is_ready_while_some_server_has_all_that_it_calls() {
    let stable = deployment("r", 2);
    let ready = |pods: &[Pod]| {
        let before = ServingJobStatus::default();
        let observed = served(&before, &stable);
        is_ready(&serving_status(&Observed { pods, ..observed }))
    };
    // The encoders of a rollout are not up yet, and the old servers have theirs.
    assert!(ready(&[calling(Some("old")), encoder_pod("old", true), encoder_pod("new", false)]));
    assert!(ready(&[calling(Some("old")), calling(Some("new")), encoder_pod("new", true)]));
    assert!(ready(&[calling(Some("old")), calling(None)]), "one that runs all graphs itself");
    assert!(!ready(&[calling(Some("old")), calling(Some("new")), encoder_pod("other", true)]));
}

#[test]
fn an_encoder_that_does_not_answer_is_named_and_the_job_is_ready_while_its_servers_are() {
    let stable = deployment("r", 2);
    let status = |answering: Option<i32>| {
        let encoder = answering.map(|answering| {
            let mut encoder = deployment("e", 2);
            encoder.status.as_mut().unwrap().available_replicas = Some(answering);
            Arc::new(encoder)
        });
        let encoders = [("vqa-image-encoder-e".to_owned(), encoder)];
        let pods: Vec<Pod> = (0..answering.unwrap_or(0)).map(|_| encoder_pod("e", true)).collect();
        let before = ServingJobStatus::default();
        let observed = served(&before, &stable);
        serving_status(&Observed { encoders: &encoders, pods: &pods, ..observed })
    };
    let whole = status(Some(2));
    assert!(is_true(&whole.conditions, "WorkloadsReady") && !is_true(&whole.conditions, "Degraded"));
    let half = status(Some(1));
    assert!(!is_true(&half.conditions, "WorkloadsReady") && is_true(&half.conditions, "Degraded") && is_ready(&half));
    assert_eq!(half.message.unwrap(), "2 of 2 servers answer; encoder vqa-image-encoder-e: 1 of 2 answer");
    let message = status(None).message.unwrap();
    assert_eq!(message, "2 of 2 servers answer; encoder vqa-image-encoder-e: 0 of 1 answer", "it was deleted");
}

#[test]
fn what_cannot_be_made_is_said_and_what_serves_goes_on() {
    let stable = deployment("old", 2);
    let refusal = Refusal { cause: crate::status::RefusalCause::Graph, message: "no graph g".to_owned() };
    let ready = serving_status(&served(&ServingJobStatus::default(), &stable));
    let refused = serving_status(&Observed { generation: Some(2), refusal: Some(&refusal), ..served(&ready, &stable) });
    for name in ["Ready", "Progressing"] {
        let condition = refused.conditions.iter().find(|condition| condition.type_ == name).unwrap();
        assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("False", "UnknownGraph"), "{name}");
        assert_eq!(condition.observed_generation, Some(2));
    }
    assert_eq!(refused.message.as_deref(), Some("no graph g; 2 of 2 servers go on as they are"));
    let notes = serving_notes(Some(&ready), &refused, Some(&refusal));
    assert_eq!(notes, [Note::warning("UnknownGraph", "no graph g")], "one event, and not NotReady as well");
    assert_eq!(serving_notes(Some(&refused), &refused, Some(&refusal)), [], "and only once");
    let again = serving_status(&served(&refused, &stable));
    assert_eq!(serving_notes(Some(&refused), &again, None), [Note::normal("Ready", "2 of 2 servers answer")]);

    let nothing = Observed { stable: None, endpoints: 0, refusal: Some(&refusal), ..served(&refused, &stable) };
    let status = serving_status(&Observed { status: &ServingJobStatus::default(), ..nothing });
    assert_eq!((status.state, status.message.as_deref()), (Some(JobState::Pending), Some("no graph g")));
}

#[test]
fn an_artifact_that_went_away_is_an_event_and_one_that_is_to_come_is_no_alarm() {
    let stable = deployment("old", 1);
    let missing = || Err("waits for artifact m".to_owned());
    let first = serving_status(&Observed { artifact: missing(), ..served(&ServingJobStatus::default(), &stable) });
    assert_eq!(serving_notes(None, &first, None), [Note::normal("WaitingForArtifact", "waits for artifact m")]);
    let ready = serving_status(&served(&first, &stable));
    let gone = serving_status(&Observed { artifact: missing(), ..served(&ready, &stable) });
    assert!(!is_ready(&gone) && is_ready(&ready));
    assert_eq!(serving_notes(Some(&ready), &gone, None), [Note::warning("ArtifactNotReady", "waits for artifact m")]);
}

#[test]
fn a_server_that_has_gone_does_not_count_before_its_deployment_notices() {
    let stable = deployment("r", 1);
    let ready = serving_status(&served(&ServingJobStatus::default(), &stable));
    let gone = serving_status(&Observed { endpoints: 0, ..served(&ready, &stable) });
    assert_eq!(serving_notes(Some(&ready), &gone, None), [Note::warning("NotReady", "0 of 1 servers answer")]);
}

#[test]
fn pods_that_a_quota_holds_off_are_why_nobody_answers() {
    let mut stable = deployment("r", 1);
    let status = stable.status.as_mut().unwrap();
    status.available_replicas = Some(0);
    status.conditions = serde_json::from_value(json!([
        {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: small"},
    ]))
    .unwrap();
    let status = serving_status(&Observed { endpoints: 0, ..served(&ServingJobStatus::default(), &stable) });
    assert_eq!(status.message.as_deref(), Some("0 of 1 servers answer: exceeded quota: small"));
}

//! Why an attempt failed: whose fault it was, and whether starting it again can help.

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, Pod};
use kube::ResourceExt;
use sensorium_api::run::{RunResult, RunState};
use sensorium_api::{FailureAction, FailurePolicy};

use crate::render::{COMPLETION_INDEX, CONTAINER};

/// Exit code by which a program says that the job itself has to be changed.
const USAGE: i32 = 2;
/// Exit code by which a worker says that it only lost the others. It is as good as any other in the rules.
const WAKE: i32 = 75;
/// Reasons in a pod's status that are the cluster's: the kubelet refused it, or took it away.
const DISRUPTIONS: [&str; 9] = [
    "Evicted",
    "NodeLost",
    "NodeShutdown",
    "Terminated",
    "Shutdown",
    "Preempting",
    "UnexpectedAdmissionError",
    "NodeAffinity",
    "OutOfcpu",
];

/// What an attempt ended with.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// Whose fault it was.
    pub cause: Cause,
    /// What happened, for a person.
    pub message: String,
    /// What the program says itself, if it came to that.
    pub result: Option<RunResult>,
}

/// Whose fault a failure was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The cluster's: try again, and do not count it.
    Disruption,
    /// The program's: try again, within the budget.
    Program,
    /// The job's own: trying again would end the same way.
    Job,
}

/// The message of a terminated container, as the program wrote it.
pub(super) fn result_of(pods: &[Pod]) -> Option<RunResult> {
    let first = pods.iter().find(|pod| index(pod) == Some(0))?;
    serde_json::from_str(terminated(first)?.message.as_deref()?).ok()
}

/// Judges a failed Job by its pods, as far as they are still there, and by its own conditions.
pub(super) fn judge(job: &Job, pods: &[Pod], policy: &FailurePolicy) -> Failure {
    let result = result_of(pods).filter(|result| result.state == RunState::Failed);
    if let Some(reason) = disruption(job, pods) {
        return Failure { cause: Cause::Disruption, message: reason, result: None };
    }
    let mut failed: Vec<(&Pod, &ContainerStateTerminated)> =
        pods.iter().filter_map(|pod| Some((pod, terminated(pod)?))).filter(|(_, state)| state.exit_code != 0).collect();
    failed.sort_by_key(|(pod, state)| blame(pod, state));
    let Some((pod, state)) = failed.first() else {
        let message = "the pods of the attempt are gone, and with them what they ended with".to_owned();
        return Failure { cause: Cause::Disruption, message, result: None };
    };
    let mut message = describe(pod, state);
    if let Some(result) = result.as_ref().filter(|_| index(pod) == Some(0)) {
        message.clone_from(&result.message);
    }
    let cause = match rule(policy, state.exit_code) {
        // A gate's verdict is a measurement: measuring again would not change it.
        _ if result.as_ref().is_some_and(|result| result.gate.is_some()) => Cause::Job,
        FailureAction::Fail => Cause::Job,
        FailureAction::Restart => Cause::Program,
        FailureAction::Ignore => Cause::Disruption,
    };
    Failure { cause, message, result }
}

/// Whom to blame: the smallest. One that can never succeed, whenever it ended. Else the others fail in the wake of the first;
/// but times are whole seconds, and within one a worker that only lost another may come before the one that it lost.
fn blame(pod: &Pod, state: &ContainerStateTerminated) -> (bool, Option<Timestamp>, bool, Option<u32>) {
    let ended = state.finished_at.as_ref().map(|time| time.0);
    (state.exit_code != USAGE, ended, state.exit_code == WAKE, index(pod))
}

fn rule(policy: &FailurePolicy, code: i32) -> FailureAction {
    let default = if code == USAGE { FailureAction::Fail } else { FailureAction::Restart };
    policy.rules.iter().find(|rule| rule.exit_codes.contains(&code)).map_or(default, |rule| rule.action)
}

fn disruption(job: &Job, pods: &[Pod]) -> Option<String> {
    for pod in pods {
        let Some(status) = &pod.status else { continue };
        let target = status.conditions.iter().flatten().find(|c| c.type_ == "DisruptionTarget" && c.status == "True");
        if let Some(condition) = target {
            let why = condition.message.as_deref().or(condition.reason.as_deref()).unwrap_or("no reason given");
            return Some(format!("pod {} was taken away: {why}", pod.name_any()));
        }
        if let Some(reason) = status.reason.as_deref().filter(|reason| DISRUPTIONS.contains(reason)) {
            return Some(format!(
                "pod {}: {reason}: {}",
                pod.name_any(),
                status.message.as_deref().unwrap_or_default()
            ));
        }
    }
    // Ours is the only rule of the Job, and it is about disruptions.
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_ref()).into_iter().flatten();
    let mut matched = conditions.filter(|c| c.reason.as_deref() == Some("PodFailurePolicy"));
    matched.next().map(|condition| condition.message.clone().unwrap_or_else(|| "a pod was taken away".to_owned()))
}

fn describe(pod: &Pod, state: &ContainerStateTerminated) -> String {
    let who = index(pod).map_or_else(|| pod.name_any(), |index| format!("worker {index} ({})", pod.name_any()));
    match (state.reason.as_deref(), state.signal, state.message.as_deref().map(str::trim)) {
        (Some("OOMKilled"), ..) => {
            format!("{who} ran out of memory and was killed; raise resources.limits.memory")
        }
        (_, Some(signal), _) if signal != 0 => format!("{who} was ended by signal {signal}"),
        (_, _, Some(text)) if !text.is_empty() => {
            let text = serde_json::from_str::<RunResult>(text).map_or_else(|_| tail(text), |result| result.message);
            format!("{who} ended with exit code {}: {text}", state.exit_code)
        }
        _ => format!("{who} ended with exit code {}; see its log: kubectl logs {}", state.exit_code, pod.name_any()),
    }
}

/// The end of a log, where the error is.
fn tail(text: &str) -> String {
    let start = text.char_indices().rev().nth(500).map_or(0, |(start, _)| start);
    text[start..].to_owned()
}

/// The number of a pod within its Job.
pub(crate) fn index(pod: &Pod) -> Option<u32> {
    pod.annotations().get(COMPLETION_INDEX)?.parse().ok()
}

fn terminated(pod: &Pod) -> Option<&ContainerStateTerminated> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    statuses.iter().find(|status| status.name == CONTAINER)?.state.as_ref()?.terminated.as_ref()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, PodStatus};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn ended(worker: u32, exit_code: i32, second: i64) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.annotations = Some(BTreeMap::from([(COMPLETION_INDEX.to_owned(), worker.to_string())]));
        let finished_at = Some(Time(Timestamp::from_second(second).unwrap()));
        let terminated = ContainerStateTerminated { exit_code, finished_at, ..ContainerStateTerminated::default() };
        let state = Some(ContainerState { terminated: Some(terminated), ..ContainerState::default() });
        let container = ContainerStatus { name: CONTAINER.to_owned(), state, ..ContainerStatus::default() };
        pod.status = Some(PodStatus { container_statuses: Some(vec![container]), ..PodStatus::default() });
        pod
    }

    /// The cause, and the worker that is blamed.
    fn judged(pods: &[Pod]) -> (Cause, String) {
        let failure = judge(&Job::default(), pods, &FailurePolicy::default());
        (failure.cause, failure.message.chars().take("worker 0".len()).collect())
    }

    fn program(who: &str) -> (Cause, String) {
        (Cause::Program, who.to_owned())
    }

    #[test]
    fn the_first_that_failed_is_blamed() {
        assert_eq!(judged(&[ended(0, 1, 8), ended(1, 1, 7), ended(2, 0, 6)]), program("worker 1"));
    }

    #[test]
    fn of_two_that_ended_in_one_second_the_one_that_only_lost_the_other_is_not_blamed() {
        assert_eq!(judged(&[ended(0, WAKE, 7), ended(1, 1, 7)]), program("worker 1"));
        assert_eq!(judged(&[ended(0, 137, 7), ended(1, WAKE, 7)]), program("worker 0"));
    }

    #[test]
    fn a_group_that_only_lost_each_other_starts_again() {
        assert_eq!(judged(&[ended(0, WAKE, 7), ended(1, WAKE, 7)]), program("worker 0"));
    }

    #[test]
    fn a_worker_that_can_never_succeed_fails_the_job_whenever_it_ended() {
        for second in [6, 7, 8] {
            let blamed = (Cause::Job, "worker 1".to_owned());
            assert_eq!(judged(&[ended(0, WAKE, 7), ended(1, USAGE, second)]), blamed);
            assert_eq!(judged(&[ended(0, 1, 7), ended(1, USAGE, second)]), blamed);
        }
    }
}

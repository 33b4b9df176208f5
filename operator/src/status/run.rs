//! A job that comes to an end: what to do next, given what the cluster shows, and what to say about it.
//!
//! Nothing is remembered but the status, and every visit may be the first after a crash: a decision depends on what is
//! there, and what is done can be done again. An attempt's failure is written into the status before its Job is removed,
//! and it is written once, because it names the attempt.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::ResourceExt;
use sensorium_api::run::{GateResult, Progress, RunState};
use sensorium_api::{AttemptFailure, JobState, JobStatus};

use super::conditions::{Conditions, Truth, is_true};
use super::failure::{self, Cause, Failure};
use super::serving::has_ended;
use super::{Note, Refusal, backoff};
use crate::plan::{RunPolicy, WorkloadPlan};
use crate::render::{MADE_FOR_LABEL, QUEUE_LABEL, attempt_of};

/// How long the pods of an attempt of which one has ended may take to end as well: what Kubernetes gives them, and as much again. One on
/// a node that is gone never says so.
const LAST_WORDS: SignedDuration = SignedDuration::from_secs(60);
/// Time between looks while they do.
const ENDING_INTERVAL: Duration = Duration::from_secs(10);

/// Kubernetes' label of a pod: the name of its Job.
pub(crate) const JOB_LABEL: &str = "batch.kubernetes.io/job-name";

const TYPES: [&str; 7] = ["Admitted", "ArtifactsReady", "PodsReady", "Suspended", "Restarting", "Complete", "Failed"];

/// All that a decision depends on.
#[derive(Debug)]
pub struct Observed<'a> {
    /// The time.
    pub now: Timestamp,
    /// Something that tells this job from all others; it decides on jitter only.
    pub uid: &'a str,
    /// Generation of the spec.
    pub generation: Option<i64>,
    /// What the spec asks for, or why it cannot be had.
    pub plan: Result<&'a WorkloadPlan, String>,
    /// Digests of the artifacts that the job reads, by name, or what is missing. Not looked at once they are in the
    /// status.
    pub inputs: Result<BTreeMap<String, String>, String>,
    /// What was said last.
    pub status: &'a JobStatus,
    /// The job's attempts that exist.
    pub jobs: &'a [Job],
    /// Whether objects of another job of this name, which is gone, are still there, and have the names of those that this one needs.
    pub is_taken: bool,
    /// The pods of all of them.
    pub pods: &'a [Pod],
    /// What rank 0 says, if it was asked.
    pub progress: Option<Progress>,
    /// Whether the number of workers can be changed: the widths that are possible, from the smallest.
    pub widths: &'a [u32],
}

/// What to do, what to say, and when to look again if nothing happens until then.
#[derive(Debug, PartialEq)]
pub struct Decision {
    /// What to do.
    pub action: Action,
    /// What to say. Written before a [`Action::Remove`], after anything else.
    pub status: JobStatus,
    /// What is worth an event.
    pub notes: Vec<Note>,
    /// When to look again.
    pub again: Option<Duration>,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// Make sure that this attempt's objects are there, with so many workers.
    Ensure {
        /// Number of the attempt.
        attempt: u32,
        /// Its workers.
        workers: u32,
    },
    /// Hold the attempt, or let it go on.
    Suspend {
        /// Number of the attempt.
        attempt: u32,
        /// Whether to hold it.
        hold: bool,
    },
    /// Remove all attempts.
    Remove,
    /// Delete the job itself: its time has come.
    Expire,
}

/// Decides.
pub fn decide(observed: &Observed<'_>) -> Decision {
    let mut status = observed.status.clone();
    status.observed_generation = observed.generation;
    let visit = Visit { observed, status, notes: Vec::new() };
    visit.decide()
}

struct Visit<'a> {
    observed: &'a Observed<'a>,
    status: JobStatus,
    notes: Vec<Note>,
}

impl Visit<'_> {
    fn decide(mut self) -> Decision {
        self.conditions();
        if is_true(&self.status.conditions, "Complete") || is_true(&self.status.conditions, "Failed") {
            return self.finished();
        }
        let plan = match &self.observed.plan {
            Ok(plan) => *plan,
            Err(reason) => {
                let reason = reason.clone();
                self.conditions().set("Admitted", false, "InvalidSpec", &reason);
                self.say(JobState::Failed, reason);
                return self.end(Action::None, None);
            }
        };
        let crate::plan::Lifetime::RunToCompletion(policy) = &plan.lifetime else {
            return self.end(Action::None, None);
        };
        self.conditions().set("Admitted", true, "Valid", "the spec can be run");
        self.settle(plan, policy)
    }

    /// A job that has not ended yet.
    fn settle(mut self, plan: &WorkloadPlan, policy: &RunPolicy) -> Decision {
        let current = self.observed.jobs.iter().filter_map(|job| Some((attempt_of(job)?, job))).max_by_key(|(n, _)| *n);
        let ending = self.observed.jobs.iter().any(|job| job.metadata.deletion_timestamp.is_some());
        if let Some((attempt, _)) = current {
            self.status.attempt = self.status.attempt.max(attempt);
        }
        if plan.suspended {
            return self.hold(plan, current);
        }
        let was_held = is_true(&self.status.conditions, "Suspended");
        self.conditions().set("Suspended", false, "NotAsked", "spec.suspend is false");
        if was_held {
            self.notes.push(Note::normal("Resumed", "goes on from its newest checkpoint"));
        }

        if self.status.inputs.is_empty() && !plan.requires.is_empty() {
            match &self.observed.inputs {
                Ok(inputs) => self.status.inputs.clone_from(inputs),
                Err(missing) => {
                    let missing = missing.clone();
                    self.conditions().set("ArtifactsReady", false, "ArtifactNotReady", &missing);
                    self.say(JobState::Pending, missing);
                    // A new artifact wakes us up; this is for one whose news got lost.
                    return self.end(Action::None, Some(Duration::from_mins(5)));
                }
            }
        }
        let message = if plan.requires.is_empty() { "the job reads no artifact" } else { "every artifact is there" };
        self.conditions().set("ArtifactsReady", true, "Resolved", message);

        match current {
            Some((attempt, job)) if !ending => {
                // An attempt whose failure is in the status already, or which a newer one has replaced, is left over.
                let failed = self.status.last_failure.as_ref().is_some_and(|failure| failure.attempt >= attempt);
                if failed || self.observed.jobs.len() > 1 {
                    return self.end(Action::Remove, None);
                }
                if Self::is_in_another_queue(plan, job) {
                    // Made anew, with the label of the queue that lets it in, or without one.
                    self.conditions().set("PodsReady", false, "Ending", "it is made again for another queue");
                    return self.end(Action::Remove, None);
                }
                if Self::suspended_without_queue(plan, job) {
                    self.status.start_time = None;
                    // In one write with its being let go: there is nothing else to say until pods run.
                    self.starting(0, workers_of(job), "");
                    return self.end(Action::Suspend { attempt, hold: false }, None);
                }
                self.attempt(plan, policy, attempt, job)
            }
            Some(_) => {
                self.conditions().set("PodsReady", false, "Ending", "the pods of the last attempt are being removed");
                self.end(Action::None, Some(Duration::from_mins(1)))
            }
            None if self.observed.is_taken => {
                let message = "waits until what a job of the same name has left is removed";
                self.conditions().set("PodsReady", false, "Ending", message);
                self.say(JobState::Pending, message.to_owned());
                self.end(Action::None, Some(Duration::from_mins(1)))
            }
            None => self.next(plan, policy),
        }
    }

    /// Whether the attempt waits, and the spec names another queue by now than when it was made.
    fn is_in_another_queue(plan: &WorkloadPlan, job: &Job) -> bool {
        let queue = plan.scheduling.queue_name.as_deref().unwrap_or_default();
        is_held(job) && job.labels().get(MADE_FOR_LABEL).is_some_and(|made_for| made_for != queue)
    }

    /// Whether the attempt waits for us, and not for a queue, to go on.
    fn suspended_without_queue(plan: &WorkloadPlan, job: &Job) -> bool {
        is_held(job) && queue_of(plan, job).is_none()
    }

    fn hold(mut self, plan: &WorkloadPlan, current: Option<(u32, &Job)>) -> Decision {
        if !is_true(&self.status.conditions, "Suspended") {
            self.notes.push(Note::normal("Suspended", "all workers are stopped after a checkpoint"));
        }
        let message = "held by spec.suspend; set it to false to go on from the newest checkpoint";
        let mut conditions = self.conditions();
        conditions.set("Suspended", true, "Asked", message);
        conditions.set("PodsReady", false, "Suspended", "held by spec.suspend");
        self.status.start_time = None;
        self.say(JobState::Suspended, message.to_owned());
        let action = match current {
            // The queue owns `suspend` of its Jobs, so holding one means taking it away.
            Some((_, job)) if queue_of(plan, job).is_some() => Action::Remove,
            Some((attempt, job)) if !is_held(job) => Action::Suspend { attempt, hold: true },
            _ => Action::None,
        };
        self.end(action, None)
    }

    /// No attempt exists: the first one, one that somebody deleted, or the one after a failure.
    fn next(mut self, plan: &WorkloadPlan, policy: &RunPolicy) -> Decision {
        let attempt = match &self.status.last_failure {
            Some(failure) if failure.attempt >= self.status.attempt => {
                let failures = self.status.restarts + self.status.disruptions;
                let due = failure.time.0 + as_signed(backoff::delay(failures, self.observed.uid));
                if let Some(wait) = until(self.observed.now, due) {
                    let seconds = wait.as_secs();
                    self.say(JobState::Pending, format!("starts again in {seconds} s: {}", failure_text(&self.status)));
                    return self.end(Action::None, Some(wait));
                }
                failure.attempt + 1
            }
            _ => self.status.attempt.max(1),
        };
        if let Some(decision) = self.deadline(policy) {
            return decision;
        }
        let declared = plan.roles.first().map_or(1, |role| role.replicas);
        let workers = match (self.status.workers, attempt) {
            // The width that the last failure left us with; see `whole`.
            (Some(workers), 2..) => workers,
            _ => declared,
        };
        // That a job which was just made is started goes without saying.
        if (1..attempt).contains(&self.status.attempt) {
            self.notes.push(Note::normal("Started", format!("attempt {attempt} with {workers} workers")));
        }
        self.status.attempt = attempt;
        self.status.workers = Some(workers);
        self.starting(0, workers, "");
        self.end(Action::Ensure { attempt, workers }, None)
    }

    /// Says how far the start of an attempt is. In the same words before its pods are seen as when they first are, so that
    /// nothing is written in between.
    fn starting(&mut self, running: u32, workers: u32, because: &str) {
        let message = format!("{running} of {workers} workers run{because}");
        self.conditions().set("PodsReady", false, "Starting", &message);
        self.say(JobState::Pending, message);
    }

    /// The newest attempt exists and nothing speaks against it.
    fn attempt(mut self, plan: &WorkloadPlan, policy: &RunPolicy, attempt: u32, job: &Job) -> Decision {
        let pods: Vec<Pod> = self.pods_of(job);
        if has(job, "Complete") || has(job, "SuccessCriteriaMet") {
            return self.complete(attempt, &pods, policy);
        }
        if has(job, "Failed") || is_doomed(job, &pods, self.observed.now) {
            return self.failed(attempt, failure::judge(job, &pods, &policy.failure), policy);
        }
        let workers = workers_of(job);
        self.status.workers = Some(workers);
        if is_held(job) {
            let queue = queue_of(plan, job).unwrap_or_default();
            let message = format!("waits for Kueue to let it in through queue {queue}");
            self.conditions().set("PodsReady", false, "Queued", &message);
            self.say(JobState::Pending, message);
            return self.end(Action::Ensure { attempt, workers }, None);
        }
        if let Some(decision) = self.deadline(policy) {
            return decision;
        }
        // One that has failed takes the others with it, of which its Job says more when all have ended.
        if has(job, "FailureTarget") || pods.iter().any(|pod| phase(pod) == "Failed" || is_leaving(pod)) {
            return self.ending(attempt, &pods, policy);
        }
        let running = pods.iter().filter(|pod| phase(pod) == "Running" || phase(pod) == "Succeeded").count() as u32;
        if running >= workers {
            return self.running(policy, attempt, workers);
        }
        // The Job's own clock: it has none while it is held, and starts anew when it is let go on.
        let since =
            job.status.as_ref().and_then(|status| status.start_time.as_ref()).map_or(self.observed.now, |time| time.0);
        let due =
            since + SignedDuration::from_secs(i64::try_from(policy.pre_running_deadline_seconds).unwrap_or(i64::MAX));
        let obstacle = pods.iter().find_map(obstacle);
        let because = obstacle.map(|text| format!(": {text}")).unwrap_or_default();
        match until(self.observed.now, due) {
            Some(wait) => {
                self.starting(running, workers, &because);
                let wait = self.nearest(policy, wait);
                self.end(Action::Ensure { attempt, workers }, Some(wait))
            }
            None => self.whole(attempt, running, workers, policy, &because),
        }
    }

    /// Some pods have ended, or are about to, and the rest is waited for: what they end with is what is judged.
    fn ending(mut self, attempt: u32, pods: &[Pod], policy: &RunPolicy) -> Decision {
        // The time by which it should have gone: the grace that it was given is in it.
        let stuck = pods.iter().find(|pod| {
            let due = pod.metadata.deletion_timestamp.as_ref().map(|time| time.0 + LAST_WORDS);
            !has_ended(pod) && due.is_some_and(|due| due <= self.observed.now)
        });
        if let Some(pod) = stuck {
            let message = format!("pod {} was taken away and has not ended: its node does not answer", pod.name_any());
            return self.failed(attempt, Failure { cause: Cause::Disruption, message, result: None }, policy);
        }
        let left = pods.iter().filter(|pod| !has_ended(pod)).count();
        // Those of before it was suspended go while it is let go on already.
        let (state, message) = match self.status.start_time {
            Some(_) => (JobState::Running, format!("a worker has ended, and {left} are about to")),
            None => (JobState::Pending, format!("waits until {left} workers of before have ended")),
        };
        self.conditions().set("PodsReady", false, "Ending", &message);
        self.say(state, message);
        let wait = self.nearest(policy, ENDING_INTERVAL);
        self.end(Action::None, Some(wait))
    }

    fn running(mut self, policy: &RunPolicy, attempt: u32, workers: u32) -> Decision {
        if self.status.start_time.is_none() {
            self.status.start_time = Some(Time(self.observed.now));
        }
        if !is_true(&self.status.conditions, "PodsReady") {
            self.notes.push(Note::normal("Running", format!("all {workers} workers run")));
        }
        let mut conditions = self.conditions();
        conditions.set("PodsReady", true, "Running", format!("all {workers} workers run"));
        conditions.set("Restarting", false, "Running", "the workers run");
        if let Some(progress) = &self.observed.progress {
            self.status.progress = Some(progress.clone());
        }
        let message = self.status.progress.as_ref().map_or_else(|| "the workers run".to_owned(), in_words);
        self.say(JobState::Running, message);
        let wait = self.nearest(policy, Duration::from_mins(10));
        self.end(Action::Ensure { attempt, workers }, Some(wait))
    }

    /// The group was not whole in time: it makes room for others and comes back, narrower if it may.
    fn whole(self, attempt: u32, running: u32, workers: u32, policy: &RunPolicy, because: &str) -> Decision {
        let narrower = self.observed.widths.iter().rev().find(|width| **width <= running.max(1) && **width < workers);
        let seconds = policy.pre_running_deadline_seconds;
        let mut message = format!("only {running} of {workers} workers ran within {seconds} s{because}");
        let width = narrower.copied().unwrap_or(workers);
        if width < workers {
            message = format!("{message}; goes on with {width}");
        }
        let failure = Failure { cause: Cause::Disruption, message, result: None };
        let mut decision = self.failed(attempt, failure, policy);
        decision.status.workers = Some(width);
        decision
    }

    fn complete(mut self, attempt: u32, pods: &[Pod], policy: &RunPolicy) -> Decision {
        let Some(result) = failure::result_of(pods).filter(|result| result.state == RunState::Succeeded) else {
            let message = "the workers ended well, but their pods are gone and the result with them; \
                           a new attempt goes on from the last checkpoint and reports it"
                .to_owned();
            return self.failed(attempt, Failure { cause: Cause::Disruption, message, result: None }, policy);
        };
        self.status.artifact.clone_from(&result.artifact);
        self.status.gate = result.gate.map(rounded);
        self.status.completion_time = Some(Time(self.observed.now));
        if let Some(progress) = &mut self.status.progress {
            "done".clone_into(&mut progress.state);
            progress.step = progress.steps;
            progress.eta_seconds = None;
        }
        if let (Some(progress), Some(accuracy)) = (&mut self.status.progress, result.metrics.get("vqa_accuracy")) {
            progress.accuracy = Some(*accuracy);
        }
        let mut conditions = self.conditions();
        conditions.set("Complete", true, "Succeeded", &result.message);
        conditions.set("Failed", false, "Succeeded", "");
        conditions.set("Restarting", false, "Succeeded", "");
        conditions.set("PodsReady", false, "Succeeded", "the workers have ended");
        self.notes.push(Note::normal("Completed", result.message.clone()));
        self.say(JobState::Succeeded, result.message);
        let again = policy.ttl_seconds_after_finished.map(Duration::from_secs);
        self.end(Action::None, again)
    }

    /// Writes the failure down; starts again unless that is over.
    fn failed(mut self, attempt: u32, failure: Failure, policy: &RunPolicy) -> Decision {
        let Failure { cause, message, result } = failure;
        let time = Time(self.observed.now);
        let disruption = cause == Cause::Disruption;
        self.status.last_failure = Some(AttemptFailure { attempt, disruption, message: message.clone(), time });
        if let Some(result) = result {
            self.status.gate = result.gate.map(rounded).or(self.status.gate.take());
            self.status.artifact = result.artifact.or(self.status.artifact.take());
        }
        let spent = cause == Cause::Program && self.status.restarts >= policy.failure.max_restarts;
        if cause == Cause::Job || spent {
            let refused = self.status.gate.as_ref().is_some_and(|gate| !gate.promoted);
            let reason = match cause {
                _ if refused => "GateRefused",
                Cause::Job => "JobFailed",
                _ => "RestartsExhausted",
            };
            let tried = if spent { format!(" (after {} restarts)", self.status.restarts) } else { String::new() };
            return self.give_up(reason, &format!("{message}{tried}"), Action::None, policy);
        }
        match cause {
            Cause::Disruption => self.status.disruptions += 1,
            _ => self.status.restarts += 1,
        }
        if !self.observed.widths.is_empty() && cause == Cause::Disruption {
            // A cluster that took a worker away may have room for more by now.
            self.status.workers = self.observed.widths.last().copied();
        }
        let mut conditions = self.conditions();
        let reason = if disruption { "Disrupted" } else { "WorkerFailed" };
        conditions.set("Restarting", true, reason, &message);
        conditions.set("PodsReady", false, reason, "all workers are started again from the newest checkpoint");
        self.notes.push(Note::warning(reason, format!("attempt {attempt}: {message}")));
        self.say(JobState::Pending, format!("starts again: {message}"));
        self.end(Action::Remove, None)
    }

    fn give_up(mut self, reason: &'static str, message: &str, action: Action, policy: &RunPolicy) -> Decision {
        self.status.completion_time = Some(Time(self.observed.now));
        let mut conditions = self.conditions();
        conditions.set("Failed", true, reason, message);
        conditions.set("Complete", false, reason, "");
        conditions.set("Restarting", false, reason, "");
        conditions.set("PodsReady", false, reason, "the workers have ended");
        self.notes.push(Note::warning(reason, message));
        self.say(JobState::Failed, message.to_owned());
        self.end(action, policy.ttl_seconds_after_finished.map(Duration::from_secs))
    }

    /// Fails the job if it has run for longer than it may.
    fn deadline(&mut self, policy: &RunPolicy) -> Option<Decision> {
        let (limit, start) = (policy.active_deadline_seconds?, self.status.start_time.as_ref()?.0);
        let due = start + SignedDuration::from_secs(i64::try_from(limit).ok()?);
        if self.observed.now < due {
            return None;
        }
        let visit =
            Visit { observed: self.observed, status: self.status.clone(), notes: std::mem::take(&mut self.notes) };
        let message = format!("ran for longer than activeDeadlineSeconds allows ({limit} s)");
        Some(visit.give_up("DeadlineExceeded", &message, Action::Remove, policy))
    }

    /// `wait`, or the time until the deadline if that comes first.
    fn nearest(&self, policy: &RunPolicy, wait: Duration) -> Duration {
        let due = policy.active_deadline_seconds.zip(self.status.start_time.as_ref()).and_then(|(limit, start)| {
            until(self.observed.now, start.0 + SignedDuration::from_secs(i64::try_from(limit).ok()?))
        });
        due.map_or(wait, |due| due.min(wait))
    }

    fn finished(mut self) -> Decision {
        // What ran past its deadline has been told to go; see that it went.
        let overdue = self.status.conditions.iter().any(|c| c.type_ == "Failed" && c.reason == "DeadlineExceeded");
        let left = self.observed.jobs.iter().any(|job| job.metadata.deletion_timestamp.is_none());
        if overdue && left {
            self.notes.clear();
            return self.end(Action::Remove, Some(Duration::from_mins(1)));
        }
        // The verdict stands; only the generation that it speaks of may be newer.
        let ttl = self.observed.plan.as_ref().ok().and_then(|plan| match &plan.lifetime {
            crate::plan::Lifetime::RunToCompletion(policy) => policy.ttl_seconds_after_finished,
            crate::plan::Lifetime::Service => None,
        });
        let ended = self.status.completion_time.as_ref().map(|time| time.0);
        if let (Some(ttl), Some(ended)) = (ttl, ended) {
            let due = ended + SignedDuration::from_secs(i64::try_from(ttl).unwrap_or(i64::MAX));
            return match until(self.observed.now, due) {
                Some(wait) => self.end(Action::None, Some(wait)),
                None => self.end(Action::Expire, None),
            };
        }
        self.notes.clear();
        self.end(Action::None, None)
    }

    fn pods_of(&self, job: &Job) -> Vec<Pod> {
        let name = job.name_any();
        // Pods of a Job of that name which is gone may be about to go as well.
        let is_own =
            |pod: &Pod| job.uid().is_none_or(|uid| pod.owner_references().iter().any(|owner| owner.uid == uid));
        let of = |pod: &&Pod| pod.labels().get(JOB_LABEL).is_some_and(|owner| *owner == name) && is_own(pod);
        self.observed.pods.iter().filter(of).cloned().collect()
    }

    fn conditions(&mut self) -> Conditions<'_> {
        Conditions::new(&mut self.status.conditions, &TYPES, self.observed.generation, self.observed.now)
    }

    fn say(&mut self, state: JobState, message: String) {
        self.status.state = Some(state);
        self.status.message = Some(message);
    }

    fn end(mut self, action: Action, again: Option<Duration>) -> Decision {
        let ended = is_true(&self.status.conditions, "Complete") || is_true(&self.status.conditions, "Failed");
        if !ended {
            let mut conditions = self.conditions();
            conditions.set("Complete", false, "NotEnded", "the job has not ended");
            conditions.set("Failed", false, "NotEnded", "the job has not ended");
            if self.status.attempt <= 1 && self.status.last_failure.is_none() {
                self.conditions().set("Restarting", false, "FirstAttempt", "");
            }
            let unknown = |c: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition| {
                c.type_ == "PodsReady" && c.status == "Unknown"
            };
            if self.status.conditions.iter().any(unknown) {
                self.conditions().set("PodsReady", Truth::False, "NotStarted", "no worker has been started");
            }
        }
        Decision { action, status: self.status, notes: self.notes, again }
    }
}

/// What to say instead of what was `decided`, where the cluster does not let an attempt, or the record of what it made, be created;
/// and what is worth an event.
pub fn refused(observed: &Observed<'_>, decided: &JobStatus, refusal: &Refusal) -> (JobStatus, Option<Note>) {
    let (reason, mut status) = (refusal.cause.reason(), decided.clone());
    let is_known = observed.status.conditions.iter().any(|c| c.type_ == "PodsReady" && c.reason == reason);
    // It was never said that it is complete, and is not to seem to have been taken back.
    let is_end = |c: &Condition| c.type_ == "Complete";
    if let Some(before) = observed.status.conditions.iter().find(|c| is_end(c)) {
        status.conditions.iter_mut().filter(|c| is_end(c)).for_each(|end| end.clone_from(before));
    }
    let mut conditions = Conditions::new(&mut status.conditions, &TYPES, observed.generation, observed.now);
    conditions.set("PodsReady", false, reason, &refusal.message);
    conditions.set("Complete", false, "NotEnded", "the job has not ended");
    status.completion_time = None;
    status.state = Some(JobState::Pending);
    status.message = Some(refusal.message.clone());
    (status, (!is_known).then(|| Note::warning(reason, &refusal.message)))
}

/// Whether its pods are not to be there, for now.
fn is_held(job: &Job) -> bool {
    job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true)
}

/// The queue that decides when an attempt runs: the spec's, or one that Kueue has given it by itself.
fn queue_of<'a>(plan: &'a WorkloadPlan, job: &'a Job) -> Option<&'a str> {
    plan.scheduling.queue_name.as_deref().or_else(|| job.labels().get(QUEUE_LABEL).map(String::as_str))
}

/// Whether a Job is about to fail, and all of it that can still say why has said so.
fn is_doomed(job: &Job, pods: &[Pod], now: Timestamp) -> bool {
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_ref()).into_iter().flatten();
    let mut targets = conditions.filter(|c| c.type_ == "FailureTarget" && c.status == "True");
    targets.next().is_some_and(|target| {
        let since = target.last_transition_time.as_ref().map_or(now, |time| time.0);
        pods.iter().all(has_ended) || now >= since + LAST_WORDS
    })
}

/// Whether a pod was told to go.
fn is_leaving(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Whether `job`, an attempt, has ended and `status` does not say yet how. Its pods decide on that, and they have to be seen as
/// they are now: a watch of pods may lag behind that of Jobs.
pub fn is_to_be_judged(status: &JobStatus, job: &Job) -> bool {
    let ended = ["Complete", "SuccessCriteriaMet", "FailureTarget", "Failed"].iter().any(|name| has(job, name));
    let judged = status.last_failure.as_ref().map(|failure| failure.attempt);
    let over = is_true(&status.conditions, "Complete") || is_true(&status.conditions, "Failed");
    ended && !over && judged < attempt_of(job)
}

fn workers_of(job: &Job) -> u32 {
    let completions = job.spec.as_ref().and_then(|spec| spec.completions);
    completions.and_then(|workers| u32::try_from(workers).ok()).unwrap_or(1)
}

fn has(job: &Job, name: &str) -> bool {
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|list| list.iter().any(|c| c.type_ == name && c.status == "True"))
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// What keeps a pod from running, in Kubernetes' words.
pub(super) fn obstacle(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let unscheduled = status.conditions.iter().flatten().find(|c| c.type_ == "PodScheduled" && c.status == "False");
    if let Some(message) = unscheduled.and_then(|condition| condition.message.clone()) {
        return Some(message);
    }
    let waiting =
        status.container_statuses.iter().flatten().find_map(|status| status.state.as_ref()?.waiting.as_ref())?;
    let reason =
        waiting.reason.as_deref().filter(|reason| !["ContainerCreating", "PodInitializing"].contains(reason))?;
    Some(format!("{}: {reason}: {}", pod.name_any(), waiting.message.as_deref().unwrap_or_default()))
}

/// `gate` with figures that people can read: `kubectl get` prints all digits of a number.
fn rounded(gate: GateResult) -> GateResult {
    let hundredths = |value: f64| (value * 100.0).round() / 100.0;
    GateResult {
        parent: significant(gate.parent),
        candidate: significant(gate.candidate),
        drop: significant(gate.drop),
        speedup: hundredths(gate.speedup),
        size_ratio: hundredths(gate.size_ratio),
        ..gate
    }
}

/// `value` with four significant digits, or more where they are before the point. A metric may be of any size.
fn significant(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let shift = 10_f64.powi((3 - value.abs().log10().floor() as i32).clamp(0, 15));
    (value * shift).round() / shift
}

fn in_words(progress: &Progress) -> String {
    let mut text = progress.state.clone();
    if progress.steps > 0 {
        text = format!("{text}, step {} of {}", progress.step, progress.steps);
    }
    text
}

fn failure_text(status: &JobStatus) -> &str {
    status.last_failure.as_ref().map_or("", |failure| &failure.message)
}

fn as_signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

/// The time from `now` to `due`, if that lies ahead.
fn until(now: Timestamp, due: Timestamp) -> Option<Duration> {
    (due > now).then(|| due.duration_since(now).unsigned_abs())
}

#[cfg(test)]
mod tests;

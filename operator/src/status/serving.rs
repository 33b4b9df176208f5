//! A ServingJob: which servers there should be while a new model takes the place of an old one, and whether the whole
//! answers.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use sensorium_api::{Canary, JobState, RolloutStatus, ServingJobSpec, ServingJobStatus};

use super::conditions::{Conditions, is_true};
use super::{Note, Refusal};
use crate::render::{ARTIFACT_ANNOTATION, ENCODER_LABEL, ENCODERS_ANNOTATION, REVISION_ANNOTATION};

const TYPES: [&str; 6] = ["ArtifactsReady", "WorkloadsReady", "RouteReady", "Progressing", "Degraded", "Ready"];

/// What is measured of servers: of one since it started, or of one track in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TrackLoad {
    /// Requests that were answered, well or badly.
    pub requests: f64,
    /// Those that failed for reasons of the server's.
    pub failures: f64,
    /// Sum of the time they took, in seconds.
    pub seconds: f64,
}

impl TrackLoad {
    fn mean(&self) -> Option<f64> {
        (self.requests > 0.0).then(|| self.seconds / self.requests)
    }
}

/// What is known of both tracks' servers, while a canary is being judged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// What the servers that serve for good have done since the step began.
    pub stable: TrackLoad,
    /// The same of the servers that are tried.
    pub canary: TrackLoad,
    /// The last time that one of the latter crashed.
    pub crash: Option<Crash>,
}

/// A container that ended, although it was to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// When.
    pub at: Timestamp,
    /// Whose, how, and how often.
    pub what: String,
}

/// Which servers there should be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Whether the stable servers take the wanted revision; otherwise they stay as they are.
    pub apply: bool,
    /// Number of canaries with the wanted revision; none: no canary Deployment.
    pub canaries: Option<u32>,
    /// Where the rollout is, for the status.
    pub rollout: Option<RolloutStatus>,
    /// What is worth an event.
    pub notes: Vec<Note>,
    /// What is waited for before any server takes the wanted revision.
    pub awaited: Option<Awaited>,
}

/// An encoder that new servers will call, and that is not up yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Awaited {
    /// Its name.
    pub name: String,
    /// Its pods, if they are there.
    pub live: Option<Arc<Deployment>>,
    /// Whether it should have been up by now.
    pub is_late: bool,
}

/// Whether servers that have been waited for since then should be up by now.
pub(crate) fn is_late(since: &Time, spec: &ServingJobSpec, now: Timestamp) -> bool {
    now >= since.0 + SignedDuration::from_secs(spec.rollout.progress_deadline_seconds.into())
}

/// The revision that a Deployment's pods are made of.
pub(crate) fn revision(deployment: &Deployment) -> Option<&str> {
    let template = deployment.spec.template.metadata.as_ref()?;
    template.annotations.as_ref()?.get(REVISION_ANNOTATION).map(String::as_str)
}

fn digest(deployment: &Deployment) -> Option<&String> {
    deployment.spec.template.metadata.as_ref()?.annotations.as_ref()?.get(ARTIFACT_ANNOTATION)
}

pub(crate) fn wanted(deployment: &Deployment) -> i32 {
    deployment.spec.replicas.unwrap_or(1)
}

/// Servers of the newest template that have been ready for a while.
pub(crate) fn available(deployment: &Deployment) -> i32 {
    deployment.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

/// Whether the controller has seen the newest template and every server is of it.
pub(crate) fn is_rolled_out(deployment: &Deployment) -> bool {
    let Some(status) = &deployment.status else { return false };
    let wanted = wanted(deployment);
    status.observed_generation >= deployment.metadata.generation
        && status.updated_replicas.unwrap_or(0) >= wanted
        && status.available_replicas.unwrap_or(0) >= wanted
        && status.replicas.unwrap_or(0) == status.updated_replicas.unwrap_or(0)
}

/// Decides on the servers. `revision` is the one that the spec and its artifact ask for.
pub fn rollout(
    spec: &ServingJobSpec,
    wanted_revision: &str,
    status: &ServingJobStatus,
    stable: Option<&Deployment>,
    canary: Option<&Deployment>,
    measured: &Measured,
    now: Timestamp,
) -> Plan {
    let plan = |apply, canaries, rollout, notes| Plan { apply, canaries, rollout, notes, awaited: None };
    let Some(stable) = stable else { return plan(true, None, None, Vec::new()) };
    let current = revision(stable);
    let known = status.rollout.clone().filter(|rollout| rollout.revision == wanted_revision);
    let start = || RolloutStatus {
        revision: wanted_revision.to_owned(),
        previous: current.map(str::to_owned),
        step: 0,
        step_ready: None,
        unready: None,
        started: Time(now),
        failed: None,
    };
    if current == Some(wanted_revision) {
        if is_rolled_out(stable) {
            let done = known.is_some_and(|rollout| rollout.failed.is_none());
            let note = Note::normal("RolledOut", format!("every server is of revision {wanted_revision}"));
            return plan(true, None, None, if done { vec![note] } else { Vec::new() });
        }
        // Canaries stay until the stable servers have taken over.
        let canaries = canary.map(|canary| u32::try_from(wanted(canary)).unwrap_or(0)).filter(|count| *count > 0);
        let canaries = canaries.filter(|_| canary.and_then(revision) == Some(wanted_revision));
        return plan(true, canaries, known, Vec::new());
    }
    let Some(strategy) = &spec.rollout.canary else {
        let note = Note::normal("RollingOut", format!("revision {wanted_revision} takes the place of the old servers"));
        let notes = if known.is_none() { vec![note] } else { Vec::new() };
        return plan(true, None, Some(known.unwrap_or_else(start)), notes);
    };
    match known {
        Some(failed) if failed.failed.is_some() => plan(false, None, Some(failed), Vec::new()),
        Some(rollout) => step(spec, strategy, rollout, stable, canary, measured, now),
        None => {
            let rollout = start();
            let canaries = canaries_of(strategy, 0, stable);
            let note = Note::normal("CanaryStarted", format!("{canaries} servers of revision {wanted_revision}"));
            plan(false, Some(canaries), Some(rollout), vec![note])
        }
    }
}

/// The stable servers all stay, so a weight of w percent takes stable * w / (100 - w) canaries.
fn canaries_of(strategy: &Canary, step: u32, stable: &Deployment) -> u32 {
    let servers = u32::try_from(wanted(stable)).unwrap_or(1).max(1);
    let weight = strategy.steps.get(step as usize).map_or(100, |step| step.weight);
    if weight >= 100 { servers } else { (servers * weight).div_ceil(100 - weight).max(1) }
}

fn step(
    spec: &ServingJobSpec,
    strategy: &Canary,
    mut rollout: RolloutStatus,
    stable: &Deployment,
    canary: Option<&Deployment>,
    measured: &Measured,
    now: Timestamp,
) -> Plan {
    let canaries = canaries_of(strategy, rollout.step, stable);
    let ready = canary.is_some_and(|canary| {
        revision(canary) == Some(&rollout.revision) && is_rolled_out(canary) && available(canary) >= canaries as i32
    });
    let fail = |mut rollout: RolloutStatus, why: String| {
        let note = Note::warning("RolledBack", format!("revision {}: {why}", rollout.revision));
        rollout.failed = Some(why);
        Plan { rollout: Some(rollout), notes: vec![note], ..Plan::default() }
    };
    if let Some(why) = verdict(strategy, measured) {
        return fail(rollout, why);
    }
    // Some start more than once before they answer, for want of what they need; those that did are to go on.
    let answered = rollout.step_ready.as_ref().or(Some(&rollout.started).filter(|_| rollout.step > 0));
    if let Some(crash) = &measured.crash
        && answered.is_some_and(|since| crash.at > since.0)
    {
        return fail(rollout, crash.what.clone());
    }
    let seconds = spec.rollout.progress_deadline_seconds;
    let stay = |rollout| Plan { canaries: Some(canaries), rollout: Some(rollout), ..Plan::default() };
    let Some(since) = rollout.step_ready.as_ref().map(|time| time.0) else {
        if ready {
            rollout.step_ready = Some(Time(now));
        } else if is_late(&rollout.started, spec, now) {
            return fail(rollout, format!("its servers did not answer within {seconds} s"));
        }
        return stay(rollout);
    };
    if !ready {
        let unready = rollout.unready.get_or_insert(Time(now)).clone();
        if is_late(&unready, spec, now) {
            return fail(rollout, format!("its servers have not all answered for {seconds} s"));
        }
        return stay(rollout);
    }
    rollout.unready = None;
    let pause = strategy.steps.get(rollout.step as usize).map_or(0, |step| step.pause_seconds);
    if now < since + SignedDuration::from_secs(i64::try_from(pause).unwrap_or(i64::MAX)) {
        return stay(rollout);
    }
    rollout.step += 1;
    rollout.step_ready = None;
    rollout.started = Time(now);
    if rollout.step as usize >= strategy.steps.len() {
        let note = Note::normal("Promoted", format!("revision {} takes over", rollout.revision));
        return Plan {
            apply: true,
            canaries: Some(canaries),
            rollout: Some(rollout),
            notes: vec![note],
            awaited: None,
        };
    }
    let canaries = canaries_of(strategy, rollout.step, stable);
    let note = Note::normal(
        "CanaryStep",
        format!("step {} of {}: {canaries} canaries", rollout.step + 1, strategy.steps.len()),
    );
    Plan { canaries: Some(canaries), rollout: Some(rollout), notes: vec![note], ..Plan::default() }
}

/// Why the canaries are no good, if they are not.
fn verdict(strategy: &Canary, measured: &Measured) -> Option<String> {
    let (analysis, canary) = (&strategy.analysis, &measured.canary);
    if canary.requests < analysis.min_requests as f64 || canary.requests == 0.0 {
        return None;
    }
    let rate = canary.failures / canary.requests;
    if rate > analysis.max_error_rate {
        return Some(format!(
            "{} of {} requests failed ({:.1} %), and maxErrorRate allows {:.1} %",
            canary.failures,
            canary.requests,
            rate * 100.0,
            analysis.max_error_rate * 100.0
        ));
    }
    let ratio = canary.mean()? / measured.stable.mean().filter(|mean| *mean > 0.0)?;
    (ratio > analysis.max_latency_ratio).then(|| {
        format!(
            "a request took {ratio:.1} times as long as with the old servers, and maxLatencyRatio allows {}",
            analysis.max_latency_ratio
        )
    })
}

/// All that a ServingJob's status depends on.
#[derive(Debug)]
pub struct Observed<'a> {
    /// The time.
    pub now: Timestamp,
    /// Generation of the spec.
    pub generation: Option<i64>,
    /// What was said last.
    pub status: &'a ServingJobStatus,
    /// Digest of the artifact to serve, or what is missing.
    pub artifact: Result<&'a str, String>,
    /// Why the servers could not be made what the spec asks for, if they could not.
    pub refusal: Option<&'a Refusal>,
    /// The stable servers.
    pub stable: Option<&'a Deployment>,
    /// The encoders that these call, by name, as far as they are there.
    pub encoders: &'a [(String, Option<Arc<Deployment>>)],
    /// All of the job's pods.
    pub pods: &'a [Pod],
    /// Addresses that the Service sends requests to.
    pub endpoints: usize,
    /// Where the rollout is.
    pub rollout: Option<RolloutStatus>,
    /// What it waits for.
    pub awaited: Option<Awaited>,
    /// The pods' labels, as a selector in text.
    pub selector: String,
}

/// What to say about a ServingJob.
pub fn serving_status(observed: &Observed<'_>) -> ServingJobStatus {
    let mut status = observed.status.clone();
    status.observed_generation = observed.generation;
    status.rollout.clone_from(&observed.rollout);
    status.selector = Some(observed.selector.clone());
    let (wanted, available, ready, replicas) = observed.stable.map_or((0, 0, 0, 0), |stable| {
        let live = stable.status.as_ref();
        let count =
            |get: fn(&k8s_openapi::api::apps::v1::DeploymentStatus) -> Option<i32>| live.and_then(get).unwrap_or(0);
        (wanted(stable), available(stable), count(|status| status.ready_replicas), count(|status| status.replicas))
    });
    status.replicas = u32::try_from(replicas).unwrap_or(0);
    status.ready_replicas = u32::try_from(ready).unwrap_or(0);
    let rolled_out = observed.stable.is_some_and(is_rolled_out);
    if rolled_out {
        status.digest = observed.stable.and_then(digest).cloned();
    }
    let serves = status.digest.is_some();
    // The Deployment hears later than the Service that a server has gone, and the Service later that one can be relied on.
    let answering = available.min(i32::try_from(observed.endpoints).unwrap_or(i32::MAX));
    let crash = observed.pods.iter().find_map(crash);
    let mut conditions = Conditions::new(&mut status.conditions, &TYPES, observed.generation, observed.now);

    match &observed.artifact {
        Ok(digest) => conditions.set("ArtifactsReady", true, "Resolved", *digest),
        Err(missing) => conditions.set("ArtifactsReady", false, "ArtifactNotReady", missing),
    }
    let silent = silent(observed.pods);
    let awaited = observed.awaited.as_ref().and_then(|awaited| {
        let absent = absent(&awaited.name, awaited.live.as_deref(), observed.pods)?;
        Some((format!("its servers wait for {absent}"), awaited.is_late))
    });
    let absent = silent
        .clone()
        .or_else(|| observed.encoders.iter().find_map(|(name, live)| absent(name, live.as_deref(), observed.pods)));
    let servers = match &absent {
        None => format!("{answering} of {wanted} servers answer"),
        Some(absent) => format!("{answering} of {wanted} servers answer; {absent}"),
    };
    let workloads = observed.stable.is_some() && answering >= wanted && wanted > 0 && absent.is_none();
    match (observed.stable, wanted) {
        (None, _) => conditions.set("WorkloadsReady", false, "NotStarted", "no server has been started"),
        (Some(_), 0) => conditions.set("WorkloadsReady", false, "ScaledToZero", "no server is wanted"),
        (Some(_), _) if workloads => conditions.set("WorkloadsReady", true, "Available", &servers),
        (Some(_), _) => conditions.set("WorkloadsReady", false, "Unavailable", &servers),
    }
    let route = observed.endpoints > 0;
    let routed = format!("the Service has {} ready addresses", observed.endpoints);
    conditions.set("RouteReady", route, if route { "Endpoints" } else { "NoEndpoints" }, &routed);

    let failed = observed.rollout.as_ref().and_then(|rollout| rollout.failed.clone());
    let progressing = observed.stable.is_some() && (!rolled_out || observed.rollout.is_some()) && failed.is_none();
    let late = awaited.as_ref().filter(|(_, is_late)| *is_late).map(|(why, _)| why.clone());
    let stuck = observed.stable.and_then(stuck).or(late);
    let progress = match &observed.rollout {
        Some(rollout) => {
            let why = awaited.map(|(why, _)| format!(": {why}")).unwrap_or_default();
            format!("revision {}, step {}{why}", rollout.revision, rollout.step + 1)
        }
        None => servers.clone(),
    };
    let refused = observed.refusal.map(|refusal| (refusal.cause.reason(), refusal.message.clone()));
    match (&refused, progressing && stuck.is_none(), &failed) {
        (Some((reason, why)), ..) => conditions.set("Progressing", false, reason, why),
        (None, true, _) => conditions.set("Progressing", true, "RollingOut", &progress),
        (None, false, Some(why)) => conditions.set("Progressing", false, "RolledBack", why),
        (None, false, None) if stuck.is_some() => {
            conditions.set("Progressing", false, "DeadlineExceeded", stuck.clone().unwrap_or_default());
        }
        (None, false, None) => conditions.set("Progressing", false, "Settled", &servers),
    }
    let degraded = match (&crash, &failed, &stuck) {
        (Some(crash), ..) => Some(("PodsCrash", crash.clone())),
        _ if refused.is_some() => refused.clone(),
        (None, Some(why), _) => Some(("RolledBack", format!("the last rollout was taken back: {why}"))),
        (None, None, Some(why)) => Some(("DeadlineExceeded", why.clone())),
        (None, None, None) if serves && !workloads && wanted > 0 && rolled_out => {
            Some(("Unavailable", servers.clone()))
        }
        _ => None,
    };
    match &degraded {
        Some((reason, message)) => conditions.set("Degraded", true, reason, message),
        None => conditions.set("Degraded", false, "AsWanted", ""),
    }
    // Old servers may answer while new ones crash or cannot be made; whoever waits for Ready waits for what the spec asks for.
    let missing = observed.artifact.as_ref().err().map(|missing| ("ArtifactNotReady", missing.clone()));
    let in_the_way = refused.or(missing);
    let answers = answering > 0 && route && serves;
    // Servers find out by themselves, but not before a request, or half a minute, has told them.
    let ready = answers && crash.is_none() && in_the_way.is_none() && silent.is_none();
    let (state, reason, message) = match (crash, in_the_way) {
        (Some(crash), _) => (JobState::Running, "PodsCrash", crash),
        (None, Some((reason, why))) if answers => {
            (JobState::Running, reason, format!("{why}; {answering} of {wanted} servers go on as they are"))
        }
        (None, Some((reason, why))) if observed.stable.is_none() => (JobState::Pending, reason, why),
        (None, Some((reason, why))) => (JobState::Running, reason, why),
        (None, None) if ready => {
            let message =
                failed.map_or(servers.clone(), |why| format!("{servers}; the last rollout was taken back: {why}"));
            (JobState::Ready, "Answering", message)
        }
        (None, None) if answers && silent.is_some() => (JobState::Running, "EncoderNotAnswering", servers.clone()),
        (None, None) if observed.stable.is_none() => {
            (JobState::Pending, "NotAnswering", "starting the servers".to_owned())
        }
        (None, None) => {
            let held_up = observed.pods.iter().find_map(obstacle).or_else(|| observed.stable.and_then(pods_refused));
            (JobState::Running, "NotAnswering", held_up.map_or(servers.clone(), |text| format!("{servers}: {text}")))
        }
    };
    conditions.set("Ready", ready, reason, &message);
    status.state = Some(state);
    status.message = Some(message);
    status
}

/// How many of an encoder's pods answer, unless all do. Its Deployment hears later than we do that one of them has gone, and
/// counts none before it can be relied on.
fn absent(name: &str, live: Option<&Deployment>, pods: &[Pod]) -> Option<String> {
    let (available, wanted) = live.map_or((0, 1), |live| (available(live), wanted(live)));
    let answering =
        available.min(i32::try_from(pods_of(name, pods).filter(|pod| is_up(pod)).count()).unwrap_or(i32::MAX));
    (answering < wanted).then(|| unanswered(name, answering, wanted, pods))
}

/// An encoder of which no pod answers, although every server that is up calls it or another such: then no request can be
/// answered. Only the pods are asked: they are the first to know.
fn silent(pods: &[Pod]) -> Option<String> {
    let called = |pod: &Pod| {
        pod.annotations().get(ENCODERS_ANNOTATION).map(|names| names.split(',').map(str::to_owned).collect())
    };
    let servers = pods.iter().filter(|pod| is_up(pod) && !pod.labels().contains_key(ENCODER_LABEL));
    let mut first = None;
    for server in servers {
        let called: Vec<String> = called(server).unwrap_or_default();
        let silent = called.into_iter().find(|name| !pods_of(name, pods).any(is_up))?;
        first.get_or_insert(silent);
    }
    let name = first?;
    let wanted = i32::try_from(pods_of(&name, pods).count()).unwrap_or(i32::MAX).max(1);
    Some(unanswered(&name, 0, wanted, pods))
}

/// That so many of an encoder's pods answer, and what is known of those that do not.
fn unanswered(name: &str, answering: i32, wanted: i32, pods: &[Pod]) -> String {
    let why = pods_of(name, pods).filter(|pod| !is_up(pod)).find_map(|pod| {
        let leaves = || pod.metadata.deletion_timestamp.is_some().then(|| format!("pod {} leaves", pod.name_any()));
        let fails = || pod.status.as_ref()?.phase.as_deref().filter(|phase| *phase == "Running");
        leaves().or_else(|| obstacle(pod)).or_else(|| fails().map(|_| format!("pod {} is not ready", pod.name_any())))
    });
    let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
    format!("encoder {name}: {answering} of {wanted} answer{why}")
}

/// The pods of an encoder.
fn pods_of<'a>(name: &'a str, pods: &'a [Pod]) -> impl Iterator<Item = &'a Pod> {
    let own = move |pod: &&Pod| pod.labels().get(ENCODER_LABEL).is_some_and(|label| label == name);
    pods.iter().filter(own).filter(|pod| !has_ended(pod))
}

/// Whether a pod is ready and not about to leave.
fn is_up(pod: &Pod) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let is_ready = conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True");
    is_ready && pod.metadata.deletion_timestamp.is_none()
}

/// What is worth an event when `new` takes the place of `old`.
pub fn serving_notes(old: Option<&ServingJobStatus>, new: &ServingJobStatus, refusal: Option<&Refusal>) -> Vec<Note> {
    let find = |status: Option<&ServingJobStatus>, name: &str| {
        status?.conditions.iter().find(|condition| condition.type_ == name).cloned()
    };
    let (was, is) = (old.is_some_and(is_ready), is_ready(new));
    let message = new.message.clone().unwrap_or_default();
    let mut notes = Vec::new();
    if let Some(Refusal { cause, message }) = refusal {
        let told = find(old, "Progressing").is_some_and(|known| {
            known.reason == cause.reason() && known.observed_generation == new.observed_generation
        });
        if !told {
            notes.push(Note::warning(cause.reason(), message));
        }
    }
    if let Some(missing) = find(Some(new), "ArtifactsReady").filter(|condition| condition.status == "False") {
        match find(old, "ArtifactsReady").as_ref().map(|known| known.status.as_str()) {
            Some("False") => {}
            Some("True") => notes.push(Note::warning("ArtifactNotReady", missing.message)),
            _ => notes.push(Note::normal("WaitingForArtifact", missing.message)),
        }
    }
    match (was, is) {
        (false, true) => notes.push(Note::normal("Ready", message)),
        // Why has just been said, where that is why.
        (true, false) if notes.is_empty() => notes.push(Note::warning("NotReady", message)),
        _ => {}
    }
    notes
}

/// Whether `status` says that the job answers.
fn is_ready(status: &ServingJobStatus) -> bool {
    is_true(&status.conditions, "Ready")
}

/// Why a Deployment's pods cannot even be made: a quota, a policy.
fn pods_refused(deployment: &Deployment) -> Option<String> {
    let conditions = deployment.status.as_ref()?.conditions.as_ref()?;
    let refused = |c: &&k8s_openapi::api::apps::v1::DeploymentCondition| {
        c.type_.as_deref() == Some("ReplicaFailure") && c.status.as_deref() == Some("True")
    };
    conditions.iter().find(refused)?.message.clone()
}

/// Why the Deployment gave up waiting for its servers.
fn stuck(deployment: &Deployment) -> Option<String> {
    let conditions = deployment.status.as_ref()?.conditions.as_ref()?;
    let stuck = conditions
        .iter()
        .find(|c| c.type_.as_deref() == Some("Progressing") && c.status.as_deref() == Some("False"))?;
    Some(stuck.message.clone().unwrap_or_else(|| "the new servers did not answer in time".to_owned()))
}

/// A pod that was evicted, or whose node was shut down, stays on record when another one has taken its place.
pub(crate) fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The last time that a container of one of these pods ended, of those that are to go on.
pub fn last_crash<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> Option<Crash> {
    let crashes =
        pods.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none() && !has_ended(pod)).flat_map(|pod| {
            let containers = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
            containers.filter_map(|container| {
                let at = last_end(container)?.finished_at.as_ref()?.0;
                Some(Crash { at, what: crashed(pod, container) })
            })
        });
    crashes.max_by_key(|crash| crash.at)
}

/// How a pod crashes, if it does.
fn crash(pod: &Pod) -> Option<String> {
    if pod.metadata.deletion_timestamp.is_some() || has_ended(pod) {
        return None;
    }
    let crashes = |status: &&ContainerStatus| {
        let waiting = status
            .state
            .as_ref()
            .and_then(|state| state.waiting.as_ref())
            .and_then(|waiting| waiting.reason.as_deref());
        let ended = status.state.as_ref().is_some_and(|state| state.terminated.is_some());
        waiting == Some("CrashLoopBackOff") || ended || (status.restart_count > 0 && !status.ready)
    };
    let container = pod.status.as_ref()?.container_statuses.iter().flatten().find(crashes)?;
    Some(crashed(pod, container))
}

/// How the container ended last, if it did.
fn last_end(container: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    let now = container.state.as_ref().and_then(|state| state.terminated.as_ref());
    now.or_else(|| container.last_state.as_ref()?.terminated.as_ref())
}

fn crashed(pod: &Pod, container: &ContainerStatus) -> String {
    let why = last_end(container).map_or_else(String::new, |last| {
        let text = last.message.as_deref().map(str::trim).filter(|text| !text.is_empty()).or(last.reason.as_deref());
        format!(": exit code {}{}", last.exit_code, text.map(|text| format!(", {text}")).unwrap_or_default())
    });
    format!("pod {} crashes (started again {} times){why}", pod.name_any(), container.restart_count)
}

fn obstacle(pod: &Pod) -> Option<String> {
    super::run::obstacle(pod).filter(|_| !has_ended(pod))
}

#[cfg(test)]
mod tests;

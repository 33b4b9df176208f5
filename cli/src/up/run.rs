//! One run: its jobs so far, and the servers that are up.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use sensorium_api::ServingJob;
use sensorium_api::manifest::Resource;
use sensorium_api::run::{ArtifactResult, GateResult, RunResult};
use sensorium_artifact::Artifact;
use sensorium_operator::plan::{Lifetime, WorkloadPlan};

use super::{questions, summary};
use crate::client::Client;
use crate::data;
use crate::error::Error;
use crate::local::interrupt::Interrupt;
use crate::local::job::{self, Attempt, Budget, Finished, GRACE, JobFailure};
use crate::local::placement::{PortMap, PortWishes, processes};
use crate::local::programs::Programs;
use crate::local::reuse::{inputs, open_store, reusable};
use crate::local::service::Service;
use crate::local::state_dir::{JobRecord, Phase, StateDir};
use crate::manifests::Job;
use crate::references::References;
use crate::report::{ArtifactReport, GateReport, JobDetails, JobReport, JobState, QuestionReport, Report};
use crate::view::View;

/// Port on which rank 0 serves its progress.
const PROGRESS: &str = "progress";
/// Time between an attempt and the next: enough for the system to take back ports and memory.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// What a run has and has done.
pub(super) struct Run<'a> {
    state: &'a StateDir,
    programs: &'a Programs,
    wishes: &'a PortWishes,
    view: &'a View,
    interrupt: &'a Interrupt,
    cores: usize,
    jobs: Vec<(JobReport, JobDetails)>,
    questions: Vec<QuestionReport>,
    services: Vec<Served>,
}

/// A server of the run.
struct Served {
    model: String,
    /// Of gRPC, `HOST:PORT`.
    address: Option<String>,
    service: Service,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        state: &'a StateDir,
        programs: &'a Programs,
        wishes: &'a PortWishes,
        view: &'a View,
        interrupt: &'a Interrupt,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let (jobs, questions, services) = (Vec::new(), Vec::new(), Vec::new());
        Self { state, programs, wishes, view, interrupt, cores, jobs, questions, services }
    }

    /// Runs, reuses or serves one job, and notes what came of it.
    pub(super) async fn job(&mut self, job: &Job) -> Result<(), Error> {
        if self.interrupt.is_asked() {
            return Err(Error::Interrupted);
        }
        if job.plan.suspended {
            self.view.job_line(&job.plan.job.to_string(), "suspended: not run");
            return Ok(());
        }
        let began = Instant::now();
        let outcome = match (&job.plan.lifetime, &job.resource) {
            (Lifetime::Service, Resource::ServingJob(serving)) => self.serve(job, serving).await,
            _ => self.complete(job).await,
        };
        let (outcome, result) = match outcome {
            Ok(outcome) => (outcome, Ok(())),
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            Err(error) => (Outcome::failed(&error), Err(error)),
        };
        let report = JobReport {
            kind: job.plan.job.kind.to_string(),
            name: job.plan.job.name.clone(),
            state: outcome.state,
            seconds: began.elapsed().as_secs_f64(),
            metrics: outcome.metrics,
            artifact: outcome.artifact,
            gate: outcome.gate,
        };
        self.jobs.push((report, self.details(job)));
        result
    }

    /// A job that ends by itself.
    async fn complete(&self, job: &Job) -> Result<Outcome, Error> {
        let references = References::of(&job.resource);
        let inputs = self.interrupt.or(inputs(&job.plan, &references, self.state)).await?;
        let folder = self.state.job(&job.plan.job);
        let record = folder.record();
        if let Some(output) = &references.output
            && let Some(artifact) = self.interrupt.or(reusable(record.as_ref(), &inputs, output, self.state)).await?
        {
            let short = artifact.digest.short();
            self.view.job_line(&job.plan.job.to_string(), &format!("unchanged, reused: {} {short}", output.artifact));
            return Ok(Outcome::reused(&artifact, record));
        }
        let mut record = JobRecord::started(inputs);
        folder.set_record(&record)?;
        folder.prepare(&job.plan.files)?;
        let outcome = self.attempts(job).await;
        folder.clear_scratch();
        match &outcome {
            Ok(finished) => record.finish(Phase::Succeeded, finished.attempts, Some(&finished.result)),
            Err(Error::Job(failure)) => record.finish(Phase::Failed, failure.attempts, failure.result.as_ref()),
            // Not known how far it came: the next run goes on from its checkpoint.
            Err(_) => {}
        }
        // Why a job failed is said also where that cannot be kept.
        let kept = folder.set_record(&record);
        let Finished { result, .. } = outcome?;
        kept?;
        self.view.job_line(&job.plan.job.to_string(), &summary::done(&result));
        Ok(Outcome::succeeded(result))
    }

    async fn attempts(&self, job: &Job) -> Result<Finished, Error> {
        let Lifetime::RunToCompletion(policy) = &job.plan.lifetime else {
            // Only reached for a service of a kind that is not served; there is none.
            return Err(Error::Job(Box::new(JobFailure::new("it does not end by itself".to_owned()))));
        };
        let budget = Budget {
            max_restarts: policy.failure.max_restarts,
            deadline: policy.active_deadline_seconds.map(Duration::from_secs),
            grace: GRACE,
            pause: RESTART_PAUSE,
        };
        let name = job.plan.job.to_string();
        let mut view = self.view.start(&name, &summary::processes(&job.plan));
        let prepare = |_| Ok(self.attempt(job)?.0);
        job::run(&name, prepare, budget, &mut view, self.interrupt).await
    }

    /// What to start, and where it will listen.
    fn attempt(&self, job: &Job) -> Result<(Attempt, PortMap), Error> {
        let mut ports = PortMap::choose(&job.plan, self.wishes)?;
        let processes = processes(&job.plan, &ports, self.state, self.programs, self.cores)?;
        let reporting = job.plan.roles.iter().find(|role| role.result);
        let progress = reporting.and_then(|role| ports.address(&role.name, 0, PROGRESS));
        let result = self.state.job(&job.plan.job).result();
        let reserved = std::mem::take(&mut ports.reserved);
        Ok((Attempt { processes, progress, result, reserved }, ports))
    }

    /// A server: started, asked its verification questions, and left running.
    async fn serve(&mut self, job: &Job, serving: &ServingJob) -> Result<Outcome, Error> {
        let name = job.plan.job.to_string();
        let artifact = self.interrupt.or(self.source(job)).await?;
        self.state.job(&job.plan.job).prepare(&job.plan.files)?;
        let (attempt, ports) = self.attempt(job)?;
        for replaced in &ports.replaced {
            self.view.job_line(&name, &summary::replaced(replaced));
        }
        let bar = self.view.start(&name, &summary::processes(&job.plan));
        let service = Service::start(&job.plan, attempt, &probes(&job.plan, &ports), self.interrupt).await;
        drop(bar);
        let address = job.plan.roles.first().and_then(|role| ports.address(&role.name, 0, "grpc"));
        self.services.push(Served { model: job.plan.job.name.clone(), address: address.clone(), service: service? });
        self.view.job_line(&name, &summary::ready(&job.plan, &ports));
        if let (Some(verification), Some(address)) = (&serving.spec.verification, address) {
            let dataset = data::open(self.state, &verification.data)?;
            let chosen = questions::choose(&dataset, verification.samples as usize)
                .map_err(|source| Error::Data { uri: verification.data.clone(), source })?;
            let mut client = self.interrupt.or(Client::connect(&address)).await?;
            let folder = self.state.questions().join(&job.plan.job.name);
            let asked = questions::ask(&mut client, &job.plan.job.name, chosen, &folder);
            let asked = self.interrupt.or(asked).await?;
            self.view.line(questions::table(&asked).trim_end());
            self.questions.extend(asked);
        }
        Ok(Outcome::ready(artifact.as_ref()))
    }

    async fn source(&self, job: &Job) -> Result<Option<Artifact>, Error> {
        match References::of(&job.resource).source {
            Some(source) => Ok(Some(open_store(&source, self.state)?.resolve(&source.artifact).await?)),
            None => Ok(None),
        }
    }

    fn details(&self, job: &Job) -> JobDetails {
        let Resource::TrainingJob(training) = &job.resource else { return JobDetails::default() };
        let uri = training.checkpoint_uri();
        let folder = self.state.volumes_of(&[&uri]).and_then(|volumes| volumes.local_path(&uri));
        folder.map(|folder| JobDetails::read(&folder)).unwrap_or_default()
    }

    /// The report of what was done so far.
    pub(super) fn report(&self, elapsed: Duration) -> (Report, Vec<JobDetails>) {
        let (jobs, details) = self.jobs.iter().cloned().unzip();
        (Report { seconds: elapsed.as_secs_f64(), jobs, questions: self.questions.clone() }, details)
    }

    /// A model that is being served, and where it takes questions.
    pub(super) fn served(&self) -> Option<(String, String)> {
        self.services.iter().find_map(|served| Some((served.model.clone(), served.address.clone()?)))
    }

    /// Waits until it is interrupted, which is how it should end, or a server ends.
    pub(super) async fn keep(&mut self) -> Result<(), Error> {
        if self.services.is_empty() {
            return Ok(());
        }
        let watches = self.services.iter_mut().map(|served| served.service.watch().boxed());
        tokio::select! {
            (error, _, _) = futures::future::select_all(watches) => Err(error),
            () = self.interrupt.asked() => Ok(()),
        }
    }

    /// Stops the servers.
    pub(super) async fn stop(self) {
        let interrupt = self.interrupt;
        futures::future::join_all(self.services.into_iter().map(|served| served.service.stop(interrupt))).await;
    }
}

/// Where each replica says that it is ready: `HOST:PORT` and path.
fn probes(plan: &WorkloadPlan, ports: &PortMap) -> Vec<(String, String)> {
    let mut probes = Vec::new();
    for role in &plan.roles {
        let Some(probe) = &role.readiness else { continue };
        let addresses = (0..role.replicas).filter_map(|replica| ports.address(&role.name, replica, &probe.port));
        probes.extend(addresses.map(|address| (address, probe.path.clone())));
    }
    probes
}

/// What came of a job, for the report.
struct Outcome {
    state: JobState,
    metrics: BTreeMap<String, f64>,
    artifact: Option<ArtifactReport>,
    gate: Option<GateReport>,
}

impl Outcome {
    fn succeeded(result: RunResult) -> Self {
        let RunResult { metrics, artifact, gate, .. } = result;
        Self { state: JobState::Succeeded, metrics, artifact: artifact.map(made), gate: gate.map(verdict) }
    }

    fn reused(artifact: &Artifact, record: Option<JobRecord>) -> Self {
        let (metrics, gate) = record.map(|record| (record.metrics, record.gate)).unwrap_or_default();
        Self { state: JobState::Reused, metrics, artifact: Some(stored(artifact)), gate: gate.map(verdict) }
    }

    fn ready(artifact: Option<&Artifact>) -> Self {
        let metrics = artifact.map(|artifact| artifact.manifest.metrics.clone()).unwrap_or_default();
        Self { state: JobState::Ready, metrics, artifact: artifact.map(stored), gate: None }
    }

    fn failed(error: &Error) -> Self {
        let result = match error {
            Error::Job(failure) => failure.result.clone(),
            _ => None,
        };
        let (metrics, artifact, gate) =
            result.map(|result| (result.metrics, result.artifact, result.gate)).unwrap_or_default();
        Self { state: JobState::Failed, metrics, artifact: artifact.map(made), gate: gate.map(verdict) }
    }
}

fn made(artifact: ArtifactResult) -> ArtifactReport {
    ArtifactReport { digest: artifact.digest, bytes: artifact.bytes, uri: artifact.uri }
}

fn stored(artifact: &Artifact) -> ArtifactReport {
    let bytes = artifact.manifest.total_bytes();
    ArtifactReport { digest: artifact.digest.to_string(), bytes, uri: artifact.uri.clone() }
}

fn verdict(gate: GateResult) -> GateReport {
    let GateResult { metric, parent, candidate, drop, speedup, promoted, .. } = gate;
    GateReport { metric, parent, candidate, drop, speedup: Some(speedup), promoted }
}

//! TrainingJobs and CompressionJobs: one controller for jobs that come to an end.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt;
use kube::api::ListParams;
use kube::runtime::Controller;
use kube::runtime::controller::{Action as Again, Config};
use sensorium_api::manifest::Resource as Manifest;
use sensorium_api::run::{ArtifactResult, JobKey, JobKind};
use sensorium_api::{CompressionJob, JobStatus, LineageJob, ModelArtifact, ModelArtifactSpec, OutputSpec, TrainingJob};
use serde_json::json;

use super::apply;
use super::artifact::Artifacts;
use super::children::{
    Children, Key, is_of, owner_by_annotation, owner_by_reference, prune_config, prune_job, prune_pod,
};
use super::context::{Context, DEBOUNCE};
use super::index::reference;
use super::kept::{Kept, Own};
use super::visit::Visit;
use super::{Error, News, Stop};
use crate::plan::{Pins, WorkloadPlan, check_available, plan_pinned};
use crate::render::{ACCESS_ANNOTATION, Owner, access_of, attempt_of, render_run, short_digest};
use crate::status::conditions::is_true;
use crate::status::{
    ARTIFACT_LABEL, Action, Decision, JOB_LABEL, Observed, References, decide, index, is_to_be_judged, refused,
};

/// A kind whose jobs come to an end.
pub(super) trait Run: Own {
    /// The kind.
    const KIND: JobKind;
    /// What was said last.
    fn status(&self) -> Option<&JobStatus>;
    /// Where its artifact goes.
    fn output(&self) -> &OutputSpec;
    /// Numbers of workers that are possible, from the fewest; none where there is no choice.
    fn widths(&self) -> Vec<u32>;
}

impl Run for TrainingJob {
    const KIND: JobKind = JobKind::TrainingJob;

    fn status(&self) -> Option<&JobStatus> {
        self.status.as_ref()
    }
    fn output(&self) -> &OutputSpec {
        &self.spec.output
    }
    fn widths(&self) -> Vec<u32> {
        let (spec, layout) = (&self.spec, &self.spec.parallelism);
        let Some(elastic) = &spec.elastic else { return Vec::new() };
        let replica = layout.tensor * layout.pipeline;
        let fits = |workers: &u32| {
            let processes = workers * spec.processes_per_worker;
            processes.is_multiple_of(replica) && spec.training.batch.images.is_multiple_of(processes / replica)
        };
        (elastic.min_workers..=elastic.max_workers).filter(fits).collect()
    }
}

impl Run for CompressionJob {
    const KIND: JobKind = JobKind::CompressionJob;

    fn status(&self) -> Option<&JobStatus> {
        self.status.as_ref()
    }
    fn output(&self) -> &OutputSpec {
        &self.spec.output
    }
    fn widths(&self) -> Vec<u32> {
        Vec::new()
    }
}

/// The controller of one kind, with its caches.
struct Runs {
    context: Arc<Context>,
    jobs: Children<Job>,
    pods: Children<Pod>,
    services: Children<Service>,
    configs: Children<ConfigMap>,
    policies: Children<NetworkPolicy>,
    artifacts: Artifacts,
}

/// Runs the controller until `stop` ends. `news` are of artifacts.
pub(super) async fn control<K: Run>(context: Arc<Context>, artifacts: Artifacts, news: News, stop: Stop) {
    let kind = K::KIND.as_str();
    let (known, objects) = context.watch_main::<K>();
    let (jobs, job_news) = context.watch_children(kind, owner_by_reference(kind), prune_job);
    let (pods, pod_news) = context.watch_children(kind, owner_by_annotation, prune_pod);
    let (services, service_news) = context.watch_children(kind, owner_by_reference(kind), |_: &mut Service| {});
    let (configs, config_news) = context.watch_children(kind, owner_by_reference(kind), prune_config);
    let (policies, policy_news) = context.watch_children(kind, owner_by_reference(kind), |_: &mut NetworkPolicy| {});
    let touched = futures::stream::select_all([
        objects.map(|news| news.object).boxed(),
        job_news.boxed(),
        pod_news.boxed(),
        service_news.boxed(),
        config_news.boxed(),
        policy_news.boxed(),
        news.of_readers(known.clone()).boxed(),
    ])
    .inspect({
        let (context, known) = (Arc::clone(&context), known.clone());
        move |key| context.heard(kind, &known, key)
    })
    .map(|key| reference(&key));

    let counted = known.clone();
    context.health.count(kind, move || counted.count());
    let runs = Arc::new(Runs { context: Arc::clone(&context), jobs, pods, services, configs, policies, artifacts });
    Controller::for_stream(futures::stream::pending(), known.store())
        .with_config(Config::default().concurrency(context.settings.concurrency).debounce(DEBOUNCE))
        .reconcile_on(touched)
        .graceful_shutdown_on(stop)
        .run(reconcile::<K>, on_error::<K>, runs)
        .for_each(|_| std::future::ready(()))
        .await;
}

async fn reconcile<K: Run>(object: Arc<Kept<K>>, runs: Arc<Runs>) -> Result<Again, Error> {
    if let Some(again) = runs.context.held_up(K::KIND.as_str(), &object).await {
        return Ok(again);
    }
    let visit = Visit::begin(&runs.context, K::KIND.as_str(), object.key());
    let result = match object.read() {
        Ok(object) => runs.visit(&visit, &object).await,
        Err(error) => {
            runs.context.unreadable(&*object, &error).await;
            Ok(Again::await_change())
        }
    };
    visit.end(&result);
    if result.is_ok() {
        runs.context.succeeded(&object.id());
    }
    result
}

fn on_error<K: Run>(object: Arc<Kept<K>>, error: &Error, runs: Arc<Runs>) -> Again {
    super::context::again_after(&runs.context, object.id(), error)
}

impl Runs {
    async fn visit<K: Run>(&self, visit: &Visit<'_>, object: &K) -> Result<Again, Error> {
        let caches = [
            self.jobs.listed(),
            self.pods.listed(),
            self.services.listed(),
            self.configs.listed(),
            self.policies.listed(),
            self.artifacts.listed(),
        ];
        if caches.contains(&false) {
            return Err(Error::NotReady);
        }
        if object.meta().deletion_timestamp.is_some() {
            self.context.pods.forget(&object.uid().unwrap_or_default());
            return Ok(Again::await_change());
        }
        let manifest = object.clone().manifest();
        let key: Key = (object.namespace().unwrap_or_default(), object.name_any());
        let old = object.status();
        let before = old.cloned().unwrap_or_default();
        let jobs = self.jobs.of(&key).into_iter().map(Arc::unwrap_or_clone);
        let (jobs, foreign): (Vec<Job>, Vec<Job>) = jobs.partition(|job| is_of(job, object));
        let is_taken = !foreign.is_empty()
            || self.services.of(&key).iter().any(|service| !is_of(&**service, object))
            || self.configs.of(&key).iter().any(|config| !is_of(&**config, object))
            || self.policies.of(&key).iter().any(|policy| !is_of(&**policy, object));
        // What an earlier version has started goes on to its end.
        let is_new = jobs.is_empty() && before.attempt == 0;
        let available = if is_new { check_available(&manifest) } else { Ok(()) };
        let declared = available.and_then(|()| plan_pinned(&manifest, &Pins::default()));
        let pods = match jobs.iter().find(|job| is_to_be_judged(&before, job)) {
            Some(ended) => self.live_pods(&key, ended).await?,
            None => self.pods.of(&key).into_iter().map(Arc::unwrap_or_clone).collect(),
        };
        let references = References::of(&manifest);
        let meant = self.artifacts.meant_by(&key.0, &references);
        let uid = object.uid().unwrap_or_default();
        let (progress, poll) = self.progress(&uid, &before, declared.as_ref().ok(), &pods).await;
        let widths = object.widths();
        let observed = Observed {
            now: Timestamp::now(),
            uid: &uid,
            generation: object.meta().generation,
            plan: declared.as_ref().map_err(ToString::to_string),
            inputs: references.resolve(|| meant.iter()),
            status: &before,
            jobs: &jobs,
            is_taken,
            pods: &pods,
            progress,
            widths: &widths,
        };
        let decision = decide(&observed);
        if let Err(error) = self.carry_out(visit, object, &manifest, &key, old, &jobs, &decision).await {
            // Nobody says when a quota or a policy changes: it is tried again, with growing pauses.
            let starts = matches!(decision.action, Action::Ensure { .. }) && jobs.is_empty();
            let ends = !is_true(&before.conditions, "Complete") && is_true(&decision.status.conditions, "Complete");
            if let Some(refusal) = error.refusal().filter(|_| starts || ends) {
                let (status, note) = refused(&observed, &decision.status, &refusal);
                apply::write_status(visit, object, old, &status).await?;
                self.context.publish(&object.object_ref(&()), note.as_slice()).await;
            }
            return Err(error);
        }
        let again = match (decision.again, poll) {
            (Some(again), Some(poll)) => Some(again.min(poll)),
            (again, poll) => again.or(poll),
        };
        Ok(again.map_or_else(Again::await_change, |again| Again::requeue(again.max(Duration::from_millis(100)))))
    }

    /// The pods of an attempt as they are now, and not as the watch last heard of them.
    async fn live_pods(&self, key: &Key, job: &Job) -> Result<Vec<Pod>, Error> {
        let name = job.name_any();
        let parameters = ListParams::default().labels(&format!("{JOB_LABEL}={name}"));
        let list = self.context.api_in::<Pod>(&key.0).list(&parameters).await;
        Ok(list.map_err(Error::api("list the pods of", format!("Job/{name}")))?.items)
    }

    /// Asks rank 0 how far it is, if the job runs and it is its turn; and when it is again.
    async fn progress(
        &self,
        uid: &str,
        status: &JobStatus,
        plan: Option<&WorkloadPlan>,
        pods: &[Pod],
    ) -> (Option<sensorium_api::run::Progress>, Option<Duration>) {
        if !is_true(&status.conditions, "PodsReady") {
            self.context.pods.forget(uid);
            return (None, None);
        }
        let (turn, again) = self.context.pods.turn(uid);
        let port = plan.and_then(|plan| plan.roles.first()?.ports.get("progress").copied());
        let newest = format!("{}", status.attempt);
        let first = pods
            .iter()
            .find(|pod| pod.labels().get(crate::render::ATTEMPT_LABEL) == Some(&newest) && index(pod) == Some(0));
        match (turn, port, first) {
            (true, Some(port), Some(pod)) => (self.context.pods.progress(pod, port).await, Some(again)),
            _ => (None, Some(again)),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "what a visit knows by then; nobody else calls it")]
    async fn carry_out<K: Run>(
        &self,
        visit: &Visit<'_>,
        object: &K,
        manifest: &Manifest,
        key: &Key,
        old: Option<&JobStatus>,
        jobs: &[Job],
        decision: &Decision,
    ) -> Result<(), Error> {
        let status = &decision.status;
        match &decision.action {
            Action::Expire => return apply::delete(visit, object).await,
            Action::Ensure { attempt, workers } => {
                self.ensure(visit, object, manifest, key, *attempt, *workers, &status.inputs, jobs).await?;
            }
            Action::Suspend { attempt, hold } => {
                for job in jobs.iter().filter(|job| attempt_of(job) == Some(*attempt)) {
                    apply::merge(visit, job, &json!({"spec": {"suspend": hold}})).await?;
                }
            }
            Action::None | Action::Remove => {}
        }
        let ended_now =
            is_true(&status.conditions, "Complete") && !old.is_some_and(|old| is_true(&old.conditions, "Complete"));
        // The record is written first: a job that says it is complete has one.
        if let (true, Some(artifact)) = (ended_now, &status.artifact)
            && status.gate.as_ref().is_none_or(|gate| gate.promoted)
        {
            self.record(visit, object, manifest, artifact).await?;
        }
        // What a failure was is written before its traces are removed.
        apply::write_status(visit, object, old, status).await?;
        if decision.action == Action::Remove {
            for job in jobs {
                apply::delete_last(visit, job).await?;
            }
        }
        self.context.publish(&object.object_ref(&()), &decision.notes).await;
        Ok(())
    }

    /// Makes sure that all objects of an attempt are there.
    #[expect(clippy::too_many_arguments, reason = "what a visit knows by then; nobody else calls it")]
    async fn ensure<K: Run>(
        &self,
        visit: &Visit<'_>,
        object: &K,
        manifest: &Manifest,
        key: &Key,
        attempt: u32,
        workers: u32,
        inputs: &std::collections::BTreeMap<String, String>,
        jobs: &[Job],
    ) -> Result<(), Error> {
        let context = &*self.context;
        let pins = Pins { artifacts: inputs.clone(), workers: Some(workers), ..Pins::default() };
        let mut plan = plan_pinned(manifest, &pins).map_err(|error| Error::Object(error.to_string()))?;
        let Some(reference) = object.controller_owner_ref(&()) else { return Err(Error::NotReady) };
        context.settings.trace(&mut plan, &reference);
        let Some(role) = plan.roles.first() else { return Ok(()) };
        let owner = Owner { job: JobKey::of(object, K::KIND), reference };
        let objects = render_run(&owner, &plan, role, attempt, &context.settings.images);
        let is_new = !jobs.iter().any(|job| job.name_any() == objects.job.name_any());
        if let Some(config) = &objects.config
            && !self.configs.has(key, &config.name_any())
        {
            apply::create(visit, config).await?;
        }
        if let Some(service) = &objects.service {
            let live = self.services.get(key, &service.name_any());
            apply::apply(visit, service, live.as_deref()).await?;
        } else if is_new {
            // A wider attempt's. One that is under way goes on with what it was started with, also by an operator that would
            // not start it so any more.
            for service in self.services.of(key) {
                apply::delete(visit, &*service).await?;
            }
        }
        let live = self.policies.get(key, &objects.network.name_any());
        apply::apply(visit, &objects.network, live.as_deref()).await?;
        if is_new && !apply::create(visit, &objects.job).await? {
            let name = objects.job.name_any();
            let live = context.api_in::<Job>(&key.0).get_opt(&name).await;
            // Ours is known soon, and so is that one which was there has gone.
            if live.map_err(Error::api("read", format!("Job/{name}")))?.is_some_and(|live| !is_of(&live, object)) {
                return Err(Error::Taken { object: format!("Job/{name}") });
            }
        }
        // Each attempt has a file of its own; those of earlier ones have no reader any more.
        for config in self.configs.of(key) {
            if is_older(&config, attempt) {
                apply::delete(visit, &*config).await?;
            }
        }
        Ok(())
    }

    /// Creates the ModelArtifact of what the job made.
    async fn record<K: Run>(
        &self,
        visit: &Visit<'_>,
        object: &K,
        manifest: &Manifest,
        artifact: &ArtifactResult,
    ) -> Result<(), Error> {
        let plan = plan_pinned(manifest, &Pins::default()).map_err(|error| Error::Object(error.to_string()))?;
        let record = artifact.record.clone().unwrap_or_default();
        let job = JobKey::of(object, K::KIND);
        let retention = object.output().retention;
        let lineage = sensorium_api::Lineage {
            job: Some(LineageJob {
                kind: job.kind,
                namespace: job.namespace,
                name: job.name,
                spec_hash: plan.spec_hash,
            }),
            parents: record.parents,
            data: record.data,
            steps: record.steps,
        };
        let spec = ModelArtifactSpec {
            uri: artifact.uri.clone(),
            digest: artifact.digest.clone(),
            format: sensorium_api::ArtifactFormat::default(),
            signature: record.signature,
            modalities: record.modalities,
            metrics: record.metrics,
            lineage,
            retention,
        };
        let short: String = artifact.digest.trim_start_matches("sha256:").chars().take(10).collect();
        let uri = spec.uri.clone();
        let mut created = ModelArtifact::new(&format!("{}-{short}", artifact.name), spec);
        created.metadata.namespace = object.namespace();
        created.metadata.labels = Some(
            [(ARTIFACT_LABEL, artifact.name.as_str()), ("app.kubernetes.io/managed-by", crate::render::MANAGED_BY)]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
        );
        let access = access_of(&plan.pods).map(|access| [(ACCESS_ANNOTATION.to_owned(), access)].into());
        created.metadata.annotations = access;
        let api = self.context.api_in::<ModelArtifact>(&object.namespace().unwrap_or_default());
        for place in ["", &format!("-{}", short_digest(&uri))] {
            let name = format!("{}-{short}{place}", artifact.name);
            created.metadata.name = Some(name.clone());
            if apply::create(visit, &created).await? {
                return Ok(());
            }
            let live = api.get_opt(&name).await.map_err(Error::api("read", format!("ModelArtifact/{name}")))?;
            match live {
                None => return Err(Error::NotReady),
                // The same, made before, perhaps by this job.
                Some(live) if live.metadata.deletion_timestamp.is_none() && live.spec.uri == uri => return Ok(()),
                // The same content at another place, or one that is about to go, and leaves the files where another record is of them.
                Some(_) => {}
            }
        }
        Err(Error::Taken { object: format!("ModelArtifact/{}", created.name_any()) })
    }
}

fn is_older(config: &ConfigMap, attempt: u32) -> bool {
    let number = config.labels().get(crate::render::ATTEMPT_LABEL).and_then(|number| number.parse::<u32>().ok());
    number.is_some_and(|number| number < attempt)
}

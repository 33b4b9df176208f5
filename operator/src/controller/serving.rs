//! ServingJobs: servers that stay up while their model changes.

mod encoders;
mod parts;
mod records;

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::DynamicObject;
use kube::core::{ApiResource, GroupVersionKind, NamespaceResourceScope};
use kube::runtime::Controller;
use kube::runtime::controller::{Action as Again, Config};
use kube::{Api, Resource, ResourceExt};
use sensorium_api::manifest::Resource as Manifest;
use sensorium_api::run::{JobKey, JobKind};
use sensorium_api::{ModelArtifact, ServingJob, ServingJobStatus};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;

use super::apply;
use super::artifact::Artifacts;
use super::children::{Children, Key, owner_by_annotation, owner_by_reference, prune_config, prune_pod, prune_record};
use super::context::{Context, DEBOUNCE};
use super::index::reference;
use super::kept::Kept;
use super::pods::Step;
use super::visit::Visit;
use super::{Error, News, Stop};
use crate::plan::{Pins, Role, plan_pinned};
use crate::render::{
    NAME_LABEL, Owner, Revision, Servers, Track, deployment_name, render_encoders, render_servers, render_serving,
    server_selector, service_name,
};
use crate::status::{
    Measured, Note, References, Refusal, ServingObserved, ServingPlan, is_late, is_rolled_out, last_crash,
    revision as revision_of, rollout, serving_notes, serving_status,
};

const KIND: &str = "ServingJob";
/// Label of an EndpointSlice: its Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// How often a rollout that goes on is looked at.
const ROLLOUT_INTERVAL: Duration = Duration::from_secs(5);

struct Servings {
    context: Arc<Context>,
    deployments: Children<Deployment>,
    services: Children<Service>,
    configs: Children<ConfigMap>,
    records: Children<ControllerRevision>,
    budgets: Children<PodDisruptionBudget>,
    policies: Children<NetworkPolicy>,
    autoscalers: Children<HorizontalPodAutoscaler>,
    pods: Children<Pod>,
    slices: Children<EndpointSlice>,
    artifacts: Artifacts,
    /// Of which jobs a PodMonitor was applied.
    monitored: Mutex<HashMap<Key, Monitored>>,
}

/// The object and the generation of its spec.
type Monitored = (Option<String>, Option<i64>);

/// Runs the controller until `stop` ends. `news` are of artifacts.
pub(super) async fn control(context: Arc<Context>, artifacts: Artifacts, news: News, stop: Stop) {
    let (known, objects) = context.watch_main::<ServingJob>();
    let (deployments, deployment_news) =
        context.watch_children(KIND, owner_by_reference(KIND), |_: &mut Deployment| {});
    let (services, service_news) = context.watch_children(KIND, owner_by_reference(KIND), |_: &mut Service| {});
    let (configs, config_news) = context.watch_children(KIND, owner_by_reference(KIND), prune_config);
    let (records, record_news) = context.watch_children(KIND, owner_by_reference(KIND), prune_record);
    let (budgets, budget_news) =
        context.watch_children(KIND, owner_by_reference(KIND), |_: &mut PodDisruptionBudget| {});
    let (policies, policy_news) = context.watch_children(KIND, owner_by_reference(KIND), |_: &mut NetworkPolicy| {});
    let (autoscalers, autoscaler_news) =
        context.watch_children(KIND, owner_by_reference(KIND), |_: &mut HorizontalPodAutoscaler| {});
    let (pods, pod_news) = context.watch_children(KIND, owner_by_annotation, prune_pod);
    let (slices, slice_news) = context.watch_children(KIND, owner_by_label, |_: &mut EndpointSlice| {});
    let touched = futures::stream::select_all([
        objects.map(|news| news.object).boxed(),
        deployment_news.boxed(),
        service_news.boxed(),
        config_news.boxed(),
        record_news.boxed(),
        budget_news.boxed(),
        policy_news.boxed(),
        autoscaler_news.boxed(),
        pod_news.boxed(),
        slice_news.boxed(),
        news.of_readers(known.clone()).boxed(),
    ])
    .inspect({
        let (context, known) = (Arc::clone(&context), known.clone());
        move |key| context.heard(KIND, &known, key)
    })
    .map(|key| reference(&key));

    let counted = known.clone();
    context.health.count(KIND, move || counted.count());
    let servings = Arc::new(Servings {
        context: Arc::clone(&context),
        deployments,
        services,
        configs,
        records,
        budgets,
        policies,
        autoscalers,
        pods,
        slices,
        artifacts,
        monitored: Mutex::default(),
    });
    Controller::for_stream(futures::stream::pending(), known.store())
        .with_config(Config::default().concurrency(context.settings.concurrency).debounce(DEBOUNCE))
        .reconcile_on(touched)
        .graceful_shutdown_on(stop)
        .run(reconcile, on_error, servings)
        .for_each(|_| std::future::ready(()))
        .await;
}

/// Names of the graphs that an artifact has, where its record says so.
fn graphs(artifact: &ModelArtifact) -> Option<Vec<String>> {
    let names: Vec<String> = artifact.spec.signature.iter().map(|graph| graph.name.clone()).collect();
    (!names.is_empty()).then_some(names)
}

/// EndpointSlices take the labels of their Service.
fn owner_by_label(slice: &EndpointSlice) -> Option<Key> {
    Some((slice.namespace()?, slice.labels().get(NAME_LABEL)?.clone()))
}

async fn reconcile(object: Arc<Kept<ServingJob>>, servings: Arc<Servings>) -> Result<Again, Error> {
    if let Some(again) = servings.context.held_up(KIND, &object).await {
        return Ok(again);
    }
    let visit = Visit::begin(&servings.context, KIND, object.key());
    let result = match object.read() {
        Ok(object) => servings.visit(&visit, &object).await,
        Err(error) => {
            servings.context.unreadable(&*object, &error).await;
            Ok(Again::await_change())
        }
    };
    visit.end(&result);
    if result.is_ok() {
        servings.context.succeeded(&object.id());
    }
    result
}

fn on_error(object: Arc<Kept<ServingJob>>, error: &Error, servings: Arc<Servings>) -> Again {
    super::context::again_after(&servings.context, object.id(), error)
}

impl Servings {
    fn listed(&self) -> bool {
        self.deployments.listed()
            && self.services.listed()
            && self.configs.listed()
            && self.records.listed()
            && self.budgets.listed()
            && self.policies.listed()
            && self.autoscalers.listed()
            && self.pods.listed()
            && self.slices.listed()
            && self.artifacts.listed()
    }

    async fn visit(&self, visit: &Visit<'_>, object: &ServingJob) -> Result<Again, Error> {
        if !self.listed() {
            return Err(Error::NotReady);
        }
        let key: Key = (object.namespace().unwrap_or_default(), object.name_any());
        if object.meta().deletion_timestamp.is_some() {
            self.monitored().remove(&key);
            return Ok(Again::await_change());
        }
        let manifest = Manifest::ServingJob(object.clone());
        let references = References::of(&manifest);
        let meant = self.artifacts.meant_by(&key.0, &references);
        let resolved = references.resolve(|| meant.iter());
        let job = JobKey::of(object, JobKind::ServingJob);
        let stable = self.deployments.get(&key, &deployment_name(&job, Track::Stable));
        let mut before = object.status.clone().unwrap_or_default();

        let mut plan = ServingPlan::default();
        let mut refused = None;
        match &resolved {
            Ok(artifacts) => {
                let digest = artifacts.values().next().cloned().unwrap_or_default();
                let pins = Pins {
                    artifacts: artifacts.clone(),
                    graphs: meant.iter().find(|artifact| artifact.spec.digest == digest).and_then(graphs),
                    node_cache: self.context.settings.node_cache,
                    ..Pins::default()
                };
                match self.serve(visit, object, &manifest, &key, &job, &pins, &before).await {
                    Ok(decided) => plan = decided,
                    Err(error) => match error.refusal() {
                        // What serves goes on serving, as it is.
                        Some(refusal) => {
                            plan.rollout.clone_from(&before.rollout);
                            refused = Some((refusal, error));
                        }
                        None => return Err(error),
                    },
                }
            }
            // The same, with the model that it has.
            Err(_) => before.rollout = None,
        }
        let digest = resolved.as_ref().map(|artifacts| artifacts.values().next().map_or("", String::as_str));
        let pods: Vec<Pod> = self.pods.of(&key).into_iter().map(Arc::unwrap_or_clone).collect();
        let ServingPlan { rollout, notes, awaited, .. } = plan;
        let label = server_selector(&job);
        let slices_key = (key.0.clone(), label.get(NAME_LABEL).cloned().unwrap_or_default());
        let service = service_name(&job.name, "");
        let mut slices = self.slices.of(&slices_key);
        slices.retain(|slice| slice.labels().get(SERVICE_LABEL) == Some(&service));
        let encoders = self.encoders_of(&key, stable.as_deref());
        let again = rollout.as_ref().is_some_and(|rollout| rollout.failed.is_none());
        let status = serving_status(&ServingObserved {
            now: Timestamp::now(),
            generation: object.meta().generation,
            status: &before,
            artifact: digest.map_err(Clone::clone),
            refusal: refused.as_ref().map(|(refusal, _)| refusal),
            stable: stable.as_deref(),
            encoders: &encoders,
            pods: &pods,
            endpoints: slices.iter().map(|slice| ready_addresses(slice)).sum(),
            rollout,
            awaited,
            selector: label.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(","),
        });
        let refusal = refused.as_ref().map(|(refusal, _)| refusal);
        self.write(visit, object, &status, notes, refusal).await?;
        match refused {
            // Nobody says when a quota or a policy changes: it is tried again, with growing pauses.
            Some((_, error @ Error::Api { .. })) => Err(error),
            None if again => Ok(Again::requeue(ROLLOUT_INTERVAL)),
            Some(_) | None => Ok(Again::await_change()),
        }
    }

    async fn write(
        &self,
        visit: &Visit<'_>,
        object: &ServingJob,
        status: &ServingJobStatus,
        mut notes: Vec<Note>,
        refusal: Option<&Refusal>,
    ) -> Result<(), Error> {
        let old = object.status.as_ref();
        notes.extend(serving_notes(old, status, refusal));
        apply::write_status(visit, object, old, status).await?;
        self.context.publish(&object.object_ref(&()), &notes).await;
        Ok(())
    }

    /// Makes the children what they should be, and says where the rollout is.
    #[expect(clippy::too_many_arguments, reason = "what a visit knows by then; nobody else calls it")]
    async fn serve(
        &self,
        visit: &Visit<'_>,
        object: &ServingJob,
        manifest: &Manifest,
        key: &Key,
        job: &JobKey,
        pins: &Pins,
        status: &ServingJobStatus,
    ) -> Result<ServingPlan, Error> {
        let context = &*self.context;
        let mut plan = plan_pinned(manifest, pins)?;
        let digest = pins.artifacts.values().next().map_or("", String::as_str);
        let Some(reference) = object.controller_owner_ref(&()) else { return Err(Error::NotReady) };
        context.settings.trace(&mut plan, &reference);
        let Some(role) = plan.roles.first() else { return Err(Error::Object("a plan without a role".to_owned())) };
        let owner = Owner { job: job.clone(), reference };
        let spec = &object.spec;
        let live = self.deployments.get(key, &deployment_name(job, Track::Stable));
        let replicas = match &spec.autoscaling {
            None => Some(role.replicas),
            // With as many to begin with: the autoscaler takes its time.
            Some(scaling) => live.is_none().then_some(scaling.min_replicas),
        };
        let revision = Revision { owner: &owner, spec, plan: &plan, digest, images: &context.settings.images };
        let encoders = render_encoders(&revision);
        let stable = render_servers(&revision, role, &encoders, Track::Stable, replicas);
        let record = records::wanted(&owner, spec, &stable, &encoders)?;
        let live_canary = self.deployments.get(key, &deployment_name(job, Track::Canary));
        let measured = self.measure(object, key, live.as_deref(), live_canary.as_deref(), status).await;
        let mut decided = rollout(
            spec,
            &stable.revision,
            status,
            live.as_deref(),
            live_canary.as_deref(),
            &measured,
            Timestamp::now(),
        );

        self.around(visit, object, &owner, role, key).await?;
        // Servers that are not started call nobody.
        let starts = decided.apply || decided.canaries.is_some();
        let encoders = if starts { encoders } else { Vec::new() };
        if starts {
            self.apply_config(visit, key, &stable.config).await?;
            self.keep_record(visit, key, record.as_ref()).await?;
        }
        self.apply_encoders(visit, key, &encoders).await?;
        let is_late = decided.rollout.as_ref().is_some_and(|rollout| is_late(&rollout.started, spec, Timestamp::now()));
        // Where there are no servers yet, there is nothing to lose.
        decided.awaited = live.as_ref().and_then(|_| self.awaited(key, &encoders, is_late));
        let may_have = |servers: Option<&Deployment>| {
            decided.awaited.is_none() || servers.and_then(revision_of) == Some(stable.revision.as_str())
        };
        if decided.apply && may_have(live.as_deref()) {
            self.apply_servers(visit, &stable, live.as_deref()).await?;
        } else if let (Some(live), Some(replicas)) = (&live, replicas)
            && live.spec.replicas != i32::try_from(replicas).ok()
        {
            // The old revision stays while the new one is tried; its number may change all the same.
            apply::merge(visit, &**live, &json!({"spec": {"replicas": replicas}})).await?;
        }
        match (decided.canaries, live_canary) {
            (Some(_), live) if !may_have(live.as_deref()) => {}
            (Some(count), live) => {
                let canary = render_servers(&revision, role, &encoders, Track::Canary, Some(count));
                self.apply_servers(visit, &canary, live.as_deref()).await?;
            }
            (None, Some(live)) => apply::delete(visit, &*live).await?,
            (None, None) => {}
        }
        let current = starts.then_some(stable.revision.as_str());
        decided.notes.extend(self.make_again(visit, key, current).await?);
        self.sweep_encoders(visit, key, job, &encoders).await?;
        self.sweep_records(visit, key, record.as_ref()).await?;
        self.sweep_configs(visit, key, &stable).await?;
        Ok(decided)
    }

    async fn apply_servers(
        &self,
        visit: &Visit<'_>,
        servers: &Servers,
        live: Option<&Deployment>,
    ) -> Result<(), Error> {
        apply::apply(visit, &servers.deployment, live).await.map(drop)
    }

    /// The file of all pods of a revision.
    async fn apply_config(&self, visit: &Visit<'_>, key: &Key, config: &ConfigMap) -> Result<(), Error> {
        if !self.configs.has(key, &config.name_any()) {
            apply::create(visit, config).await?;
        }
        Ok(())
    }

    /// The objects that do not depend on a revision.
    async fn around(
        &self,
        visit: &Visit<'_>,
        object: &ServingJob,
        owner: &Owner,
        role: &Role,
        key: &Key,
    ) -> Result<(), Error> {
        let context = &*self.context;
        let objects = render_serving(owner, &object.spec, role);
        let name = deployment_name(&owner.job, Track::Stable);
        settle(visit, &self.services, key, &objects.service.name_any(), Some(&objects.service)).await?;
        settle(visit, &self.budgets, key, &name, Some(&objects.budget)).await?;
        settle(visit, &self.policies, key, &name, objects.network.as_ref()).await?;
        settle(visit, &self.autoscalers, key, &name, objects.autoscaler.as_ref()).await?;
        // Applied once per generation, and once by each process: the kind is not ours to watch.
        let seen = (object.uid(), object.meta().generation);
        if context.settings.pod_monitors && self.monitored().get(key) != Some(&seen) {
            let gvk = GroupVersionKind::gvk("monitoring.coreos.com", "v1", "PodMonitor");
            let api: Api<DynamicObject> =
                Api::namespaced_with(context.client.clone(), &key.0, &ApiResource::from_gvk(&gvk));
            apply::apply_unseen(visit, &api, &objects.monitor).await?;
            self.monitored().insert(key.clone(), seen);
        }
        Ok(())
    }

    /// Only assignments run under it.
    fn monitored(&self) -> MutexGuard<'_, HashMap<Key, Monitored>> {
        self.monitored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes files that no server reads any more.
    async fn sweep_configs(&self, visit: &Visit<'_>, key: &Key, stable: &Servers) -> Result<(), Error> {
        let deployments = self.deployments.of(key);
        // An older template has servers as long as the newest one has not all, and they may have to be started again.
        if !deployments.iter().all(|deployment| is_rolled_out(deployment)) {
            return Ok(());
        }
        let read = |name: &str| {
            deployments.iter().any(|deployment| {
                let volumes = deployment.spec.template.spec.as_ref().and_then(|pod| pod.volumes.as_ref());
                volumes
                    .into_iter()
                    .flatten()
                    .any(|volume| volume.config_map.as_ref().is_some_and(|map| map.name == name))
            })
        };
        for config in self.configs.of(key) {
            let name = config.name_any();
            if name != stable.config.name_any() && !deployments.is_empty() && !read(&name) {
                apply::delete(visit, &*config).await?;
            }
        }
        Ok(())
    }

    /// What both tracks have done since the step began, while a canary is being judged.
    async fn measure(
        &self,
        object: &ServingJob,
        key: &Key,
        stable: Option<&Deployment>,
        canary: Option<&Deployment>,
        status: &ServingJobStatus,
    ) -> Measured {
        let (asked, uid) = (&self.context.pods, object.uid().unwrap_or_default());
        let judged = status.rollout.as_ref().filter(|rollout| rollout.failed.is_none());
        let ports = stable.and_then(metrics_port).zip(canary.and_then(metrics_port));
        let Some((rollout, (stable_port, canary_port))) = judged.zip(ports) else {
            asked.forget_steps(&uid);
            return Measured::default();
        };
        let pods = self.pods.of(key);
        let track = |track: &str| {
            let of = |pod: &&Arc<Pod>| pod.labels().get("sensorium.dev/track").is_some_and(|label| label == track);
            pods.iter().filter(of).map(|pod| &**pod).collect::<Vec<&Pod>>()
        };
        let (stable, canary) = (track("server"), track("canary"));
        if canary.is_empty() {
            asked.forget_steps(&uid);
            return Measured::default();
        }
        let crash = last_crash(canary.iter().copied());
        let (stable, canary) =
            futures::future::join(asked.loads(&stable, stable_port), asked.loads(&canary, canary_port)).await;
        let step = Step { uid: &uid, revision: &rollout.revision, number: rollout.step, began: rollout.started.0 };
        let [stable, canary] = asked.since(&step, [stable, canary]);
        Measured { stable, canary, crash }
    }
}

/// Makes the child of this name what is wanted: nothing, where that is `None`.
async fn settle<K>(
    visit: &Visit<'_>,
    children: &Children<K>,
    key: &Key,
    name: &str,
    wanted: Option<&K>,
) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned,
{
    match (wanted, children.get(key, name)) {
        (Some(wanted), live) => apply::apply(visit, wanted, live.as_deref()).await.map(drop),
        (None, Some(live)) => apply::delete(visit, &*live).await,
        (None, None) => Ok(()),
    }
}

/// The port at which a Deployment's pods tell their metrics; the spec's is that of the newest ones only.
fn metrics_port(deployment: &Deployment) -> Option<u16> {
    let pod = deployment.spec.template.spec.as_ref()?;
    let mut ports = pod.containers.iter().flat_map(|container| container.ports.iter().flatten());
    let port = ports.find(|port| port.name.as_deref() == Some("metrics"))?.container_port;
    u16::try_from(port).ok()
}

fn ready_addresses(slice: &EndpointSlice) -> usize {
    let endpoints = slice.endpoints.iter().flatten();
    let ready = endpoints.filter(|endpoint| endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true));
    ready.map(|endpoint| endpoint.addresses.len()).sum()
}

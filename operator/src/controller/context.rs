//! What every controller works with.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt as _};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::runtime::controller::Action as Again;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use sensorium_telemetry::{Parent, error_line};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::children::{self, Children, Key, prune_metadata};
use super::events::Events;
use super::health::Health;
use super::index::{Follower, Known, Touched};
use super::kept::{Kept, Own};
use super::pods::Pods;
use super::visit::{Replaced, Unseen};
use super::{Error, Stop};
use crate::plan::WorkloadPlan;
use crate::render::{Images, KIND_LABEL, MANAGED_BY};
use crate::status::Note;

/// What the operator is told when it starts.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the pods' programs come from.
    pub images: Images,
    /// The one namespace to look at, or all of them.
    pub namespace: Option<String>,
    /// Objects of one kind that are visited at the same time.
    pub concurrency: u16,
    /// Who writes events; the pod's name.
    pub identity: String,
    /// Whether PodMonitors can be made: whether the cluster knows the kind.
    pub pod_monitors: bool,
    /// Whether nodes fetch artifacts from buckets for their pods.
    pub node_cache: bool,
    /// Where spans go by OTLP, those of the pods too.
    pub otlp_endpoint: Option<String>,
}

impl Settings {
    /// Makes the pods of `plan` go on with the trace of their job, unless the job says otherwise.
    pub(super) fn trace(&self, plan: &mut WorkloadPlan, job: &OwnerReference) {
        if let (Some(endpoint), Some(parent)) = (&self.otlp_endpoint, Parent::of_object(&job.uid)) {
            let env = &mut plan.pods.env;
            env.entry("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned()).or_insert_with(|| endpoint.clone());
            env.entry("TRACEPARENT".to_owned()).or_insert_with(|| parent.traceparent());
        }
    }
}

/// Shared by all controllers.
pub struct Context {
    pub(super) client: Client,
    pub(super) settings: Settings,
    pub(super) health: Arc<Health>,
    pub(super) pods: Pods,
    pub(super) unseen: Unseen,
    pub(super) replaced: Replaced,
    events: Events,
    /// Whether this operator is the one that acts.
    lead: watch::Receiver<bool>,
    stop: Stop,
    /// How often each object has failed since it last did not.
    failures: Mutex<HashMap<String, u32>>,
}

impl Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// How long the visits of an object that has just changed are put together.
pub(super) const DEBOUNCE: Duration = Duration::from_millis(100);
/// A watch that has not told of our own write after so long will be asked again. It nearly always tells within milliseconds, and
/// that brings a visit of its own.
const CATCH_UP: Duration = Duration::from_secs(5);
/// Bounds of the wait after a failed visit.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Objects of a list that are under way at a time. All kinds are listed at once, and a pod has kilobytes: pages decide on
/// how much memory is needed at most.
pub(super) const PAGE: u32 = 100;

fn watch_config() -> watcher::Config {
    watcher::Config::default().page_size(PAGE)
}

impl Context {
    pub(super) fn new(
        client: Client,
        settings: Settings,
        health: Arc<Health>,
        lead: watch::Receiver<bool>,
        stop: Stop,
    ) -> Self {
        let events = Events::new(client.clone(), settings.identity.clone());
        let (pods, failures) = (Pods::default(), Mutex::default());
        let (unseen, replaced) = (Unseen::default(), Replaced::default());
        Self { client, settings, health, pods, unseen, replaced, events, lead, stop, failures }
    }

    /// Why a visit to `object` may not go on: when it has to be begun again, because what it was about to look at is old.
    /// One that another operator has to make waits here until that one leads no more.
    pub(super) async fn held_up<K: Own>(&self, kind: &'static str, object: &Kept<K>) -> Option<Again> {
        if *self.lead.borrow() {
            let version = object.meta().resource_version.as_deref();
            return self.replaced.is_replaced(kind, &object.key(), version).then(|| Again::requeue(CATCH_UP));
        }
        let mut lead = self.lead.clone();
        tokio::select! {
            // An error: this operator will never lead any more. It is about to end.
            _ = lead.wait_for(|leads| *leads) => {}
            () = self.stop.clone() => {}
        }
        Some(Again::requeue(Duration::ZERO))
    }

    /// There is news of an object. How long it takes to act on it is measured where anybody does: an operator that stands by
    /// waits for something else.
    pub(super) fn heard<K: Own>(&self, kind: &'static str, known: &Known<K>, key: &Key) {
        if known.has(key) && *self.lead.borrow() {
            self.unseen.heard(kind, key, Instant::now());
        } else {
            self.unseen.take(kind, key);
            self.replaced.is_replaced(kind, key, None);
        }
    }

    /// The objects of kind `K` that the operator looks at.
    pub(super) fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        match &self.settings.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    /// The objects of kind `K` in one namespace.
    pub(super) fn api_in<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Watches the objects of a kind of our own. One that cannot be read, because another version wrote it, is passed on
    /// as such and holds up no other. The stream tells of whom there is news.
    pub(super) fn watch_main<K: Own>(&self) -> (Known<K>, impl Stream<Item = Touched> + Send + use<K>) {
        let api: Api<Kept<K>> = match &self.settings.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        let health = self.health.watch(K::kind(&()).to_string());
        let (known, mut follower) = Follower::new();
        let stream = watcher(api, watch_config())
            .inspect(move |event| health.note(event.as_ref().err()))
            .default_backoff()
            .flat_map(move |event| {
                futures::stream::iter(event.map(|event| follower.follow(&event)).unwrap_or_default())
            });
        (known, stream)
    }

    /// Watches the children of kind `K` of all objects of kind `owner`.
    pub(super) fn watch_children<K>(
        &self,
        owner: &'static str,
        owner_of: impl Fn(&K) -> Option<Key> + Send + 'static,
        prune: impl Fn(&mut K) + Send + 'static,
    ) -> (Children<K>, impl Stream<Item = Key> + Send + 'static)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + Serialize
            + DeserializeOwned
            + Send
            + Sync
            + 'static,
    {
        let labels = format!("app.kubernetes.io/managed-by={MANAGED_BY},{KIND_LABEL}={owner}");
        let health = self.health.watch(format!("{}/{owner}", K::kind(&())));
        let prune = move |object: &mut K| {
            prune_metadata(object);
            prune(object);
        };
        children::watch(self.api(), watch_config().labels(&labels), health, owner_of, prune)
    }

    /// Publishes events. One that cannot be written is logged: nothing depends on it.
    pub(super) async fn publish(&self, about: &ObjectReference, notes: &[Note]) {
        for note in notes {
            if let Err(error) = self.events.write(about, note).await {
                tracing::warn!(error = error_line(&error), reason = note.reason, "an event could not be written");
            }
        }
    }

    /// Says of an object that it is left alone, because it has fields that this operator does not know: a newer one, or
    /// somebody whom nothing checked, wrote it.
    pub(super) async fn unreadable<K>(&self, object: &K, error: &(dyn std::error::Error + Send + Sync))
    where
        K: Resource<DynamicType = ()>,
    {
        let (name, error) = (object.meta().name.as_deref().unwrap_or_default(), error_line(error));
        tracing::warn!(kind = %K::kind(&()), object = name, error, "cannot be read; left alone");
        let message = format!("cannot be read, and is left alone: {error}");
        self.publish(&object.object_ref(&()), &[Note::warning("Unreadable", message)]).await;
    }

    /// The wait after yet another failed visit of `object`: doubles up to half a minute, with jitter.
    pub(super) fn retry_delay(&self, object: String) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(object.clone()).or_default();
        *count = count.saturating_add(1);
        let doubled = RETRY.0.saturating_mul(2_u32.saturating_pow(*count - 1)).min(RETRY.1);
        crate::status::backoff::jitter(doubled, &format!("{object}/{count}"))
    }

    /// A visit of `object` went well.
    pub(super) fn succeeded(&self, object: &str) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(object);
    }
}

/// When to visit an object again whose visit failed.
pub(super) fn again_after(context: &Context, object: String, error: &Error) -> Again {
    // Somebody wrote in between, or the caches are being filled: nothing is wrong, and news is on its way.
    if error.is_conflict() || matches!(error, Error::NotReady) {
        return Again::requeue(Duration::from_millis(500));
    }
    let wait = context.retry_delay(object.clone());
    tracing::warn!(object, error = error_line(error), again_in_seconds = wait.as_secs(), "a visit failed");
    Again::requeue(wait)
}

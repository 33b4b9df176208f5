//! Watches: caches of what exists, and news of whom it concerns.
//!
//! Every watch has a back-off of its own, so that one kind that cannot be listed holds up no other. What vanished while
//! a watch was down is news too: the new list is compared with the old one.

use std::collections::HashMap;
use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::{Arc, PoisonError, RwLock};

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::batch::v1::{Job, JobSpec, JobStatus};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::health::Watch;
use super::lean::Lean;
use crate::render::{COMPLETION_INDEX, ENCODERS_ANNOTATION, OWNER_ANNOTATION, REVISION_ANNOTATION};

/// Namespace and name of an object.
pub(super) type Key = (String, String);

/// The children of one kind, by their owners.
#[derive(Debug)]
pub(super) struct Children<K> {
    state: Arc<RwLock<State>>,
    kind: PhantomData<fn() -> K>,
}

/// The children of each owner, by name. They are few, and owners may be many: a plain list takes the least memory.
type ByOwner = HashMap<Key, Vec<Packed>>;

/// A child, kept as text: read into its type, it takes several times the memory.
#[derive(Debug)]
struct Packed {
    name: Box<str>,
    text: Box<str>,
}

impl Packed {
    fn new<K: ResourceExt + Serialize>(child: &K) -> Result<Self, serde_json::Error> {
        Ok(Self { name: child.name_any().into(), text: serde_json::to_string(child)?.into() })
    }

    fn read<K: DeserializeOwned>(&self) -> Option<Arc<K>> {
        match serde_json::from_str(&self.text) {
            Ok(child) => Some(Arc::new(child)),
            Err(error) => {
                tracing::error!(name = &*self.name, %error, "a child cannot be read");
                None
            }
        }
    }
}

fn put<K: ResourceExt + Serialize>(children: &mut Vec<Packed>, child: &K) {
    let packed = match Packed::new(child) {
        Ok(packed) => packed,
        Err(error) => {
            tracing::error!(name = child.name_any(), %error, "a child cannot be kept");
            return;
        }
    };
    match children.binary_search_by(|known| known.name.cmp(&packed.name)) {
        Ok(index) => children[index] = packed,
        Err(index) => {
            children.reserve_exact(1);
            children.insert(index, packed);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    by_owner: ByOwner,
    /// Whether a first list is complete.
    listed: bool,
}

impl State {
    /// Drops a child, and its owner with the last one.
    fn remove(&mut self, owner: &Key, name: &str) {
        if let Some(children) = self.by_owner.get_mut(owner) {
            children.retain(|child| *child.name != *name);
            if children.is_empty() {
                self.by_owner.remove(owner);
            }
        }
    }
}

impl<K: DeserializeOwned> Children<K> {
    /// The children of `owner`, by name.
    pub(super) fn of(&self, owner: &Key) -> Vec<Arc<K>> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.by_owner.get(owner).into_iter().flatten().filter_map(Packed::read).collect()
    }

    /// The child of `owner` with this name.
    pub(super) fn get(&self, owner: &Key, name: &str) -> Option<Arc<K>> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.by_owner.get(owner)?.iter().find(|child| &*child.name == name)?.read()
    }

    /// Whether `owner` has a child with this name.
    pub(super) fn has(&self, owner: &Key, name: &str) -> bool {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.by_owner.get(owner).is_some_and(|children| children.iter().any(|child| &*child.name == name))
    }

    /// Whether all that exist are known.
    pub(super) fn listed(&self) -> bool {
        self.state.read().unwrap_or_else(PoisonError::into_inner).listed
    }
}

/// Watches `api`; `owner_of` tells whom an object concerns, `prune` drops what nobody looks at. The stream gives the owners
/// of what changed.
pub(super) fn watch<K>(
    api: Api<Lean<K>>,
    config: watcher::Config,
    health: Watch,
    owner_of: impl Fn(&K) -> Option<Key> + Send + 'static,
    prune: impl Fn(&mut K) + Send + 'static,
) -> (Children<K>, impl Stream<Item = Key> + Send + 'static)
where
    K: Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static,
{
    let state = Arc::<RwLock<State>>::default();
    let children = Children { state: Arc::clone(&state), kind: PhantomData };
    let mut listing: ByOwner = HashMap::new();
    let stream = watcher(api, config)
        .inspect(move |event| health.note(event.as_ref().err()))
        .default_backoff()
        .flat_map(move |event| {
            let Ok(event) = event else { return futures::stream::iter(Vec::new()) };
            let mut touched = Vec::new();
            let write = || state.write().unwrap_or_else(PoisonError::into_inner);
            match event {
                watcher::Event::Init => listing.clear(),
                watcher::Event::InitApply(Lean(mut object)) => {
                    if let Some(owner) = owner_of(&object) {
                        prune(&mut object);
                        put(listing.entry(owner).or_default(), &object);
                    }
                }
                watcher::Event::InitDone => {
                    let mut state = write();
                    let old = std::mem::replace(&mut state.by_owner, std::mem::take(&mut listing));
                    state.listed = true;
                    touched.extend(state.by_owner.keys().cloned());
                    touched.extend(old.into_keys().filter(|owner| !state.by_owner.contains_key(owner)));
                }
                watcher::Event::Apply(Lean(mut object)) => {
                    if object.owner_references().is_empty() {
                        touched.extend(forget(&mut write(), &object));
                    }
                    if let Some(owner) = owner_of(&object) {
                        prune(&mut object);
                        put(write().by_owner.entry(owner.clone()).or_default(), &object);
                        touched.push(owner);
                    }
                }
                watcher::Event::Delete(Lean(object)) => {
                    if object.owner_references().is_empty() {
                        touched.extend(forget(&mut write(), &object));
                    }
                    if let Some(owner) = owner_of(&object) {
                        write().remove(&owner, &object.name_any());
                        touched.push(owner);
                    }
                }
            }
            futures::stream::iter(touched)
        });
    (children, stream)
}

/// Drops an object that is nobody's any more, as its owner was deleted without it, and says whose it was.
fn forget<K: ResourceExt>(state: &mut State, object: &K) -> Option<Key> {
    let (namespace, name) = (object.namespace()?, object.name_any());
    let mut owners = state.by_owner.iter().filter(|(owner, _)| owner.0 == namespace);
    let owner = owners.find(|(_, children)| children.iter().any(|child| *child.name == *name))?.0.clone();
    state.remove(&owner, &name);
    Some(owner)
}

/// Whether an object is of exactly this owner, and not of one of the same name that was there before.
pub(super) fn is_of<K: ResourceExt>(object: &K, owner: &impl ResourceExt) -> bool {
    let uid = owner.uid();
    object.owner_references().iter().any(|reference| Some(&reference.uid) == uid.as_ref())
}

/// The owner that an object's reference names.
pub(super) fn owner_by_reference<K: ResourceExt>(kind: &'static str) -> impl Fn(&K) -> Option<Key> + Send + 'static {
    move |object| {
        let owner = object.owner_references().iter().find(|owner| owner.kind == kind)?;
        Some((object.namespace()?, owner.name.clone()))
    }
}

/// The owner that a pod's annotation names: its own reference is to a Job or a ReplicaSet.
pub(super) fn owner_by_annotation<K: ResourceExt>(object: &K) -> Option<Key> {
    Some((object.namespace()?, object.annotations().get(OWNER_ANNOTATION)?.clone()))
}

/// Drops the parts of a Job that nobody looks at: most of it.
pub(super) fn prune_job(job: &mut Job) {
    prune_identity(job);
    if let Some(JobSpec { completions, suspend, .. }) = job.spec.take() {
        job.spec = Some(JobSpec { completions, suspend, ..JobSpec::default() });
    }
    if let Some(JobStatus { conditions, start_time, .. }) = job.status.take() {
        job.status = Some(JobStatus { conditions, start_time, ..JobStatus::default() });
    }
}

/// Drops the parts of a pod that nobody looks at.
pub(super) fn prune_pod(pod: &mut Pod) {
    prune_identity(pod);
    pod.spec = None;
    if let Some(status) = &mut pod.status {
        status.init_container_statuses = None;
        status.host_ip = None;
        status.host_ips = None;
        status.pod_ips = None;
        // Steps on the way that every pod has taken.
        let steps = ["PodReadyToStartContainers", "Initialized", "ContainersReady"];
        status.conditions.iter_mut().for_each(|all| all.retain(|one| !steps.contains(&one.type_.as_str())));
    }
    for container in pod.status.iter_mut().flat_map(|status| status.container_statuses.iter_mut().flatten()) {
        // Long names of images, one for every pod.
        container.image = String::new();
        container.image_id = String::new();
        container.volume_mounts = None;
    }
}

/// Drops the content of a ConfigMap: it can't change, so that it is there is all there is to know.
pub(super) fn prune_config(config: &mut ConfigMap) {
    prune_identity(config);
    config.data = None;
}

/// Drops the content of a record: it is fetched when it is needed, which is seldom.
pub(super) fn prune_record(record: &mut ControllerRevision) {
    record.data = RawExtension::default();
}

/// Drops from the metadata of what is never compared all that does not tell which one it is and whose.
fn prune_identity<K: ResourceExt>(object: &mut K) {
    let metadata = object.meta_mut();
    if let Some(owners) = &mut metadata.owner_references {
        owners.shrink_to_fit();
    }
    metadata.finalizers = None;
    metadata.generate_name = None;
    if let Some(annotations) = &mut metadata.annotations {
        let known = [OWNER_ANNOTATION, ENCODERS_ANNOTATION, REVISION_ANNOTATION, COMPLETION_INDEX];
        annotations.retain(|key, _| known.contains(&key.as_str()));
        if annotations.is_empty() {
            metadata.annotations = None;
        }
    }
}

/// Drops what a client keeps for itself: all that it once applied.
pub(super) fn prune_metadata<K: ResourceExt>(object: &mut K) {
    if let Some(annotations) = &mut object.meta_mut().annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
}

//! Objects of our own kinds, kept as text.
//!
//! Read into its type, an object takes several times the memory of its text, most of it for fields that are not set. There
//! may be ten thousand of them and few are visited at a time, so each is read again when it is its turn.

use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::NamespaceResourceScope;
use sensorium_api::manifest::Resource as Manifest;
use sensorium_api::{CompressionJob, JobState, ModelArtifact, ServingJob, TrainingJob};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::children::{Key, prune_metadata};
use super::{Error, lean};
use crate::status::{References, names_of};

/// A kind of our own.
pub(super) trait Own:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    /// The resource, as the planner takes it.
    fn manifest(self) -> Manifest;
}

impl Own for TrainingJob {
    fn manifest(self) -> Manifest {
        Manifest::TrainingJob(self)
    }
}

impl Own for CompressionJob {
    fn manifest(self) -> Manifest {
        Manifest::CompressionJob(self)
    }
}

impl Own for ServingJob {
    fn manifest(self) -> Manifest {
        Manifest::ServingJob(self)
    }
}

impl Own for ModelArtifact {
    fn manifest(self) -> Manifest {
        Manifest::ModelArtifact(self)
    }
}

/// An object, and what has to be known of it without reading it.
pub(super) struct Kept<K> {
    /// Which one it is; nothing else.
    meta: ObjectMeta,
    /// The object, or why it cannot be read: another version wrote it.
    text: Result<Arc<str>, Arc<str>>,
    state: Option<JobState>,
    /// For an artifact what it can be meant by, for others what they read.
    terms: Arc<[Key]>,
    kind: PhantomData<fn() -> K>,
}

impl<K> Clone for Kept<K> {
    fn clone(&self) -> Self {
        let Self { meta, text, state, terms, kind } = self;
        Self { meta: meta.clone(), text: text.clone(), state: *state, terms: Arc::clone(terms), kind: *kind }
    }
}

impl<K> Debug for Kept<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").field("text", &self.text).finish_non_exhaustive()
    }
}

impl<K> Kept<K> {
    /// The state that it prints.
    pub(super) fn state(&self) -> Option<JobState> {
        self.state
    }

    /// For an artifact what it can be meant by, for others what they read: see [`super::index::Index`].
    pub(super) fn terms(&self) -> &[Key] {
        &self.terms
    }

    /// Namespace and name.
    pub(super) fn key(&self) -> Key {
        (self.meta.namespace.clone().unwrap_or_default(), self.meta.name.clone().unwrap_or_default())
    }
}

impl<K: Own> Kept<K> {
    /// Kind, namespace and name in one word.
    pub(super) fn id(&self) -> String {
        let (namespace, name) = self.key();
        format!("{}/{namespace}/{name}", K::kind(&()))
    }

    /// The object, or why it cannot be read.
    pub(super) fn read(&self) -> Result<K, Unreadable> {
        let text = self.text.as_ref().map_err(|why| Unreadable(why.to_string()))?;
        serde_json::from_str(text).map_err(|error| Unreadable(error.to_string()))
    }
}

/// Why an object cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unreadable(String);

impl From<Unreadable> for Error {
    fn from(error: Unreadable) -> Self {
        Self::Object(error.0)
    }
}

lean::same_kind!(Kept, self => &self.meta, &mut self.meta);

impl<'de, K: Own> Deserialize<'de> for Kept<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = lean::object(deserializer)?;
        let mut object = K::deserialize(&value);
        if let Ok(object) = &mut object {
            prune_metadata(object);
        }
        let (meta, text) = match &object {
            Ok(object) => (object.meta().clone(), Ok(serde_json::to_string(object).map_err(D::Error::custom)?.into())),
            Err(error) => {
                let meta = value.get_mut("metadata").map(Value::take).unwrap_or_default();
                (ObjectMeta::deserialize(meta).map_err(D::Error::custom)?, Err(error.to_string().into()))
            }
        };
        let ObjectMeta { name, namespace, uid, resource_version, .. } = meta;
        let meta = ObjectMeta { name, namespace, uid, resource_version, ..ObjectMeta::default() };
        let manifest = object.ok().map(Own::manifest);
        let terms = manifest.as_ref().map(|manifest| terms(manifest, &meta)).unwrap_or_default().into();
        Ok(Self { meta, text, state: manifest.as_ref().and_then(state), terms, kind: PhantomData })
    }
}

fn state(manifest: &Manifest) -> Option<JobState> {
    match manifest {
        Manifest::TrainingJob(job) => job.status.as_ref()?.state,
        Manifest::CompressionJob(job) => job.status.as_ref()?.state,
        Manifest::ServingJob(job) => job.status.as_ref()?.state,
        Manifest::ModelArtifact(_) => None,
    }
}

fn terms(manifest: &Manifest, meta: &ObjectMeta) -> Vec<Key> {
    let here = |name: &str| (meta.namespace.clone().unwrap_or_default(), name.to_owned());
    match manifest {
        Manifest::ModelArtifact(artifact) => {
            // Whose files these are is asked across namespaces.
            let files = (String::new(), artifact.spec.uri.clone());
            names_of(artifact).map(here).chain([files]).collect()
        }
        _ => References::of(manifest).0.iter().map(|(name, _)| here(name)).collect(),
    }
}

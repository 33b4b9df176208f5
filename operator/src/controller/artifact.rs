//! ModelArtifacts: whether the stored files are what the record says, which records are kept, and what becomes of their
//! files.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use jiff::Timestamp;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use kube::api::ListParams;
use kube::runtime::Controller;
use kube::runtime::controller::{Action as Again, Config};
use kube::{Api, Resource, ResourceExt};
use sensorium_api::manifest::Resource as Manifest;
use sensorium_api::{CompressionJob, ModelArtifact, ServingJob, TrainingJob};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::apply;
use super::children::{Children, Key, is_of, owner_by_reference, prune_job};
use super::context::{Context, DEBOUNCE, PAGE};
use super::index::{Known, reference};
use super::kept::Kept;
use super::visit::Visit;
use super::{Error, Stop};
use crate::render::{is_verification, render_removal, render_verification};
use crate::status::conditions::is_true;
use crate::status::{
    ARTIFACT_LABEL, FINALIZER, Note, Reader, References, is_verified, reader_of, removal, removes_files, surplus,
    verification,
};

const KIND: &str = "ModelArtifact";
/// When to look again whether something that may go is still used.
const STILL_USED: Duration = Duration::from_mins(5);

/// All artifacts, for whoever reads some.
#[derive(Clone)]
pub(super) struct Artifacts(Known<ModelArtifact>);

impl Artifacts {
    pub(super) fn new(known: Known<ModelArtifact>) -> Self {
        Self(known)
    }

    /// Whether all that exist are known.
    pub(super) fn listed(&self) -> bool {
        self.0.listed()
    }

    /// Those in `namespace` that one of `references` can mean.
    pub(super) fn meant_by(&self, namespace: &str, references: &References) -> Vec<ModelArtifact> {
        let terms = references.0.iter().map(|(name, _)| (namespace.to_owned(), name.clone()));
        terms.flat_map(|term| self.0.meant_by(&term)).collect()
    }

    /// Those that `newest` may be newer than: of the same name, wherever they are stored.
    fn of_its_name(&self, newest: &ModelArtifact) -> Vec<ModelArtifact> {
        let Some(name) = newest.labels().get(ARTIFACT_LABEL) else { return Vec::new() };
        self.0.meant_by(&(newest.namespace().unwrap_or_default(), name.clone()))
    }

    /// Those whose files are at `uri`, in all namespaces.
    fn at(&self, uri: &str) -> Vec<ModelArtifact> {
        self.0.meant_by(&(String::new(), uri.to_owned()))
    }
}

struct Records {
    context: Arc<Context>,
    jobs: Children<Job>,
    all: Artifacts,
}

/// Runs the controller until `stop` ends; `touched` are the artifacts that there is news of.
pub(super) async fn control(
    context: Arc<Context>,
    artifacts: Artifacts,
    touched: impl Stream<Item = Key> + Send + 'static,
    stop: Stop,
) {
    let store = artifacts.0.store();
    let (jobs, news) = context.watch_children(KIND, owner_by_reference(KIND), prune_job);
    let heard = {
        let (context, known) = (Arc::clone(&context), artifacts.0.clone());
        move |key: &Key| context.heard(KIND, &known, key)
    };
    let touched = futures::stream::select(touched, news).inspect(heard).map(|key| reference(&key));
    let records = Arc::new(Records { context: Arc::clone(&context), jobs, all: artifacts });
    Controller::for_stream(futures::stream::pending(), store)
        .with_config(Config::default().concurrency(context.settings.concurrency).debounce(DEBOUNCE))
        .reconcile_on(touched)
        .graceful_shutdown_on(stop)
        .run(reconcile, on_error, records)
        .for_each(|_| std::future::ready(()))
        .await;
}

async fn reconcile(object: Arc<Kept<ModelArtifact>>, records: Arc<Records>) -> Result<Again, Error> {
    if let Some(again) = records.context.held_up(KIND, &object).await {
        return Ok(again);
    }
    let visit = Visit::begin(&records.context, KIND, object.key());
    let result = match object.read() {
        Ok(object) => records.visit(&visit, &object).await,
        Err(error) => {
            records.context.unreadable(&*object, &error).await;
            Ok(None)
        }
    };
    visit.end(&result);
    result.map(|again| {
        records.context.succeeded(&object.id());
        again.map_or_else(Again::await_change, Again::requeue)
    })
}

fn on_error(object: Arc<Kept<ModelArtifact>>, error: &Error, records: Arc<Records>) -> Again {
    super::context::again_after(&records.context, object.id(), error)
}

/// Whether the record stays until its files are removed.
fn is_kept(artifact: &ModelArtifact) -> bool {
    artifact.finalizers().iter().any(|name| name == FINALIZER)
}

impl Records {
    /// Gives the time after which to look again, if nothing happens until then.
    async fn visit(&self, visit: &Visit<'_>, artifact: &ModelArtifact) -> Result<Option<Duration>, Error> {
        if !self.jobs.listed() {
            return Err(Error::NotReady);
        }
        let key: Key = (artifact.namespace().unwrap_or_default(), artifact.name_any());
        let mut jobs = self.jobs.of(&key);
        jobs.retain(|job| is_of(&**job, artifact));
        if artifact.meta().deletion_timestamp.is_some() {
            let job = jobs.iter().find(|job| !is_verification(job));
            return self.remove(visit, artifact, job.map(|job| &**job)).await;
        }
        if removes_files(artifact) && !is_kept(artifact) {
            let finalizers: Vec<&str> = artifact.finalizers().iter().map(String::as_str).chain([FINALIZER]).collect();
            self.set_finalizers(visit, artifact, &finalizers).await?;
        }
        let job = jobs.iter().find(|job| is_verification(job));
        self.verify(visit, artifact, job.map(|job| &**job)).await?;
        self.retire(visit, artifact).await
    }

    /// Has the stored files compared with their digests.
    async fn verify(&self, visit: &Visit<'_>, artifact: &ModelArtifact, live: Option<&Job>) -> Result<(), Error> {
        let Some(owner) = artifact.controller_owner_ref(&()) else { return Err(Error::NotReady) };
        let verified = is_verified(artifact);
        let mut problem = None;
        // The files are immutable: once verified they need not be read again.
        if !verified && live.is_none() {
            match render_verification(artifact, owner, &self.context.settings.images) {
                Ok(job) => {
                    apply::create(visit, &job).await?;
                }
                Err(reason) => problem = Some(reason),
            }
        }
        let (status, notes) = verification(artifact, live, problem.as_deref(), Timestamp::now());
        let verified = is_true(&status.conditions, "Verified");
        apply::write_status(visit, artifact, artifact.status.as_ref(), &status).await?;
        if let (true, Some(job)) = (verified, live) {
            apply::delete(visit, job).await?;
        }
        self.context.publish(&artifact.object_ref(&()), &notes).await;
        Ok(())
    }

    /// Deletes the older artifacts that the rule of this one lets go and nobody uses.
    async fn retire(&self, visit: &Visit<'_>, artifact: &ModelArtifact) -> Result<Option<Duration>, Error> {
        if artifact.spec.retention.is_none() {
            return Ok(None);
        }
        let known = self.all.of_its_name(artifact);
        let surplus = surplus(artifact, known.iter());
        if surplus.is_empty() {
            return Ok(None);
        }
        let readers = self.readers(artifact).await?;
        let mut used = false;
        for old in surplus {
            if reader_of(old, &readers).is_some() {
                used = true;
                continue;
            }
            let keep = artifact.spec.retention.map_or(1, |retention| retention.keep);
            let message = format!("{} is newer, and the newest {keep} of the name are kept", artifact.name_any());
            self.context.publish(&old.object_ref(&()), &[Note::normal("Retired", message)]).await;
            apply::delete(visit, old).await?;
        }
        Ok(used.then_some(STILL_USED))
    }

    /// A record that is being deleted: first its files go, if they should and no other record is of the same ones.
    async fn remove(
        &self,
        visit: &Visit<'_>,
        artifact: &ModelArtifact,
        live: Option<&Job>,
    ) -> Result<Option<Duration>, Error> {
        // Deleted in the foreground, whatever it owns goes at once, and a Job that removes files would too. The garbage collector
        // takes its mark away when it is done with what there was.
        if !is_kept(artifact) || artifact.finalizers().iter().any(|name| name == "foregroundDeletion") {
            return Ok(None);
        }
        let there = self.all.at(&artifact.spec.uri);
        let shared =
            there.iter().any(|other| other.uid() != artifact.uid() && other.metadata.deletion_timestamp.is_none());
        if removes_files(artifact) && !shared {
            let readers = self.readers(artifact).await?;
            let reader = reader_of(artifact, &readers).map(|reader| reader.who.as_str());
            let mut problem = None;
            if reader.is_none() && live.is_none() {
                let Some(owner) = artifact.controller_owner_ref(&()) else { return Err(Error::NotReady) };
                match render_removal(artifact, owner, &self.context.settings.images) {
                    Ok(job) => match apply::create(visit, &job).await {
                        // Nothing can be made in a namespace that goes away; its volumes go with it.
                        Err(error) if error.is_namespace_terminating() => return self.let_go(visit, artifact).await,
                        made => drop(made?),
                    },
                    Err(reason) => problem = Some(reason),
                }
            }
            let (status, removed) = removal(artifact, reader, live, problem.as_deref(), Timestamp::now());
            if !removed {
                apply::write_status(visit, artifact, artifact.status.as_ref(), &status).await?;
                return Ok(reader.is_some().then_some(STILL_USED));
            }
        }
        self.let_go(visit, artifact).await
    }

    async fn let_go(&self, visit: &Visit<'_>, artifact: &ModelArtifact) -> Result<Option<Duration>, Error> {
        let others: Vec<&str> =
            artifact.finalizers().iter().map(String::as_str).filter(|name| *name != FINALIZER).collect();
        self.set_finalizers(visit, artifact, &others).await.map(|()| None)
    }

    async fn set_finalizers(
        &self,
        visit: &Visit<'_>,
        artifact: &ModelArtifact,
        finalizers: &[&str],
    ) -> Result<(), Error> {
        let change = json!({"metadata": {"finalizers": finalizers, "resourceVersion": artifact.resource_version()}});
        apply::merge(visit, artifact, &change).await
    }

    /// Everybody who reads artifacts in the namespace of this one. Asked for when something is about to be removed only, so
    /// they are listed then and not watched.
    async fn readers(&self, artifact: &ModelArtifact) -> Result<Vec<Reader>, Error> {
        let namespace = artifact.namespace().unwrap_or_default();
        let mut readers = self.listed::<TrainingJob>(&namespace, Manifest::TrainingJob).await?;
        readers.extend(self.listed::<CompressionJob>(&namespace, Manifest::CompressionJob).await?);
        readers.extend(self.listed::<ServingJob>(&namespace, Manifest::ServingJob).await?);
        Ok(readers)
    }

    /// An object that cannot be read is an error: it might be a reader.
    async fn listed<K>(&self, namespace: &str, manifest: fn(K) -> Manifest) -> Result<Vec<Reader>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
    {
        let api: Api<K> = self.context.api_in(namespace);
        let mut page = ListParams::default().limit(PAGE);
        let mut readers = Vec::new();
        loop {
            let list = api.list(&page).await.map_err(Error::api("list", K::plural(&())))?;
            readers.extend(list.items.into_iter().filter_map(|object| Reader::of(&manifest(object))));
            match list.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return Ok(readers),
            }
        }
    }
}

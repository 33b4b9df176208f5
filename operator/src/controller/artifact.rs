//! ModelArtifacts: whether the stored files are what the record says.

use std::sync::Arc;

use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use kube::core::DeserializeGuard;
use kube::runtime::Controller;
use kube::runtime::controller::{Action as Again, Config};
use kube::runtime::reflector::ObjectRef;
use kube::{Resource, ResourceExt};
use sensorium_api::ModelArtifact;

use super::apply;
use super::children::{Children, Key, owner_by_reference};
use super::context::{Context, DEBOUNCE, Visit};
use super::{Error, Stop};
use crate::render::render_verification;
use crate::status::conditions::is_true;
use crate::status::verification;

const KIND: &str = "ModelArtifact";

struct Artifacts {
    context: Arc<Context>,
    jobs: Children<Job>,
}

/// Runs the controller until `stop` ends.
pub(super) async fn control(context: Arc<Context>, stop: Stop) {
    let (store, objects) = context.watch_main::<ModelArtifact>();
    let (jobs, news) = context.watch_children(KIND, owner_by_reference(KIND), |job: &mut Job| {
        if let Some(spec) = &mut job.spec {
            spec.template = Default::default();
        }
    });
    let news = news.map(|(namespace, name): Key| ObjectRef::new(&name).within(&namespace));
    let artifacts = Arc::new(Artifacts { context: Arc::clone(&context), jobs });
    Controller::for_stream(objects, store)
        .with_config(Config::default().concurrency(context.settings.concurrency).debounce(DEBOUNCE))
        .reconcile_on(news)
        .graceful_shutdown_on(stop)
        .run(reconcile, on_error, artifacts)
        .for_each(|_| std::future::ready(()))
        .await;
}

async fn reconcile(object: Arc<DeserializeGuard<ModelArtifact>>, artifacts: Arc<Artifacts>) -> Result<Again, Error> {
    let visit = Visit::begin(&artifacts.context.health, KIND);
    let result = match &object.0 {
        Ok(object) => artifacts.visit(object).await,
        Err(_) => Ok(()),
    };
    visit.end(&result);
    result.map(|()| {
        artifacts.context.succeeded(&id(&object));
        Again::await_change()
    })
}

fn id(object: &DeserializeGuard<ModelArtifact>) -> String {
    let meta = object.meta();
    format!("{KIND}/{}/{}", meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

fn on_error(object: Arc<DeserializeGuard<ModelArtifact>>, error: &Error, artifacts: Arc<Artifacts>) -> Again {
    super::context::again_after(&artifacts.context, id(&object), error)
}

impl Artifacts {
    async fn visit(&self, artifact: &ModelArtifact) -> Result<(), Error> {
        if !self.jobs.listed() {
            return Err(Error::NotReady);
        }
        if artifact.meta().deletion_timestamp.is_some() {
            return Ok(());
        }
        let key: Key = (artifact.namespace().unwrap_or_default(), artifact.name_any());
        let Some(owner) = artifact.controller_owner_ref(&()) else { return Err(Error::NotReady) };
        let verified = artifact.status.as_ref().is_some_and(|status| is_true(&status.conditions, "Verified"));
        let live = self.jobs.of(&key).into_iter().next();
        let mut problem = None;
        // The files are immutable: once verified they need not be read again.
        if !verified && live.is_none() {
            match render_verification(artifact, owner, &self.context.settings.images) {
                Ok(job) => {
                    apply::create(&self.context, KIND, &job).await?;
                }
                Err(reason) => problem = Some(reason),
            }
        }
        let (status, notes) = verification(artifact, live.as_deref(), problem.as_deref(), Timestamp::now());
        let verified = is_true(&status.conditions, "Verified");
        apply::write_status(&self.context, KIND, artifact, artifact.status.as_ref(), &status).await?;
        if let (true, Some(job)) = (verified, live) {
            apply::delete(&self.context, KIND, &*job).await?;
        }
        self.context.publish(&artifact.object_ref(&()), &notes).await;
        Ok(())
    }
}

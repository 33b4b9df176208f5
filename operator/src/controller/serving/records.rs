//! Records of revisions: written before the servers, read when something of an older revision was deleted.

use std::collections::BTreeSet;

use k8s_openapi::api::apps::v1::ControllerRevision;
use kube::{Api, ResourceExt};
use sensorium_api::ServingJobSpec;

use super::Servings;
use super::encoders::names;
use crate::controller::children::Key;
use crate::controller::visit::Visit;
use crate::controller::{Error, apply};
use crate::render::{
    CONFIG_ANNOTATION, ENCODERS_ANNOTATION, Encoder, MadeOf, Owner, REVISION_ANNOTATION, Servers, render_record,
};
use crate::status::{Note, has_ended};

/// The record of the wanted revision; none where nothing of it could be missing beside a newer one for long.
pub(super) fn wanted(
    owner: &Owner,
    spec: &ServingJobSpec,
    servers: &Servers,
    encoders: &[Encoder],
) -> Result<Option<ControllerRevision>, Error> {
    if encoders.is_empty() && spec.rollout.canary.is_none() {
        return Ok(None);
    }
    render_record(owner, servers, encoders).map(Some).map_err(|error| Error::Object(error.to_string()))
}

impl Servings {
    /// Writes a record, unless it is there.
    pub(super) async fn keep_record(
        &self,
        visit: &Visit<'_>,
        key: &Key,
        record: Option<&ControllerRevision>,
    ) -> Result<(), Error> {
        match record {
            Some(record) if !self.records.has(key, &record.name_any()) => apply::create(visit, record).await.map(drop),
            _ => Ok(()),
        }
    }

    /// Makes again what servers of older revisions need and somebody deleted. `current` is the revision that has just been
    /// applied as a whole.
    pub(super) async fn make_again(
        &self,
        visit: &Visit<'_>,
        key: &Key,
        current: Option<&str>,
    ) -> Result<Vec<Note>, Error> {
        let mut notes = Vec::new();
        let records = self.records.of(key);
        if records.is_empty() {
            return Ok(notes);
        }
        let (stay, run) = (self.revisions_of_deployments(key), self.revisions_of_pods(key));
        let parts = self.parts();
        for record in records {
            let annotations = record.annotations();
            let revision = annotations.get(REVISION_ANNOTATION).map_or("", String::as_str);
            if current == Some(revision) || !(stay.contains(revision) || run.contains(revision)) {
                continue;
            }
            let encoders = names(annotations.get(ENCODERS_ANNOTATION)).filter(|name| !name.is_empty());
            let is_whole = |name: &str| parts.iter().all(|part| part.is_whole(key, name));
            let lost: BTreeSet<&str> = encoders.filter(|name| !is_whole(name)).collect();
            let config = annotations.get(CONFIG_ANNOTATION).map_or("", String::as_str);
            // Pods that are the last of their revision have read the file already.
            let is_read = stay.contains(revision) || !lost.is_empty();
            let config = Some(config).filter(|config| is_read && !self.configs.has(key, config));
            if lost.is_empty() && config.is_none() {
                continue;
            }
            let api: Api<ControllerRevision> = self.context.api_in(&key.0);
            let name = record.name_any();
            let found = api.get_opt(&name).await.map_err(Error::api("read", format!("ControllerRevision/{name}")))?;
            let Some(made) = found.as_ref().and_then(MadeOf::read) else { continue };
            let mut again = Vec::new();
            if let Some(name) = config
                && apply::create(visit, &made.config).await?
            {
                again.push(format!("ConfigMap {name}"));
            }
            for encoder in made.encoders.iter().filter(|encoder| lost.contains(encoder.name.as_str())) {
                if self.make_encoder_again(visit, key, encoder).await? {
                    again.push(format!("encoder {}", encoder.name));
                }
            }
            if !again.is_empty() {
                let message = format!("{} of revision {revision}, which serves: deleted by someone", again.join(", "));
                notes.push(Note::warning("MadeAgain", message));
            }
        }
        Ok(notes)
    }

    /// Removes records of revisions that no server is of.
    pub(super) async fn sweep_records(
        &self,
        visit: &Visit<'_>,
        key: &Key,
        wanted: Option<&ControllerRevision>,
    ) -> Result<(), Error> {
        let records = self.records.of(key);
        if records.is_empty() {
            return Ok(());
        }
        let wanted = wanted.map(|wanted| (wanted.name_any(), wanted.annotations().get(REVISION_ANNOTATION)));
        let mut live = self.revisions_of_deployments(key);
        live.extend(self.revisions_of_pods(key));
        for record in records {
            let revision = record.annotations().get(REVISION_ANNOTATION);
            let is_kept = match &wanted {
                // Another record of it says what its encoders were once.
                Some((name, known)) if revision == *known => *name == record.name_any(),
                _ => revision.is_some_and(|revision| live.contains(revision)),
            };
            if !is_kept {
                apply::delete(visit, &*record).await?;
            }
        }
        Ok(())
    }

    /// What is there stays as it is.
    async fn make_encoder_again(&self, visit: &Visit<'_>, key: &Key, encoder: &Encoder) -> Result<bool, Error> {
        let mut made = false;
        for part in self.parts() {
            made |= part.restore(visit, key, encoder).await?;
        }
        Ok(made)
    }

    /// Revisions whose servers stay.
    fn revisions_of_deployments(&self, key: &Key) -> BTreeSet<String> {
        let deployments = self.deployments.of(key);
        let templates = deployments.iter().filter_map(|deployment| deployment.spec.template.metadata.as_ref());
        let annotations = templates.filter_map(|metadata| metadata.annotations.as_ref());
        annotations.filter_map(|annotations| annotations.get(REVISION_ANNOTATION).cloned()).collect()
    }

    /// Revisions that have pods.
    fn revisions_of_pods(&self, key: &Key) -> BTreeSet<String> {
        let pods = self.pods.of(key);
        let running = pods.iter().filter(|pod| !has_ended(pod));
        running.filter_map(|pod| pod.annotations().get(REVISION_ANNOTATION).cloned()).collect()
    }
}

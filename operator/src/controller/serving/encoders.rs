//! Encoders come with the servers that call them, and go when the last of these is gone.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use sensorium_api::run::JobKey;

use super::Servings;
use crate::controller::Error;
use crate::controller::children::Key;
use crate::controller::visit::Visit;
use crate::render::{ENCODERS_ANNOTATION, Encoder, Track, child_name, deployment_name};

impl Servings {
    pub(super) async fn apply_encoders(&self, visit: &Visit<'_>, key: &Key, encoders: &[Encoder]) -> Result<(), Error> {
        for encoder in encoders {
            for part in self.parts() {
                part.settle(visit, key, encoder).await?;
            }
        }
        Ok(())
    }

    /// The encoders that the servers of `stable` call, by name.
    pub(super) fn encoders_of(&self, key: &Key, stable: Option<&Deployment>) -> Vec<(String, Option<Arc<Deployment>>)> {
        let names = stable.into_iter().flat_map(called_by);
        names.map(|name| (name.to_owned(), self.deployments.get(key, name))).collect()
    }

    /// Removes encoders that are not `wanted` and that no server may still call.
    pub(super) async fn sweep_encoders(
        &self,
        visit: &Visit<'_>,
        key: &Key,
        job: &JobKey,
        wanted: &[Encoder],
    ) -> Result<(), Error> {
        let (deployments, pods) = (self.deployments.of(key), self.pods.of(key));
        let mut kept: BTreeSet<String> = wanted.iter().map(|encoder| encoder.name.clone()).collect();
        kept.extend(deployments.iter().flat_map(|deployment| called_by(deployment)).map(str::to_owned));
        let running = pods.iter().filter(|pod| !has_ended(pod));
        kept.extend(running.flat_map(|pod| names(pod.annotations().get(ENCODERS_ANNOTATION))).map(str::to_owned));
        // The job's other objects.
        kept.extend([Track::Stable, Track::Canary].map(|track| deployment_name(job, track)));
        kept.insert(child_name(&job.name, ""));

        for part in self.parts().iter().rev() {
            part.sweep(visit, key, &kept).await?;
        }
        Ok(())
    }
}

/// Names of the encoders that a Deployment's servers call.
fn called_by(deployment: &Deployment) -> impl Iterator<Item = &str> {
    let metadata = deployment.spec.template.metadata.as_ref();
    let annotations = metadata.and_then(|metadata| metadata.annotations.as_ref());
    names(annotations.and_then(|annotations| annotations.get(ENCODERS_ANNOTATION)))
}

pub(super) fn names(annotation: Option<&String>) -> impl Iterator<Item = &str> {
    annotation.into_iter().flat_map(|names| names.split(','))
}

/// A pod that was evicted stays on record, and calls nobody.
pub(super) fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

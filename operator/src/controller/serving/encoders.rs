//! Encoders come with the servers that call them, and go when the last of these is gone.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use kube::ResourceExt;
use sensorium_api::run::JobKey;

use super::Servings;
use crate::controller::Error;
use crate::controller::children::Key;
use crate::controller::visit::Visit;
use crate::render::{ENCODERS_ANNOTATION, Encoder, GRAPH_LABEL, Track, deployment_name, service_name};
use crate::status::{Awaited, available, has_ended, wanted};

impl Servings {
    pub(super) async fn apply_encoders(&self, visit: &Visit<'_>, key: &Key, encoders: &[Encoder]) -> Result<(), Error> {
        for encoder in encoders {
            let encoder = self.as_begun(key, encoder);
            for part in self.parts() {
                part.settle(visit, key, &encoder).await?;
            }
        }
        Ok(())
    }

    /// An encoder that an autoscaler will look after begins with as many pods as the one before it has: the load is the same.
    fn as_begun<'a>(&self, key: &Key, encoder: &'a Encoder) -> Cow<'a, Encoder> {
        let scaling = encoder.autoscaler.as_ref().and_then(|autoscaler| autoscaler.spec.min_replicas);
        let Some(least) = scaling.filter(|_| !self.deployments.has(key, &encoder.name)) else {
            return Cow::Borrowed(encoder);
        };
        let deployments = self.deployments.of(key);
        let before = deployments.iter().filter(|deployment| graph_of(deployment) == Some(&encoder.graph));
        let mut begun = encoder.clone();
        begun.deployment.spec.replicas = before.map(|deployment| wanted(deployment)).chain([least]).max();
        Cow::Owned(begun)
    }

    /// One of `encoders` that is not up yet. When it is late, one pod is enough.
    pub(super) fn awaited(&self, key: &Key, encoders: &[Encoder], is_late: bool) -> Option<Awaited> {
        encoders.iter().find_map(|encoder| {
            let live = self.deployments.get(key, &encoder.name);
            let (up, of) = live.as_deref().map_or((0, 1), |live| (available(live), wanted(live)));
            let enough = if is_late { of.min(1) } else { of };
            (up < enough).then(|| Awaited { name: encoder.name.clone(), live, is_late })
        })
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
        kept.insert(service_name(&job.name, ""));

        for part in self.parts().iter().rev() {
            part.sweep(visit, key, &kept).await?;
        }
        Ok(())
    }
}

/// The graph that an encoder's Deployment runs.
fn graph_of(deployment: &Deployment) -> Option<&String> {
    deployment.spec.template.metadata.as_ref()?.labels.as_ref()?.get(GRAPH_LABEL)
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

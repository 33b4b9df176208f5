//! Manifests on disk to plans in the order in which they run.

use std::path::{Path, PathBuf};

use sensorium_api::manifest::{Resource, parse_documents};
use sensorium_api::{Resources, Security};
use sensorium_operator::plan::{self, WorkloadPlan};

use crate::error::Error;

/// One job: what its manifest says, and what that means.
#[derive(Debug, Clone)]
pub struct Job {
    /// The checked manifest.
    pub resource: Resource,
    /// What is to run.
    pub plan: WorkloadPlan,
}

impl Job {
    /// The same on this machine: its loopback is nobody else's, so that servers need no certificate and no token there, and
    /// nobody hands out its GPUs.
    ///
    /// # Errors
    /// As [`load`].
    pub fn on_this_machine(self) -> Result<Self, Error> {
        let Resource::ServingJob(mut job) = self.resource else { return Ok(self) };
        job.spec.security = Security::default();
        job.spec.resources = Resources::default();
        job.spec.encoders.iter_mut().for_each(|encoder| encoder.resources = Resources::default());
        let resource = Resource::ServingJob(job);
        Ok(Self { plan: plan::plan(&resource)?, resource })
    }
}

/// Reads manifests and plans their jobs, in the order in which they need each other.
///
/// # Errors
/// When a file cannot be read, a manifest is wrong, or the jobs cannot be put in order.
pub fn load(paths: &[PathBuf]) -> Result<Vec<Job>, Error> {
    let mut jobs = Vec::new();
    for path in files(paths)? {
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        for resource in parse_documents(&text, &path.display().to_string())? {
            // A ModelArtifact records something; there is nothing to run.
            if resource.job().is_some() {
                let plan = plan::plan(&resource)?;
                jobs.push(Job { resource, plan });
            }
        }
    }
    if jobs.is_empty() {
        return Err(Error::NothingToRun { paths: paths.to_vec() });
    }
    Ok(jobs)
}

/// The files themselves, and the manifests right inside the folders, in order of their names.
fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            let entries = std::fs::read_dir(path).map_err(Error::io("read", path))?;
            let mut found: Vec<PathBuf> =
                entries.flatten().map(|entry| entry.path()).filter(|path| is_manifest(path)).collect();
            found.sort();
            files.append(&mut found);
        } else {
            files.push(path.clone());
        }
    }
    Ok(files)
}

fn is_manifest(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_on_this_machine_have_neither_certificates_nor_tokens_nor_gpus() {
        let manifest = "
apiVersion: sensorium.dev/v1alpha1
kind: ServingJob
metadata: {name: vqa}
spec:
  model: {artifact: vqa-int8}
  resources: {limits: {nvidia.com/gpu: 1}}
  encoders: [{graph: image_encoder, resources: {limits: {nvidia.com/gpu: 1}}}]
  security: {tls: {secretName: vqa-tls}, tokens: {secretName: vqa-clients}}
";
        let resource = parse_documents(manifest, "m.yaml").unwrap().remove(0);
        let on_a_cluster = Job { plan: plan::plan(&resource).unwrap(), resource };
        let here = on_a_cluster.clone().on_this_machine().unwrap();
        let texts = |job: &Job| serde_json::to_string(&job.plan.roles).unwrap();
        for wanted in ["--tls-cert", "--remote-tls-ca", "--auth-tokens", "--engine-device", "vqa-tls"] {
            assert!(texts(&on_a_cluster).contains(wanted) && !texts(&here).contains(wanted), "{wanted}");
        }
        assert_eq!(here.plan.spec_hash, on_a_cluster.plan.spec_hash, "its answers are the same");
    }
}

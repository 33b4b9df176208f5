//! Which recorded model a name means, and whether a record can be trusted.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{Job, JobCondition};
use kube::ResourceExt;
use sensorium_api::manifest::Resource;
use sensorium_api::{ModelArtifact, ModelArtifactStatus, ModelSource};

use super::Note;
use super::conditions::{Conditions, Truth, is_true};

/// Finalizer that keeps a record until its files are removed.
pub const FINALIZER: &str = "sensorium.dev/stored-files";
/// Label with the name under which a job left an artifact.
pub const ARTIFACT_LABEL: &str = "sensorium.dev/artifact";

/// The artifacts that a resource reads, each with the store that it is looked for in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct References(pub Vec<(String, String)>);

impl References {
    /// Those of `resource`.
    pub fn of(resource: &Resource) -> Self {
        let source = match resource {
            Resource::TrainingJob(job) => match &job.spec.model {
                ModelSource::Artifact(name) => Some((name.clone(), job.spec.output.store.clone())),
                ModelSource::Architecture(_) => None,
            },
            Resource::CompressionJob(job) => Some((job.spec.source.artifact.clone(), job.spec.source.store.clone())),
            Resource::ServingJob(job) => Some((job.spec.model.artifact.clone(), job.spec.model.store.clone())),
            Resource::ModelArtifact(_) => None,
        };
        Self(source.into_iter().collect())
    }

    /// Whether news of `artifact` concern whoever has these references.
    pub fn mention(&self, artifact: &ModelArtifact) -> bool {
        self.0.iter().any(|(reference, _)| is_meant(artifact, reference))
    }

    /// The digest of each, or the first one that is missing.
    pub fn resolve<'a, I>(&self, artifacts: impl Fn() -> I) -> Result<BTreeMap<String, String>, String>
    where
        I: Iterator<Item = &'a ModelArtifact>,
    {
        let digest = |(name, store): &(String, String)| match resolve(name, store, artifacts()) {
            Resolution::Found(digest) => Ok((name.clone(), digest)),
            Resolution::Missing(why) => Err(why),
        };
        self.0.iter().map(digest).collect()
    }
}

/// What a reference means now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The artifact with this digest.
    Found(String),
    /// Nothing that can be used, and why.
    Missing(String),
}

/// Whether its files were found to be what it says.
pub(crate) fn is_verified(artifact: &ModelArtifact) -> bool {
    artifact.status.as_ref().is_some_and(|status| is_true(&status.conditions, "Verified"))
}

/// Orders artifacts, the oldest first. Times are whole seconds, so that names have to decide too.
pub(super) fn age(artifact: &ModelArtifact) -> (Option<Timestamp>, String) {
    (artifact.metadata.creation_timestamp.as_ref().map(|time| time.0), artifact.name_any())
}

/// All that a reference can call it by: its digest, the name that its job gave it, its own name.
pub(crate) fn names_of(artifact: &ModelArtifact) -> impl Iterator<Item = &str> {
    let label = artifact.labels().get(ARTIFACT_LABEL).map(String::as_str);
    [Some(artifact.spec.digest.as_str()), label, artifact.metadata.name.as_deref()].into_iter().flatten()
}

fn is_meant(artifact: &ModelArtifact, reference: &str) -> bool {
    names_of(artifact).any(|name| name == reference)
}

/// The newest verified artifact that `reference` (a name or a digest) means and that lies in `store`.
pub fn resolve<'a>(reference: &str, store: &str, artifacts: impl Iterator<Item = &'a ModelArtifact>) -> Resolution {
    let mut known: Vec<&ModelArtifact> = artifacts
        .filter(|artifact| artifact.metadata.deletion_timestamp.is_none() && is_meant(artifact, reference))
        .collect();
    known.sort_by_key(|artifact| age(artifact));
    // As those that write artifacts read it.
    let root = store.trim_end_matches('/');
    let here = |artifact: &&&ModelArtifact| {
        artifact.spec.uri.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if let Some(found) = known.iter().filter(here).rev().find(|artifact| is_verified(artifact)) {
        return Resolution::Found(found.spec.digest.clone());
    }
    let newest_here = known.iter().rfind(here);
    Resolution::Missing(match (newest_here, known.last()) {
        (Some(artifact), _) => {
            let conditions = artifact.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
            let failed = conditions.iter().find(|c| c.type_ == "Verified" && c.status == "False");
            match failed {
                Some(condition) => format!(
                    "artifact {reference} (ModelArtifact/{}) cannot be used: {}",
                    artifact.name_any(),
                    condition.message
                ),
                None => format!("waits until the files of ModelArtifact/{} are verified", artifact.name_any()),
            }
        }
        (None, Some(elsewhere)) => {
            format!("artifact {reference} is at {}, not in store {store}; correct the store", elsewhere.spec.uri)
        }
        (None, None) => format!(
            "waits for artifact {reference}; it comes when the job whose spec.output.artifact is {reference} has ended \
             well (kubectl get modelartifacts lists what there is)"
        ),
    })
}

/// The status of a ModelArtifact, given the Job that checks it; `problem` says why there can be none.
pub fn verification(
    artifact: &ModelArtifact,
    job: Option<&Job>,
    problem: Option<&str>,
    now: Timestamp,
) -> (ModelArtifactStatus, Vec<Note>) {
    let mut status = artifact.status.clone().unwrap_or_default();
    let before = is_true(&status.conditions, "Verified");
    status.observed_generation = artifact.metadata.generation;
    let mut notes = Vec::new();
    let mut conditions = Conditions::new(&mut status.conditions, &["Verified"], artifact.metadata.generation, now);
    let ended = |name: &str| ended(job, name);
    if let Some(problem) = problem {
        conditions.set("Verified", false, "InvalidUri", problem);
    } else if ended("Complete").is_some() {
        conditions.set("Verified", true, "DigestsMatch", "every file has the digest that the manifest lists");
        if !before {
            notes.push(Note::normal("Verified", "every file has the digest that the manifest lists"));
        }
    } else if let Some(condition) = ended("Failed") {
        let job = job.map(ResourceExt::name_any).unwrap_or_default();
        let why = condition.message.as_deref().unwrap_or_default();
        let message = format!(
            "the stored files could not be verified ({why}); kubectl logs job/{job} says which; restore them, then delete \
             the Job and it is tried again"
        );
        conditions.set("Verified", false, "VerificationFailed", &message);
        notes.push(Note::warning("VerificationFailed", message));
    } else if !before {
        conditions.set("Verified", Truth::Unknown, "Verifying", "the stored files are being read");
    }
    (status, notes)
}

/// The status of a ModelArtifact that is being deleted together with its files, and whether these are gone. `reader` still
/// reads them, `job` removes them, `problem` says why there can be none.
pub fn removal(
    artifact: &ModelArtifact,
    reader: Option<&str>,
    job: Option<&Job>,
    problem: Option<&str>,
    now: Timestamp,
) -> (ModelArtifactStatus, bool) {
    let mut status = artifact.status.clone().unwrap_or_default();
    let mut conditions = Conditions::new(&mut status.conditions, &[], artifact.metadata.generation, now);
    let (reason, message) = if let Some(problem) = problem {
        ("InvalidUri", problem.to_owned())
    } else if let Some(reader) = reader {
        ("InUse", format!("{reader} reads the stored files; they are removed when nobody does any more"))
    } else if ended(job, "Complete").is_some() {
        ("Removed", "the stored files are gone".to_owned())
    } else if let Some(condition) = ended(job, "Failed") {
        let (job, why) =
            (job.map(ResourceExt::name_any).unwrap_or_default(), condition.message.as_deref().unwrap_or_default());
        let message = format!(
            "the stored files could not be removed ({why}); kubectl logs job/{job} says which; delete the Job and it is \
             tried again, or remove the finalizer {FINALIZER} to leave the files where they are"
        );
        ("RemovalFailed", message)
    } else {
        ("Removing", "the stored files are being removed".to_owned())
    };
    let removed = reason == "Removed";
    conditions.set("FilesRemoved", removed, reason, message);
    (status, removed)
}

/// The condition of this type of a Job that has ended.
fn ended<'a>(job: Option<&'a Job>, condition: &str) -> Option<&'a JobCondition> {
    let conditions = job?.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|found| found.type_ == condition && found.status == "True")
}

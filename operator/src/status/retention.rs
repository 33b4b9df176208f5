//! Which recorded models are kept: those that their name's rule keeps, and those that somebody uses.

use std::collections::BTreeSet;

use kube::ResourceExt;
use sensorium_api::manifest::Resource;
use sensorium_api::{FilePolicy, JobState, JobStatus, ModelArtifact};

use super::artifact::{ARTIFACT_LABEL, References, age, is_verified};

/// A job or a server, and what it reads.
#[derive(Clone, Debug)]
pub struct Reader {
    /// Kind and name, such as `ServingJob/vqa`.
    pub who: String,
    /// Digests that it has settled on.
    pub digests: BTreeSet<String>,
    /// What its spec asks for.
    pub references: References,
    /// Whether it may read any of the artifacts that its spec means, because it is going from one to another.
    pub between: bool,
}

impl Reader {
    /// `resource`, if it reads anything any more.
    pub fn of(resource: &Resource) -> Option<Self> {
        let ended = |state: Option<JobState>| matches!(state, Some(JobState::Succeeded | JobState::Failed));
        let settled = |status: Option<&JobStatus>| {
            let status = status.cloned().unwrap_or_default();
            (!ended(status.state)).then(|| status.inputs.into_values().collect())
        };
        let (digests, between) = match resource {
            Resource::TrainingJob(job) => (settled(job.status.as_ref())?, false),
            Resource::CompressionJob(job) => (settled(job.status.as_ref())?, false),
            Resource::ServingJob(job) => {
                let status = job.status.clone().unwrap_or_default();
                (status.digest.into_iter().collect(), status.rollout.is_some())
            }
            Resource::ModelArtifact(_) => return None,
        };
        let references = References::of(resource);
        let who = format!("{}/{}", resource.kind(), resource.name());
        Some(Self { who, digests, references, between })
    }

    /// Whether it reads `artifact`, or will.
    fn reads(&self, artifact: &ModelArtifact) -> bool {
        let digest = &artifact.spec.digest;
        self.digests.contains(digest)
            || self.references.0.iter().any(|(reference, _)| reference == digest || *reference == artifact.name_any())
            || (self.between && self.references.mention(artifact))
    }
}

/// The first of `readers` that needs `artifact`.
pub fn reader_of<'a>(artifact: &ModelArtifact, readers: &'a [Reader]) -> Option<&'a Reader> {
    readers.iter().find(|reader| reader.reads(artifact))
}

/// The artifacts of `all` that `newest` and its rule let go; none unless it is the newest verified one of its name and
/// store. Newer ones that are not verified yet are not counted: they may never be.
pub fn surplus<'a>(newest: &ModelArtifact, all: impl Iterator<Item = &'a ModelArtifact>) -> Vec<&'a ModelArtifact> {
    let (Some(retention), Some(group)) = (&newest.spec.retention, group(newest)) else { return Vec::new() };
    let mut members: Vec<&ModelArtifact> = all
        .filter(|artifact| artifact.metadata.deletion_timestamp.is_none() && self::group(artifact) == Some(group))
        .collect();
    members.sort_by_key(|artifact| std::cmp::Reverse(age(artifact)));
    let known = members.into_iter().skip_while(|artifact| !is_verified(artifact)).collect::<Vec<_>>();
    match known.first() {
        Some(first) if first.name_any() == newest.name_any() => {
            known.into_iter().skip(retention.keep as usize).collect()
        }
        _ => Vec::new(),
    }
}

/// Whether the stored files go when the record does.
pub fn removes_files(artifact: &ModelArtifact) -> bool {
    artifact.spec.retention.is_some_and(|retention| retention.files == FilePolicy::Delete)
}

/// Namespace, name and store: what a rule is about.
fn group(artifact: &ModelArtifact) -> Option<(Option<&str>, &str, &str)> {
    let name = artifact.labels().get(ARTIFACT_LABEL)?;
    Some((artifact.metadata.namespace.as_deref(), name, artifact.spec.store()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn artifact(name: &str, created: u32, verified: bool, keep: u32) -> ModelArtifact {
        let digest = format!("sha256:{name:0>64}");
        serde_json::from_value(json!({
            "apiVersion": "sensorium.dev/v1alpha1",
            "kind": "ModelArtifact",
            "metadata": {
                "name": name, "namespace": "a", "labels": {"sensorium.dev/artifact": "vqa"},
                "creationTimestamp": format!("2026-01-01T00:00:{created:02}Z"),
            },
            "spec": {
                "uri": format!("pvc://artifacts/objects/{name}"), "digest": digest, "signature": [],
                "retention": {"keep": keep},
            },
            "status": {"conditions": [{
                "type": "Verified", "status": if verified { "True" } else { "False" }, "reason": "x", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }]},
        }))
        .unwrap()
    }

    fn names(artifacts: &[&ModelArtifact]) -> Vec<String> {
        artifacts.iter().map(|artifact| artifact.name_any()).collect()
    }

    #[test]
    fn the_newest_verified_one_says_how_many_stay() {
        let all = [
            artifact("a", 1, true, 9),
            artifact("b", 2, false, 9),
            artifact("c", 3, true, 2),
            artifact("d", 4, false, 1),
        ];
        assert_eq!(names(&surplus(&all[2], all.iter())), ["a"]);
        assert!(surplus(&all[0], all.iter()).is_empty(), "an older one decides nothing");
        assert!(surplus(&all[3], all.iter()).is_empty(), "one that is not verified decides nothing");
    }

    #[test]
    fn other_names_stores_and_namespaces_are_none_of_its_business() {
        let newest = artifact("c", 3, true, 1);
        let mut others = [artifact("x", 1, true, 1), artifact("y", 1, true, 1), artifact("z", 1, true, 1)];
        others[0].metadata.namespace = Some("b".to_owned());
        others[1].metadata.labels = None;
        others[2].spec.uri = "pvc://elsewhere/objects/z".to_owned();
        assert!(surplus(&newest, others.iter().chain([&newest])).is_empty());
    }

    #[test]
    fn what_a_server_serves_or_goes_away_from_is_used() {
        let (old, new) = (artifact("old", 1, true, 1), artifact("new", 2, true, 1));
        let mut job = json!({
            "apiVersion": "sensorium.dev/v1alpha1", "kind": "ServingJob", "metadata": {"name": "vqa"},
            "spec": {"model": {"artifact": "vqa"}},
            "status": {"digest": new.spec.digest},
        });
        let reader = |job: &serde_json::Value| {
            vec![Reader::of(&Resource::ServingJob(serde_json::from_value(job.clone()).unwrap())).unwrap()]
        };
        assert!(reader_of(&old, &reader(&job)).is_none());
        assert_eq!(reader_of(&new, &reader(&job)).unwrap().who, "ServingJob/vqa");
        job["status"]["rollout"] =
            json!({"revision": "2", "previous": "1", "step": 0, "started": "2026-01-01T00:00:00Z"});
        assert!(reader_of(&old, &reader(&job)).is_some(), "its old servers still read it");
    }
}

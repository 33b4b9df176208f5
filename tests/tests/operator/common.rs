//! What the tests of all kinds share.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use sensorium_api::{CompressionJob, ModelArtifact, ServingJob, TrainingJob};
use sensorium_tests::{ApiCluster, Kubelet, Namespace, Operator};
use serde_json::{Value, json};

/// Long enough for a busy machine; nothing here takes so long otherwise.
pub(crate) const LIMIT: Duration = Duration::from_mins(3);

/// A namespace with an operator that looks after it.
pub(crate) struct Case {
    pub(crate) namespace: Namespace,
    pub(crate) kubelet: Kubelet,
    pub(crate) operator: Operator,
}

impl Case {
    pub(crate) async fn start(name: &str) -> Result<Self> {
        let cluster = ApiCluster::shared()?;
        let namespace = cluster.namespace(name).await?;
        let mut operator = Operator::start(&cluster.kubeconfig(), namespace.name(), &[])?;
        operator.wait_until_ready(LIMIT)?;
        let kubelet = Kubelet::new(&namespace);
        Ok(Self { namespace, kubelet, operator })
    }

    /// Applies a resource given as JSON.
    pub(crate) async fn apply(&self, manifest: &Value) -> Result<()> {
        self.namespace.apply(&manifest.to_string()).await.map(drop)
    }

    /// Waits until a TrainingJob is as wanted.
    pub(crate) async fn training(
        &self,
        name: &str,
        what: &str,
        condition: impl Fn(&TrainingJob) -> bool,
    ) -> Result<TrainingJob> {
        self.namespace.eventually(name, what, LIMIT, condition).await
    }

    /// Waits until a ServingJob is as wanted.
    pub(crate) async fn serving(
        &self,
        name: &str,
        what: &str,
        condition: impl Fn(&ServingJob) -> bool,
    ) -> Result<ServingJob> {
        self.namespace.eventually(name, what, LIMIT, condition).await
    }

    /// Waits until a CompressionJob is as wanted.
    pub(crate) async fn compression(
        &self,
        name: &str,
        what: &str,
        condition: impl Fn(&CompressionJob) -> bool,
    ) -> Result<CompressionJob> {
        self.namespace.eventually(name, what, LIMIT, condition).await
    }

    /// The pods of an attempt, by rank.
    pub(crate) async fn workers(&self, name: &str, attempt: u32, count: usize) -> Result<Vec<String>> {
        let selector = format!("sensorium.dev/name={name},sensorium.dev/attempt={attempt}");
        let mut pods = self.kubelet.pods(&selector, count, LIMIT).await?;
        pods.sort_by_key(rank);
        Ok(pods.iter().map(ResourceExt::name_any).collect())
    }

    /// The file that a worker reads.
    pub(crate) async fn job_file(&self, pod: &str) -> Result<String> {
        let pod = self.namespace.api::<Pod>().get(pod).await?;
        pod.annotations().get("sensorium.dev/job.json").cloned().context("the pod has no file")
    }

    /// Starts a TrainingJob of two workers and lets them run.
    pub(crate) async fn running(&self, name: &str, change: impl FnOnce(&mut Value)) -> Result<Vec<String>> {
        let mut manifest = training(name);
        change(&mut manifest);
        self.apply(&manifest).await?;
        let pods = self.workers(name, 1, 2).await?;
        for pod in &pods {
            self.kubelet.run(pod).await?;
        }
        self.training(name, "to run", |job| holds_of(job.status.as_ref().map(|s| &s.conditions[..]), "PodsReady"))
            .await?;
        Ok(pods)
    }

    /// Ends all workers of an attempt well; rank 0 reports `artifact` with a digest made of `digit`.
    pub(crate) async fn succeed(&self, pods: &[String], artifact: &str, digit: char) -> Result<()> {
        for (rank, pod) in pods.iter().enumerate() {
            let message = if rank == 0 { result(artifact, digit).to_string() } else { String::new() };
            self.kubelet.succeed(pod, &message).await?;
        }
        Ok(())
    }

    /// A recorded model whose files have been verified.
    pub(crate) async fn artifact(&self, name: &str, digit: char) -> Result<()> {
        self.artifact_of(name, digit, &["fusion", "image_encoder"]).await
    }

    /// One with these graphs.
    pub(crate) async fn artifact_of(&self, name: &str, digit: char, graphs: &[&str]) -> Result<()> {
        let digest = digest(digit);
        let graphs: Vec<Value> =
            graphs.iter().map(|graph| json!({"name": graph, "inputs": [], "outputs": []})).collect();
        let manifest = json!({
            "apiVersion": "sensorium.dev/v1alpha1",
            "kind": "ModelArtifact",
            "metadata": {"name": format!("{name}-{digit}"), "labels": {"sensorium.dev/artifact": name}},
            "spec": {
                "uri": format!("pvc://artifacts/objects/{}", &digest[7..]),
                "digest": digest,
                "signature": graphs,
            },
        });
        self.apply(&manifest).await?;
        self.verify(&format!("{name}-{digit}")).await
    }

    /// Plays the pod that verifies a recorded model.
    pub(crate) async fn verify(&self, artifact: &str) -> Result<()> {
        let selector = format!("sensorium.dev/kind=ModelArtifact,sensorium.dev/name={artifact}");
        let pods = self.kubelet.pods(&selector, 1, LIMIT).await?;
        self.kubelet.succeed(&pods[0].name_any(), "").await?;
        let verified = |artifact: &ModelArtifact| {
            holds_of(artifact.status.as_ref().map(|status| &status.conditions[..]), "Verified")
        };
        self.namespace.eventually::<ModelArtifact>(artifact, "to be verified", LIMIT, verified).await?;
        Ok(())
    }

    /// Waits for an event about an object, and gives its message and the reasons of all events about it.
    pub(crate) async fn event(&self, name: &str, reason: &str) -> Result<(String, Vec<String>)> {
        let about = ListParams::default().fields(&format!("involvedObject.name={name}"));
        let deadline = std::time::Instant::now() + LIMIT;
        loop {
            let events = self.namespace.api::<Event>().list(&about).await?.items;
            let reasons: Vec<String> = events.iter().filter_map(|event| event.reason.clone()).collect();
            if let Some(event) = events.into_iter().find(|event| event.reason.as_deref() == Some(reason)) {
                return Ok((event.message.unwrap_or_default(), reasons));
            }
            anyhow::ensure!(std::time::Instant::now() < deadline, "no event {reason} about {name}: {reasons:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Names of all encoders' Deployments, once there are so many.
    pub(crate) async fn encoders(&self, count: usize) -> Result<Vec<String>> {
        let encoders = ListParams::default().labels("app.kubernetes.io/component=encoder");
        let deadline = std::time::Instant::now() + LIMIT;
        loop {
            let names = self.namespace.api::<Deployment>().list_metadata(&encoders).await?.items;
            let names: Vec<String> = names.iter().map(ResourceExt::name_any).collect();
            if names.len() == count {
                return Ok(names);
            }
            anyhow::ensure!(
                std::time::Instant::now() < deadline,
                "{count} encoders were expected, there are {names:?}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Changes part of a TrainingJob's spec, as `kubectl patch` does.
    pub(crate) async fn patch<K>(&self, name: &str, change: Value) -> Result<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let api = self.namespace.api::<K>();
        Ok(api.patch(name, &PatchParams::default(), &Patch::Merge(&change)).await?)
    }

    /// Deletes an object.
    pub(crate) async fn delete<K>(&self, name: &str) -> Result<()>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        self.namespace.api::<K>().delete(name, &DeleteParams::default()).await.map(drop).context("delete")
    }
}

fn rank(pod: &Pod) -> u32 {
    let index = pod.annotations().get("batch.kubernetes.io/job-completion-index");
    index.and_then(|index| index.parse().ok()).unwrap_or(0)
}

type Conditions<'a> = Option<&'a [k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition]>;

/// Whether the condition is true.
pub(crate) fn holds_of(conditions: Conditions<'_>, name: &str) -> bool {
    conditions.is_some_and(|list| list.iter().any(|c| c.type_ == name && c.status == "True"))
}

/// The reason of a condition.
pub(crate) fn reason_of<'a>(conditions: Conditions<'a>, name: &str) -> Option<&'a str> {
    conditions?.iter().find(|condition| condition.type_ == name).map(|condition| condition.reason.as_str())
}

/// Whether a condition of a job holds.
pub(crate) fn holds(job: &TrainingJob, name: &str) -> bool {
    holds_of(job.status.as_ref().map(|status| &status.conditions[..]), name)
}

/// The reason of a job's condition.
pub(crate) fn reason<'a>(job: &'a TrainingJob, name: &str) -> Option<&'a str> {
    reason_of(job.status.as_ref().map(|status| &status.conditions[..]), name)
}

/// A digest made of one digit.
pub(crate) fn digest(digit: char) -> String {
    format!("sha256:{}", digit.to_string().repeat(64))
}

/// What rank 0 leaves behind.
pub(crate) fn result(artifact: &str, digit: char) -> Value {
    let digest = digest(digit);
    json!({
        "state": "succeeded",
        "message": "trained 10 steps",
        "artifact": {
            "name": artifact,
            "digest": digest,
            "bytes": 1000,
            "uri": format!("pvc://artifacts/objects/{}", &digest[7..]),
            "record": {
                "signature": [{"name": "fusion", "inputs": [], "outputs": []}],
                "modalities": ["text", "image"],
                "metrics": {"vqa_accuracy": 0.99},
                "parents": [],
                "data": ["pvc://datasets/train"],
                "steps": ["train"],
            },
        },
        "metrics": {"vqa_accuracy": 0.99},
        "seconds": 12.5,
    })
}

/// A TrainingJob of two workers.
pub(crate) fn training(name: &str) -> Value {
    json!({
        "apiVersion": "sensorium.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"architecture": {
                "width": 8,
                "text": {"layers": 1, "width": 8, "heads": 1, "maxLength": 4},
                "image": {"size": 8, "stem": [{"channels": 8, "kernel": 8, "stride": 8}], "layers": 1, "width": 8, "heads": 1},
                "fusion": {"layers": 1, "heads": 1},
            }},
            "data": {"train": "pvc://datasets/train", "evaluation": "pvc://datasets/test"},
            "tasks": [{"type": "vqa"}],
            "training": {"steps": 10, "batch": {"images": 12}},
            "parallelism": {"data": 2},
            "workers": 2,
            "output": {"artifact": format!("{name}-model")},
        },
    })
}

/// Makes the file of a job's workers too long for their annotations.
pub(crate) fn with_a_long_file(job: &mut Value) {
    job["spec"]["pods"] = json!({"env": {"NOTES": "x".repeat(40_000)}});
}

/// A CompressionJob that reads `source`.
pub(crate) fn compression(name: &str, source: &str) -> Value {
    json!({
        "apiVersion": "sensorium.dev/v1alpha1",
        "kind": "CompressionJob",
        "metadata": {"name": name},
        "spec": {
            "source": {"artifact": source},
            "steps": [{"quantize": {"calibration": {"data": "pvc://datasets/train"}}}],
            "acceptance": {"data": "pvc://datasets/test", "maxDrop": 0.01},
            "output": {"artifact": format!("{name}-model")},
        },
    })
}

/// [`serving`] with its image encoder as a service of its own.
pub(crate) fn serving_with_encoder(name: &str, artifact: &str) -> Value {
    let mut manifest = serving(name, artifact);
    manifest["spec"]["encoders"] = json!([{"graph": "image_encoder"}]);
    manifest
}

/// A ServingJob of two servers of `artifact`.
pub(crate) fn serving(name: &str, artifact: &str) -> Value {
    json!({
        "apiVersion": "sensorium.dev/v1alpha1",
        "kind": "ServingJob",
        "metadata": {"name": name},
        "spec": {"model": {"artifact": artifact}, "replicas": 2},
    })
}

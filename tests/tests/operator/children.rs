//! Whatever is deleted or changed by hand comes back, and what nothing needs any more goes.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::ListParams;
use kube::{Resource as _, ResourceExt};
use sensorium_api::{ServingJob, TrainingJob};
use serde_json::{Value, json};

use crate::common::{Case, LIMIT, holds, serving, serving_with_encoder, training, with_a_long_file};

/// Deletes a child and waits until another one of its name is there.
async fn deleted_and_back<K>(case: &Case, name: &str) -> Result<()>
where
    K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::Serialize
        + serde::de::DeserializeOwned,
{
    let old = case.namespace.eventually::<K>(name, "to exist", LIMIT, |_| true).await?.uid();
    case.delete::<K>(name).await?;
    case.namespace.eventually::<K>(name, "to be back", LIMIT, |child| child.uid() != old).await?;
    Ok(())
}

#[tokio::test]
async fn every_child_of_a_training_job_comes_back() -> Result<()> {
    let case = Case::start("children-train").await?;
    case.running("vqa", with_a_long_file).await?;
    deleted_and_back::<Service>(&case, "vqa-worker").await?;
    deleted_and_back::<ConfigMap>(&case, "vqa-worker-1").await?;
    deleted_and_back::<NetworkPolicy>(&case, "vqa-worker").await?;
    deleted_and_back::<Job>(&case, "vqa-worker-1").await?;
    let job = case.training("vqa", "to be there", |_| true).await?.status.unwrap();
    assert_eq!((job.attempt, job.restarts, job.disruptions), (1, 0, 0), "it costs nothing");
    Ok(())
}

/// A TrainingJob of one worker.
fn alone(name: &str) -> Value {
    let mut manifest = training(name);
    manifest["spec"]["workers"] = json!(1);
    manifest["spec"]["parallelism"] = json!({"data": 1});
    manifest
}

#[tokio::test]
async fn a_single_worker_has_a_job_and_a_policy_and_both_come_back() -> Result<()> {
    let case = Case::start("children-one").await?;
    case.apply(&alone("vqa")).await?;
    let pods = case.workers("vqa", 1, 1).await?;
    assert!(case.job_file(&pods[0]).await?.contains("\"specHash\""));
    deleted_and_back::<NetworkPolicy>(&case, "vqa-worker").await?;
    deleted_and_back::<Job>(&case, "vqa-worker-1").await?;
    let mine = ListParams::default().labels("sensorium.dev/name=vqa");
    assert!(case.namespace.api::<Service>().list(&mine).await?.items.is_empty());
    assert!(case.namespace.api::<ConfigMap>().list(&mine).await?.items.is_empty());
    Ok(())
}

/// Makes what an operator before 0.2 made for the first attempt of a job of one worker.
async fn started_by_an_earlier_version(case: &Case, job: &TrainingJob) -> Result<()> {
    let owner = json!([job.controller_owner_ref(&()).context("it has a uid")?]);
    let labels = json!({
        "app.kubernetes.io/component": "worker", "app.kubernetes.io/managed-by": "sensorium",
        "sensorium.dev/attempt": "1", "sensorium.dev/kind": "TrainingJob", "sensorium.dev/name": "vqa",
    });
    let metadata = |name: &str| json!({"name": name, "labels": labels, "ownerReferences": owner});
    case.apply(&json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata("vqa-worker-1"), "immutable": true,
        "data": {"job.json": "{}"},
    }))
    .await?;
    case.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata("vqa-worker"),
        "spec": {
            "clusterIP": "None", "publishNotReadyAddresses": true, "ports": [{"name": "rendezvous", "port": 29500}],
            "selector": {"sensorium.dev/kind": "TrainingJob", "sensorium.dev/name": "vqa"},
        },
    }))
    .await?;
    case.apply(&json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": metadata("vqa-worker-1"),
        "spec": {
            "completionMode": "Indexed", "completions": 1, "parallelism": 1, "backoffLimit": 0,
            "template": {
                "metadata": {"labels": labels, "annotations": {"sensorium.dev/owner": "vqa"}},
                "spec": {
                    "restartPolicy": "Never", "subdomain": "vqa-worker",
                    "containers": [{
                        "name": "main", "image": "trainer", "volumeMounts": [{"name": "config", "mountPath": "/mnt/config"}],
                    }],
                    "volumes": [{"name": "config", "configMap": {"name": "vqa-worker-1"}}],
                },
            },
        },
    }))
    .await
}

#[tokio::test]
async fn an_attempt_of_an_earlier_version_keeps_what_it_has_and_the_next_one_does_without() -> Result<()> {
    let mut case = Case::start("upgrade").await?;
    case.operator.kill()?;
    case.apply(&alone("vqa")).await?;
    let job = case.training("vqa", "to be there", |_| true).await?;
    started_by_an_earlier_version(&case, &job).await?;
    case.operator.restart()?;
    case.operator.wait_until_ready(LIMIT)?;
    let pods = case.workers("vqa", 1, 1).await?;
    case.kubelet.run(&pods[0]).await?;
    case.training("vqa", "to run", |job| holds(job, "PodsReady")).await?;
    case.namespace.api::<Service>().get("vqa-worker").await?;
    case.namespace.api::<ConfigMap>().get("vqa-worker-1").await?;

    case.kubelet.fail(&pods[0], 1, "out of luck").await?;
    let again = case.workers("vqa", 2, 1).await?;
    case.namespace.eventually_gone::<Service>("vqa-worker", LIMIT).await?;
    case.namespace.eventually_gone::<ConfigMap>("vqa-worker-1", LIMIT).await?;
    case.kubelet.run(&again[0]).await?;
    case.succeed(&again, "vqa-model", 'e').await?;
    case.training("vqa", "to be complete", |job| holds(job, "Complete")).await?;
    Ok(())
}

#[tokio::test]
async fn every_child_of_a_serving_job_comes_back() -> Result<()> {
    let case = Case::start("children-serve").await?;
    case.artifact("model", 'a').await?;
    case.apply(&serving("vqa", "model")).await?;
    deleted_and_back::<Service>(&case, "vqa").await?;
    deleted_and_back::<Deployment>(&case, "vqa-server").await?;
    deleted_and_back::<PodDisruptionBudget>(&case, "vqa-server").await?;
    deleted_and_back::<NetworkPolicy>(&case, "vqa-server").await?;
    let configs =
        case.namespace.api::<ConfigMap>().list(&ListParams::default().labels("sensorium.dev/name=vqa")).await?;
    deleted_and_back::<ConfigMap>(&case, &configs.items[0].name_any()).await
}

#[tokio::test]
async fn every_child_of_an_encoder_comes_back_and_goes_when_it_is_not_wanted() -> Result<()> {
    let case = Case::start("children-encoder").await?;
    case.artifact("model", 'a').await?;
    let mut manifest = serving_with_encoder("vqa", "model");
    manifest["spec"]["encoders"][0]["autoscaling"] = json!({"maxReplicas": 2, "metric": "queueDepth"});
    case.apply(&manifest).await?;
    let running = case.kubelet.run_all("sensorium.dev/kind=ServingJob");
    let name = case.encoders(1).await?.remove(0);
    deleted_and_back::<Deployment>(&case, &name).await?;
    deleted_and_back::<Service>(&case, &name).await?;
    deleted_and_back::<PodDisruptionBudget>(&case, &name).await?;
    deleted_and_back::<NetworkPolicy>(&case, &name).await?;
    deleted_and_back::<HorizontalPodAutoscaler>(&case, &name).await?;

    case.patch::<ServingJob>("vqa", json!({"spec": {"encoders": null}})).await?;
    case.namespace.eventually_gone::<Deployment>(&name, LIMIT).await?;
    case.namespace.eventually_gone::<Service>(&name, LIMIT).await?;
    case.namespace.eventually_gone::<PodDisruptionBudget>(&name, LIMIT).await?;
    case.namespace.eventually_gone::<NetworkPolicy>(&name, LIMIT).await?;
    case.namespace.eventually_gone::<HorizontalPodAutoscaler>(&name, LIMIT).await?;
    case.namespace.api::<PodDisruptionBudget>().get("vqa-server").await?;
    drop(running);
    Ok(())
}

#[tokio::test]
async fn a_child_that_was_changed_by_hand_is_put_right() -> Result<()> {
    let case = Case::start("drift").await?;
    case.artifact("model", 'a').await?;
    case.apply(&serving("vqa", "model")).await?;
    case.namespace.eventually::<Deployment>("vqa-server", "to exist", LIMIT, |_| true).await?;
    case.patch::<Deployment>("vqa-server", json!({"spec": {"replicas": 7}})).await?;
    case.namespace
        .eventually::<Deployment>("vqa-server", "to be put right", LIMIT, |d| d.spec.replicas == Some(2))
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_deleted_job_takes_its_children_along() -> Result<()> {
    let case = Case::start("gone").await?;
    let mut manifest = training("vqa");
    with_a_long_file(&mut manifest);
    case.apply(&manifest).await?;
    case.workers("vqa", 1, 2).await?;
    case.namespace.api::<ConfigMap>().get("vqa-worker-1").await?;
    case.delete::<TrainingJob>("vqa").await?;
    case.namespace.eventually_gone::<Job>("vqa-worker-1", LIMIT).await?;
    case.namespace.eventually_gone::<ConfigMap>("vqa-worker-1", LIMIT).await?;
    case.namespace.eventually_gone::<Service>("vqa-worker", LIMIT).await
}

/// Waits until the operator, as it was started last, has visited an object of each of these kinds, and well.
async fn visited(case: &Case, kinds: &[&str]) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let (_, metrics) = case.operator.get("/metrics")?;
        // A sample is not there before its first visit.
        let is_visited = |kind: &&str| {
            let name = format!("sensorium_reconcile_total{{kind=\"{kind}\",outcome=\"ok\"}} ");
            metrics.lines().any(|line| line.strip_prefix(&name).is_some_and(|visits| visits != "0"))
        };
        if kinds.iter().all(is_visited) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "of {kinds:?}, not all are visited after {} s:\n{metrics}", LIMIT.as_secs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_visit_that_changes_nothing_writes_nothing() -> Result<()> {
    let mut case = Case::start("quiet").await?;
    case.artifact("model", 'a').await?;
    case.apply(&serving_with_encoder("srv", "model")).await?;
    let pods = case.kubelet.run_all("sensorium.dev/kind=ServingJob");
    case.serving("srv", "to be ready", |job| {
        crate::common::holds_of(job.status.as_ref().map(|status| &status.conditions[..]), "Ready")
    })
    .await?;
    case.running("vqa", |_| {}).await?;
    drop(pods);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let versions = async || {
        let one = case.namespace.api::<TrainingJob>().get("vqa").await?.resource_version();
        let other = case.namespace.api::<ServingJob>().get("srv").await?.resource_version();
        let third = case.namespace.api::<Deployment>().get("srv-server").await?.resource_version();
        anyhow::Ok((one, other, third))
    };
    let before = versions().await?;
    case.operator.kill()?;
    case.operator.restart()?;
    case.operator.wait_until_ready(LIMIT)?;
    visited(&case, &["TrainingJob", "ServingJob"]).await?;
    // The first visits may bring others with them.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(versions().await?, before);
    let (_, metrics) = case.operator.get("/metrics")?;
    let writes: Vec<&str> = metrics.lines().filter(|line| line.starts_with("sensorium_writes_total{")).collect();
    assert!(writes.iter().all(|line| line.ends_with(" 0")), "{writes:?}");
    Ok(())
}

//! Encoders in pods of their own: one that dies, and one that is deleted while a newer revision is tried.

use std::time::{Duration, Instant};

use anyhow::Result;
use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;
use kube::api::ListParams;
use sensorium_api::ServingJob;
use serde_json::json;

use crate::common::{Case, LIMIT, digest, holds_of, reason_of, serving_with_encoder};

const ALL: &str = "sensorium.dev/kind=ServingJob";
const ENCODERS: &str = "sensorium.dev/kind=ServingJob,app.kubernetes.io/component=encoder";

type Conditions<'a> = Option<&'a [k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition]>;

fn conditions(job: &ServingJob) -> Conditions<'_> {
    job.status.as_ref().map(|status| &status.conditions[..])
}

fn is_ready(job: &ServingJob) -> bool {
    holds_of(conditions(job), "Ready")
}

fn message(job: &ServingJob) -> &str {
    job.status.as_ref().and_then(|status| status.message.as_deref()).unwrap_or_default()
}

#[tokio::test]
async fn a_dead_encoder_is_in_the_condition_as_soon_as_its_pod_says_so() -> Result<()> {
    let case = Case::start("encoder-dead").await?;
    case.artifact("model", 'a').await?;
    case.apply(&serving_with_encoder("vqa", "model")).await?;
    let running = case.kubelet.run_all(ALL);
    case.serving("vqa", "to be ready", is_ready).await?;
    drop(running);
    let name = case.encoders(1).await?.remove(0);
    let pod = case.kubelet.pods(ENCODERS, 1, LIMIT).await?.remove(0).name_any();

    // Its servers are as ready as before: they would find out half a minute later.
    case.kubelet.run_unready(&pod).await?;
    let died = Instant::now();
    let job = case.serving("vqa", "to notice", |job| !is_ready(job)).await?;
    assert!(died.elapsed() < Duration::from_secs(15), "after {:?}", died.elapsed());
    assert_eq!(reason_of(conditions(&job), "Ready"), Some("EncoderNotAnswering"));
    let said = format!("2 of 2 servers answer; encoder {name}: 0 of 1 answer (pod {pod} is not ready)");
    assert_eq!(message(&job), said);
    assert_eq!(case.event("vqa", "NotReady").await?.0, said);

    case.kubelet.run(&pod).await?;
    case.serving("vqa", "to be ready again", is_ready).await?;
    Ok(())
}

#[tokio::test]
async fn no_server_is_made_to_call_an_encoder_that_is_not_up() -> Result<()> {
    let case = Case::start("encoder-first").await?;
    case.artifact("model", 'a').await?;
    let mut manifest = serving_with_encoder("vqa", "model");
    manifest["spec"]["encoders"][0]["autoscaling"] = json!({"minReplicas": 1, "maxReplicas": 4});
    manifest["spec"]["encoders"][0]["resources"] = json!({"requests": {"cpu": "100m"}});
    case.apply(&manifest).await?;
    let running = case.kubelet.run_all(ALL);
    case.serving("vqa", "to be ready", is_ready).await?;
    let old = case.encoders(1).await?.remove(0);
    case.patch::<Deployment>(&old, json!({"spec": {"replicas": 3}})).await?;
    case.kubelet.pods(ENCODERS, 3, LIMIT).await?;
    drop(running);

    case.artifact("model", 'b').await?;
    let new = case.encoders(2).await?.into_iter().find(|name| *name != old).unwrap();
    let begun = case.namespace.api::<Deployment>().get(&new).await?;
    assert_eq!(begun.spec.replicas, Some(3), "as many as the one before it");
    let waits = |job: &ServingJob| {
        let progress = conditions(job).unwrap_or_default().iter().find(|condition| condition.type_ == "Progressing");
        progress
            .is_some_and(|said| said.message.ends_with(&format!("its servers wait for encoder {new}: 0 of 3 answer")))
    };
    let job = case.serving("vqa", "to wait for the encoder", waits).await?;
    assert!(is_ready(&job), "{}", message(&job));
    let called = async || {
        let servers = case.namespace.api::<Deployment>().get("vqa-server").await?;
        anyhow::Ok(servers.spec.template.metadata.unwrap().annotations.unwrap()["sensorium.dev/encoders"].clone())
    };
    assert_eq!(called().await?, old);
    let running = case.kubelet.run_all(ALL);
    let rolled = |job: &ServingJob| {
        job.status.as_ref().is_some_and(|status| status.digest == Some(digest('b'))) && is_ready(job)
    };
    case.serving("vqa", "to serve the newer one", rolled).await?;
    assert_eq!(called().await?, new);
    drop(running);
    Ok(())
}

#[tokio::test]
async fn what_servers_of_an_older_revision_need_is_made_again_while_a_newer_one_is_tried() -> Result<()> {
    let case = Case::start("encoder-deleted").await?;
    case.artifact("model", 'a').await?;
    let mut manifest = serving_with_encoder("vqa", "model");
    manifest["spec"]["rollout"] = json!({"canary": {"steps": [{"weight": 50, "pauseSeconds": 600}]}});
    case.apply(&manifest).await?;
    let running = case.kubelet.run_all(ALL);
    case.serving("vqa", "to be ready", is_ready).await?;
    let old = case.encoders(1).await?.remove(0);
    let config = async || {
        let deployment = case.namespace.api::<Deployment>().get("vqa-server").await?;
        let volumes = deployment.spec.template.spec.unwrap().volumes.unwrap();
        anyhow::Ok(volumes.into_iter().find_map(|volume| volume.config_map).unwrap().name)
    };
    let config = config().await?;
    case.artifact("model", 'b').await?;
    case.namespace.eventually::<Deployment>("vqa-canary", "to exist", LIMIT, |_| true).await?;
    // Numbers of the new spec are not those of the old revision, which nobody speaks of any more.
    let before = case.namespace.api::<Deployment>().get(&old).await?;
    case.patch::<ServingJob>("vqa", json!({"spec": {"encoders": [{"graph": "image_encoder", "replicas": 3}]}})).await?;

    case.delete::<ConfigMap>(&config).await?;
    case.namespace.eventually::<ConfigMap>(&config, "to be made again", LIMIT, |_| true).await?;
    case.delete::<Service>(&old).await?;
    case.delete::<NetworkPolicy>(&old).await?;
    case.delete::<PodDisruptionBudget>(&old).await?;
    case.delete::<Deployment>(&old).await?;
    let is_another = |deployment: &Deployment| deployment.uid() != before.uid();
    let again = case.namespace.eventually::<Deployment>(&old, "to be made again", LIMIT, is_another).await?;
    assert_eq!(again.spec.template, before.spec.template);
    assert_eq!(again.spec.replicas, Some(1));
    let service = case.namespace.eventually::<Service>(&old, "to be made again", LIMIT, |_| true).await?;
    assert_eq!(service.spec.unwrap().cluster_ip.as_deref(), Some("None"));
    case.namespace.eventually::<NetworkPolicy>(&old, "to be made again", LIMIT, |_| true).await?;
    case.namespace.eventually::<PodDisruptionBudget>(&old, "to be made again", LIMIT, |_| true).await?;
    let (said, _) = case.event("vqa", "MadeAgain").await?;
    assert!(said.contains(&config) || said.contains(&old), "{said}");
    case.serving("vqa", "to be ready again", is_ready).await?;

    // The new revision takes over, and nothing of the old one is left.
    case.patch::<ServingJob>("vqa", json!({"spec": {"rollout": {"canary": null}}})).await?;
    let rolled = |job: &ServingJob| {
        job.status.as_ref().is_some_and(|status| status.digest == Some(digest('b'))) && is_ready(job)
    };
    case.serving("vqa", "to serve the newer one", rolled).await?;
    case.namespace.eventually_gone::<Deployment>(&old, LIMIT).await?;
    let records = case.namespace.api::<ControllerRevision>();
    let deadline = Instant::now() + LIMIT;
    while records.list(&ListParams::default().labels(ALL)).await?.items.len() > 1 {
        anyhow::ensure!(Instant::now() < deadline, "records of revisions that are over stay");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let pods = case.namespace.api::<Pod>().list(&ListParams::default().labels(ENCODERS)).await?;
    assert!(pods.iter().all(|pod| pod.labels()["sensorium.dev/encoder"] != old));
    drop(running);
    Ok(())
}

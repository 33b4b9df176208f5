//! TrainingJobs: from apply to artifact, through failures, evictions, suspension and deadlines.

use std::time::{Duration, Instant};

use anyhow::Result;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, ResourceQuota};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use sensorium_api::{ModelArtifact, TrainingJob};
use sensorium_tests::refusal;
use serde_json::json;

use crate::common::{Case, LIMIT, holds, reason, result, training};

#[tokio::test]
async fn a_job_runs_reports_and_leaves_a_recorded_artifact() -> Result<()> {
    let case = Case::start("train").await?;
    let pods = case.running("vqa", |_| {}).await?;
    case.succeed(&pods, "vqa-model", 'a').await?;
    let job = case.training("vqa", "to be complete", |job| holds(job, "Complete")).await?;
    let status = job.status.unwrap();
    assert_eq!(status.artifact.unwrap().digest, crate::common::digest('a'));
    assert_eq!((status.restarts, status.disruptions, status.attempt), (0, 0, 1));
    let artifact = case.namespace.api::<ModelArtifact>().get("vqa-model-aaaaaaaaaa").await?;
    assert_eq!(artifact.spec.modalities, ["text", "image"]);
    assert_eq!(artifact.spec.lineage.job.unwrap().name, "vqa");
    assert!(artifact.metadata.owner_references.is_none(), "it outlives the job");
    Ok(())
}

#[tokio::test]
async fn workers_get_what_torchrun_gives_and_nothing_that_they_do_not_need() -> Result<()> {
    let case = Case::start("pods").await?;
    case.apply(&training("vqa")).await?;
    let pods = case.workers("vqa", 1, 2).await?;
    let pod = case.namespace.api::<Pod>().get(&pods[1]).await?;
    let spec = pod.spec.unwrap();
    let env = |name: &str| {
        let variable = spec.containers[0].env.iter().flatten().find(|variable| variable.name == name);
        variable.and_then(|variable| variable.value.clone()).unwrap_or_default()
    };
    assert_eq!(
        (env("WORLD_SIZE"), env("RANK"), env("MASTER_PORT")),
        ("2".into(), "$(POD_INDEX)".into(), "29500".into())
    );
    assert_eq!(env("MASTER_ADDR"), "vqa-worker-1-0.vqa-worker");
    assert_eq!((spec.hostname.as_deref(), spec.subdomain.as_deref()), (Some("vqa-worker-1-1"), Some("vqa-worker")));
    assert_eq!(spec.automount_service_account_token, Some(false));
    assert_eq!(spec.security_context.unwrap().run_as_non_root, Some(true));
    assert!(case.job_file(&pods[1]).await?.contains("\"specHash\""));
    Ok(())
}

#[tokio::test]
async fn a_namespace_under_the_restricted_standard_takes_the_pods() -> Result<()> {
    let case = Case::start("restricted").await?;
    let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(case.namespace.client().clone());
    let labels = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    namespaces.patch(case.namespace.name(), &PatchParams::default(), &Patch::Merge(&labels)).await?;
    case.apply(&training("vqa")).await?;
    case.workers("vqa", 1, 2).await?;
    Ok(())
}

#[tokio::test]
async fn a_failed_worker_restarts_the_whole_group() -> Result<()> {
    let case = Case::start("restart").await?;
    let pods = case.running("vqa", |_| {}).await?;
    case.kubelet.fail(&pods[1], 1, "out of luck").await?;
    let job = case.training("vqa", "to notice", |job| holds(job, "Restarting")).await?;
    assert_eq!(job.status.unwrap().restarts, 1);
    let again = case.workers("vqa", 2, 2).await?;
    assert!(again.iter().all(|pod| pod.starts_with("vqa-worker-2-")), "{again:?}");
    let left = case.namespace.api::<Pod>().list(&ListParams::default().labels("sensorium.dev/attempt=1")).await?;
    assert!(left.items.is_empty(), "no pod of the first attempt may be left when the second starts");
    case.kubelet.run(&again[0]).await?;
    case.kubelet.run(&again[1]).await?;
    case.succeed(&again, "vqa-model", 'b').await?;
    case.training("vqa", "to be complete", |job| holds(job, "Complete")).await?;
    Ok(())
}

#[tokio::test]
async fn an_evicted_worker_does_not_cost_a_restart() -> Result<()> {
    let case = Case::start("evict").await?;
    let pods = case.running("vqa", |job| job["spec"]["failurePolicy"] = json!({"maxRestarts": 0})).await?;
    case.kubelet.disrupt(&pods[0], "EvictionByEvictionAPI").await?;
    case.kubelet.fail(&pods[0], 143, "").await?;
    case.workers("vqa", 2, 2).await?;
    let job =
        case.training("vqa", "to count it", |job| job.status.as_ref().is_some_and(|s| s.disruptions == 1)).await?;
    assert_eq!(job.status.unwrap().restarts, 0);
    Ok(())
}

#[tokio::test]
async fn a_pod_that_vanishes_with_its_node_does_not_cost_a_restart() -> Result<()> {
    let case = Case::start("vanish").await?;
    let pods = case.running("vqa", |job| job["spec"]["failurePolicy"] = json!({"maxRestarts": 0})).await?;
    case.kubelet.disrupt(&pods[1], "DeletionByTaintManager").await?;
    case.kubelet.delete(&pods[1]).await?;
    case.workers("vqa", 2, 2).await?;
    Ok(())
}

#[tokio::test]
async fn exit_code_2_fails_the_job_with_the_programs_own_words() -> Result<()> {
    let case = Case::start("usage").await?;
    let pods = case.running("vqa", |_| {}).await?;
    let mut said = result("vqa-model", 'a');
    said["state"] = json!("failed");
    said["message"] = json!("spec.data.train: pvc://datasets/train has no index.json");
    said["artifact"] = json!(null);
    case.kubelet.fail(&pods[0], 2, &said.to_string()).await?;
    let job = case.training("vqa", "to fail", |job| holds(job, "Failed")).await?;
    assert_eq!(reason(&job, "Failed"), Some("JobFailed"));
    assert!(job.status.unwrap().message.unwrap().contains("has no index.json"));
    Ok(())
}

#[tokio::test]
async fn a_worker_that_fails_long_after_the_start_is_judged_by_its_exit_code() -> Result<()> {
    let case = Case::start("late").await?;
    let change = |job: &mut serde_json::Value| {
        job["spec"]["preRunningDeadlineSeconds"] = json!(30);
        job["spec"]["failurePolicy"] = json!({"maxRestarts": 0});
    };
    let pods = case.running("vqa", change).await?;
    // As long ago as a group may take to be whole, and more.
    tokio::time::sleep(Duration::from_secs(32)).await;
    case.kubelet.fail(&pods[1], 1, "out of luck").await?;
    let job = case.training("vqa", "to fail", |job| holds(job, "Failed")).await?;
    assert_eq!(reason(&job, "Failed"), Some("RestartsExhausted"));
    let status = job.status.unwrap();
    assert!(status.message.as_ref().unwrap().contains("out of luck"), "{:?}", status.message);
    assert_eq!((status.attempt, status.disruptions), (1, 0));
    Ok(())
}

#[tokio::test]
async fn a_job_that_is_made_anew_runs_anew_whatever_its_predecessor_has_left() -> Result<()> {
    let case = Case::start("anew").await?;
    let pods = case.running("vqa", |_| {}).await?;
    case.succeed(&pods, "vqa-model", 'a').await?;
    case.training("vqa", "to be complete", |job| holds(job, "Complete")).await?;
    let old = case.namespace.api::<Job>().get("vqa-worker-1").await?.uid();
    case.namespace.api::<TrainingJob>().delete("vqa", &DeleteParams::default()).await?;
    case.apply(&training("vqa")).await?;
    let has_job = |job: &TrainingJob| reason(job, "PodsReady") == Some("Starting");
    case.training("vqa", "to start", has_job).await?;
    let is_anew = async || {
        let job = case.namespace.api::<Job>().get_opt("vqa-worker-1").await?.and_then(|job| job.uid());
        let pods = case.namespace.api::<Pod>().list(&ListParams::default()).await?;
        let is_old = |pod: &Pod| pod.owner_references().iter().any(|owner| Some(&owner.uid) == old.as_ref());
        anyhow::Ok(job.is_some() && job != old && !pods.items.iter().any(is_old))
    };
    let begun = Instant::now();
    while !is_anew().await? {
        assert!(begun.elapsed() < LIMIT, "its Job is there, and nothing of the old one");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let pods = case.workers("vqa", 1, 2).await?;
    for pod in &pods {
        case.kubelet.run(pod).await?;
    }
    case.succeed(&pods, "vqa-model", 'b').await?;
    let job = case.training("vqa", "to be complete", |job| holds(job, "Complete")).await?;
    assert_eq!(job.status.unwrap().artifact.unwrap().digest, crate::common::digest('b'));
    Ok(())
}

#[tokio::test]
async fn what_the_cluster_does_not_let_be_made_is_in_the_status() -> Result<()> {
    let case = Case::start("quota").await?;
    let quotas: Api<ResourceQuota> = case.namespace.api();
    let none = json!({"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}});
    quotas.create(&PostParams::default(), &serde_json::from_value(none)?).await?;
    // A quota holds once it has been counted.
    let counted = async || anyhow::Ok(quotas.get("none").await?.status.is_some_and(|status| status.hard.is_some()));
    let begun = Instant::now();
    while !counted().await? {
        assert!(begun.elapsed() < LIMIT, "the quota is counted");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    case.apply(&training("vqa")).await?;
    let is_refused = |job: &TrainingJob| reason(job, "PodsReady") == Some("RefusedByCluster");
    let job = case.training("vqa", "to be refused", is_refused).await?;
    assert!(job.status.unwrap().message.unwrap().contains("exceeded quota"));
    quotas.delete("none", &DeleteParams::default()).await?;
    case.workers("vqa", 1, 2).await?;
    Ok(())
}

#[tokio::test]
async fn the_last_restart_is_the_last_and_its_pods_stay_for_their_logs() -> Result<()> {
    let case = Case::start("spent").await?;
    let pods = case.running("vqa", |job| job["spec"]["failurePolicy"] = json!({"maxRestarts": 0})).await?;
    case.kubelet.fail(&pods[1], 137, "").await?;
    let job = case.training("vqa", "to fail", |job| holds(job, "Failed")).await?;
    assert_eq!(reason(&job, "Failed"), Some("RestartsExhausted"));
    assert!(case.namespace.api::<Pod>().get_opt(&pods[1]).await?.is_some());
    Ok(())
}

#[tokio::test]
async fn a_rule_decides_by_exit_code() -> Result<()> {
    let case = Case::start("rule").await?;
    let rules = json!({"maxRestarts": 0, "rules": [{"exitCodes": [42], "action": "ignore"}]});
    let pods = case.running("vqa", |job| job["spec"]["failurePolicy"] = rules).await?;
    case.kubelet.fail(&pods[0], 42, "").await?;
    case.workers("vqa", 2, 2).await?;
    Ok(())
}

#[tokio::test]
async fn a_suspended_job_gives_its_pods_back_and_goes_on_when_it_may() -> Result<()> {
    let case = Case::start("suspend").await?;
    case.running("vqa", |_| {}).await?;
    case.patch::<TrainingJob>("vqa", json!({"spec": {"suspend": true}})).await?;
    let job = case.training("vqa", "to be suspended", |job| holds(job, "Suspended")).await?;
    assert_eq!(job.status.unwrap().start_time, None, "the deadline starts anew");
    // Nobody plays the node here, so the pods that the Job takes away wait for somebody to confirm it.
    let ending = case.namespace.api::<Pod>().list(&ListParams::default().labels("sensorium.dev/name=vqa")).await?;
    for pod in ending {
        // It may have gone by itself.
        let _ = case.kubelet.delete(&pod.name_any()).await;
    }
    case.workers("vqa", 1, 0).await?;
    case.patch::<TrainingJob>("vqa", json!({"spec": {"suspend": false}})).await?;
    for pod in case.workers("vqa", 1, 2).await? {
        case.kubelet.run(&pod).await?;
    }
    let job = case.training("vqa", "to run again", |job| holds(job, "PodsReady") && !holds(job, "Suspended")).await?;
    assert_eq!((job.status.as_ref().unwrap().attempt, job.status.unwrap().restarts), (1, 0));
    Ok(())
}

#[tokio::test]
async fn a_job_that_is_created_suspended_starts_nothing() -> Result<()> {
    let case = Case::start("held").await?;
    let mut manifest = training("vqa");
    manifest["spec"]["suspend"] = json!(true);
    case.apply(&manifest).await?;
    case.training("vqa", "to be suspended", |job| holds(job, "Suspended")).await?;
    assert!(case.namespace.api::<Job>().list(&ListParams::default()).await?.items.is_empty());
    case.patch::<TrainingJob>("vqa", json!({"spec": {"suspend": false}})).await?;
    case.workers("vqa", 1, 2).await?;
    Ok(())
}

#[tokio::test]
async fn a_queued_job_waits_for_kueue_and_never_touches_suspend_itself() -> Result<()> {
    let case = Case::start("queue").await?;
    let mut manifest = training("vqa");
    manifest["spec"]["scheduling"] = json!({"queueName": "team-a"});
    case.apply(&manifest).await?;
    let job: Job = case.namespace.eventually("vqa-worker-1", "to wait", LIMIT, |_: &Job| true).await?;
    assert_eq!(job.labels()["kueue.x-k8s.io/queue-name"], "team-a");
    assert_eq!(job.spec.unwrap().suspend, Some(true));
    case.training("vqa", "to say so", |job| reason(job, "PodsReady") == Some("Queued")).await?;
    case.patch::<Job>("vqa-worker-1", json!({"spec": {"suspend": false}})).await?;
    for pod in case.workers("vqa", 1, 2).await? {
        case.kubelet.run(&pod).await?;
    }
    case.training("vqa", "to run", |job| holds(job, "PodsReady")).await?;
    Ok(())
}

#[tokio::test]
async fn a_group_that_is_not_whole_in_time_makes_room_and_comes_back_narrower() -> Result<()> {
    let case = Case::start("gang").await?;
    let mut manifest = training("vqa");
    manifest["spec"]["preRunningDeadlineSeconds"] = json!(15);
    manifest["spec"]["elastic"] = json!({"minWorkers": 1, "maxWorkers": 2});
    case.apply(&manifest).await?;
    let pods = case.workers("vqa", 1, 2).await?;
    case.kubelet.run(&pods[0]).await?;
    let job =
        case.training("vqa", "to make room", |job| job.status.as_ref().is_some_and(|s| s.disruptions == 1)).await?;
    let status = job.status.unwrap();
    assert!(status.last_failure.unwrap().message.starts_with("only 1 of 2 workers ran within 15 s"));
    for pod in &pods {
        // It is the node that ends a pod that had run.
        let _ = case.kubelet.delete(pod).await;
    }
    let again = case.workers("vqa", 2, 1).await?;
    case.kubelet.run(&again[0]).await?;
    let job = case.training("vqa", "to run", |job| holds(job, "PodsReady")).await?;
    assert_eq!(job.status.unwrap().workers, Some(1));
    assert!(case.job_file(&again[0]).await?.contains("\"data\": 1"), "the worker is told of its width");
    Ok(())
}

#[tokio::test]
async fn a_deadline_ends_a_job_that_runs_too_long() -> Result<()> {
    let case = Case::start("deadline").await?;
    case.running("vqa", |job| job["spec"]["activeDeadlineSeconds"] = json!(3)).await?;
    let job = case.training("vqa", "to be ended", |job| holds(job, "Failed")).await?;
    assert_eq!(reason(&job, "Failed"), Some("DeadlineExceeded"));
    case.namespace
        .eventually("vqa-worker-1", "to go", LIMIT, |job: &Job| job.metadata.deletion_timestamp.is_some())
        .await
        .map(drop)
        .or_else(|error| if error.to_string().contains("does not exist") { Ok(()) } else { Err(error) })
}

#[tokio::test]
async fn a_finished_job_is_deleted_when_its_time_has_come_and_its_artifact_stays() -> Result<()> {
    let case = Case::start("ttl").await?;
    let pods = case.running("vqa", |job| job["spec"]["ttlSecondsAfterFinished"] = json!(1)).await?;
    case.succeed(&pods, "vqa-model", 'c').await?;
    case.namespace.eventually_gone::<TrainingJob>("vqa", LIMIT).await?;
    case.namespace.api::<ModelArtifact>().get("vqa-model-cccccccccc").await?;
    Ok(())
}

#[tokio::test]
async fn what_is_trained_cannot_change_and_how_it_runs_can() -> Result<()> {
    let case = Case::start("immutable").await?;
    case.running("vqa", |_| {}).await?;
    let error = case.patch::<TrainingJob>("vqa", json!({"spec": {"training": {"steps": 20}}})).await.unwrap_err();
    assert!(refusal(&error).unwrap().contains("cannot change once the job is created"), "{error}");
    case.patch::<TrainingJob>("vqa", json!({"spec": {"ttlSecondsAfterFinished": 100_000}})).await?;
    Ok(())
}

#[tokio::test]
async fn a_job_that_starts_from_an_artifact_waits_for_it_and_pins_its_digest() -> Result<()> {
    let case = Case::start("source").await?;
    let mut manifest = training("tune");
    manifest["spec"]["model"] = json!({"artifact": "base"});
    case.apply(&manifest).await?;
    let job = case.training("tune", "to wait", |job| reason(job, "ArtifactsReady") == Some("ArtifactNotReady")).await?;
    assert!(job.status.unwrap().message.unwrap().contains("waits for artifact base"));
    case.artifact("base", 'd').await?;
    let pods = case.workers("tune", 1, 2).await?;
    assert!(case.job_file(&pods[0]).await?.contains(&crate::common::digest('d')));
    Ok(())
}

#[tokio::test]
async fn what_keeps_a_pod_from_running_is_in_the_status() -> Result<()> {
    let case = Case::start("pull").await?;
    case.apply(&training("vqa")).await?;
    let pods = case.workers("vqa", 1, 2).await?;
    case.kubelet.cannot_pull(&pods[0], "no such image").await?;
    let told = |job: &TrainingJob| {
        let message = job.status.as_ref().and_then(|status| status.message.clone()).unwrap_or_default();
        message.contains("ImagePullBackOff") && message.contains("no such image")
    };
    case.training("vqa", "to say why", told).await?;
    Ok(())
}

#[tokio::test]
async fn gpus_bring_shared_memory_a_toleration_and_the_right_nodes() -> Result<()> {
    let case = Case::start("gpu").await?;
    let mut manifest = training("vqa");
    manifest["spec"]["resources"] = json!({"limits": {"nvidia.com/mig-1g.10gb": "1"}});
    manifest["spec"]["scheduling"] = json!({"gpuProduct": "NVIDIA-H100-80GB-HBM3"});
    case.apply(&manifest).await?;
    let pods = case.workers("vqa", 1, 2).await?;
    let spec = case.namespace.api::<Pod>().get(&pods[0]).await?.spec.unwrap();
    assert_eq!(spec.node_selector.unwrap()["nvidia.com/gpu.product"], "NVIDIA-H100-80GB-HBM3");
    assert!(spec.tolerations.unwrap().iter().any(|toleration| toleration.key.as_deref() == Some("nvidia.com/gpu")));
    assert!(spec.containers[0].volume_mounts.as_ref().unwrap().iter().any(|mount| mount.mount_path == "/dev/shm"));
    Ok(())
}

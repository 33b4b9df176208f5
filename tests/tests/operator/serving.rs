//! ServingJobs: servers, routes, rollouts, canaries.

use anyhow::Result;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ResourceQuota, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;
use kube::api::{ListParams, Patch, PatchParams};
use sensorium_api::ServingJob;
use serde_json::json;

use crate::common::{Case, LIMIT, digest, holds_of, reason_of, serving, serving_with_encoder};

fn conditions(job: &ServingJob) -> Option<&[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition]> {
    job.status.as_ref().map(|status| &status.conditions[..])
}

fn is_ready(job: &ServingJob) -> bool {
    holds_of(conditions(job), "Ready")
}

const SERVERS: &str = "sensorium.dev/kind=ServingJob";
const SERVERS_ALONE: &str = "sensorium.dev/kind=ServingJob,app.kubernetes.io/component=server";

async fn ready(name: &str) -> Result<Case> {
    let case = Case::start(name).await?;
    case.artifact("model", 'a').await?;
    case.apply(&serving("vqa", "model")).await?;
    for pod in case.kubelet.pods(SERVERS, 2, LIMIT).await? {
        case.kubelet.run(&pod.name_any()).await?;
    }
    case.serving("vqa", "to be ready", is_ready).await?;
    Ok(case)
}

#[tokio::test]
async fn a_job_is_ready_when_its_servers_answer_and_not_before() -> Result<()> {
    let case = Case::start("serve").await?;
    case.apply(&serving("vqa", "model")).await?;
    case.serving("vqa", "to wait", |job| reason_of(conditions(job), "ArtifactsReady") == Some("ArtifactNotReady"))
        .await?;
    case.artifact("model", 'a').await?;
    let pods = case.kubelet.pods(SERVERS, 2, LIMIT).await?;
    case.kubelet.run_unready(&pods[0].name_any()).await?;
    let job = case.serving("vqa", "to start", |job| holds_of(conditions(job), "ArtifactsReady")).await?;
    assert!(!is_ready(&job));
    for pod in &pods {
        case.kubelet.run(&pod.name_any()).await?;
    }
    let job = case.serving("vqa", "to be ready", is_ready).await?;
    let status = job.status.unwrap();
    assert_eq!((status.ready_replicas, status.digest), (2, Some(digest('a'))));
    let service = case.namespace.api::<Service>().get("vqa").await?;
    let ports: Vec<i32> = service.spec.unwrap().ports.unwrap().iter().map(|port| port.port).collect();
    assert_eq!(ports, [8001, 8000, 8002]);
    case.namespace.api::<PodDisruptionBudget>().get("vqa-server").await?;
    Ok(())
}

#[tokio::test]
async fn a_job_whose_pods_crash_is_not_ready_and_says_how_they_crash() -> Result<()> {
    let case = ready("crash").await?;
    let pods = case.kubelet.pods(SERVERS, 2, LIMIT).await?;
    case.kubelet.crash_loop(&pods[0].name_any(), 1, "cannot open the model", 3).await?;
    let job = case.serving("vqa", "to notice", |job| !is_ready(job)).await?;
    assert_eq!(reason_of(conditions(&job), "Ready"), Some("PodsCrash"));
    assert!(job.status.unwrap().message.unwrap().contains("cannot open the model"));
    Ok(())
}

#[tokio::test]
async fn a_newer_artifact_of_the_name_rolls_out_by_itself_before_an_old_server_stops() -> Result<()> {
    let case = ready("rollout").await?;
    case.artifact("model", 'b').await?;
    let running = case.kubelet.run_all(SERVERS);
    let rolled = |job: &ServingJob| {
        job.status.as_ref().is_some_and(|status| status.digest == Some(digest('b'))) && is_ready(job)
    };
    let watched = async {
        loop {
            // Never fewer than the two that are wanted.
            let deployment = case.namespace.api::<Deployment>().get("vqa-server").await?;
            let available = deployment.status.and_then(|status| status.available_replicas).unwrap_or(0);
            anyhow::ensure!(available >= 2, "only {available} servers were available during the rollout");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        outcome = case.serving("vqa", "to serve the newer one", rolled) => { outcome?; }
        outcome = watched => { let never: Result<()> = outcome; never?; }
    }
    drop(running);
    Ok(())
}

#[tokio::test]
async fn while_ports_change_each_server_is_called_at_its_own() -> Result<()> {
    let case = ready("ports").await?;
    let grpc = async || {
        let slices = ListParams::default().labels("kubernetes.io/service-name=vqa");
        let slices: Vec<EndpointSlice> = case.namespace.api::<EndpointSlice>().list(&slices).await?.items;
        let mut called: Vec<(i32, usize)> = slices
            .iter()
            .filter_map(|slice| {
                let port = slice.ports.iter().flatten().find(|port| port.name.as_deref() == Some("grpc"))?.port?;
                Some((port, slice.endpoints.as_ref().map_or(0, Vec::len)))
            })
            .filter(|(_, servers)| *servers > 0)
            .collect();
        called.sort_unstable();
        anyhow::Ok(called)
    };
    assert_eq!(grpc().await?, [(8001, 2)]);
    case.patch::<ServingJob>("vqa", json!({"spec": {"ports": {"grpc": 9001}}})).await?;
    let offers = |service: &Service| {
        let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_ref());
        ports.is_some_and(|ports| ports.iter().any(|port| port.port == 9001))
    };
    case.namespace.eventually::<Service>("vqa", "to offer the new port", LIMIT, offers).await?;
    // One more server, as the rollout begins: nobody runs it yet, so its address is not known.
    case.kubelet.pods(SERVERS, 3, LIMIT).await?;
    // By the time that the controller of EndpointSlices has seen that pod, it has long seen the Service.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(grpc().await?, [(8001, 2)], "the old servers listen where they did");

    let running = case.kubelet.run_all(SERVERS);
    let deadline = std::time::Instant::now() + LIMIT;
    while grpc().await? != [(9001, 2)] {
        anyhow::ensure!(std::time::Instant::now() < deadline, "called at {:?}", grpc().await?);
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    drop(running);
    Ok(())
}

#[tokio::test]
async fn an_encoder_that_is_not_up_is_named() -> Result<()> {
    let case = Case::start("encoder-down").await?;
    case.artifact("model", 'a').await?;
    case.apply(&serving_with_encoder("vqa", "model")).await?;
    let name = case.encoders(1).await?.remove(0);
    // Real servers would not be ready either.
    let servers = case.kubelet.run_all(SERVERS_ALONE);
    let says = |job: &ServingJob| {
        let message = job.status.as_ref().and_then(|status| status.message.clone()).unwrap_or_default();
        message == format!("2 of 2 servers answer; encoder {name}: 0 of 1 answer")
    };
    let job = case.serving("vqa", "to name the encoder", says).await?;
    assert!(!holds_of(conditions(&job), "WorkloadsReady"));
    let encoders = case.kubelet.run_all(SERVERS);
    case.serving("vqa", "to be whole", |job| holds_of(conditions(job), "WorkloadsReady")).await?;
    let job = case.serving("vqa", "to be ready", is_ready).await?;
    assert_eq!(job.status.unwrap().ready_replicas, 2, "encoders are no servers");
    let slices: Vec<EndpointSlice> = case
        .namespace
        .api::<EndpointSlice>()
        .list(&ListParams::default().labels("kubernetes.io/service-name=vqa"))
        .await?
        .items;
    let addresses: usize = slices.iter().map(|slice| slice.endpoints.as_ref().map_or(0, Vec::len)).sum();
    assert_eq!(addresses, 2, "clients do not reach encoders by the job's Service");
    drop((servers, encoders));
    Ok(())
}

#[tokio::test]
async fn a_rollout_brings_its_own_encoders_and_the_old_ones_stay_for_the_old_servers() -> Result<()> {
    let case = Case::start("rollout-encoder").await?;
    case.artifact("model", 'a').await?;
    case.apply(&serving_with_encoder("vqa", "model")).await?;
    let running = case.kubelet.run_all(SERVERS);
    case.serving("vqa", "to be ready", is_ready).await?;
    let old = case.encoders(1).await?.remove(0);
    case.artifact("model", 'b').await?;
    let rolled = |job: &ServingJob| {
        job.status.as_ref().is_some_and(|status| status.digest == Some(digest('b'))) && is_ready(job)
    };
    let watched = async {
        loop {
            // Pods first: an encoder that goes after its last server is no fault.
            let pods = case.namespace.api::<Pod>().list(&ListParams::default().labels(SERVERS_ALONE)).await?;
            let encoders = case.namespace.api::<Deployment>();
            for pod in &pods {
                let called = &pod.annotations()["sensorium.dev/encoders"];
                let is_there = encoders.get_metadata_opt(called).await?.is_some();
                let has_gone = case.namespace.api::<Pod>().get_metadata_opt(&pod.name_any()).await?.is_none();
                anyhow::ensure!(is_there || has_gone, "{} calls {called}, which is gone", pod.name_any());
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        outcome = case.serving("vqa", "to serve the newer one", rolled) => { outcome?; }
        outcome = watched => { let never: Result<()> = outcome; never?; }
    }
    case.namespace.eventually_gone::<Deployment>(&old, LIMIT).await?;
    case.namespace.eventually_gone::<Service>(&old, LIMIT).await?;
    assert_ne!(case.encoders(1).await?, [old]);
    drop(running);
    Ok(())
}

#[tokio::test]
async fn kubectl_scale_changes_the_number_of_servers() -> Result<()> {
    let case = ready("scale").await?;
    let scale = json!({"spec": {"replicas": 3}});
    let api = case.namespace.api::<ServingJob>();
    api.patch_scale("vqa", &PatchParams::default(), &Patch::Merge(&scale)).await?;
    case.kubelet.pods(SERVERS, 3, LIMIT).await?;
    let scale = api.get_scale("vqa").await?;
    assert!(scale.status.unwrap().selector.unwrap().contains("sensorium.dev/name=vqa"));
    Ok(())
}

#[tokio::test]
async fn an_autoscaled_job_leaves_the_number_to_the_autoscaler() -> Result<()> {
    let case = Case::start("hpa").await?;
    case.artifact("model", 'a').await?;
    let mut manifest = serving("vqa", "model");
    manifest["spec"].as_object_mut().unwrap().remove("replicas");
    manifest["spec"]["autoscaling"] = json!({"minReplicas": 1, "maxReplicas": 5});
    manifest["spec"]["resources"] = json!({"requests": {"cpu": "100m"}});
    case.apply(&manifest).await?;
    case.namespace.eventually::<HorizontalPodAutoscaler>("vqa-server", "to exist", LIMIT, |_| true).await?;
    case.namespace.eventually::<Deployment>("vqa-server", "to exist", LIMIT, |_| true).await?;
    case.patch::<Deployment>("vqa-server", json!({"spec": {"replicas": 3}})).await?;
    case.patch::<ServingJob>("vqa", json!({"spec": {"batching": {"maxBatchSize": 8}}})).await?;
    let changed = |deployment: &Deployment| deployment.metadata.generation > Some(2);
    let deployment = case.namespace.eventually::<Deployment>("vqa-server", "to change", LIMIT, changed).await?;
    assert_eq!(deployment.spec.replicas, Some(3), "the operator does not take the number back");
    Ok(())
}

#[tokio::test]
async fn a_job_that_is_autoscaled_from_now_on_keeps_the_servers_that_it_has() -> Result<()> {
    let case = Case::start("to-hpa").await?;
    case.artifact("model", 'a').await?;
    let mut manifest = serving("vqa", "model");
    manifest["spec"]["replicas"] = json!(3);
    case.apply(&manifest).await?;
    case.kubelet.pods(SERVERS, 3, LIMIT).await?;
    let autoscaling = json!({"spec": {
        "replicas": null,
        "autoscaling": {"minReplicas": 1, "maxReplicas": 5},
        "resources": {"requests": {"cpu": "100m"}},
    }});
    case.patch::<ServingJob>("vqa", autoscaling).await?;
    let asks_for = |cpu: &'static str| {
        move |deployment: &Deployment| {
            let resources = deployment.spec.template.spec.as_ref().and_then(|pod| pod.containers[0].resources.as_ref());
            let requests = resources.and_then(|resources| resources.requests.as_ref());
            requests.and_then(|requests| requests.get("cpu")).is_some_and(|found| found.0 == cpu)
        }
    };
    let deployment =
        case.namespace.eventually::<Deployment>("vqa-server", "to change", LIMIT, asks_for("100m")).await?;
    assert_eq!(deployment.spec.replicas, Some(3));
    // It is the autoscaler's now.
    case.patch::<Deployment>("vqa-server", json!({"spec": {"replicas": 2}})).await?;
    case.patch::<ServingJob>("vqa", json!({"spec": {"resources": {"requests": {"cpu": "200m"}}}})).await?;
    let deployment =
        case.namespace.eventually::<Deployment>("vqa-server", "to change", LIMIT, asks_for("200m")).await?;
    assert_eq!(deployment.spec.replicas, Some(2));
    Ok(())
}

#[tokio::test]
async fn what_a_spec_says_no_longer_is_taken_away() -> Result<()> {
    let case = Case::start("taken-away").await?;
    case.artifact("model", 'a').await?;
    let mut manifest = serving("vqa", "model");
    manifest["spec"]["service"] = json!({"annotations": {"example.com/internet-facing": "true"}});
    case.apply(&manifest).await?;
    let is_faced = |service: &Service| service.annotations().contains_key("example.com/internet-facing");
    case.namespace.eventually::<Service>("vqa", "to be as asked for", LIMIT, is_faced).await?;
    // What others have said stays.
    case.patch::<Service>("vqa", json!({"metadata": {"annotations": {"example.com/other": "x"}}})).await?;
    case.patch::<ServingJob>("vqa", json!({"spec": {"service": null}})).await?;
    let service = case.namespace.eventually::<Service>("vqa", "to forget it", LIMIT, |s| !is_faced(s)).await?;
    assert!(service.annotations().contains_key("example.com/other"));
    Ok(())
}

#[tokio::test]
async fn the_file_of_old_servers_stays_until_the_new_ones_have_all_taken_their_place() -> Result<()> {
    let case = ready("files").await?;
    let file = |deployment: &Deployment| {
        let volumes = deployment.spec.template.spec.as_ref().and_then(|pod| pod.volumes.clone()).unwrap_or_default();
        volumes.into_iter().find_map(|volume| volume.config_map).map(|map| map.name).unwrap_or_default()
    };
    let old = file(&case.namespace.api::<Deployment>().get("vqa-server").await?);
    case.patch::<ServingJob>("vqa", json!({"spec": {"batching": {"maxBatchSize": 8}}})).await?;
    case.namespace.eventually::<Deployment>("vqa-server", "to change", LIMIT, |now| file(now) != old).await?;
    // An old server whose node was drained: another one takes its place, and reads what it read.
    let pods = case.kubelet.pods(SERVERS, 3, LIMIT).await?;
    let is_old = |pod: &&Pod| {
        let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        volumes.filter_map(|volume| volume.config_map.as_ref()).any(|map| map.name == old)
    };
    case.delete::<Pod>(&pods.iter().find(is_old).unwrap().name_any()).await?;
    case.serving("vqa", "to notice", |job| message(job).contains("1 of 2 servers answer")).await?;
    case.namespace.api::<ConfigMap>().get(&old).await?;
    let running = case.kubelet.run_all(SERVERS);
    case.namespace.eventually_gone::<ConfigMap>(&old, LIMIT).await?;
    drop(running);
    Ok(())
}

#[tokio::test]
async fn a_canary_goes_step_by_step_and_then_takes_over() -> Result<()> {
    let case = Case::start("canary").await?;
    case.artifact("model", 'a').await?;
    let mut manifest = serving("vqa", "model");
    manifest["spec"]["rollout"] =
        json!({"canary": {"steps": [{"weight": 30, "pauseSeconds": 1}, {"weight": 50, "pauseSeconds": 1}]}});
    case.apply(&manifest).await?;
    let running = case.kubelet.run_all(SERVERS);
    case.serving("vqa", "to be ready", is_ready).await?;
    case.artifact("model", 'b').await?;
    let canary = case.namespace.eventually::<Deployment>("vqa-canary", "to exist", LIMIT, |_| true).await?;
    assert_eq!(canary.spec.replicas, Some(1), "30 % beside two servers");
    let stable = case.namespace.api::<Deployment>().get("vqa-server").await?;
    let annotation = |deployment: &Deployment| {
        deployment.spec.template.metadata.as_ref().unwrap().annotations.as_ref().unwrap()["sensorium.dev/artifact-digest"].clone()
    };
    assert_eq!((annotation(&stable), annotation(&canary)), (digest('a'), digest('b')));
    case.namespace.eventually::<Deployment>("vqa-canary", "to be two", LIMIT, |d| d.spec.replicas == Some(2)).await?;
    let rolled = |job: &ServingJob| {
        job.status.as_ref().is_some_and(|status| status.digest == Some(digest('b'))) && is_ready(job)
    };
    case.serving("vqa", "to serve the newer one", rolled).await?;
    case.namespace.eventually_gone::<Deployment>("vqa-canary", LIMIT).await?;
    drop(running);
    Ok(())
}

#[tokio::test]
async fn a_canary_that_does_not_answer_is_rolled_back_and_the_old_servers_stay() -> Result<()> {
    let case = Case::start("rollback").await?;
    case.artifact("model", 'a').await?;
    let mut manifest = serving("vqa", "model");
    manifest["spec"]["rollout"] =
        json!({"progressDeadlineSeconds": 10, "canary": {"steps": [{"weight": 50, "pauseSeconds": 1}]}});
    case.apply(&manifest).await?;
    let running = case.kubelet.run_all(SERVERS);
    case.serving("vqa", "to be ready", is_ready).await?;
    drop(running);
    case.artifact("model", 'b').await?;
    let back = |job: &ServingJob| reason_of(conditions(job), "Progressing") == Some("RolledBack");
    let job = case.serving("vqa", "to roll back", back).await?;
    assert!(holds_of(conditions(&job), "Degraded") && is_ready(&job), "the old servers answer");
    assert_eq!(job.status.unwrap().digest, Some(digest('a')));
    case.namespace.eventually_gone::<Deployment>("vqa-canary", LIMIT).await
}

/// Whether the status speaks of the newest spec and gives this as the reason why the job is not ready.
fn is_refused(reason: &'static str) -> impl Fn(&ServingJob) -> bool {
    move |job| {
        let generation = job.metadata.generation;
        let of_this_spec = conditions(job).unwrap_or_default().iter().all(|c| c.observed_generation == generation);
        reason_of(conditions(job), "Ready") == Some(reason) && of_this_spec && !is_ready(job)
    }
}

fn message(job: &ServingJob) -> &str {
    job.status.as_ref().and_then(|status| status.message.as_deref()).unwrap_or_default()
}

#[tokio::test]
async fn a_graph_that_the_artifact_does_not_have_is_named_and_running_servers_go_on() -> Result<()> {
    let case = ready("graph").await?;
    let template = async || {
        let servers = case.namespace.api::<Deployment>().get("vqa-server").await?;
        anyhow::Ok((servers.uid(), serde_json::to_string(&servers.spec)?))
    };
    let before = template().await?;
    let asked = json!({"spec": {"encoders": [{"graph": "audio_encoder"}]}});
    case.patch::<ServingJob>("vqa", asked).await?;
    let job = case.serving("vqa", "to name the graph", is_refused("UnknownGraph")).await?;
    assert_eq!(
        message(&job),
        "spec.encoders names graph audio_encoder, which artifact model does not have; its graphs are fusion, image_encoder; \
         2 of 2 servers go on as they are"
    );
    assert_eq!(reason_of(conditions(&job), "Progressing"), Some("UnknownGraph"));
    assert!(holds_of(conditions(&job), "Degraded") && holds_of(conditions(&job), "WorkloadsReady"));
    assert_eq!(template().await?, before);
    case.encoders(0).await?;
    let (_, events) = case.event("vqa", "UnknownGraph").await?;
    assert!(!events.contains(&"NotReady".to_owned()), "{events:?}");

    // A newer artifact has the graph: nobody has to touch the job.
    let running = case.kubelet.run_all(SERVERS);
    case.artifact_of("model", 'b', &["fusion", "audio_encoder"]).await?;
    let rolled = |job: &ServingJob| {
        job.status.as_ref().is_some_and(|status| status.digest == Some(digest('b'))) && is_ready(job)
    };
    let job = case.serving("vqa", "to serve the newer one", rolled).await?;
    assert!(!holds_of(conditions(&job), "Degraded"));
    drop(running);
    Ok(())
}

#[tokio::test]
async fn what_the_cluster_refuses_is_said_in_its_words_and_tried_again() -> Result<()> {
    let case = ready("refused").await?;
    let too_much = json!({"requests": {"cpu": "2"}, "limits": {"cpu": "1"}});
    case.patch::<ServingJob>("vqa", json!({"spec": {"resources": too_much}})).await?;
    let job = case.serving("vqa", "to be refused", is_refused("RefusedByCluster")).await?;
    let said = message(&job);
    assert!(
        said.contains("Deployment/vqa-server") && said.contains("must be less than or equal to cpu limit"),
        "{said}"
    );
    assert!(said.ends_with("2 of 2 servers go on as they are"), "{said}");
    case.event("vqa", "RefusedByCluster").await?;
    case.patch::<ServingJob>("vqa", json!({"spec": {"resources": {"requests": {"cpu": "1"}}}})).await?;
    let running = case.kubelet.run_all(SERVERS);
    case.serving("vqa", "to be ready again", |job| is_ready(job) && !holds_of(conditions(job), "Progressing")).await?;

    // A quota is nothing that the operator watches.
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"},
        "spec": {"hard": {"count/deployments.apps": "1"}},
    });
    case.apply(&quota).await?;
    case.apply(&serving("other", "model")).await?;
    let job = case.serving("other", "to be refused", is_refused("RefusedByCluster")).await?;
    assert!(message(&job).contains("quota") && job.status.as_ref().unwrap().state.is_some(), "{}", message(&job));
    case.delete::<ResourceQuota>("none").await?;
    case.serving("other", "to be ready", is_ready).await?;
    drop(running);
    Ok(())
}

#[tokio::test]
async fn a_job_whose_only_server_is_deleted_says_that_none_answers() -> Result<()> {
    let case = Case::start("only").await?;
    case.artifact("model", 'a').await?;
    let mut manifest = serving("vqa", "model");
    manifest["spec"]["replicas"] = json!(1);
    case.apply(&manifest).await?;
    let pods = case.kubelet.pods(SERVERS, 1, LIMIT).await?;
    case.kubelet.run(&pods[0].name_any()).await?;
    case.serving("vqa", "to be ready", is_ready).await?;
    case.delete::<Pod>(&pods[0].name_any()).await?;
    let job = case.serving("vqa", "to notice", |job| !is_ready(job)).await?;
    assert!(message(&job).starts_with("0 of 1 servers answer"), "{}", message(&job));
    let (said, _) = case.event("vqa", "NotReady").await?;
    assert!(said.starts_with("0 of 1 servers answer"), "{said}");
    Ok(())
}

//! The real API server, the controllers behind it, and what the other tests of the operator rely on.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt};
use sensorium_api::TrainingJob;
use sensorium_tests::{ApiCluster, Kubelet, refusal, training};

/// Long enough for a busy machine; each takes a second or two.
const LIMIT: Duration = Duration::from_mins(2);

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

#[tokio::test]
async fn the_api_server_accepts_every_kind_and_their_schemas_are_structural() -> Result<()> {
    let client = ApiCluster::shared()?.client().await?;
    let kinds = Api::<CustomResourceDefinition>::all(client).list(&ListParams::default()).await?;
    let mut names = Vec::new();
    for kind in kinds.items.iter().filter(|kind| kind.spec.group == "sensorium.dev") {
        let conditions = kind.status.as_ref().and_then(|status| status.conditions.as_ref()).context("conditions")?;
        let is = |name: &str| conditions.iter().any(|one| one.type_ == name && one.status == "True");
        ensure!(is("Established") && is("NamesAccepted") && !is("NonStructuralSchema"), "{conditions:#?}");
        names.push(kind.spec.names.kind.as_str());
    }
    ensure!(names == ["CompressionJob", "ModelArtifact", "ServingJob", "TrainingJob"], "{names:?}");
    Ok(())
}

#[tokio::test]
async fn the_examples_apply() -> Result<()> {
    let namespace = ApiCluster::shared()?.namespace("examples").await?;
    for name in ["training", "compression", "serving"] {
        let manifest = fs::read_to_string(repository().join("examples/easy-vqa").join(name).with_extension("yaml"))?;
        let applied = namespace.apply(&manifest).await?;
        ensure!(applied.len() == 1 && applied[0].uid().is_some(), "{applied:#?}");
    }
    let stored = namespace.api::<TrainingJob>().get("vqa").await?;
    ensure!(stored.spec.workers == 2, "{stored:#?}");
    Ok(())
}

#[tokio::test]
async fn a_manifest_that_breaks_a_rule_is_refused_with_the_rules_own_words() -> Result<()> {
    let namespace = ApiCluster::shared()?.namespace("refused").await?;
    let error =
        namespace.apply(&training(10, 5).replace("workers: 2", "workers: 3")).await.err().context("accepted")?;
    let said = refusal(&error).context(format!("{error:#}"))?;
    ensure!(said.contains("parallelism"), "{said}");
    Ok(())
}

#[tokio::test]
async fn the_controllers_run_jobs_whose_pods_the_test_plays() -> Result<()> {
    let namespace = ApiCluster::shared()?.namespace("jobs").await?;
    let kubelet = Kubelet::new(&namespace);
    let job = "
apiVersion: batch/v1
kind: Job
metadata: {name: pair}
spec:
  completions: 2
  parallelism: 2
  completionMode: Indexed
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      containers: [{name: main, image: sensorium.dev/test}]
";
    namespace.apply(job).await?;
    let pods = kubelet.pods("job-name=pair", 2, LIMIT).await?;
    for pod in &pods {
        kubelet.run(&pod.name_any()).await?;
    }
    let ready = |job: &Job| job.status.as_ref().and_then(|status| status.ready) == Some(2);
    namespace.eventually("pair", "to have two ready pods", LIMIT, ready).await?;

    kubelet.succeed(&pods[0].name_any(), "done").await?;
    kubelet.disrupt(&pods[1].name_any(), "EvictionByEvictionAPI").await?;
    kubelet.fail(&pods[1].name_any(), 137, "killed").await?;
    let failed = |job: &Job| has_condition(job, "Failed");
    let job = namespace.eventually("pair", "to have failed", LIMIT, failed).await?;
    ensure!(job.status.as_ref().and_then(|status| status.succeeded) == Some(1), "{job:#?}");

    namespace.api::<Job>().delete("pair", &DeleteParams::background()).await?;
    namespace.eventually_gone::<Job>("pair", LIMIT).await?;
    kubelet.pods("job-name=pair", 0, LIMIT).await?;
    Ok(())
}

#[tokio::test]
async fn what_a_resource_owns_is_collected_when_it_is_deleted() -> Result<()> {
    let namespace = ApiCluster::shared()?.namespace("owned").await?;
    let owner = namespace.apply(&training(10, 5)).await?.remove(0);
    let uid = owner.uid().context("a uid")?;
    namespace
        .apply(&format!(
            "
apiVersion: v1
kind: ConfigMap
metadata:
  name: owned
  ownerReferences: [{{apiVersion: sensorium.dev/v1alpha1, kind: TrainingJob, name: tiny, uid: {uid}}}]
"
        ))
        .await?;
    namespace.api::<TrainingJob>().delete("tiny", &DeleteParams::default()).await?;
    namespace.eventually_gone::<k8s_openapi::api::core::v1::ConfigMap>("owned", LIMIT).await
}

#[test]
fn kubectl_and_helm_are_at_hand() -> Result<()> {
    let cluster = ApiCluster::shared()?;
    for (program, arguments) in
        [("kubectl", ["get", "trainingjobs", "--all-namespaces"]), ("helm", ["list", "--output", "json"])]
    {
        let output = cluster.command(program).args(arguments).output()?;
        ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn has_condition(job: &Job, kind: &str) -> bool {
    let conditions = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == kind && condition.status == "True")
}

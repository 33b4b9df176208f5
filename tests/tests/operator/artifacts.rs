//! ModelArtifacts: immutable, and trusted only once their files have been read.

use anyhow::Result;
use kube::ResourceExt;
use sensorium_api::ModelArtifact;
use sensorium_tests::refusal;
use serde_json::json;

use crate::common::{Case, LIMIT, compression, reason_of};

fn reason(artifact: &ModelArtifact) -> Option<&str> {
    reason_of(artifact.status.as_ref().map(|status| &status.conditions[..]), "Verified")
}

#[tokio::test]
async fn an_artifact_never_changes_and_can_always_be_labelled_and_deleted() -> Result<()> {
    let case = Case::start("artifact").await?;
    case.artifact("base", 'a').await?;
    let change = json!({"spec": {"digest": crate::common::digest('b')}});
    let error = case.patch::<ModelArtifact>("base-a", change).await.unwrap_err();
    assert!(refusal(&error).unwrap().contains("never changes"), "{error}");
    case.patch::<ModelArtifact>("base-a", json!({"metadata": {"labels": {"team": "a"}}})).await?;
    case.delete::<ModelArtifact>("base-a").await?;
    case.namespace.eventually_gone::<ModelArtifact>("base-a", LIMIT).await
}

#[tokio::test]
async fn an_artifact_whose_files_do_not_match_is_used_by_nobody() -> Result<()> {
    let case = Case::start("broken").await?;
    let manifest = json!({
        "apiVersion": "sensorium.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": "base"},
        "spec": {
            "uri": "pvc://artifacts/objects/1",
            "digest": crate::common::digest('a'),
            "signature": [{"name": "fusion", "inputs": [], "outputs": []}],
        },
    });
    case.apply(&manifest).await?;
    case.apply(&compression("small", "base")).await?;
    // The Job tries four times.
    let failed = tokio::time::timeout(LIMIT * 3, async {
        loop {
            let selector = "sensorium.dev/kind=ModelArtifact";
            for pod in case
                .namespace
                .api::<k8s_openapi::api::core::v1::Pod>()
                .list(&kube::api::ListParams::default().labels(selector))
                .await?
            {
                if pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Pending") {
                    case.kubelet.fail(&pod.name_any(), 1, "a digest differs").await?;
                }
            }
            let artifact = case.namespace.api::<ModelArtifact>().get("base").await?;
            if reason(&artifact) == Some("VerificationFailed") {
                return anyhow::Ok(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    });
    failed.await??;
    let told = |job: &sensorium_api::CompressionJob| {
        let message = job.status.as_ref().and_then(|status| status.message.clone()).unwrap_or_default();
        message.contains("cannot be used")
    };
    case.compression("small", "to say why it waits", told).await?;
    Ok(())
}

#[tokio::test]
async fn an_artifact_at_a_place_that_is_none_says_what_would_be_right() -> Result<()> {
    let case = Case::start("place").await?;
    let manifest = json!({
        "apiVersion": "sensorium.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": "base"},
        "spec": {
            "uri": "pvc://artifacts",
            "digest": crate::common::digest('a'),
            "signature": [{"name": "fusion", "inputs": [], "outputs": []}],
        },
    });
    case.apply(&manifest).await?;
    let artifact = case
        .namespace
        .eventually::<ModelArtifact>("base", "to be refused", LIMIT, |artifact| reason(artifact) == Some("InvalidUri"))
        .await?;
    assert!(artifact.status.unwrap().conditions[0].message.contains("STORE/objects/DIGEST"));
    Ok(())
}

#[tokio::test]
async fn kubectl_sensorium_draws_what_an_artifact_was_made_from() -> Result<()> {
    let case = Case::start("tree").await?;
    let pods = case.running("vqa", |_| {}).await?;
    case.succeed(&pods, "base", 'a').await?;
    case.training("vqa", "to be complete", |job| crate::common::holds(job, "Complete")).await?;
    let program = std::env::var_os("SENSORIUM_BIN_DIR")
        .map_or_else(|| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release"), Into::into);
    let folder = tempfile::tempdir()?;
    let plugin = folder.path().join("kubectl-sensorium");
    std::os::unix::fs::symlink(program.join("sensorium"), &plugin)?;
    let output = std::process::Command::new(plugin)
        .args(["artifact", "tree", "base", "--namespace", case.namespace.name()])
        .env("KUBECONFIG", sensorium_tests::ApiCluster::shared()?.kubeconfig())
        .current_dir(folder.path())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(said, "base aaaaaaaaaaaa  TrainingJob/vqa: train\n└─ pvc://datasets/train\n");
    Ok(())
}

#[tokio::test]
async fn an_older_artifact_goes_with_its_files_once_nobody_uses_it() -> Result<()> {
    let case = Case::start("retain").await?;
    for digit in ['a', 'b'] {
        let digest = crate::common::digest(digit);
        let manifest = json!({
            "apiVersion": "sensorium.dev/v1alpha1",
            "kind": "ModelArtifact",
            "metadata": {"name": format!("base-{digit}"), "labels": {"sensorium.dev/artifact": "base"}},
            "spec": {
                "uri": format!("pvc://artifacts/objects/{}", &digest[7..]),
                "digest": digest,
                "signature": [{"name": "fusion", "inputs": [], "outputs": []}],
                "retention": {"keep": 1, "files": "Delete"},
            },
        });
        if digit == 'b' {
            // It reads the first one, and goes on doing so.
            case.apply(&compression("small", &crate::common::digest('a'))).await?;
            let settled =
                |job: &sensorium_api::CompressionJob| job.status.as_ref().is_some_and(|s| !s.inputs.is_empty());
            case.compression("small", "to settle on its source", settled).await?;
        }
        case.apply(&manifest).await?;
        case.verify(&format!("base-{digit}")).await?;
    }
    let old = case.namespace.api::<ModelArtifact>().get("base-a").await?;
    assert!(old.metadata.deletion_timestamp.is_none(), "a job reads it");

    case.delete::<sensorium_api::CompressionJob>("small").await?;
    case.namespace.eventually_gone::<sensorium_api::CompressionJob>("small", LIMIT).await?;
    case.patch::<ModelArtifact>("base-b", json!({"metadata": {"labels": {"look": "again"}}})).await?;
    let removing = |artifact: &ModelArtifact| {
        let conditions = artifact.status.as_ref().map(|status| &status.conditions[..]);
        reason_of(conditions, "FilesRemoved") == Some("Removing")
    };
    case.namespace.eventually::<ModelArtifact>("base-a", "to lose its files", LIMIT, removing).await?;
    let pods = case.kubelet.pods("sensorium.dev/name=base-a,app.kubernetes.io/component=remove", 1, LIMIT).await?;
    let args = pods[0].spec.as_ref().and_then(|spec| spec.containers[0].args.clone()).unwrap_or_default();
    assert_eq!(args[..3], ["artifact".to_owned(), "rm".to_owned(), crate::common::digest('a')]);
    case.kubelet.succeed(&pods[0].name_any(), "").await?;
    case.namespace.eventually_gone::<ModelArtifact>("base-a", LIMIT).await?;
    assert!(case.namespace.api::<ModelArtifact>().get("base-b").await?.metadata.deletion_timestamp.is_none());
    Ok(())
}

#[tokio::test]
async fn those_who_verify_and_remove_files_in_a_bucket_get_the_credentials_of_the_job_that_made_it() -> Result<()> {
    let case = Case::start("access").await?;
    let pods = case
        .running("vqa", |job| {
            job["spec"]["pods"] = json!({
                "env": {"AWS_REGION": "eu-1", "NCCL_DEBUG": "INFO"}, "envFromSecrets": ["s3"], "image": "elsewhere/trainer:1",
            });
            job["spec"]["output"]["retention"] = json!({"keep": 1, "files": "Delete"});
        })
        .await?;
    case.succeed(&pods, "base", 'a').await?;
    case.training("vqa", "to be complete", |job| crate::common::holds(job, "Complete")).await?;
    let name = format!("base-{}", "a".repeat(10));
    let has_access = async |component: &str| {
        let selector = format!("sensorium.dev/name={name},app.kubernetes.io/component={component}");
        let pod = case.kubelet.pods(&selector, 1, LIMIT).await?.remove(0);
        let container = pod.spec.as_ref().unwrap().containers[0].clone();
        let env: Vec<_> = container.env.unwrap_or_default().into_iter().map(|v| (v.name, v.value.unwrap())).collect();
        assert_eq!(env, [("AWS_REGION".to_owned(), "eu-1".to_owned())]);
        let secrets = container.env_from.unwrap_or_default().into_iter().map(|source| source.secret_ref.unwrap().name);
        assert_eq!(secrets.collect::<Vec<_>>(), ["s3"]);
        assert_eq!(container.image.unwrap(), "sensorium.dev/sensorium-cli:test");
        anyhow::Ok(pod.name_any())
    };
    has_access("verify").await?;
    case.verify(&name).await?;

    // In the foreground, as `kubectl delete --cascade=foreground` does: the Job that removes the files is not in its way.
    let foreground = kube::api::DeleteParams::foreground();
    case.namespace.api::<ModelArtifact>().delete(&name, &foreground).await?;
    case.delete::<sensorium_api::TrainingJob>("vqa").await?;
    let pod = has_access("remove").await?;
    case.kubelet.succeed(&pod, "").await?;
    case.namespace.eventually_gone::<ModelArtifact>(&name, LIMIT).await
}

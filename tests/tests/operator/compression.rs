//! CompressionJobs: they wait for their source, and the gate's verdict is theirs.

use anyhow::Result;
use kube::api::ListParams;
use sensorium_api::{CompressionJob, ModelArtifact};
use serde_json::json;

use crate::common::{Case, compression, digest, holds_of, reason_of, result};

fn conditions(job: &CompressionJob) -> Option<&[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition]> {
    job.status.as_ref().map(|status| &status.conditions[..])
}

fn gate(promoted: bool) -> serde_json::Value {
    json!({
        "metric": "vqa_accuracy", "parent": 0.99, "candidate": if promoted { 0.985 } else { 0.5 },
        "drop": if promoted { 0.005 } else { 0.49 }, "speedup": 1.5, "sizeRatio": 0.29, "promoted": promoted,
        "message": "as measured",
    })
}

#[tokio::test]
async fn a_candidate_that_passes_is_recorded_with_its_numbers() -> Result<()> {
    let case = Case::start("gate").await?;
    case.apply(&compression("small", "base")).await?;
    case.compression("small", "to wait", |job| {
        reason_of(conditions(job), "ArtifactsReady") == Some("ArtifactNotReady")
    })
    .await?;
    case.artifact("base", 'a').await?;
    let pods = case.workers("small", 1, 1).await?;
    case.kubelet.run(&pods[0]).await?;
    let mut said = result("small-model", 'e');
    said["gate"] = gate(true);
    case.kubelet.succeed(&pods[0], &said.to_string()).await?;
    let job = case.compression("small", "to be complete", |job| holds_of(conditions(job), "Complete")).await?;
    let status = job.status.unwrap();
    assert_eq!(status.inputs["base"], digest('a'));
    assert!(status.gate.unwrap().promoted);
    case.namespace.api::<ModelArtifact>().get("small-model-eeeeeeeeee").await?;
    Ok(())
}

#[tokio::test]
async fn a_refused_candidate_fails_the_job_and_is_not_recorded() -> Result<()> {
    let case = Case::start("refuse").await?;
    case.artifact("base", 'a').await?;
    case.apply(&compression("small", "base")).await?;
    let pods = case.workers("small", 1, 1).await?;
    case.kubelet.run(&pods[0]).await?;
    let mut said = result("small-model", 'e');
    said["state"] = json!("failed");
    said["gate"] = gate(false);
    case.kubelet.fail(&pods[0], 1, &said.to_string()).await?;
    let job = case.compression("small", "to fail", |job| holds_of(conditions(job), "Failed")).await?;
    assert_eq!(reason_of(conditions(&job), "Failed"), Some("GateRefused"));
    assert!((job.status.unwrap().gate.unwrap().drop - 0.49).abs() < 1e-9);
    let recorded = case.namespace.api::<ModelArtifact>().list(&ListParams::default()).await?;
    assert_eq!(recorded.items.len(), 1, "only the source");
    Ok(())
}

//! Turns a trained network into an artifact.

use std::collections::BTreeMap;

use sensorium_api::TrainingJobSpec;
use sensorium_api::run::{ArtifactResult, RunConfig};
use sensorium_artifact::{
    ArtifactError, DType, Format, Graph, Lineage, LineageJob, ManifestParts, Store, TensorSpec, Volumes, atomic,
};
use sensorium_compress::artifact_result;
use sensorium_model::{Weights, export};
use sensorium_onnx::{Model, ValueInfoProto};

use crate::error::TrainError;
use crate::setup::{NETWORK_FILE, Setup, TOKENIZER_FILE};

/// Exports the network, commits it to the job's store and gives it the job's artifact name.
///
/// # Errors
/// A full disk, among others; what the name meant before then still holds.
pub async fn publish(
    config: &RunConfig<TrainingJobSpec>,
    setup: &Setup,
    weights: &Weights,
    metrics: BTreeMap<String, f64>,
    volumes: &Volumes,
) -> Result<ArtifactResult, TrainError> {
    let output = &config.spec.output;
    let store = Store::open(&output.store, volumes)?;
    let draft = store.draft()?;
    let mut graphs = Vec::new();
    for (name, model) in export(&setup.network, weights)?.graphs {
        let file = format!("graphs/{name}.onnx");
        atomic::write(draft.path(&file)?, model.to_bytes())?;
        graphs.push(describe(name, file, &model)?);
    }
    let network = serde_json::to_vec_pretty(setup.network.config())
        .map_err(|error| TrainError::Spec { field: "spec.model", reason: error.to_string() })?;
    atomic::write(draft.path(NETWORK_FILE)?, network)?;
    setup.preparation.text.save(&draft.path(TOKENIZER_FILE)?)?;
    let pipeline = serde_json::to_value(setup.pipeline())
        .map_err(|error| TrainError::Spec { field: "spec.tasks", reason: error.to_string() })?;
    let job = &config.job;
    let parts = ManifestParts {
        name: output.artifact.clone(),
        format: Format::Onnx,
        graphs,
        pipeline: Some(pipeline),
        modalities: vec!["text".to_owned(), "image".to_owned()],
        metrics,
        lineage: Lineage {
            job: Some(LineageJob {
                kind: job.kind.to_string(),
                namespace: job.namespace.clone(),
                name: job.name.clone(),
                spec_hash: config.spec_hash.clone(),
            }),
            parents: setup.parent.into_iter().collect(),
            data: vec![config.spec.data.train.clone()],
            steps: vec!["train".to_owned()],
        },
    };
    let artifact = store.commit(draft, parts).await?;
    store.promote(&output.artifact, &artifact.digest).await?;
    Ok(artifact_result(&output.artifact, &artifact))
}

fn describe(name: &str, file: String, model: &Model) -> Result<Graph, TrainError> {
    let spec = |value: &ValueInfoProto| {
        let known = match value.dtype() {
            Some(sensorium_onnx::DType::F32) => Some(DType::Fp32),
            Some(sensorium_onnx::DType::I64) => Some(DType::Int64),
            _ => None,
        };
        let (dtype, shape) = known.zip(value.shape()).ok_or_else(|| {
            let reason = format!("`{}` of {name} has no type or shape", value.name);
            TrainError::Artifact(ArtifactError::InvalidManifest { what: file.clone(), reason })
        })?;
        Ok(TensorSpec { name: value.name.clone(), dtype, shape })
    };
    let inputs = model.inputs().map(spec).collect::<Result<_, TrainError>>()?;
    let outputs = model.outputs().iter().map(spec).collect::<Result<_, TrainError>>()?;
    Ok(Graph { name: name.to_owned(), file, inputs, outputs })
}

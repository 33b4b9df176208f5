//! What a job tells of the artifact that it wrote.

use sensorium_api::run::{ArtifactRecord, ArtifactResult};
use sensorium_api::{DataType, GraphSignature, TensorSignature};
use sensorium_artifact::{Artifact, DType, Manifest, TensorSpec};

/// The result of a job that wrote `artifact` under `name`.
pub fn artifact_result(name: &str, artifact: &Artifact) -> ArtifactResult {
    ArtifactResult {
        name: name.to_owned(),
        digest: artifact.digest.to_string(),
        bytes: artifact.manifest.total_bytes(),
        uri: artifact.uri.clone(),
        record: record(&artifact.manifest),
    }
}

/// What a cluster's record says of the model; none where it has no word for the type of a tensor.
fn record(manifest: &Manifest) -> Option<ArtifactRecord> {
    let signature = manifest.graphs.iter().map(|graph| {
        let tensors = |specs: &[TensorSpec]| specs.iter().map(tensor).collect::<Option<Vec<_>>>();
        let (inputs, outputs) = (tensors(&graph.inputs)?, tensors(&graph.outputs)?);
        Some(GraphSignature { name: graph.name.clone(), inputs, outputs })
    });
    let lineage = &manifest.lineage;
    Some(ArtifactRecord {
        signature: signature.collect::<Option<_>>()?,
        modalities: manifest.modalities.clone(),
        metrics: manifest.metrics.clone(),
        parents: lineage.parents.iter().map(ToString::to_string).collect(),
        data: lineage.data.clone(),
        steps: lineage.steps.clone(),
    })
}

fn tensor(spec: &TensorSpec) -> Option<TensorSignature> {
    let datatype = match spec.dtype {
        DType::Bool => DataType::Bool,
        DType::Uint8 => DataType::Uint8,
        DType::Int8 => DataType::Int8,
        DType::Int32 => DataType::Int32,
        DType::Int64 => DataType::Int64,
        DType::Fp32 => DataType::Fp32,
        DType::Bytes => DataType::Bytes,
        DType::Uint16 | DType::Uint32 | DType::Uint64 | DType::Int16 | DType::Fp16 | DType::Bf16 | DType::Fp64 => {
            return None;
        }
    };
    let shape = spec.shape.iter().map(|size| size.map_or(-1, |size| size as i64)).collect();
    Some(TensorSignature { name: spec.name.clone(), datatype, shape })
}

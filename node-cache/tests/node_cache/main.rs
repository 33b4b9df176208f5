//! The cache against a real S3 server, and its mounts.

#![expect(clippy::unwrap_used, reason = "helpers of tests, which clippy does not count as tests")]

mod cache;
mod mounts;

use std::collections::BTreeMap;

use sensorium_artifact::{DType, Format, Graph, Lineage, ManifestParts, TensorSpec};

/// What is said of an artifact with one graph.
pub(crate) fn parts() -> ManifestParts {
    let spec = |name: &str| TensorSpec { name: name.into(), dtype: DType::Fp32, shape: vec![None] };
    ManifestParts {
        name: "vqa".into(),
        format: Format::Onnx,
        graphs: vec![Graph {
            name: "fusion".into(),
            file: "graphs/fusion.onnx".into(),
            inputs: vec![spec("x")],
            outputs: vec![spec("y")],
        }],
        pipeline: None,
        modalities: vec![],
        metrics: BTreeMap::new(),
        lineage: Lineage::default(),
    }
}

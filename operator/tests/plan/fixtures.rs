//! Manifests to plans, through the real validation.

use sensorium_api::manifest::parse_documents;
use sensorium_operator::plan::{WorkloadPlan, plan};
use serde_json::{Value, json};

pub(crate) const TRAINING: &str = include_str!("../../../examples/easy-vqa/training.yaml");
pub(crate) const COMPRESSION: &str = include_str!("../../../examples/easy-vqa/compression.yaml");
pub(crate) const SERVING: &str = include_str!("../../../examples/easy-vqa/serving.yaml");
pub(crate) const ENCODERS: &str = include_str!("../../../examples/encoders/serving.yaml");

/// The plan of a manifest with one document.
pub(crate) fn plan_of(text: &str) -> WorkloadPlan {
    let resources = parse_documents(text, "test.yaml").unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(resources.len(), 1);
    plan(&resources[0]).unwrap()
}

/// The plan of a manifest after changes at JSON pointers.
pub(crate) fn plan_with(text: &str, changes: &[(&str, Value)]) -> WorkloadPlan {
    let mut document: Value = serde_yaml_ng::from_str(text).unwrap();
    for (pointer, value) in changes {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        document.pointer_mut(parent).unwrap()[name] = value.clone();
    }
    // JSON is YAML.
    plan_of(&document.to_string())
}

/// A training job with this topology.
pub(crate) fn plan_of_topology(workers: u32, processes: u32) -> WorkloadPlan {
    let data = workers * processes;
    plan_with(
        TRAINING,
        &[
            ("/spec/workers", json!(workers)),
            ("/spec/processesPerWorker", json!(processes)),
            ("/spec/parallelism", json!({"data": data})),
            ("/spec/training/batch/images", json!(data)),
        ],
    )
}

/// A compression job from one artifact to another.
pub(crate) fn link(name: &str, from: &str, to: &str) -> WorkloadPlan {
    plan_with(
        COMPRESSION,
        &[
            ("/metadata/name", json!(name)),
            ("/spec/source/artifact", json!(from)),
            ("/spec/output/artifact", json!(to)),
        ],
    )
}

//! The digest of what changes a job's result. Each spec is taken apart field by field, so that a new field does not
//! compile until someone has decided on which side it belongs.

use sensorium_api::canonical::canonical_json;
use sensorium_api::{CompressionJobSpec, ServingJobSpec, TrainingJobSpec, TrainingParams};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Training: the network, the data, the tasks, the recipe, and the layout, which changes the order of sums and so the
/// last bits. Where checkpoints and the artifact go, and how the run is watched or held, changes nothing.
pub(super) fn training(spec: &TrainingJobSpec) -> String {
    let TrainingJobSpec {
        model,
        data,
        tasks,
        training,
        parallelism,
        workers: _,
        processes_per_worker: _,
        elastic: _,
        checkpoint: _,
        failure_policy: _,
        suspend: _,
        active_deadline_seconds: _,
        pre_running_deadline_seconds: _,
        ttl_seconds_after_finished: _,
        scheduling: _,
        pods: _,
        resources: _,
        output: _,
    } = spec;
    // Evaluation only looks; everything else in the recipe counts.
    let recipe = TrainingParams { evaluate_every_steps: None, ..training.clone() };
    digest(&json!({
        "kind": "TrainingJob",
        "model": model,
        "data": data,
        "tasks": tasks,
        "training": recipe,
        "parallelism": parallelism,
    }))
}

/// Compression: the source, the steps, and the gate, which decides whether there is a result.
pub(super) fn compression(spec: &CompressionJobSpec) -> String {
    let CompressionJobSpec {
        source,
        steps,
        acceptance,
        failure_policy: _,
        suspend: _,
        active_deadline_seconds: _,
        pre_running_deadline_seconds: _,
        ttl_seconds_after_finished: _,
        scheduling: _,
        pods: _,
        resources: _,
        output: _,
    } = spec;
    digest(&json!({"kind": "CompressionJob", "source": source, "steps": steps, "acceptance": acceptance}))
}

/// Serving: everything that a server's answers, or the way it gives them, depend on. Where its graphs run is not of it.
pub(super) fn serving(spec: &ServingJobSpec) -> String {
    let ServingJobSpec {
        model,
        engine,
        batching,
        limits,
        replicas: _,
        autoscaling: _,
        encoders: _,
        rollout: _,
        ports: _,
        verification: _,
        resources: _,
        service: _,
        network_access: _,
        security: _,
        disruption_max_unavailable: _,
        drain_seconds: _,
        scheduling: _,
        pods: _,
    } = spec;
    digest(&json!({"kind": "ServingJob", "model": model, "engine": engine, "batching": batching, "limits": limits}))
}

fn digest(parts: &Value) -> String {
    let hash = Sha256::digest(canonical_json(parts));
    hash.iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

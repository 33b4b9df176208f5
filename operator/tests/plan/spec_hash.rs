//! The spec hash changes with what changes the result, and with nothing else.

use crate::fixtures::{COMPRESSION, SERVING, TRAINING, plan_of, plan_with};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

type Change<'a> = (&'a str, &'a str, Value);

#[test]
fn what_only_concerns_the_run_leaves_the_hash_alone() {
    let changes: [Change; 12] = [
        (TRAINING, "/metadata/name", json!("other")),
        (TRAINING, "/spec/suspend", json!(true)),
        (TRAINING, "/spec/activeDeadlineSeconds", json!(60)),
        (TRAINING, "/spec/resources", json!({"limits": {"memory": "8Gi"}})),
        (TRAINING, "/spec/checkpoint", json!({"everySteps": 10, "uri": "s3://runs/a"})),
        (TRAINING, "/spec/failurePolicy", json!({"maxRestarts": 9})),
        (TRAINING, "/spec/training/evaluateEverySteps", json!(10)),
        (TRAINING, "/spec/output", json!({"artifact": "other", "store": "s3://models/x"})),
        (COMPRESSION, "/spec/suspend", json!(true)),
        (COMPRESSION, "/spec/output/artifact", json!("other")),
        (SERVING, "/spec/replicas", json!(3)),
        (SERVING, "/spec/verification/samples", json!(9)),
    ];
    for (text, pointer, value) in changes {
        assert_eq!(plan_with(text, &[(pointer, value)]).spec_hash, plan_of(text).spec_hash, "{pointer}");
    }
}

#[test]
fn what_changes_the_result_changes_the_hash() {
    let changes: [Change; 13] = [
        (TRAINING, "/spec/model/architecture/text/layers", json!(2)),
        (TRAINING, "/spec/data/train", json!("pvc://datasets/other")),
        (TRAINING, "/spec/data/evaluation", json!("pvc://datasets/other")),
        (TRAINING, "/spec/tasks/0/weight", json!(0.5)),
        (TRAINING, "/spec/training/steps", json!(1501)),
        (TRAINING, "/spec/training/seed", json!(1)),
        (TRAINING, "/spec/training/optimizer/eps", json!(1e-7)),
        (COMPRESSION, "/spec/source/artifact", json!("other")),
        (COMPRESSION, "/spec/steps/0/quantize/exclude", json!(["fusion"])),
        (COMPRESSION, "/spec/steps/0/quantize/calibration/method", json!("entropy")),
        (COMPRESSION, "/spec/acceptance/maxDrop", json!(0.02)),
        (SERVING, "/spec/model/artifact", json!("vqa")),
        (SERVING, "/spec/batching/maxBatchSize", json!(8)),
    ];
    for (text, pointer, value) in changes {
        assert_ne!(plan_with(text, &[(pointer, value)]).spec_hash, plan_of(text).spec_hash, "{pointer}");
    }
    let wider = [("/spec/parallelism", json!({"data": 4})), ("/spec/workers", json!(4))];
    assert_ne!(plan_with(TRAINING, &wider).spec_hash, plan_of(TRAINING).spec_hash);
}

#[test]
fn a_default_written_out_is_the_same_spec() {
    let explicit = plan_with(
        TRAINING,
        &[("/spec/training/precision", json!("fp32")), ("/spec/training/optimizer/eps", json!(0.000_000_01))],
    );
    assert_eq!(explicit.spec_hash, plan_of(TRAINING).spec_hash);
}

#[test]
fn kinds_do_not_share_a_hash() {
    let hashes = [plan_of(TRAINING).spec_hash, plan_of(COMPRESSION).spec_hash, plan_of(SERVING).spec_hash];
    assert!(hashes.iter().all(|hash| hash.starts_with("sha256:") && hash.len() == 71));
    assert!(hashes[0] != hashes[1] && hashes[1] != hashes[2] && hashes[0] != hashes[2]);
}

/// Checkpoints and artifacts are found again by this hash: it may not drift from one version to the next.
#[test]
fn the_hash_of_a_spec_stays_what_it_was() {
    let text =
        "{apiVersion: sensorium.dev/v1alpha1, kind: ServingJob, metadata: {name: x}, spec: {model: {artifact: x}}}";
    let canonical = r#"{"batching":{"maxBatchSize":32,"maxQueueDelayMicroseconds":500,"maxQueueSize":1024},"engine":"onnxruntime","kind":"ServingJob","limits":{"maxImageBytes":16777216,"maxImagePixels":16777216,"maxRequestBytes":67108864},"model":{"artifact":"x","store":"pvc://artifacts"}}"#;
    let expected = format!("sha256:{}", sha256(canonical));
    assert_eq!(plan_of(text).spec_hash, expected);
}

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

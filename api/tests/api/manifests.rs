//! What a bad manifest is told, and what a good one becomes.

use crate::fixtures::{artifact, complaint, compression, parse, serving, training, with};
use sensorium_api::manifest::parse_documents;
use sensorium_api::run::JobKind;
use sensorium_api::{CheckpointSpec, OptimizerSpec, Parallelism, Resource};
use serde_json::{Value, json};

#[test]
fn a_problem_names_file_document_resource_field_value_and_what_would_be_right() {
    let text = format!(
        "{}\n---\n{}",
        include_str!("../../../examples/easy-vqa/serving.yaml"),
        serde_yaml_ng::to_string(&with(training(), "/spec/training/steps", json!(0))).unwrap()
    );
    assert_eq!(
        parse_documents(&text, "jobs/vqa.yaml").unwrap_err().to_string(),
        "jobs/vqa.yaml: document 2 (TrainingJob/vqa): spec.training.steps: is 0, must be at least 1"
    );
}

#[test]
fn all_problems_of_a_file_are_told_at_once() {
    let bad = with(with(serving(), "/spec/replicas", json!(-1)), "/spec/engine", json!("tensorflow"));
    let text = format!("{}---\n{}", serde_yaml_ng::to_string(&bad).unwrap(), "kind: Pod\n");
    assert_eq!(
        parse_documents(&text, "f").unwrap_err().to_string(),
        "f: document 1 (ServingJob/vqa): spec.engine: is \"tensorflow\", must be onnxruntime\n\
         f: document 1 (ServingJob/vqa): spec.replicas: is -1, must be at least 0\n\
         f: document 2 (Pod): apiVersion: is missing: write \"sensorium.dev/v1alpha1\""
    );
}

#[test]
fn a_misspelt_field_is_told_which_one_was_meant() {
    for (document, pointer, meant) in [
        (serving(), "/spec/replica", "replicas"),
        (training(), "/spec/training/batch/images_per_step", ""),
        (training(), "/spec/training/learningRate", ""),
        (training(), "/spec/training/evaluate_every_steps", "evaluateEverySteps"),
        (training(), "/spec/tasks/0/wieght", "weight"),
        (compression(), "/spec/acceptance/maxdrop", "maxDrop"),
        (artifact(), "/metadata/lables", "labels"),
        (training(), "/sepc", "spec"),
    ] {
        let text = complaint(&with(document, pointer, json!(1)));
        assert!(text.contains("there is no such field"), "{text}");
        if meant.is_empty() {
            assert!(!text.contains("did you mean"), "{text}");
        } else {
            assert!(text.contains(&format!("did you mean `{meant}`?")), "{text}");
        }
    }
}

#[test]
fn a_wrong_value_is_told_what_would_be_right() {
    for (document, pointer, value, told) in [
        (training(), "/kind", json!("TrainingJobs"), "(did you mean `TrainingJob`?)"),
        (training(), "/apiVersion", json!("sensorium.dev/v1"), "must be \"sensorium.dev/v1alpha1\""),
        (training(), "/spec/training/steps", json!("1500"), "is \"1500\", must be a whole number"),
        (training(), "/spec/training/steps", json!(1.5), "is 1.5, must be a whole number"),
        (training(), "/spec/training/steps", json!(-5), "is -5, must be at least 1"),
        (training(), "/spec/workers", json!(u64::MAX), "must be a whole number"),
        (training(), "/spec/tasks/0/type", json!("vqaa"), "did you mean `vqa`?"),
        (training(), "/spec/tasks", json!([]), "is 0 items long, must be at least 1"),
        (training(), "/spec/tasks/-", json!({"type": "vqa"}), "spec.tasks[1]: type is \"vqa\" again"),
        (training(), "/spec/training/batch", json!([96]), "is a list, must be a mapping"),
        (training(), "/spec/training/augment/horizontalFlip", json!("yes"), "must be true or false"),
        (training(), "/spec/parallelism/zeroStage", json!(4), "is 4, must be at most 3"),
        (training(), "/spec/model/artifact", json!("vqa"), "has architecture and artifact, must have exactly one of"),
        (training(), "/spec/model", json!({}), "has none, must have exactly one of architecture, artifact"),
        (training(), "/spec/output", Value::Null, "spec.output: is missing: Under which name, and where,"),
        (training(), "/metadata/name", Value::Null, "metadata.name: is missing"),
        (training(), "/metadata/name", json!("My Job"), "'My Job' is not an object name"),
        (serving(), "/spec/ports", json!({"grpc": 70_000}), "is 70000, must be at most 65535"),
        (compression(), "/spec/acceptance/maxDrop", json!(1.5), "is 1.5, must be at most 1"),
        (compression(), "/spec/steps/0", json!({"prune": {}}), "spec.steps[0].prune: there is no such field"),
        (artifact(), "/spec/signature/0/inputs/0/shape", json!([-2]), "is -2, must be at least -1"),
    ] {
        let text = complaint(&with(document, pointer, value));
        assert!(text.contains(told), "{text}\nshould say: {told}");
    }
}

#[test]
fn text_that_is_not_yaml_is_told_where() {
    let text = parse_documents("kind: [TrainingJob\nspec: {", "broken.yaml").unwrap_err().to_string();
    assert!(text.starts_with("broken.yaml: document 1: is not YAML:") && text.contains("line 2"), "{text}");
    let text = parse_documents("kind: TrainingJob\nkind: ServingJob\n", "twice.yaml").unwrap_err().to_string();
    assert!(text.contains("duplicate"), "{text}");
    let text = parse_documents("- just\n- a list\n", "list.yaml").unwrap_err().to_string();
    assert!(text.contains("is a list, must be a mapping with apiVersion"), "{text}");
}

#[test]
fn empty_documents_are_skipped_and_still_counted() {
    assert_eq!(parse_documents("", "f").unwrap(), []);
    assert_eq!(parse_documents("---\n# nothing\n---\n", "f").unwrap(), []);
    let text = parse_documents("---\n---\nkind: x\n", "f").unwrap_err().to_string();
    assert!(text.starts_with("f: document 2"), "{text}");
}

#[test]
fn what_is_not_available_yet_is_refused_by_name() {
    for (degree, workers) in [("tensor", 4), ("pipeline", 4)] {
        let document = with(training(), &format!("/spec/parallelism/{degree}"), json!(2));
        let text = complaint(&with(document, "/spec/workers", json!(workers)));
        assert!(
            text.contains(&format!("spec.parallelism.{degree}: is 2, which is not available yet; use 1")),
            "{text}"
        );
    }
    let text = complaint(&with(training(), "/spec/parallelism/zeroStage", json!(1)));
    assert!(text.contains("spec.parallelism.zeroStage: is 1, which is not available yet; use 0"), "{text}");
}

#[test]
fn defaults_are_those_of_the_schema() {
    let mut bare = training();
    for pointer in ["/spec/parallelism", "/spec/workers", "/spec/checkpoint", "/spec/training/optimizer"] {
        bare = with(bare, pointer, Value::Null);
    }
    let Resource::TrainingJob(job) = parse(&bare).unwrap() else { panic!("a TrainingJob stays one") };
    assert_eq!(job.spec.parallelism, Parallelism::default());
    assert_eq!(job.spec.checkpoint, CheckpointSpec::default());
    assert_eq!(job.spec.training.optimizer, OptimizerSpec::default());
    assert_eq!((job.spec.workers, job.spec.processes_per_worker, job.spec.failure_policy.max_restarts), (1, 1, 3));
    assert_eq!(job.spec.output.store, "pvc://artifacts");
}

#[test]
fn a_field_with_a_default_may_be_left_empty() {
    // `optimizer:` with every line below it commented out.
    let mut document = training();
    document["spec"]["training"]["optimizer"] = Value::Null;
    document["spec"]["training"]["evaluateEverySteps"] = Value::Null;
    let Resource::TrainingJob(job) = parse(&document).unwrap() else { panic!("a TrainingJob stays one") };
    assert_eq!(job.spec.training.optimizer, OptimizerSpec::default());
    assert_eq!(job.spec.training.evaluate_every_steps, None);
    document["spec"]["training"]["steps"] = Value::Null;
    assert!(complaint(&document).contains("spec.training.steps: is empty, must be a whole number"));
}

#[test]
fn a_job_has_a_key_and_its_checkpoints_a_place() {
    let resource = parse(&with(training(), "/metadata/namespace", json!("research"))).unwrap();
    let key = resource.job().unwrap();
    assert_eq!((key.kind, key.namespace.as_str(), key.name.as_str()), (JobKind::TrainingJob, "research", "vqa"));
    assert_eq!(key.to_string(), "TrainingJob/vqa");
    let Resource::TrainingJob(job) = resource else { panic!("a TrainingJob stays one") };
    assert_eq!(job.checkpoint_uri(), "pvc://checkpoints/research/vqa");
    let resource = parse(&with(training(), "/spec/checkpoint/uri", json!("s3://bucket/ckpt"))).unwrap();
    let Resource::TrainingJob(job) = resource else { panic!("a TrainingJob stays one") };
    assert_eq!(job.checkpoint_uri(), "s3://bucket/ckpt");
    assert_eq!(parse(&artifact()).unwrap().job(), None);
}

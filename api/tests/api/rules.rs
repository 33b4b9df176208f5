//! Every CEL rule, broken once: the offline check must run the rules that a cluster runs.

use std::collections::BTreeSet;

use crate::fixtures::{all, artifact, complaint, compression, parse, serving, training, with};
use kube::core::cel::{ErrorKind, Validator};
use sensorium_api::crds::definitions;
use serde_json::{Value, json};

/// A bad document, the field that is to blame, and a part of what is said about it.
type Case = (Value, &'static str, &'static str);

fn cases() -> Vec<Case> {
    let contrastive = with(training(), "/spec/tasks/-", json!({"type": "contrastive"}));
    vec![
        (
            with(training(), "/spec/workers", json!(3)),
            "spec.parallelism",
            "data x tensor x pipeline must equal workers x processesPerWorker, since every process has one place \
             (parallelism.data is 2, parallelism.tensor is 1, parallelism.pipeline is 1, workers is 3, \
             processesPerWorker is 1)",
        ),
        (
            with(training(), "/spec/training/batch/images", json!(97)),
            "spec.training.batch.images",
            "every rank takes an equal part (training.batch.images is 97, parallelism.data is 2)",
        ),
        (contrastive, "spec.model.architecture", "set embeddingDim"),
        (
            with(training(), "/spec/elastic", json!({"minWorkers": 3, "maxWorkers": 4})),
            "spec.elastic",
            "workers must lie between minWorkers and maxWorkers",
        ),
        (
            with(serving(), "/spec/encoders", json!([{"graph": "server"}])),
            "spec.encoders[0].graph",
            "small letters, digits and single underscores between them, and not `server`",
        ),
        (
            with(
                with(serving(), "/spec/replicas", json!(2)),
                "/spec/autoscaling",
                json!({"maxReplicas": 3, "metric": "queueDepth"}),
            ),
            "spec.replicas",
            "set replicas or autoscaling, not both",
        ),
        (
            with(serving(), "/spec/autoscaling", json!({"maxReplicas": 3})),
            "spec.autoscaling",
            "set resources.requests.cpu",
        ),
        (
            with(serving(), "/spec/autoscaling", json!({"minReplicas": 4, "maxReplicas": 3, "metric": "queueDepth"})),
            "spec.autoscaling.maxReplicas",
            "must be at least minReplicas",
        ),
        (with(training(), "/spec/tasks/0/weight", json!(0)), "spec.tasks", "the weights are all 0"),
        (
            with(training(), "/spec/model/architecture/fusion/heads", json!(5)),
            "spec.model.architecture.width",
            "must be a multiple of fusion.heads (width is 64, fusion.heads is 5)",
        ),
        (
            with(training(), "/spec/model/architecture/text/heads", json!(3)),
            "spec.model.architecture.text.width",
            "must be a multiple of heads (width is 64, heads is 3)",
        ),
        (
            with(training(), "/spec/model/architecture/image/stem/2/channels", json!(32)),
            "spec.model.architecture.image.stem",
            "there must be as many as width (width is 64)",
        ),
        (
            with(training(), "/spec/training/optimizer/learningRate", json!(0)),
            "spec.training.optimizer.learningRate",
            "is 0, must be above 0",
        ),
        (
            with(training(), "/spec/training/optimizer/betas", json!([0.9, 1])),
            "spec.training.optimizer.betas",
            "at least 0 and below 1",
        ),
        (
            with(training(), "/spec/training/optimizer/eps", json!(-1e-8)),
            "spec.training.optimizer.eps",
            "must be above 0",
        ),
        (
            with(training(), "/spec/training/optimizer/clipNorm", json!(0.0)),
            "spec.training.optimizer.clipNorm",
            "must be above 0",
        ),
        (
            with(training(), "/spec/data/train", json!("/data/easy-vqa")),
            "spec.data.train",
            "'/data/easy-vqa' is not a storage location; write pvc://CLAIM/PATH",
        ),
        (
            with(training(), "/spec/output/artifact", json!("VQA")),
            "spec.output.artifact",
            "'VQA' is not an artifact name",
        ),
        (
            with(compression(), "/spec/source/artifact", json!("sha256:12")),
            "spec.source.artifact",
            "'sha256:12' names no artifact",
        ),
        (
            with(compression(), "/spec/output/artifact", json!("vqa")),
            "spec.output.artifact",
            "must differ from source.artifact",
        ),
        (
            with(serving(), "/spec/batching/maxQueueSize", json!(8)),
            "spec.batching.maxQueueSize",
            "(maxQueueSize is 8, maxBatchSize is 32)",
        ),
        (
            with(serving(), "/spec/ports", json!({"grpc": 8000})),
            "spec.ports",
            "grpc, http and metrics must differ (grpc is 8000, http is 8000, metrics is 8002)",
        ),
        (
            with(serving(), "/spec/limits", json!({"maxRequestBytes": 4096})),
            "spec.limits.maxImageBytes",
            "must be at most maxRequestBytes, which lets in no larger image (maxRequestBytes is 4096,",
        ),
        (with(artifact(), "/spec/digest", json!("sha256:ABC")), "spec.digest", "'sha256:ABC' is not a digest"),
    ]
}

#[test]
fn a_broken_rule_names_the_field_the_value_and_what_would_be_right() {
    for (document, field, message) in cases() {
        let error = parse(&document).expect_err(field);
        assert_eq!(error.problems.len(), 1, "{error}");
        assert_eq!(error.problems[0].field, field, "{error}");
        assert!(error.to_string().contains(message), "{error}\nshould say: {message}");
    }
}

#[test]
fn every_rule_of_every_kind_is_broken_by_one_of_these_documents() {
    let mut unbroken = rules();
    for (document, ..) in cases() {
        for broken in broken_rules(&document) {
            unbroken.remove(&broken);
        }
    }
    // No single document can break a rule that compares it with what it was; the operator's tests do, on an API server.
    unbroken.retain(|rule| !rule.contains("oldSelf"));
    assert_eq!(unbroken.into_iter().collect::<Vec<_>>(), Vec::<String>::new());
}

#[test]
fn an_artifact_never_changes() {
    let changed = with(artifact(), "/spec/metrics/vqa_accuracy", json!(1.0));
    let schema = schema("ModelArtifact");
    let errors = Validator::new().validate(&schema, &changed, Some(&artifact())).unwrap_err();
    assert_eq!(errors[0].field_path, "spec");
    assert_eq!(errors[0].message, "a ModelArtifact never changes; create another one");
    Validator::new().validate(&schema, &artifact(), Some(&artifact())).unwrap();
}

#[test]
fn good_documents_break_no_rule() {
    for document in all() {
        assert_eq!(broken_rules(&document), Vec::<String>::new());
        parse(&document).unwrap();
    }
}

#[test]
fn a_location_may_not_climb_out_of_its_claim() {
    for location in ["pvc://datasets/../secrets", "pvc://datasets/a/..", "s3://bucket/./x", "file:///a/../b"] {
        let text = complaint(&with(training(), "/spec/data/train", json!(location)));
        assert!(text.contains("without '.' and '..' in the path"), "{text}");
    }
    for location in ["pvc://datasets", "pvc://datasets/a..b/.c", "s3://my-bucket/x/", "file:///data/v1.0"] {
        parse(&with(training(), "/spec/data/train", json!(location))).unwrap();
    }
}

fn schema(kind: &str) -> Value {
    definitions().unwrap().into_iter().find(|definition| definition.kind == kind).unwrap().schema().clone()
}

fn broken_rules(document: &Value) -> Vec<String> {
    let schema = schema(document["kind"].as_str().unwrap());
    match Validator::new().validate(&schema, document, None) {
        Ok(()) => Vec::new(),
        Err(errors) => errors
            .into_vec()
            .into_iter()
            .map(|error| {
                assert_eq!(error.kind, ErrorKind::ValidationFailure, "{error}");
                error.rule
            })
            .collect(),
    }
}

fn rules() -> BTreeSet<String> {
    fn collect(value: &Value, rules: &mut BTreeSet<String>) {
        if let Some(rule) = value["rule"].as_str() {
            rules.insert(rule.to_owned());
        }
        value.as_object().into_iter().flat_map(|object| object.values()).for_each(|child| collect(child, rules));
        value.as_array().into_iter().flatten().for_each(|child| collect(child, rules));
    }
    let mut rules = BTreeSet::new();
    definitions().unwrap().iter().for_each(|definition| collect(definition.schema(), &mut rules));
    rules
}

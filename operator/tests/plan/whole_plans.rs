//! Whole plans, as `sensorium plan` prints them.

use crate::fixtures::{COMPRESSION, SERVING, TRAINING, plan_of, plan_of_topology, plan_with};
use insta::assert_yaml_snapshot;
use sensorium_api::manifest::parse_documents;
use sensorium_api::run::RunConfig;
use sensorium_api::{Resource, ServingJobSpec, TrainingJobSpec};
use sensorium_operator::plan::{PlanError, WorkloadPlan, check_available, plan};
use serde_json::{Value, json};

/// A plan with the names of its files only, and no hash: an example's learning rate is not what these tests watch.
fn without_recipe(plan: &WorkloadPlan) -> Value {
    let mut plan = serde_json::to_value(plan).unwrap();
    plan["specHash"] = json!("sha256:...");
    plan["files"].as_object_mut().unwrap().values_mut().for_each(|text| *text = json!("..."));
    plan
}

#[test]
fn easy_vqa_training() {
    assert_yaml_snapshot!(without_recipe(&plan_of(TRAINING)));
}

#[test]
fn easy_vqa_compression() {
    assert_yaml_snapshot!(without_recipe(&plan_of(COMPRESSION)));
}

#[test]
fn easy_vqa_serving() {
    assert_yaml_snapshot!(without_recipe(&plan_of(SERVING)));
}

#[test]
fn serving_with_an_encoder_as_a_service_of_its_own() {
    let encoders = json!([{"graph": "image_encoder", "replicas": 2, "resources": {"limits": {"nvidia.com/gpu": "1"}}}]);
    let plan = plan_with(SERVING, &[("/spec/encoders", encoders)]);
    assert_eq!(plan.files, plan_of(SERVING).files, "no server is told of more than it runs or calls");
    assert_yaml_snapshot!(plan.roles);
}

#[test]
fn training_on_four_workers_of_two_processes() {
    assert_yaml_snapshot!(plan_of_topology(4, 2).roles);
}

#[test]
fn training_with_everything_in_a_bucket_mounts_no_claim() {
    let plan = plan_with(
        TRAINING,
        &[
            ("/spec/data", json!({"train": "s3://data/easy-vqa/train", "evaluation": "s3://data/easy-vqa/test"})),
            ("/spec/checkpoint/uri", json!("s3://runs/vqa")),
            ("/spec/output/store", json!("s3://models/vision")),
        ],
    );
    assert_yaml_snapshot!(plan.roles);
}

#[test]
fn training_with_checkpoints_on_the_claim_of_the_data_may_write_there() {
    let plan = plan_with(TRAINING, &[("/spec/checkpoint/uri", json!("pvc://datasets/checkpoints/vqa"))]);
    assert_yaml_snapshot!(plan.roles[0].mounts);
}

#[test]
fn a_job_that_starts_from_an_artifact_needs_it() {
    let plan = plan_with(TRAINING, &[("/spec/model", json!({"artifact": "vqa-base"}))]);
    assert_eq!(plan.requires, ["vqa-base"]);
    assert_eq!(plan.produces.as_deref(), Some("vqa"));
}

#[test]
fn holding_limits_and_resources_reach_the_plan() {
    let plan = plan_with(
        TRAINING,
        &[
            ("/spec/suspend", json!(true)),
            ("/spec/activeDeadlineSeconds", json!(3600)),
            ("/spec/failurePolicy", json!({"maxRestarts": 1})),
            ("/spec/resources", json!({"requests": {"cpu": 4, "memory": "8Gi"}})),
        ],
    );
    assert!(plan.suspended);
    assert_yaml_snapshot!((plan.lifetime, &plan.roles[0].resources));
}

#[test]
fn the_config_file_is_what_the_program_reads() {
    let training = plan_of(TRAINING);
    let config: RunConfig<TrainingJobSpec> = serde_json::from_str(&training.files["job.json"]).unwrap();
    assert_eq!((config.job, config.spec_hash), (training.job, training.spec_hash));
    assert_eq!(config.spec.checkpoint.uri.as_deref(), Some("pvc://checkpoints/default/vqa"));
    let serving = plan_of(SERVING);
    let config: RunConfig<ServingJobSpec> = serde_json::from_str(&serving.files["job.json"]).unwrap();
    assert_eq!(config.spec.ports.grpc, 8001);
}

#[test]
fn an_artifact_runs_nothing() {
    let text = format!(
        "{{apiVersion: sensorium.dev/v1alpha1, kind: ModelArtifact, metadata: {{name: vqa}}, spec: {{uri: pvc://a, \
         digest: 'sha256:{}', signature: [{{name: fusion, inputs: [], outputs: []}}]}}}}",
        "0".repeat(64)
    );
    let resources = parse_documents(&text, "artifact.yaml").unwrap();
    assert!(matches!(plan(&resources[0]), Err(PlanError::RunsNothing { name }) if name == "vqa"));
}

#[test]
fn what_no_trainer_does_yet_is_refused_by_name_also_where_the_api_server_has_taken_it() {
    let resources = parse_documents(TRAINING, "training.yaml").unwrap();
    let Resource::TrainingJob(mut job) = resources.into_iter().next().unwrap() else { panic!("it is a TrainingJob") };
    job.spec.parallelism.tensor = 2;
    job.spec.parallelism.zero_stage = 1;
    let error = check_available(&Resource::TrainingJob(job)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "spec.parallelism.tensor is 2, which is not available yet; use 1, and `data` for more processes; \
         spec.parallelism.zeroStage is 1, which is not available yet; use 0"
    );
}

//! Whole objects, as a cluster gets them.

#![expect(clippy::unwrap_used, reason = "helpers of tests, which clippy does not count as tests")]

use insta::assert_yaml_snapshot;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use sensorium_api::manifest::{Resource, parse_documents};
use sensorium_operator::plan::{Pins, plan_pinned};
use sensorium_operator::render::{
    Images, MadeOf, Owner, Revision, Track, render_encoders, render_record, render_run, render_servers, render_serving,
};
use serde_json::{Value, json};

const TRAINING: &str = include_str!("../../../examples/easy-vqa/training.yaml");
const COMPRESSION: &str = include_str!("../../../examples/easy-vqa/compression.yaml");
const SERVING: &str = include_str!("../../../examples/easy-vqa/serving.yaml");

fn images() -> Images {
    Images {
        trainer: "registry.example/trainer:1".to_owned(),
        server: "registry.example/server:1".to_owned(),
        cli: "registry.example/cli:1".to_owned(),
        pull_policy: "IfNotPresent".to_owned(),
        pull_secrets: vec!["registry".to_owned()],
    }
}

fn resource(text: &str, changes: &[(&str, Value)]) -> Resource {
    let mut document: Value = serde_yaml_ng::from_str(text).unwrap();
    for (pointer, value) in changes {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        document.pointer_mut(parent).unwrap()[name] = value.clone();
    }
    parse_documents(&document.to_string(), "test.yaml").unwrap_or_else(|error| panic!("{error}")).remove(0)
}

fn owner(resource: &Resource) -> Owner {
    let reference = OwnerReference {
        api_version: "sensorium.dev/v1alpha1".to_owned(),
        kind: resource.kind().to_owned(),
        name: resource.name(),
        uid: "0000".to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    };
    Owner { job: resource.job().unwrap(), reference }
}

fn run(text: &str, changes: &[(&str, Value)], attempt: u32) -> Value {
    let resource = resource(text, changes);
    let plan = plan_pinned(&resource, &Pins::default()).unwrap();
    let mut objects = render_run(&owner(&resource), &plan, &plan.roles[0], attempt, &images());
    // An example's learning rate is not what these tests watch.
    let annotations = objects.job.spec.as_mut().unwrap().template.metadata.as_mut().unwrap().annotations.as_mut();
    annotations.unwrap().entry("sensorium.dev/job.json".to_owned()).and_modify(|text| "...".clone_into(text));
    json!([objects.config, objects.service, objects.network, objects.job])
}

#[test]
fn the_first_attempt_of_a_training_job() {
    assert_yaml_snapshot!(run(TRAINING, &[], 1));
}

#[test]
fn a_single_worker_needs_nothing_but_its_job_and_a_policy() {
    let changes = [("/spec/workers", json!(1)), ("/spec/processesPerWorker", json!(2))];
    let objects = run(TRAINING, &changes, 1);
    assert_eq!((&objects[0], &objects[1]), (&Value::Null, &Value::Null), "neither a ConfigMap nor a Service");
    let pod = &objects[3]["spec"]["template"]["spec"];
    assert_eq!(pod["subdomain"], Value::Null);
    let env = pod["containers"][0]["env"].as_array().unwrap();
    let master = env.iter().find(|variable| variable["name"] == "MASTER_ADDR").unwrap();
    assert_eq!(master["value"], "127.0.0.1", "its processes find each other");
}

#[test]
fn a_file_that_is_too_long_for_all_pods_together_is_a_config_map() {
    let notes = |length: usize| ("/spec/pods", json!({"env": {"NOTES": "x".repeat(length)}}));
    let layout = |workers: u32| [("/spec/workers", json!(workers)), ("/spec/parallelism/data", json!(workers))];
    let objects = |workers: u32, length: usize| {
        let changes: Vec<_> = layout(workers).into_iter().chain([notes(length)]).collect();
        run(TRAINING, &changes, 7)
    };
    let pods = |objects: &Value| objects[3]["spec"]["template"].clone();
    let short = objects(1, 40_000);
    assert_eq!(short[0], Value::Null);
    assert_eq!(pods(&short)["metadata"]["annotations"]["sensorium.dev/job.json"], "...");

    let long = objects(2, 40_000);
    assert_eq!(long[0]["metadata"]["name"], long[3]["metadata"]["name"], "each attempt has a file of its own");
    assert_eq!(long[0]["immutable"], true);
    assert_eq!(pods(&long)["metadata"]["annotations"]["sensorium.dev/job.json"], Value::Null);
    let volumes = pods(&long)["spec"]["volumes"].clone();
    let config = volumes.as_array().unwrap().iter().find(|volume| volume["name"] == "config").unwrap();
    assert_eq!(config["configMap"]["name"], long[0]["metadata"]["name"]);
}

#[test]
fn two_processes_with_a_gpu_each_in_a_queue_on_certain_nodes() {
    let changes = [
        ("/spec/processesPerWorker", json!(2)),
        ("/spec/parallelism/data", json!(4)),
        ("/spec/resources", json!({"limits": {"nvidia.com/gpu": "2", "cpu": "8"}})),
        (
            "/spec/scheduling",
            json!({
                "queueName": "team-a", "priorityClassName": "high", "runtimeClassName": "nvidia",
                "gpuProduct": "NVIDIA-H100-80GB-HBM3", "topology": {"key": "topology.kubernetes.io/zone", "mode": "pack"},
            }),
        ),
        ("/spec/pods", json!({"env": {"NCCL_DEBUG": "INFO"}, "envFromSecrets": ["s3"]})),
    ];
    let objects = run(TRAINING, &changes, 3);
    assert_yaml_snapshot!(objects[3]["spec"]["template"]["spec"]);
}

#[test]
fn a_compression_job() {
    assert_yaml_snapshot!(run(COMPRESSION, &[], 1)[3]);
}

#[test]
fn a_serving_job_with_everything() {
    let changes = [
        ("/spec/autoscaling", json!({"maxReplicas": 4, "metric": "queueDepth", "target": 10})),
        ("/spec/networkAccess", json!({"fromNamespaces": {"team": "web"}})),
    ];
    let resource = resource(SERVING, &changes);
    let digest = format!("sha256:{}", "a".repeat(64));
    let pins = Pins { artifacts: [("vqa-int8".to_owned(), digest.clone())].into(), ..Pins::default() };
    let plan = plan_pinned(&resource, &pins).unwrap();
    let owner = owner(&resource);
    let Resource::ServingJob(job) = &resource else { panic!("it is a ServingJob") };
    let around = render_serving(&owner, &job.spec, &plan.roles[0]);
    let (spec, images) = (&job.spec, images());
    let revision = Revision { owner: &owner, spec, plan: &plan, digest: &digest, images: &images };
    let servers = render_servers(&revision, &plan.roles[0], &[], Track::Stable, None);
    assert!(servers.config.data.unwrap()["job.json"].contains(&digest), "the servers read exactly this artifact");
    assert_yaml_snapshot!(json!([
        servers.deployment,
        around.service,
        around.budget,
        around.network,
        around.autoscaler,
        around.monitor
    ]));
}

#[test]
fn a_server_has_as_long_to_end_as_its_spec_says() {
    for (changes, told, grace) in
        [(vec![], None, 35), (vec![("/spec/drainSeconds", json!(600))], Some("600".to_owned()), 610)]
    {
        let resource = resource(SERVING, &changes);
        let plan = plan_pinned(&resource, &Pins::default()).unwrap();
        let (owner, images) = (owner(&resource), images());
        let Resource::ServingJob(job) = &resource else { panic!("it is a ServingJob") };
        let revision = Revision { owner: &owner, spec: &job.spec, plan: &plan, digest: "sha256:0", images: &images };
        let servers = render_servers(&revision, &plan.roles[0], &[], Track::Stable, None);
        let pod = servers.deployment.spec.template.spec.unwrap();
        assert_eq!(pod.termination_grace_period_seconds, Some(grace));
        let args = pod.containers[0].args.clone().unwrap();
        let seconds = args.iter().position(|arg| arg == "--drain-seconds").map(|at| args[at + 1].clone());
        assert_eq!(seconds, told);
    }
}

#[test]
fn an_encoder_as_a_service_of_its_own() {
    let encoders = json!([{"graph": "image_encoder", "autoscaling": {"maxReplicas": 4, "metric": "queueDepth"}}]);
    let resource = resource(SERVING, &[("/spec/encoders", encoders)]);
    let plan = plan_pinned(&resource, &Pins::default()).unwrap();
    let (owner, images) = (owner(&resource), images());
    let Resource::ServingJob(job) = &resource else { panic!("it is a ServingJob") };
    let revision = |digest| Revision { owner: &owner, spec: &job.spec, plan: &plan, digest, images: &images };
    let encoder = render_encoders(&revision("sha256:a")).remove(0);
    let pod = &encoder.deployment.spec.template;
    assert_yaml_snapshot!(json!([
        pod.spec.as_ref().unwrap().containers[0].args,
        pod.metadata,
        encoder.deployment.spec.selector,
        encoder.deployment.spec.replicas,
        encoder.service,
        encoder.budget,
        encoder.network,
        encoder.autoscaler,
    ]));

    let other = render_encoders(&revision("sha256:b")).remove(0);
    assert_ne!(encoder.name, other.name, "another model has encoders of its own");
    let servers = |encoder| {
        let servers = render_servers(&revision("sha256:a"), &plan.roles[0], &[encoder], Track::Stable, None);
        (serde_json::to_string(&servers.deployment).unwrap(), servers.revision)
    };
    let ((text, one), (_, another)) = (servers(encoder.clone()), servers(other));
    assert!(text.contains(&format!("image_encoder={}:8001", encoder.name)), "{text}");
    assert_ne!(one, another, "servers that call other encoders are other servers");
}

#[test]
fn a_certificate_and_tokens_are_files_of_servers_and_encoders_which_know_each_other_by_them() {
    let changes = [
        ("/spec/encoders", json!([{"graph": "image_encoder"}])),
        ("/spec/security", json!({"tls": {"secretName": "vqa-tls"}, "tokens": {"secretName": "vqa-clients"}})),
    ];
    let resource = resource(SERVING, &changes);
    let plan = plan_pinned(&resource, &Pins::default()).unwrap();
    let (owner, images) = (owner(&resource), images());
    let Resource::ServingJob(job) = &resource else { panic!("it is a ServingJob") };
    let revision = Revision { owner: &owner, spec: &job.spec, plan: &plan, digest: "sha256:a", images: &images };
    let encoder = render_encoders(&revision).remove(0);
    let servers = render_servers(&revision, &plan.roles[0], std::slice::from_ref(&encoder), Track::Stable, None);
    let seen = |deployment: &Deployment| {
        let pod = json!(deployment.spec.template.spec);
        let container = &pod["containers"][0];
        let secrets = |list: &Value| {
            let all = list.as_array().unwrap().iter();
            all.filter(|one| ["tls", "tokens"].map(Value::from).contains(&one["name"])).cloned().collect::<Vec<_>>()
        };
        json!({
            "args": container["args"],
            "mounts": secrets(&container["volumeMounts"]),
            "volumes": secrets(&pod["volumes"]),
            "readiness": container["readinessProbe"]["httpGet"],
            "liveness": container["livenessProbe"]["httpGet"],
        })
    };
    let mut servers_seen = seen(&servers.deployment);
    for argument in servers_seen["args"].as_array_mut().unwrap() {
        *argument = json!(argument.as_str().unwrap().replace(&encoder.name, "ENCODER"));
    }
    let ports = render_serving(&owner, &job.spec, &plan.roles[0]).service.spec.unwrap().ports;
    assert_yaml_snapshot!(json!({
        "servers": servers_seen,
        "encoder": seen(&encoder.deployment),
        "ports": [ports, encoder.service.spec.unwrap().ports],
    }));
    let told = servers.config.data.unwrap().remove("job.json").unwrap();
    assert!(!told.contains("security"), "it is in arguments; the file stays what it is: {told}");
}

#[test]
fn a_record_has_all_that_a_revision_needs_besides_its_servers() {
    let resource = resource(SERVING, &[("/spec/encoders", json!([{"graph": "image_encoder", "replicas": 2}]))]);
    let plan = plan_pinned(&resource, &Pins::default()).unwrap();
    let (owner, images) = (owner(&resource), images());
    let Resource::ServingJob(job) = &resource else { panic!("it is a ServingJob") };
    let revision = Revision { owner: &owner, spec: &job.spec, plan: &plan, digest: "sha256:a", images: &images };
    let mut encoders = render_encoders(&revision);
    let servers = render_servers(&revision, &plan.roles[0], &encoders, Track::Stable, None);
    let record = render_record(&owner, &servers, &encoders).unwrap();
    let made = MadeOf::read(&record).unwrap();
    assert_eq!((&made.config, &made.encoders), (&servers.config, &encoders));
    let annotations = record.metadata.annotations.as_ref().unwrap();
    assert_eq!(annotations["sensorium.dev/revision"], servers.revision);
    assert_eq!(annotations["sensorium.dev/encoders"], encoders[0].name);
    assert_eq!(Some(&annotations["sensorium.dev/config"]), servers.config.metadata.name.as_ref());
    // Its content cannot be changed: another number of pods is another record, of the same revision.
    encoders[0].deployment.spec.replicas = Some(3);
    let other = render_record(&owner, &servers, &encoders).unwrap();
    assert_ne!(record.metadata.name, other.metadata.name);
    assert_eq!(Some(annotations), other.metadata.annotations.as_ref());
    let strange = k8s_openapi::api::apps::v1::ControllerRevision { data: RawExtension::default(), ..record };
    assert_eq!(MadeOf::read(&strange), None);
}

#[test]
fn an_artifact_in_a_bucket_is_a_volume_where_the_node_can_fetch_it_as_the_pods_would() {
    let digest = format!("sha256:{}", "a".repeat(64));
    let servers = |store: &str, secrets: Value, node_cache: bool| {
        let pods = json!({"envFromSecrets": secrets, "env": {"AWS_REGION": "eu-1", "OMP_NUM_THREADS": "1"}});
        let resource = resource(SERVING, &[("/spec/model/store", json!(store)), ("/spec/pods", pods)]);
        let artifacts = [("vqa-int8".to_owned(), digest.clone())].into();
        let plan = plan_pinned(&resource, &Pins { artifacts, node_cache, ..Pins::default() }).unwrap();
        let (owner, images) = (owner(&resource), images());
        let Resource::ServingJob(job) = &resource else { panic!("it is a ServingJob") };
        let revision = Revision { owner: &owner, spec: &job.spec, plan: &plan, digest: &digest, images: &images };
        let servers = render_servers(&revision, &plan.roles[0], &[], Track::Stable, None);
        let pod = json!(servers.deployment.spec.template.spec);
        let volume = pod["volumes"].as_array().unwrap().iter().find(|volume| volume["csi"].is_object()).cloned();
        let told: Value = serde_json::from_str(&servers.config.data.unwrap()["job.json"]).unwrap();
        (volume, pod["containers"][0].clone(), told["spec"]["model"].clone())
    };
    let bucket = "s3://models/team-a";
    let (volume, container, model) = servers(bucket, json!(["s3"]), true);
    let volume = volume.unwrap();
    assert_eq!(
        volume["csi"],
        json!({
            "driver": "node-cache.sensorium.dev",
            "readOnly": true,
            "nodePublishSecretRef": {"name": "s3"},
            "volumeAttributes": {"store": bucket, "digest": digest, "AWS_REGION": "eu-1"},
        })
    );
    // The servers find it as they would find a claim.
    assert_eq!(model, json!({"store": "pvc://node-cache", "artifact": digest}));
    let mounts = container["volumeMounts"].as_array().unwrap();
    let mount = mounts.iter().find(|mount| mount["name"] == volume["name"]).unwrap();
    assert_eq!(
        (mount["readOnly"].as_bool(), mount["mountPath"].as_str()),
        (Some(true), Some("/mnt/volumes/node-cache"))
    );
    assert!(
        container["args"].as_array().unwrap().contains(&json!("node-cache=/mnt/volumes/node-cache")),
        "{container}"
    );

    // Nobody fetches for them; nobody knows with which of two Secrets; there is nothing to fetch.
    for (store, secrets, node_cache) in [
        (bucket, json!(["s3"]), false),
        (bucket, json!(["s3", "other"]), true),
        ("pvc://artifacts", json!(["s3"]), true),
    ] {
        let (volume, _, model) = servers(store, secrets, node_cache);
        assert_eq!((volume, &model["store"]), (None, &json!(store)));
    }
}

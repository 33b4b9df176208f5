//! Short Jobs on the stored files of a recorded model: one that compares their digests, and one that removes them.

use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    Container, PersistentVolumeClaimVolumeSource, PodSpec, PodTemplateSpec, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::ResourceExt;
use sensorium_api::{ModelArtifact, PodSettings};

use super::Images;
use super::names::{COMPONENT_LABEL, KIND_LABEL, MANAGED_BY, NAME_LABEL, child_name};
use super::pod::{
    CONTAINER, RESULT_FILE, container_security, env_from, plain, pod_security, program_path, pull_secrets,
};

/// Annotation of a ModelArtifact: how its store is reached, as in `spec.pods` of the job that made it. Not in the spec, which
/// never changes: Secrets do get other names.
pub const ACCESS_ANNOTATION: &str = "sensorium.dev/access";
/// Component label of the Job that compares digests, and the end of its name.
const VERIFIER: &str = "verify";
/// The same of the Job that removes files.
const REMOVER: &str = "remove";
/// A store that does not answer for so long is not going to; the check is made again later.
const DEADLINE_SECONDS: i64 = 3600;

/// The Job that checks `artifact`, or what is wrong with its location.
pub fn render_verification(artifact: &ModelArtifact, owner: OwnerReference, images: &Images) -> Result<Job, String> {
    store_job(artifact, owner, images, VERIFIER, "verify")
}

/// The Job that removes the files of `artifact`, or what is wrong with its location.
pub fn render_removal(artifact: &ModelArtifact, owner: OwnerReference, images: &Images) -> Result<Job, String> {
    store_job(artifact, owner, images, REMOVER, "rm")
}

/// Whether this Job compares digests.
pub fn is_verification(job: &Job) -> bool {
    job.labels().get(COMPONENT_LABEL).is_some_and(|component| component == VERIFIER)
}

/// The part of a job's settings that the store of its artifact may ask for, as text for [`ACCESS_ANNOTATION`]; nothing where
/// there is none.
pub(crate) fn access_of(pods: &PodSettings) -> Option<String> {
    let env = pods.env.iter().filter(|(name, _)| name.starts_with("AWS_"));
    let access = PodSettings {
        image: None,
        env: env.map(|(name, value)| (name.clone(), value.clone())).collect(),
        service_account_name: pods.service_account_name.clone(),
        env_from_secrets: pods.env_from_secrets.clone(),
    };
    (access != PodSettings::default()).then(|| serde_json::to_string(&access).unwrap_or_default())
}

fn access(artifact: &ModelArtifact) -> Result<PodSettings, String> {
    let Some(text) = artifact.annotations().get(ACCESS_ANNOTATION) else { return Ok(PodSettings::default()) };
    serde_json::from_str(text).map_err(|error| {
        format!(
            "annotation {ACCESS_ANNOTATION} cannot be read ({error}); it is JSON such as {{\"envFromSecrets\": [\"s3\"]}}"
        )
    })
}

/// A Job that runs a subcommand of `sensorium artifact` on the files of `artifact`.
fn store_job(
    artifact: &ModelArtifact,
    owner: OwnerReference,
    images: &Images,
    component: &str,
    command: &str,
) -> Result<Job, String> {
    let name = child_name(&artifact.name_any(), component);
    let labels = [
        (KIND_LABEL, "ModelArtifact"),
        (NAME_LABEL, &child_name(&artifact.name_any(), "")),
        (COMPONENT_LABEL, component),
        ("app.kubernetes.io/managed-by", MANAGED_BY),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let uri = &artifact.spec.uri;
    let store = artifact.spec.store().ok_or_else(|| {
        format!(
            "spec.uri is {uri}, which is not STORE/objects/DIGEST, as jobs write it; correct it in a new ModelArtifact"
        )
    })?;
    let mut args: Vec<String> =
        ["artifact", command, &artifact.spec.digest, "--store", store].map(str::to_owned).to_vec();
    let mut volumes = None;
    let mut mounts = None;
    if let Some(claim) = uri.strip_prefix("pvc://").and_then(|rest| rest.split('/').next()) {
        let path = format!("/mnt/volumes/{claim}");
        args.extend(["--volume".to_owned(), format!("{claim}={path}")]);
        volumes = Some(vec![Volume {
            name: "store".to_owned(),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim.to_owned(),
                read_only: None,
            }),
            ..Volume::default()
        }]);
        mounts = Some(vec![VolumeMount {
            name: "store".to_owned(),
            mount_path: path,
            read_only: (component == VERIFIER).then_some(true),
            ..VolumeMount::default()
        }]);
    }
    let access = access(artifact)?;
    let pod = PodSpec {
        service_account_name: access.service_account_name,
        restart_policy: Some("Never".to_owned()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        image_pull_secrets: pull_secrets(images),
        security_context: Some(pod_security()),
        containers: vec![Container {
            name: CONTAINER.to_owned(),
            image: Some(images.cli.clone()),
            image_pull_policy: Some(images.pull_policy.clone()),
            command: Some(vec![program_path("sensorium")]),
            args: Some(args),
            env: Some(access.env.into_iter().map(|(name, value)| plain(&name, value)).collect::<Vec<_>>())
                .filter(|env| !env.is_empty()),
            env_from: env_from(&access.env_from_secrets),
            volume_mounts: mounts,
            security_context: Some(container_security()),
            termination_message_path: Some(RESULT_FILE.to_owned()),
            termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
            ..Container::default()
        }],
        volumes,
        ..PodSpec::default()
    };
    let metadata = ObjectMeta {
        name: Some(name),
        namespace: artifact.namespace(),
        labels: Some(labels.clone().into()),
        owner_references: Some(vec![owner]),
        ..ObjectMeta::default()
    };
    let template = PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels.into()), ..ObjectMeta::default() }),
        spec: Some(pod),
    };
    let spec = JobSpec {
        backoff_limit: Some(3),
        active_deadline_seconds: Some(DEADLINE_SECONDS),
        template,
        ..JobSpec::default()
    };
    Ok(Job { metadata, spec: Some(spec), status: None })
}

//! The check of a recorded model: a short Job that reads the stored files and compares their digests.

use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    Container, PersistentVolumeClaimVolumeSource, PodSpec, PodTemplateSpec, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::ResourceExt;
use sensorium_api::ModelArtifact;

use super::Images;
use super::names::{KIND_LABEL, MANAGED_BY, NAME_LABEL, child_name};
use super::pod::{CONTAINER, RESULT_FILE, container_security, pod_security, program_path, pull_secrets};

/// Component label of the Job, and the end of its name.
pub const VERIFIER: &str = "verify";
/// A store that does not answer for so long is not going to; the check is made again later.
const DEADLINE_SECONDS: i64 = 3600;

/// The Job that checks `artifact`, or what is wrong with its location.
pub fn render_verification(artifact: &ModelArtifact, owner: OwnerReference, images: &Images) -> Result<Job, String> {
    let name = child_name(&artifact.name_any(), VERIFIER);
    let labels = [
        (KIND_LABEL, "ModelArtifact"),
        (NAME_LABEL, &child_name(&artifact.name_any(), "")),
        ("app.kubernetes.io/component", VERIFIER),
        ("app.kubernetes.io/managed-by", MANAGED_BY),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let uri = &artifact.spec.uri;
    // An artifact lies in STORE/objects/DIGEST.
    let store = uri.rsplitn(3, '/').nth(2).filter(|store| store.contains("://")).ok_or_else(|| {
        format!(
            "spec.uri is {uri}, which is not STORE/objects/DIGEST, as jobs write it; correct it in a new ModelArtifact"
        )
    })?;
    let mut args: Vec<String> =
        ["artifact", "verify", &artifact.spec.digest, "--store", store].map(str::to_owned).to_vec();
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
            read_only: Some(true),
            ..VolumeMount::default()
        }]);
    }
    let pod = PodSpec {
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

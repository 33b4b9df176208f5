//! A role's pod: without root, without a token, with a read-only file system, as the restricted Pod Security wants it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, CSIVolumeSource, Capabilities, ConfigMapVolumeSource, Container, ContainerPort, DownwardAPIVolumeFile,
    DownwardAPIVolumeSource, EmptyDirVolumeSource, EnvFromSource, EnvVar, EnvVarSource, LocalObjectReference,
    ObjectFieldSelector, PersistentVolumeClaimVolumeSource, PodAffinity, PodAffinityTerm, PodSecurityContext, PodSpec,
    ResourceFieldSelector, ResourceRequirements, SeccompProfile, SecretEnvSource, SecretVolumeSource, SecurityContext,
    Toleration, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use sensorium_api::{Scheduling, TopologyMode};

use super::Images;
use super::names::{COMPLETION_INDEX, child_name, service_name};
use crate::plan::{ArtifactVolume, MountSource, Program, Resolve, Role, WorkloadPlan};

/// Name of the one container of every pod.
pub const CONTAINER: &str = "main";
/// Where a program leaves its result: Kubernetes keeps it in the pod's status.
pub const RESULT_FILE: &str = "/dev/termination-log";
/// Name of the CSI driver that fetches artifacts once per node; the chart's CSIDriver has it too.
const NODE_CACHE_DRIVER: &str = "node-cache.sensorium.dev";
/// User and group of every process; the images know it.
const USER: i64 = 65_532;
/// Where the processes of a single pod find each other.
const LOOPBACK: &str = "127.0.0.1";
/// The variable that holds a pod's number within its Job.
const POD_INDEX: &str = "POD_INDEX";
/// Mode of a Secret's files: the group of every process may read them, and nobody else.
const SECRET_MODE: i32 = 0o440;

/// A pod's place in the cluster, for the holes of a plan's templates.
pub(super) struct Place<'a> {
    pub(super) plan: &'a WorkloadPlan,
    pub(super) role: &'a Role,
    /// Name of the Job, which the pods' host names begin with.
    pub(super) job: &'a str,
    /// Name of the headless Service that gives the pods their domain; none where no pod calls another.
    pub(super) domain: Option<&'a str>,
    /// Names of the Services by which other roles are reached.
    pub(super) services: &'a BTreeMap<String, String>,
}

impl Resolve for Place<'_> {
    fn host(&self, _role: &str, index: u32) -> String {
        match self.domain {
            Some(domain) => format!("{}-{index}.{domain}", self.job),
            None => LOOPBACK.to_owned(),
        }
    }
    fn port(&self, _role: &str, name: &str) -> u16 {
        self.role.ports.get(name).copied().unwrap_or_default()
    }
    fn addresses(&self, role: &str, name: &str) -> String {
        let service = self.services.get(role).map_or("", String::as_str);
        let role = self.plan.roles.iter().find(|other| other.name == role);
        let port = role.and_then(|role| role.ports.get(name)).copied().unwrap_or_default();
        format!("{service}:{port}")
    }
    fn service(&self) -> String {
        let job = &self.plan.job;
        format!("{}.{}.svc", service_name(&job.name, ""), job.namespace)
    }
    fn listen(&self, name: &str) -> String {
        format!("0.0.0.0:{}", self.port("", name))
    }
    fn mount_path(&self, name: &str) -> String {
        mount_path(name)
    }
    fn rank(&self) -> String {
        // Several processes of one pod get theirs from `launch`, which counts on from the pod's number.
        format!("$({POD_INDEX})")
    }
    fn local_rank(&self) -> String {
        "0".to_owned()
    }
    fn result_file(&self) -> String {
        RESULT_FILE.to_owned()
    }
}

fn mount_path(name: &str) -> String {
    format!("/mnt/{name}")
}

/// Where a pod finds the plan's files.
#[derive(Clone, Copy)]
pub(super) enum Files<'a> {
    /// In the ConfigMap of this name.
    ConfigMap(&'a str),
    /// In its own annotations: see [`file_annotations`].
    Annotations,
}

/// The plan's files as annotations of its pods.
pub(super) fn file_annotations(plan: &WorkloadPlan) -> BTreeMap<String, String> {
    plan.files.iter().map(|(name, text)| (file_annotation(name), text.clone())).collect()
}

fn file_annotation(file: &str) -> String {
    format!("sensorium.dev/{file}")
}

/// What a pod template needs besides its role.
pub(super) struct PodContext<'a> {
    pub(super) plan: &'a WorkloadPlan,
    pub(super) images: &'a Images,
    /// Where the plan's files are.
    pub(super) files: Files<'a>,
    /// Labels of the pods that topology speaks of.
    pub(super) peers: BTreeMap<String, String>,
}

/// The pod of `role`, to be completed with what only a Job's or only a Deployment's pods have.
pub(super) fn pod_spec(context: &PodContext<'_>, place: &Place<'_>) -> PodSpec {
    let (plan, role) = (context.plan, place.role);
    let gpus = role.resources.has_gpus();
    let scheduling = &plan.scheduling;
    let (volumes, mounts) = volumes(role, context, gpus);
    let image = plan.pods.image.as_deref().unwrap_or_else(|| context.images.of(role.program));
    let mut node_selector = scheduling.node_selector.clone();
    if let Some(product) = &scheduling.gpu_product {
        node_selector.insert("nvidia.com/gpu.product".to_owned(), product.clone());
    }
    PodSpec {
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        service_account_name: plan.pods.service_account_name.clone(),
        image_pull_secrets: pull_secrets(context.images),
        security_context: Some(pod_security()),
        node_selector: (!node_selector.is_empty()).then_some(node_selector),
        tolerations: tolerations(scheduling, gpus),
        affinity: affinity(scheduling, &context.peers),
        topology_spread_constraints: spread(scheduling, &context.peers),
        priority_class_name: scheduling.priority_class_name.clone(),
        scheduler_name: scheduling.scheduler_name.clone(),
        runtime_class_name: scheduling.runtime_class_name.clone(),
        containers: vec![Container {
            name: CONTAINER.to_owned(),
            image: Some(image.to_owned()),
            image_pull_policy: Some(context.images.pull_policy.clone()),
            command: Some(vec![program_path(role.program.binary())]),
            args: Some(args(role, place)),
            env: Some(env(context, place, gpus)),
            env_from: env_from(&plan.pods.env_from_secrets),
            ports: Some(ports(role)),
            resources: Some(ResourceRequirements {
                requests: non_empty(&role.resources.requests),
                limits: non_empty(&role.resources.limits),
                ..ResourceRequirements::default()
            }),
            volume_mounts: Some(mounts),
            security_context: Some(container_security()),
            termination_message_path: Some(RESULT_FILE.to_owned()),
            termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
            ..Container::default()
        }],
        volumes: Some(volumes),
        ..PodSpec::default()
    }
}

/// Where an image keeps a program.
pub(super) fn program_path(binary: &str) -> String {
    format!("/usr/local/bin/{binary}")
}

pub(super) fn pull_secrets(images: &Images) -> Option<Vec<LocalObjectReference>> {
    let secrets = images.pull_secrets.iter().map(|name| LocalObjectReference { name: name.clone() });
    Some(secrets.collect::<Vec<_>>()).filter(|secrets| !secrets.is_empty())
}

pub(super) fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        // Volumes are made writable for this group, and only when they are not yet: a large one takes long.
        fs_group: Some(USER),
        fs_group_change_policy: Some("OnRootMismatch".to_owned()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
        ..PodSecurityContext::default()
    }
}

pub(super) fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        ..SecurityContext::default()
    }
}

/// Several processes in one pod are started by `launch`, as torchrun does.
fn args(role: &Role, place: &Place<'_>) -> Vec<String> {
    let rendered = role.args.iter().map(|arg| arg.render(place));
    if role.processes == 1 {
        return rendered.collect();
    }
    let launch = ["launch", "--processes", &role.processes.to_string(), "--"].map(str::to_owned);
    launch.into_iter().chain(rendered).collect()
}

fn env(context: &PodContext<'_>, place: &Place<'_>, gpus: bool) -> Vec<EnvVar> {
    let role = place.role;
    let mut env = Vec::new();
    if role.program == Program::Trainer {
        env.push(from_field(POD_INDEX, &format!("metadata.annotations['{COMPLETION_INDEX}']")));
        env.push(plain("GROUP_RANK", format!("$({POD_INDEX})")));
        // Peers reach a worker at its pod's address; it need not find that out by itself.
        env.push(from_field("SENSORIUM_INTERFACE_ADDR", "status.podIP"));
    }
    // Numeric libraries would start a thread for every core of the node, whatever this container may use of it.
    env.extend(["OMP_NUM_THREADS", "RAYON_NUM_THREADS"].map(cores));
    if gpus {
        env.push(plain("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1".to_owned()));
        env.push(plain("NCCL_DEBUG", "WARN".to_owned()));
    }
    env.extend(role.env.iter().map(|(name, value)| plain(name, value.render(place))));
    let wished = &context.plan.pods.env;
    env.retain(|variable| !wished.contains_key(&variable.name));
    env.extend(wished.iter().map(|(name, value)| plain(name, value.clone())));
    env
}

pub(super) fn plain(name: &str, value: String) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value), value_from: None }
}

fn from_field(name: &str, path: &str) -> EnvVar {
    let field = ObjectFieldSelector { field_path: path.to_owned(), api_version: None };
    let source = EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() };
    EnvVar { name: name.to_owned(), value: None, value_from: Some(source) }
}

/// The container's CPU limit in whole cores; the node's cores where there is no limit.
fn cores(name: &str) -> EnvVar {
    let field = ResourceFieldSelector {
        resource: "limits.cpu".to_owned(),
        container_name: None,
        divisor: Some(Quantity("1".to_owned())),
    };
    let source = EnvVarSource { resource_field_ref: Some(field), ..EnvVarSource::default() };
    EnvVar { name: name.to_owned(), value: None, value_from: Some(source) }
}

pub(super) fn env_from(secrets: &[String]) -> Option<Vec<EnvFromSource>> {
    let sources = secrets.iter().map(|name| EnvFromSource {
        secret_ref: Some(SecretEnvSource { name: name.clone(), optional: None }),
        ..EnvFromSource::default()
    });
    Some(sources.collect::<Vec<_>>()).filter(|sources| !sources.is_empty())
}

fn ports(role: &Role) -> Vec<ContainerPort> {
    let port = |(name, number): (&String, &u16)| ContainerPort {
        name: Some(name.clone()),
        container_port: i32::from(*number),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    role.ports.iter().map(port).collect()
}

fn non_empty(quantities: &BTreeMap<String, Quantity>) -> Option<BTreeMap<String, Quantity>> {
    (!quantities.is_empty()).then(|| quantities.clone())
}

fn volumes(role: &Role, context: &PodContext<'_>, gpus: bool) -> (Vec<Volume>, Vec<VolumeMount>) {
    let mut volumes = Vec::new();
    let mut mounts = Vec::new();
    for mount in &role.mounts {
        let name = child_name(&mount.name.replace('/', "-"), "");
        let mut volume = Volume { name: name.clone(), ..Volume::default() };
        match &mount.source {
            MountSource::Config => match context.files {
                Files::ConfigMap(name) => {
                    volume.config_map = Some(ConfigMapVolumeSource { name: name.to_owned(), ..Default::default() });
                }
                Files::Annotations => volume.downward_api = Some(annotated_files(context.plan)),
            },
            MountSource::Secret(secret) => {
                volume.secret = Some(SecretVolumeSource {
                    secret_name: Some(secret.clone()),
                    default_mode: Some(SECRET_MODE),
                    ..SecretVolumeSource::default()
                });
            }
            MountSource::Artifact(artifact) => volume.csi = Some(artifact_volume(artifact)),
            MountSource::Scratch => volume.empty_dir = Some(EmptyDirVolumeSource::default()),
            MountSource::Claim(claim) => {
                volume.persistent_volume_claim = Some(PersistentVolumeClaimVolumeSource {
                    claim_name: claim.clone(),
                    // The mount is read-only, not the volume: a claim that is attached read-only once can't be
                    // written by the next pod on the same node.
                    read_only: None,
                });
            }
        }
        volumes.push(volume);
        mounts.push(VolumeMount {
            name,
            mount_path: mount_path(&mount.name),
            read_only: mount.read_only.then_some(true),
            ..VolumeMount::default()
        });
    }
    if gpus {
        // NCCL passes data between the GPUs of a pod through shared memory; the default of 64 MiB is too little.
        let memory = EmptyDirVolumeSource { medium: Some("Memory".to_owned()), ..Default::default() };
        volumes.push(Volume { name: "shared-memory".to_owned(), empty_dir: Some(memory), ..Volume::default() });
        let mount_path = "/dev/shm".to_owned();
        mounts.push(VolumeMount { name: "shared-memory".to_owned(), mount_path, ..VolumeMount::default() });
    }
    (volumes, mounts)
}

fn annotated_files(plan: &WorkloadPlan) -> DownwardAPIVolumeSource {
    let file = |name: &String| DownwardAPIVolumeFile {
        path: name.clone(),
        field_ref: Some(ObjectFieldSelector {
            field_path: format!("metadata.annotations['{}']", file_annotation(name)),
            api_version: None,
        }),
        ..DownwardAPIVolumeFile::default()
    };
    DownwardAPIVolumeSource { items: Some(plan.files.keys().map(file).collect()), ..DownwardAPIVolumeSource::default() }
}

/// The node fetches it with the pod's own Secret, which the kubelet passes on.
fn artifact_volume(artifact: &ArtifactVolume) -> CSIVolumeSource {
    let mut attributes = artifact.settings.clone();
    attributes.insert("store".to_owned(), artifact.store.clone());
    attributes.insert("digest".to_owned(), artifact.digest.clone());
    CSIVolumeSource {
        driver: NODE_CACHE_DRIVER.to_owned(),
        read_only: Some(true),
        node_publish_secret_ref: Some(LocalObjectReference { name: artifact.secret.clone() }),
        volume_attributes: Some(attributes),
        fs_type: None,
    }
}

fn tolerations(scheduling: &Scheduling, gpus: bool) -> Option<Vec<Toleration>> {
    let gpu = Toleration {
        key: Some("nvidia.com/gpu".to_owned()),
        operator: Some("Exists".to_owned()),
        effect: Some("NoSchedule".to_owned()),
        ..Toleration::default()
    };
    let all: Vec<Toleration> = scheduling.tolerations.iter().cloned().chain(gpus.then_some(gpu)).collect();
    (!all.is_empty()).then_some(all)
}

fn affinity(scheduling: &Scheduling, peers: &BTreeMap<String, String>) -> Option<Affinity> {
    let topology = scheduling.topology.as_ref().filter(|topology| topology.mode == TopologyMode::Pack)?;
    let term = PodAffinityTerm {
        label_selector: Some(LabelSelector { match_labels: Some(peers.clone()), match_expressions: None }),
        topology_key: topology.key.clone(),
        ..PodAffinityTerm::default()
    };
    let pods =
        PodAffinity { required_during_scheduling_ignored_during_execution: Some(vec![term]), ..PodAffinity::default() };
    Some(Affinity { pod_affinity: Some(pods), ..Affinity::default() })
}

fn spread(scheduling: &Scheduling, peers: &BTreeMap<String, String>) -> Option<Vec<TopologySpreadConstraint>> {
    let topology = scheduling.topology.as_ref().filter(|topology| topology.mode == TopologyMode::Spread)?;
    Some(vec![TopologySpreadConstraint {
        max_skew: 1,
        topology_key: topology.key.clone(),
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        label_selector: Some(LabelSelector { match_labels: Some(peers.clone()), match_expressions: None }),
        ..TopologySpreadConstraint::default()
    }])
}

//! ServingJob: replicas of the model server, and of encoders where these are services of their own.

use std::collections::BTreeMap;

use sensorium_api::run::{JobKey, JobKind};
use sensorium_api::{
    EncoderService, NetworkAccess, PodSettings, Resources, Rollout, Scheduling, Security, ServiceSpec, ServingJob,
    ServingJobSpec,
};

use super::config::{common_env, config_args, config_files, listen_args};
use super::spec_hash;
use super::storage::Claims;
use super::template::{Part, Template};
use super::workload::{ArtifactVolume, HttpProbe, Lifetime, Mount, MountSource, Program, Role, WorkloadPlan};
use super::{Pins, PlanError};

/// The servers' role; encoders' roles are called after their graphs.
const SERVER: &str = "server";
/// Stands in the place of a claim for an artifact that the node fetches.
const NODE_CACHE: &str = "node-cache";
/// The port by which servers call encoders.
const GRPC: &str = "grpc";
/// The mounts of a job's certificate and of its tokens.
const TLS: &str = "tls";
const TOKENS: &str = "tokens";

pub(super) fn plan_serving(object: &ServingJob, pins: &Pins) -> Result<WorkloadPlan, PlanError> {
    let job = JobKey::of(object, JobKind::ServingJob);
    let spec_hash = spec_hash::serving(&object.spec);
    let requires = vec![object.spec.model.artifact.clone()];
    let mut spec = object.spec.clone();
    if let Some(known) = &pins.graphs
        && let Some(unknown) = spec.encoders.iter().find(|encoder| !known.contains(&encoder.graph))
    {
        let (graph, artifact) = (unknown.graph.clone(), spec.model.artifact);
        return Err(PlanError::UnknownGraph { graph, artifact, known: known.clone() });
    }
    pins.pin(&mut spec.model.artifact);
    let volume = node_volume(&spec, pins);
    if volume.is_some() {
        spec.model.store = format!("pvc://{NODE_CACHE}");
    }
    // Clients and the Service look for the servers first.
    let mut roles = vec![servers(&spec)];
    roles.extend(spec.encoders.iter().map(|encoder| encoder_of(&spec, encoder)));
    if let Some(volume) = volume {
        let mounts = roles.iter_mut().flat_map(|role| &mut role.mounts);
        for mount in mounts.filter(|mount| mount.source == MountSource::Claim(NODE_CACHE.to_owned())) {
            mount.source = MountSource::Artifact(volume.clone());
        }
    }
    Ok(WorkloadPlan {
        files: config_files(&job, &spec_hash, &told(&spec))?,
        job,
        spec_hash,
        requires,
        produces: None,
        suspended: false,
        roles,
        lifetime: Lifetime::Service,
        scheduling: spec.scheduling,
        pods: spec.pods,
    })
}

/// The artifact as a volume of the node's, where it is in a bucket and the node can fetch it as the pods would: with the
/// credentials of the one Secret that they have. Which of several is meant nobody says, and a node has no account of a pod's.
fn node_volume(spec: &ServingJobSpec, pins: &Pins) -> Option<ArtifactVolume> {
    let (store, digest, pods) = (&spec.model.store, &spec.model.artifact, &spec.pods);
    let [secret] = pods.env_from_secrets.as_slice() else { return None };
    let settings = pods.env.iter().filter(|(name, _)| name.starts_with("AWS_"));
    (pins.node_cache && store.starts_with("s3://") && digest.starts_with("sha256:")).then(|| ArtifactVolume {
        store: store.clone(),
        digest: digest.clone(),
        secret: secret.clone(),
        settings: settings.map(|(name, value)| (name.clone(), value.clone())).collect(),
    })
}

/// The servers that clients talk to.
fn servers(spec: &ServingJobSpec) -> Role {
    let remote = spec.encoders.iter().flat_map(|EncoderService { graph, .. }| {
        let addresses = Part::Addresses { role: graph.clone(), name: GRPC.to_owned() };
        [Template::text("--remote-graph"), Template::new([Part::Text(format!("{graph}=")), addresses])]
    });
    let known = if spec.encoders.is_empty() { Vec::new() } else { known_by(&spec.security) };
    role(spec, SERVER, spec.replicas, &spec.resources, remote.chain(known))
}

/// How servers and encoders know each other: encoders show the job's own certificate, so that it need not be for names that
/// every rollout changes, and accept its tokens.
fn known_by(security: &Security) -> Vec<Template> {
    let tls = security.tls.iter().flat_map(|_| {
        let [flag, file] = file_args("--remote-tls-ca", TLS, "ca.crt");
        [flag, file, Template::text("--remote-tls-name"), Template::new([Part::Service])]
    });
    let tokens = security.tokens.iter().flat_map(|_| file_args("--remote-tokens", TOKENS, "tokens"));
    tls.chain(tokens).collect()
}

/// How whoever connects has to come.
fn let_in_by(security: &Security) -> Vec<Template> {
    let tls = security.tls.iter().flat_map(|_| {
        let files = [("--tls-cert", "tls.crt"), ("--tls-key", "tls.key")];
        files.map(|(flag, file)| file_args(flag, TLS, file)).concat()
    });
    let tokens = security.tokens.iter().flat_map(|_| file_args("--auth-tokens", TOKENS, "tokens"));
    tls.chain(tokens).collect()
}

/// `FLAG PATH` of a file in a mount.
fn file_args(flag: &str, mount: &str, file: &str) -> [Template; 2] {
    [Template::text(flag), Template::new([Part::MountPath(mount.to_owned()), Part::Text(format!("/{file}"))])]
}

/// The Secrets as folders.
fn secrets(security: &Security) -> impl Iterator<Item = Mount> {
    let tls = security.tls.iter().map(|tls| (TLS, &tls.secret_name));
    let tokens = security.tokens.iter().map(|tokens| (TOKENS, &tokens.secret_name));
    tls.chain(tokens).map(|(name, secret)| Mount {
        name: name.to_owned(),
        source: MountSource::Secret(secret.clone()),
        read_only: true,
    })
}

/// Servers of a single graph.
fn encoder_of(spec: &ServingJobSpec, encoder: &EncoderService) -> Role {
    let only = ["--graph", &encoder.graph].map(Template::text);
    role(spec, &encoder.graph, encoder.replicas, &encoder.resources, only)
}

fn role(
    spec: &ServingJobSpec,
    name: &str,
    replicas: Option<u32>,
    resources: &Resources,
    args: impl IntoIterator<Item = Template>,
) -> Role {
    // `verification.data` is missing on purpose: whoever verifies asks through the public API, like any client.
    let claims = Claims::default().read(&spec.model.store);
    let ports = [(GRPC, spec.ports.grpc), ("http", spec.ports.http), ("metrics", spec.ports.metrics)];
    let listen = ports.iter().flat_map(|(name, _)| listen_args(&format!("--{name}-addr"), name));
    // The program finds the GPU that it was given as the first one.
    let device = resources.has_gpus().then(|| ["--engine-device", "cuda"].map(Template::text));
    let drain =
        spec.drain_seconds.map(|seconds| ["--drain-seconds".to_owned(), seconds.to_string()].map(Template::text));
    let security = let_in_by(&spec.security);
    let args = config_args(&claims)
        .into_iter()
        .chain(listen)
        .chain(device.into_iter().flatten())
        .chain(drain.into_iter().flatten())
        .chain(security)
        .chain(args);
    Role {
        name: name.to_owned(),
        program: Program::Server,
        replicas: replicas.unwrap_or(1),
        processes: 1,
        args: args.collect(),
        env: common_env(),
        ports: BTreeMap::from(ports.map(|(name, number)| (name.to_owned(), number))),
        mounts: claims.mounts().into_iter().chain(secrets(&spec.security)).collect(),
        resources: resources.clone(),
        result: false,
        // There it is answered whatever clients do: on their ports a server that has all the connections that it may have
        // takes no other.
        readiness: Some(HttpProbe { port: "metrics".to_owned(), path: "/readyz".to_owned() }),
    }
}

/// What a server is told of the spec: nothing that concerns others only, so that scaling a job, or changing who may reach
/// it, does not make its servers new ones. Which graphs it runs itself is among its arguments.
fn told(spec: &ServingJobSpec) -> ServingJobSpec {
    ServingJobSpec {
        replicas: None,
        autoscaling: None,
        encoders: Vec::new(),
        rollout: Rollout::default(),
        verification: None,
        resources: Resources::default(),
        service: ServiceSpec::default(),
        network_access: NetworkAccess::default(),
        security: Security::default(),
        disruption_max_unavailable: 1,
        drain_seconds: None,
        scheduling: Scheduling::default(),
        pods: PodSettings::default(),
        ..spec.clone()
    }
}

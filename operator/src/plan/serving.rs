//! ServingJob: replicas of the model server.

use std::collections::BTreeMap;

use sensorium_api::run::{JobKey, JobKind};
use sensorium_api::{
    NetworkAccess, PodSettings, Resources, Rollout, Scheduling, ServiceSpec, ServingJob, ServingJobSpec,
};

use super::config::{common_env, config_args, config_files, listen_args};
use super::spec_hash;
use super::storage::Claims;
use super::workload::{HttpProbe, Lifetime, Program, Role, WorkloadPlan};
use super::{Pins, PlanError};

pub(super) fn plan_serving(object: &ServingJob, pins: &Pins) -> Result<WorkloadPlan, PlanError> {
    let job = JobKey::of(object, JobKind::ServingJob);
    let spec_hash = spec_hash::serving(&object.spec);
    let requires = vec![object.spec.model.artifact.clone()];
    let mut spec = object.spec.clone();
    pins.pin(&mut spec.model.artifact);
    // `verification.data` is missing on purpose: whoever verifies asks through the public API, like any client.
    let claims = Claims::default().read(&spec.model.store);
    let ports = [("grpc", spec.ports.grpc), ("http", spec.ports.http), ("metrics", spec.ports.metrics)];
    let listen = ports.iter().flat_map(|(name, _)| listen_args(&format!("--{name}-addr"), name));
    Ok(WorkloadPlan {
        files: config_files(&job, &spec_hash, &told(&spec))?,
        job,
        spec_hash,
        requires,
        produces: None,
        suspended: false,
        roles: vec![Role {
            name: "server".to_owned(),
            program: Program::Server,
            replicas: spec.replicas.unwrap_or(1),
            processes: 1,
            args: config_args(&claims).into_iter().chain(listen).collect(),
            env: common_env(),
            ports: BTreeMap::from(ports.map(|(name, number)| (name.to_owned(), number))),
            mounts: claims.mounts(),
            resources: spec.resources.clone(),
            result: false,
            readiness: Some(HttpProbe { port: "http".to_owned(), path: "/v2/health/ready".to_owned() }),
        }],
        lifetime: Lifetime::Service,
        scheduling: spec.scheduling,
        pods: spec.pods,
    })
}

/// What a server is told of the spec: nothing that concerns others only, so that scaling a job, or changing who may reach
/// it, does not make its servers new ones.
fn told(spec: &ServingJobSpec) -> ServingJobSpec {
    ServingJobSpec {
        replicas: None,
        autoscaling: None,
        rollout: Rollout::default(),
        verification: None,
        resources: Resources::default(),
        service: ServiceSpec::default(),
        network_access: NetworkAccess::default(),
        disruption_max_unavailable: 1,
        scheduling: Scheduling::default(),
        pods: PodSettings::default(),
        ..spec.clone()
    }
}

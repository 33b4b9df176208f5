//! ServingJob: replicas of the model server.

use std::collections::BTreeMap;

use sensorium_api::ServingJob;
use sensorium_api::run::{JobKey, JobKind};

use super::PlanError;
use super::config::{common_env, config_args, config_files, listen_args};
use super::spec_hash;
use super::storage::Claims;
use super::workload::{HttpProbe, Lifetime, Program, Role, WorkloadPlan};

pub(super) fn plan_serving(object: &ServingJob) -> Result<WorkloadPlan, PlanError> {
    let job = JobKey::of(object, JobKind::ServingJob);
    let spec = &object.spec;
    // `verification.data` is missing on purpose: whoever verifies asks through the public API, like any client.
    let claims = Claims::default().read(&spec.model.store);
    let spec_hash = spec_hash::serving(spec);
    let ports = [("grpc", spec.ports.grpc), ("http", spec.ports.http), ("metrics", spec.ports.metrics)];
    let listen = ports.iter().flat_map(|(name, _)| listen_args(&format!("--{name}-addr"), name));
    Ok(WorkloadPlan {
        files: config_files(&job, &spec_hash, spec)?,
        job,
        spec_hash,
        requires: vec![spec.model.artifact.clone()],
        produces: None,
        suspended: false,
        roles: vec![Role {
            name: "server".to_owned(),
            program: Program::Server,
            replicas: spec.replicas,
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
    })
}

//! TrainingJob: one role of workers that meet at rank 0, as torchrun lays it out.

use std::collections::BTreeMap;

use sensorium_api::run::{JobKey, JobKind};
use sensorium_api::{ModelSource, TrainingJob};

use super::config::{PROGRESS, PROGRESS_PORT, common_env, config_args, config_files, report_args};
use super::spec_hash;
use super::storage::Claims;
use super::template::{Part, Template};
use super::workload::{Lifetime, Program, Role, RunPolicy, WorkloadPlan};
use super::{Pins, PlanError};

const WORKER: &str = "worker";
/// Name of the port on which rank 0 gathers the others.
const RENDEZVOUS: &str = "rendezvous";
/// torchrun's.
const RENDEZVOUS_PORT: u16 = 29_500;

pub(super) fn plan_training(object: &TrainingJob, pins: &Pins) -> Result<WorkloadPlan, PlanError> {
    let job = JobKey::of(object, JobKind::TrainingJob);
    // Of the spec as it was written: a run of another width, or of a name that was looked up, is the same run.
    let spec_hash = spec_hash::training(&object.spec);
    let requires = match &object.spec.model {
        ModelSource::Architecture(_) => Vec::new(),
        ModelSource::Artifact(artifact) => vec![artifact.clone()],
    };
    let mut spec = object.spec.clone();
    if let ModelSource::Artifact(artifact) = &mut spec.model {
        pins.pin(artifact);
    }
    if let Some(workers) = pins.workers {
        spec.workers = workers;
        let layout = &mut spec.parallelism;
        layout.data = workers * spec.processes_per_worker / (layout.tensor * layout.pipeline);
    }
    let checkpoints = object.checkpoint_uri();
    spec.checkpoint.uri = Some(checkpoints.clone());
    let claims = Claims::default()
        .read(&spec.data.train)
        .read(&spec.data.evaluation)
        .write(&checkpoints)
        .write(&spec.output.store);
    Ok(WorkloadPlan {
        files: config_files(&job, &spec_hash, &spec)?,
        job,
        spec_hash,
        requires,
        produces: Some(spec.output.artifact.clone()),
        suspended: spec.suspend,
        roles: vec![Role {
            name: WORKER.to_owned(),
            program: Program::Trainer,
            replicas: spec.workers,
            processes: spec.processes_per_worker,
            args: [Template::text("train")].into_iter().chain(config_args(&claims)).chain(report_args()).collect(),
            env: launch_env(spec.workers * spec.processes_per_worker, spec.processes_per_worker),
            ports: BTreeMap::from([(PROGRESS.to_owned(), PROGRESS_PORT), (RENDEZVOUS.to_owned(), RENDEZVOUS_PORT)]),
            mounts: claims.mounts(),
            resources: spec.resources.clone(),
            result: true,
            readiness: None,
        }],
        lifetime: Lifetime::RunToCompletion(RunPolicy {
            failure: spec.failure_policy,
            active_deadline_seconds: spec.active_deadline_seconds,
            pre_running_deadline_seconds: spec.pre_running_deadline_seconds,
            ttl_seconds_after_finished: spec.ttl_seconds_after_finished,
        }),
        scheduling: spec.scheduling,
        pods: spec.pods,
    })
}

/// torchrun's launch contract.
fn launch_env(world_size: u32, local_world_size: u32) -> BTreeMap<String, Template> {
    let master = Part::Host { role: WORKER.to_owned(), index: 0 };
    let port = Part::Port { role: WORKER.to_owned(), name: RENDEZVOUS.to_owned() };
    let mut env = common_env();
    env.extend(
        [
            ("RANK", Template::new([Part::Rank])),
            ("LOCAL_RANK", Template::new([Part::LocalRank])),
            ("WORLD_SIZE", Template::text(world_size.to_string())),
            ("LOCAL_WORLD_SIZE", Template::text(local_world_size.to_string())),
            ("MASTER_ADDR", Template::new([master])),
            ("MASTER_PORT", Template::new([port])),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    env
}

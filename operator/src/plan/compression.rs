//! CompressionJob: one process that compresses, measures and decides.

use std::collections::BTreeMap;

use sensorium_api::run::{JobKey, JobKind};
use sensorium_api::{CompressionJob, CompressionStep};

use super::config::{PROGRESS, PROGRESS_PORT, common_env, config_args, config_files, report_args};
use super::spec_hash;
use super::storage::Claims;
use super::template::Template;
use super::workload::{Lifetime, Program, Role, RunPolicy, WorkloadPlan};
use super::{Pins, PlanError};

pub(super) fn plan_compression(object: &CompressionJob, pins: &Pins) -> Result<WorkloadPlan, PlanError> {
    let job = JobKey::of(object, JobKind::CompressionJob);
    let spec_hash = spec_hash::compression(&object.spec);
    let requires = vec![object.spec.source.artifact.clone()];
    let mut spec = object.spec.clone();
    pins.pin(&mut spec.source.artifact);
    let claims = spec
        .steps
        .iter()
        .fold(Claims::default(), |claims, step| match step {
            CompressionStep::Quantize(quantize) => claims.read(&quantize.calibration.data),
        })
        .read(&spec.source.store)
        .read(&spec.acceptance.data)
        .write(&spec.output.store);
    Ok(WorkloadPlan {
        files: config_files(&job, &spec_hash, &spec)?,
        job,
        spec_hash,
        requires,
        produces: Some(spec.output.artifact.clone()),
        suspended: spec.suspend,
        roles: vec![Role {
            name: "compressor".to_owned(),
            program: Program::Trainer,
            replicas: 1,
            processes: 1,
            args: [Template::text("compress")].into_iter().chain(config_args(&claims)).chain(report_args()).collect(),
            env: common_env(),
            ports: BTreeMap::from([(PROGRESS.to_owned(), PROGRESS_PORT)]),
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

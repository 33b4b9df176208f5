//! A run's attempt: an Indexed Job, and what its pods need to find each other and the file that they read.
//!
//! There may be ten thousand jobs, and every object costs the API server and its controllers more than it costs us. So a
//! single pod has no Service, whose addresses Kubernetes would keep up to date for nobody, and a file that is short enough
//! is an annotation of the pods instead of a ConfigMap.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{ConfigMap, PodTemplateSpec, Service, ServicePort, ServiceSpec};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::names::{ATTEMPT_LABEL, OWNER_ANNOTATION, child_name, labels, selector, service_name};
use super::pod::{Files, Place, PodContext, file_annotations, pod_spec};
use super::{Images, Owner, network};
use crate::plan::{Role, WorkloadPlan};

/// Kueue's label: the queue that lets a Job in.
pub(crate) const QUEUE_LABEL: &str = "kueue.x-k8s.io/queue-name";
/// Label of a Job: the queue that its spec named when it was made, or nothing. Kueue may add a queue of its own.
pub(crate) const MADE_FOR_LABEL: &str = "sensorium.dev/queue";
/// Time between SIGTERM and SIGKILL: enough to finish a training step and write a checkpoint.
const GRACE_SECONDS: i64 = 30;

/// Bytes of files that the pods of an attempt may have in their annotations, all together. The Job has them too, and each
/// pod has a copy of its own. Kubernetes allows 256 KiB per object; a job's file has about two.
const ANNOTATED: usize = 64 << 10;

/// The objects of one attempt, in the order in which they are made.
#[derive(Clone, Debug)]
pub struct RunObjects {
    /// The file that the pods read, where it is too long for their annotations.
    pub config: Option<ConfigMap>,
    /// Gives the pods their names; none where there is one pod only.
    pub service: Option<Service>,
    /// Lets only the pods themselves, and the operator, reach them.
    pub network: NetworkPolicy,
    /// The pods.
    pub job: Job,
}

/// Renders attempt number `attempt` of a plan with one role.
///
/// A failed pod fails the Job at once (`backoffLimit: 0`): the workers of a group can't go on without one of them, so
/// the operator starts the whole group again. The rule on `DisruptionTarget` makes the Job itself remember that the
/// cluster was at fault, even when the pods are gone.
pub fn render_run(owner: &Owner, plan: &WorkloadPlan, role: &Role, attempt: u32, images: &Images) -> RunObjects {
    let domain = service_name(&owner.job.name, &role.name);
    let name = child_name(&owner.job.name, &format!("{}-{attempt}", role.name));
    let mut attempt_labels = labels(&owner.job, &role.name);
    attempt_labels.insert(ATTEMPT_LABEL.to_owned(), attempt.to_string());
    let metadata = |name: &str, labels: &BTreeMap<String, String>| ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(owner.job.namespace.clone()),
        labels: Some(labels.clone()),
        owner_references: Some(vec![owner.reference.clone()]),
        ..ObjectMeta::default()
    };

    let bytes: usize = plan.files.values().map(String::len).sum();
    let is_short = bytes * role.replicas as usize <= ANNOTATED;
    let config = (!is_short).then(|| ConfigMap {
        metadata: metadata(&name, &attempt_labels),
        immutable: Some(true),
        data: Some(plan.files.clone()),
        binary_data: None,
    });
    let service = (role.replicas > 1).then(|| Service {
        metadata: metadata(&domain, &labels(&owner.job, &role.name)),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            // Workers look for rank 0 before anybody is ready.
            publish_not_ready_addresses: Some(true),
            selector: Some(selector(&owner.job)),
            ports: Some(role.ports.iter().map(service_port).collect()),
            ..ServiceSpec::default()
        }),
        status: None,
    });
    let network = NetworkPolicy {
        metadata: metadata(&domain, &labels(&owner.job, &role.name)),
        spec: Some(network::workers(&owner.job, role)),
    };

    let domain = service.as_ref().map(|_| domain.as_str());
    let place = Place { plan, role, job: &name, domain, services: &BTreeMap::new() };
    let files = if is_short { Files::Annotations } else { Files::ConfigMap(&name) };
    let mut pod = pod_spec(&PodContext { plan, images, files, peers: selector(&owner.job) }, &place);
    pod.restart_policy = Some("Never".to_owned());
    pod.subdomain = domain.map(str::to_owned);
    pod.termination_grace_period_seconds = Some(GRACE_SECONDS);
    let mut job_labels = attempt_labels.clone();
    let queue = plan.scheduling.queue_name.as_ref();
    if let Some(queue) = queue {
        job_labels.insert(QUEUE_LABEL.to_owned(), queue.clone());
    }
    job_labels.insert(MADE_FOR_LABEL.to_owned(), queue.cloned().unwrap_or_default());
    let mut annotations = if is_short { file_annotations(plan) } else { BTreeMap::new() };
    annotations.insert(OWNER_ANNOTATION.to_owned(), owner.job.name.clone());
    let replicas = i32::try_from(role.replicas).unwrap_or(i32::MAX);
    let job = Job {
        metadata: metadata(&name, &job_labels),
        spec: Some(JobSpec {
            completion_mode: Some("Indexed".to_owned()),
            completions: Some(replicas),
            parallelism: Some(replicas),
            backoff_limit: Some(0),
            // Kueue lets the Job go on; without a queue it starts at once.
            suspend: Some(queue.is_some()),
            pod_failure_policy: Some(disruptions_fail_the_job()),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(attempt_labels),
                    annotations: Some(annotations),
                    ..ObjectMeta::default()
                }),
                spec: Some(pod),
            },
            ..JobSpec::default()
        }),
        status: None,
    };
    RunObjects { config, service, network, job }
}

fn service_port((name, number): (&String, &u16)) -> ServicePort {
    let port = i32::from(*number);
    ServicePort {
        name: Some(name.clone()),
        port,
        target_port: Some(IntOrString::Int(port)),
        protocol: Some("TCP".to_owned()),
        ..ServicePort::default()
    }
}

fn disruptions_fail_the_job() -> PodFailurePolicy {
    let pattern = PodFailurePolicyOnPodConditionsPattern {
        type_: "DisruptionTarget".to_owned(),
        status: Some("True".to_owned()),
    };
    let rule = PodFailurePolicyRule {
        action: "FailJob".to_owned(),
        on_exit_codes: None,
        on_pod_conditions: Some(vec![pattern]),
    };
    PodFailurePolicy { rules: vec![rule] }
}

/// The number of the attempt that a Job is.
pub fn attempt_of(job: &Job) -> Option<u32> {
    job.labels().get(ATTEMPT_LABEL)?.parse().ok()
}

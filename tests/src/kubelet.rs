//! The part of a node: where there is none, a test says what its pods do.

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{
    Binding, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    Node, ObjectReference, Pod, PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::core::Status;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use tokio::task::JoinHandle;

use crate::cluster::Namespace;

/// How often [`Kubelet::pods`] and [`Kubelet::run_all`] look.
const POLL: Duration = Duration::from_millis(50);

/// The one node that there seems to be.
const NODE: &str = "test-node";

/// Says what happens to the pods of a namespace, as the kubelet of their node would. A pod that it ran and that is deleted
/// stops at once.
#[derive(Clone)]
pub struct Kubelet {
    pods: Api<Pod>,
    _stops: Arc<Background>,
}

/// Pods run for as long as this lives.
pub struct RunAll(#[expect(dead_code, reason = "held until it is dropped")] Background);

/// A task that ends with the value.
struct Background(JoinHandle<()>);

impl Kubelet {
    /// Of the pods of this namespace.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(namespace: &Namespace) -> Self {
        let pods: Api<Pod> = namespace.api();
        let stops = Background(tokio::spawn(stop_deleted(pods.clone())));
        Self { pods, _stops: Arc::new(stops) }
    }

    /// Waits until exactly `count` pods that are not being deleted match a label selector; sorted by name.
    ///
    /// # Errors
    /// When that is not so within `limit`.
    pub async fn pods(&self, selector: &str, count: usize, limit: Duration) -> Result<Vec<Pod>> {
        let deadline = Instant::now() + limit;
        loop {
            let mut pods = self.pods.list(&ListParams::default().labels(selector)).await?.items;
            pods.retain(|pod| pod.metadata.deletion_timestamp.is_none());
            pods.sort_by_key(ResourceExt::name_any);
            if pods.len() == count {
                return Ok(pods);
            }
            if Instant::now() > deadline {
                let names: Vec<String> = pods.iter().map(ResourceExt::name_any).collect();
                bail!("{count} pods with {selector} were expected after {} s, there are {names:?}", limit.as_secs());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Its containers run, and it is ready.
    ///
    /// # Errors
    /// When there is no such pod.
    pub async fn run(&self, pod: &str) -> Result<Pod> {
        self.bind(pod).await?;
        self.change(pod, |status, names| {
            status.phase = Some("Running".to_owned());
            let address = address();
            status.pod_ips.get_or_insert_with(|| vec![PodIP { ip: address.clone() }]);
            status.pod_ip.get_or_insert(address);
            status.start_time.get_or_insert_with(now);
            let running = ContainerStateRunning { started_at: Some(now()) };
            let state = ContainerState { running: Some(running), ..ContainerState::default() };
            set_containers(status, names, &state, true, 0);
            set_conditions(status, "True");
        })
        .await
    }

    /// Its containers run, and its readiness probe fails.
    ///
    /// # Errors
    /// When there is no such pod.
    pub async fn run_unready(&self, pod: &str) -> Result<Pod> {
        self.run(pod).await?;
        self.change(pod, |status, _| {
            for container in status.container_statuses.iter_mut().flatten() {
                container.ready = false;
            }
            set_conditions(status, "False");
        })
        .await
    }

    /// Its containers end with exit code 0 and this termination message.
    ///
    /// # Errors
    /// When there is no such pod.
    pub async fn succeed(&self, pod: &str, message: &str) -> Result<Pod> {
        self.end(pod, "Succeeded", 0, "Completed", message).await
    }

    /// Its containers end with this exit code and termination message, for good.
    ///
    /// # Errors
    /// When there is no such pod.
    pub async fn fail(&self, pod: &str, exit_code: i32, message: &str) -> Result<Pod> {
        self.end(pod, "Failed", exit_code, "Error", message).await
    }

    /// Its containers have ended `restarts` times and wait to be started again.
    ///
    /// # Errors
    /// When there is no such pod.
    pub async fn crash_loop(&self, pod: &str, exit_code: i32, message: &str, restarts: i32) -> Result<Pod> {
        self.run(pod).await?;
        self.change(pod, |status, names| {
            let waiting = ContainerStateWaiting {
                reason: Some("CrashLoopBackOff".to_owned()),
                ..ContainerStateWaiting::default()
            };
            let state = ContainerState { waiting: Some(waiting), ..ContainerState::default() };
            set_containers(status, names, &state, false, restarts);
            for container in status.container_statuses.iter_mut().flatten() {
                container.last_state = Some(terminated(exit_code, "Error", message));
            }
            set_conditions(status, "False");
        })
        .await
    }

    /// The image cannot be pulled.
    ///
    /// # Errors
    /// When there is no such pod.
    pub async fn cannot_pull(&self, pod: &str, message: &str) -> Result<Pod> {
        self.change(pod, |status, names| {
            let waiting = ContainerStateWaiting {
                reason: Some("ImagePullBackOff".to_owned()),
                message: Some(message.to_owned()),
            };
            set_containers(
                status,
                names,
                &ContainerState { waiting: Some(waiting), ..ContainerState::default() },
                false,
                0,
            );
            set_conditions(status, "False");
        })
        .await
    }

    /// It is about to be evicted, preempted or drained: the condition DisruptionTarget. Follow it with [`Self::fail`] or
    /// [`Self::delete`], as a cluster does.
    ///
    /// # Errors
    /// When there is no such pod.
    pub async fn disrupt(&self, pod: &str, reason: &str) -> Result<Pod> {
        self.change(pod, |status, _| set_condition(status, "DisruptionTarget", "True", Some(reason))).await
    }

    /// It is deleted at once, as by a node that left.
    ///
    /// # Errors
    /// When there is no such pod.
    pub async fn delete(&self, pod: &str) -> Result<()> {
        self.pods.delete(pod, &DeleteParams::default().grace_period(0)).await?;
        Ok(())
    }

    /// Runs every pending pod that matches a label selector, now and later, until the value is dropped.
    pub fn run_all(&self, selector: &str) -> RunAll {
        let (kubelet, pending) = (self.clone(), ListParams::default().labels(selector).fields("status.phase=Pending"));
        RunAll(Background(tokio::spawn(async move {
            loop {
                // A pod may be deleted meanwhile, and the next round asks again.
                for pod in kubelet.pods.list(&pending).await.into_iter().flatten() {
                    let _ = kubelet.run(&pod.name_any()).await;
                }
                tokio::time::sleep(POLL).await;
            }
        })))
    }

    /// Puts the pod on a node, as the scheduler would: a Service sends nothing to a pod without one.
    async fn bind(&self, pod: &str) -> Result<()> {
        let client = self.pods.clone().into_client();
        let mut node = Node::default();
        node.metadata.name = Some(NODE.to_owned());
        match Api::<Node>::all(client).create(&PostParams::default(), &node).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => {}
            made => drop(made?),
        }
        let mut binding = Binding::default();
        binding.metadata.name = Some(pod.to_owned());
        binding.target =
            ObjectReference { kind: Some("Node".to_owned()), name: Some(NODE.to_owned()), ..Default::default() };
        match self.pods.create_subresource::<_, Status>("binding", pod, &PostParams::default(), &binding).await {
            // It has one already.
            Err(kube::Error::Api(status)) if status.is_conflict() => Ok(()),
            bound => Ok(bound.map(drop)?),
        }
    }

    async fn end(&self, pod: &str, phase: &str, exit_code: i32, reason: &str, message: &str) -> Result<Pod> {
        end(&self.pods, pod, phase, terminated(exit_code, reason, message)).await
    }

    async fn change(&self, pod: &str, by: impl Fn(&mut PodStatus, &[String])) -> Result<Pod> {
        change(&self.pods, pod, by).await
    }
}

/// Its containers end, for good.
async fn end(pods: &Api<Pod>, pod: &str, phase: &str, state: ContainerState) -> Result<Pod> {
    change(pods, pod, |status, names| {
        status.phase = Some(phase.to_owned());
        set_containers(status, names, &state, false, 0);
        set_conditions(status, "False");
    })
    .await
}

/// Changes a pod's status, again when somebody else has written the pod since it was read.
async fn change(pods: &Api<Pod>, pod: &str, by: impl Fn(&mut PodStatus, &[String])) -> Result<Pod> {
    loop {
        let mut object = pods.get_status(pod).await?;
        let spec = object.spec.as_ref().context("a pod has a spec")?;
        let names: Vec<String> = spec.containers.iter().map(|container| container.name.clone()).collect();
        by(object.status.get_or_insert_default(), &names);
        match pods.replace_status(pod, &PostParams::default(), &object).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            answer => return Ok(answer?),
        }
    }
}

/// Ends and removes what is deleted. The API server waits for the kubelet before it removes a pod that has a node, and the
/// Job controller waits for a phase that says that the pod has ended.
async fn stop_deleted(pods: Api<Pod>) {
    let changed = watcher(pods.clone(), watcher::Config::default()).default_backoff().applied_objects();
    let mut deleted = std::pin::pin!(changed.filter_map(async |pod| {
        let pod = pod.ok()?;
        let has_node = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        (has_node && pod.metadata.deletion_timestamp.is_some()).then_some(pod)
    }));
    while let Some(pod) = deleted.next().await {
        let (name, phase) = (pod.name_any(), pod.status.and_then(|status| status.phase).unwrap_or_default());
        // Whatever fails here does so because the pod is gone.
        if phase != "Failed" && phase != "Succeeded" {
            let _ = end(&pods, &name, "Failed", terminated(143, "Error", "")).await;
        }
        let _ = pods.delete(&name, &DeleteParams::default().grace_period(0)).await;
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// This machine's own address, for all pods: the operator asks pods how far they are, and nothing may leave the machine for
/// that. Kubernetes takes no loopback address as a pod's.
fn address() -> String {
    // Nothing is sent by this: the system only looks up where it would go out.
    let own = || {
        let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.connect("192.0.2.1:9").ok()?;
        Some(socket.local_addr().ok()?.ip().to_string())
    };
    own().unwrap_or_else(|| "192.0.2.1".to_owned())
}

fn now() -> Time {
    Time(k8s_openapi::jiff::Timestamp::now())
}

fn terminated(exit_code: i32, reason: &str, message: &str) -> ContainerState {
    let terminated = ContainerStateTerminated {
        exit_code,
        reason: Some(reason.to_owned()),
        message: (!message.is_empty()).then(|| message.to_owned()),
        started_at: Some(now()),
        finished_at: Some(now()),
        ..ContainerStateTerminated::default()
    };
    ContainerState { terminated: Some(terminated), ..ContainerState::default() }
}

fn set_containers(status: &mut PodStatus, names: &[String], state: &ContainerState, ready: bool, restart_count: i32) {
    let container = |name: &String| ContainerStatus {
        name: name.clone(),
        image: "sensorium.dev/test".to_owned(),
        image_id: "sensorium.dev/test".to_owned(),
        ready,
        started: Some(state.running.is_some()),
        restart_count,
        state: Some(state.clone()),
        ..ContainerStatus::default()
    };
    status.container_statuses = Some(names.iter().map(container).collect());
}

fn set_conditions(status: &mut PodStatus, ready: &str) {
    for kind in ["PodScheduled", "Initialized"] {
        set_condition(status, kind, "True", None);
    }
    for kind in ["ContainersReady", "Ready"] {
        set_condition(status, kind, ready, None);
    }
}

fn set_condition(status: &mut PodStatus, kind: &str, value: &str, reason: Option<&str>) {
    let conditions = status.conditions.get_or_insert_default();
    let changed = conditions.iter().find(|old| old.type_ == kind && old.status == value);
    let since = changed.and_then(|old| old.last_transition_time.clone()).or_else(|| Some(now()));
    conditions.retain(|old| old.type_ != kind);
    conditions.push(PodCondition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: reason.map(str::to_owned),
        last_transition_time: since,
        ..PodCondition::default()
    });
}

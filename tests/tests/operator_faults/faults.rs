//! Two hundred jobs with random histories, seen by an operator whose every fifth request or watch goes wrong, end as they
//! do when nothing goes wrong.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, StreamBody};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, PostParams};
use kube::client::{Body, ClientBuilder};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use sensorium_api::{JobState, TrainingJob};
use sensorium_operator::controller::{self, Health, Settings};
use sensorium_operator::render::Images;
use sensorium_tests::{ApiCluster, Kubelet, Namespace};
use serde_json::json;
use tower::{Layer, Service};

use crate::common::{result, training};

/// Jobs, each with a history of its own.
const HISTORIES: u64 = 200;
/// One request in so many goes wrong.
const ONE_IN: u64 = 5;
/// By then all of them have ended.
const LIMIT: Duration = Duration::from_mins(20);

/// What an attempt comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    Success,
    Crash,
    Eviction,
    BadJob,
}

/// The attempts of history number `seed`: up to two that do not end well, and then one that does, or a job that cannot.
fn history(seed: u64) -> Vec<Outcome> {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut outcomes: Vec<Outcome> =
        (0..random.below(3)).map(|_| if random.below(2) == 0 { Outcome::Crash } else { Outcome::Eviction }).collect();
    outcomes.push(if random.below(8) == 0 { Outcome::BadJob } else { Outcome::Success });
    outcomes
}

/// What a job has come to: state, restarts, disruptions, attempt, digest.
type End = (Option<JobState>, u32, u32, u32, Option<String>);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_random_histories_end_the_same_with_and_without_faults() -> Result<()> {
    let cluster = ApiCluster::shared()?;
    let faults = Arc::new(Faults::default());
    let (calm, rough) =
        futures::future::try_join(live(cluster, "calm", None), live(cluster, "rough", Some(Arc::clone(&faults))))
            .await?;
    let injected = faults.injected.load(Ordering::Relaxed);
    ensure!(injected > 500, "only {injected} faults were injected");
    let differing: Vec<_> = calm.iter().filter(|(name, end)| rough.get(*name) != Some(end)).collect();
    ensure!(differing.is_empty(), "{injected} faults; without them {differing:?}, with them {rough:?}");
    for seed in 0..HISTORIES {
        let outcomes = history(seed);
        let (state, restarts, disruptions, attempt, _) = &calm[&format!("h{seed}")];
        let count = |wanted| outcomes.iter().filter(|outcome| **outcome == wanted).count() as u32;
        let bad = outcomes.last() == Some(&Outcome::BadJob);
        assert_eq!(*state, Some(if bad { JobState::Failed } else { JobState::Succeeded }), "h{seed}");
        assert_eq!((*restarts, *disruptions), (count(Outcome::Crash), count(Outcome::Eviction)), "h{seed}");
        assert_eq!(*attempt as usize, outcomes.len(), "h{seed}");
    }
    Ok(())
}

/// Plays all histories in a namespace with a controller of its own.
async fn live(cluster: &ApiCluster, name: &str, faults: Option<Arc<Faults>>) -> Result<BTreeMap<String, End>> {
    let namespace = cluster.namespace(name).await?;
    let client = client(cluster, faults).await?;
    let settings = Settings {
        images: Images {
            trainer: "sensorium.dev/trainer".to_owned(),
            server: "sensorium.dev/server".to_owned(),
            cli: "sensorium.dev/cli".to_owned(),
            pull_policy: "IfNotPresent".to_owned(),
            pull_secrets: Vec::new(),
        },
        namespace: Some(namespace.name().to_owned()),
        concurrency: 16,
        identity: name.to_owned(),
        pod_monitors: false,
        node_cache: false,
        otlp_endpoint: None,
    };
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let stop = async move { drop(ended.await) }.boxed().shared();
    let (_acts, lead) = tokio::sync::watch::channel(true);
    let operator = tokio::spawn(controller::run(client, settings, Arc::new(Health::default()), lead, stop));

    let jobs = namespace.api::<TrainingJob>();
    for seed in 0..HISTORIES {
        let mut manifest = training(&format!("h{seed}"));
        manifest["spec"]["workers"] = json!(1);
        manifest["spec"]["parallelism"] = json!({"data": 1});
        jobs.create(&PostParams::default(), &serde_json::from_value(manifest)?).await?;
    }
    let ends = play(&namespace).await?;
    drop(end);
    tokio::time::timeout(Duration::from_secs(30), operator).await.context("the operator does not end")??;
    Ok(ends)
}

/// Plays the node until every job has ended.
async fn play(namespace: &Namespace) -> Result<BTreeMap<String, End>> {
    let kubelet = Kubelet::new(namespace);
    let deadline = Instant::now() + LIMIT;
    loop {
        let pods = namespace.api::<Pod>().list(&ListParams::default()).await?;
        // A pod may be removed at any time; what happens to it then does not matter.
        futures::stream::iter(&pods).for_each_concurrent(16, |pod| turn(&kubelet, pod).map(drop)).await;
        let jobs = namespace.api::<TrainingJob>().list(&ListParams::default()).await?;
        let ends: BTreeMap<String, End> = jobs.iter().map(|job| (job.name_any(), end_of(job))).collect();
        let done = |(state, ..): &End| matches!(state, Some(JobState::Succeeded | JobState::Failed));
        let open = ends.iter().filter(|(_, end)| !done(end)).count();
        if open == 0 {
            return Ok(ends);
        }
        ensure!(Instant::now() < deadline, "{open} jobs have not ended: {ends:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// One step of a pod's life.
async fn turn(kubelet: &Kubelet, pod: &Pod) -> Result<()> {
    let name = pod.name_any();
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
    let label = |key: &str| pod.labels().get(key).cloned().unwrap_or_default();
    let seed: Option<u64> = label("sensorium.dev/name").trim_start_matches('h').parse().ok();
    if label("sensorium.dev/kind") != "TrainingJob" {
        // The verification of an artifact.
        return if phase == "Pending" { kubelet.succeed(&name, "").await.map(drop) } else { Ok(()) };
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return kubelet.delete(&name).await;
    }
    let attempt: usize = label("sensorium.dev/attempt").parse().unwrap_or(1);
    match (phase, seed) {
        ("Pending", _) => kubelet.run(&name).await.map(drop),
        ("Running", Some(seed)) => match history(seed).get(attempt - 1) {
            Some(Outcome::Success) => {
                let digit = char::from_digit((seed % 16) as u32, 16).unwrap_or('0');
                kubelet.succeed(&name, &result(&format!("h{seed}-model"), digit).to_string()).await.map(drop)
            }
            Some(Outcome::Crash) => kubelet.fail(&name, 1, "x").await.map(drop),
            Some(Outcome::BadJob) => kubelet.fail(&name, 2, "x").await.map(drop),
            Some(Outcome::Eviction) => {
                kubelet.disrupt(&name, "EvictionByEvictionAPI").await?;
                kubelet.fail(&name, 143, "").await.map(drop)
            }
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

fn end_of(job: &TrainingJob) -> End {
    let status = job.status.clone().unwrap_or_default();
    let digest = status.artifact.map(|artifact| artifact.digest);
    (status.state, status.restarts, status.disruptions, status.attempt, digest)
}

async fn client(cluster: &ApiCluster, faults: Option<Arc<Faults>>) -> Result<Client> {
    let config = Kubeconfig::read_from(cluster.kubeconfig())?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(match faults {
        None => Client::try_from(config)?,
        Some(faults) => ClientBuilder::try_from(config)?.with_layer(&FaultLayer(faults)).build(),
    })
}

/// Small random numbers; the same ones in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// Counts requests; each number decides on its own fate.
#[derive(Debug, Default)]
struct Faults {
    requests: AtomicU64,
    injected: AtomicU64,
}

impl Faults {
    fn next(&self) -> Random {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let mut random = Random((number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        random.below(2);
        random
    }
}

#[derive(Clone)]
struct FaultLayer(Arc<Faults>);

impl<S> Layer<S> for FaultLayer {
    type Service = Faulty<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Faulty { inner, faults: Arc::clone(&self.0) }
    }
}

struct Faulty<S> {
    inner: S,
    faults: Arc<Faults>,
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type AnyBody = UnsyncBoxBody<bytes::Bytes, BoxError>;

impl<S, B> Service<Request<Body>> for Faulty<S>
where
    S: Service<Request<Body>, Response = Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError> + Send,
    B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<BoxError> + Send,
{
    type Response = Response<AnyBody>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let mut random = self.faults.next();
        let strikes = random.below(ONE_IN) == 0;
        let watch = request.uri().query().is_some_and(|query| query.contains("watch=true"));
        if !strikes {
            let answer = self.inner.call(request);
            return async move { Ok(answer.await.map_err(Into::into)?.map(|body| body.map_err(Into::into).boxed_unsync())) }
                .boxed();
        }
        self.faults.injected.fetch_add(1, Ordering::Relaxed);
        match (watch, random.below(6)) {
            // A watch that hears its news late, and ends in the middle of them.
            (true, 0..=3) => {
                let answer = self.inner.call(request);
                let (late, chunks) = (random.below(1500), random.below(30) as usize + 1);
                async move {
                    let answer = answer.await.map_err(Into::into)?;
                    Ok(answer.map(|body| {
                        let slow = body.into_data_stream().take(chunks).then(move |chunk| async move {
                            tokio::time::sleep(Duration::from_millis(late)).await;
                            chunk.map(http_body::Frame::data).map_err(Into::into)
                        });
                        StreamBody::new(slow).boxed_unsync()
                    }))
                }
                .boxed()
            }
            // The request does its work, and the answer is lost.
            (false, 0) => {
                let answer = self.inner.call(request);
                async move {
                    answer.await.map_err(Into::into)?;
                    Err("the connection was lost before the answer".into())
                }
                .boxed()
            }
            (false, 1) => async { Ok(refusal(409, "Conflict")) }.boxed(),
            (_, 2) => {
                let late = Duration::from_millis(random.below(2000));
                async move {
                    tokio::time::sleep(late).await;
                    Err("timed out".into())
                }
                .boxed()
            }
            (_, 3) => async { Ok(refusal(429, "TooManyRequests")) }.boxed(),
            _ => async { Ok(refusal(500, "InternalError")) }.boxed(),
        }
    }
}

fn refusal(code: u16, reason: &str) -> Response<AnyBody> {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": "injected",
    });
    let body = http_body_util::Full::new(bytes::Bytes::from(status.to_string()));
    let mut response = Response::new(body.map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = http::StatusCode::from_u16(code).unwrap_or_default();
    response
}

//! How fast the operator is, and what it needs, with many jobs on a real API server without a node.
//!
//! The job controller of Kubernetes is the peer where it has something like the same to do. Both are timed with all their
//! work there from the start: while jobs are created, the one is not running and the other is stopped.

use std::collections::HashMap;
use std::fs;
use std::marker::PhantomData;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::{Api, Resource, ResourceExt};
use rustix::process::{Pid, Signal, kill_process};
use sensorium_api::{ServingJob, TrainingJob};
use sensorium_bench::{Better, Report};
use sensorium_tests::{ApiCluster, Namespace, Operator};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Requests that are under way at the same time while objects are created.
const CREATORS: usize = 32;
/// Changes per second, and the time between two of them.
const CHANGES_PER_SECOND: usize = 20;
const CHANGE_INTERVAL: Duration = Duration::from_millis(50);
/// From one changed job to the next: a prime, so that each has its turn.
const STRIDE: usize = 7919;
/// A change that has had no effect after so long never will.
const EFFECT_LIMIT: Duration = Duration::from_mins(1);
/// How often counts are looked at; short beside the times that are measured.
const POLL: Duration = Duration::from_millis(50);
/// Nothing happens any more when no write has been counted for so long. Longer than the job controller's batching.
const QUIET: Duration = Duration::from_secs(3);
/// The longest watch that kube allows; the changes and what follows them take less.
const WATCH_SECONDS: u32 = 294;
/// Cores that a controller takes when it has nothing to do but to renew its lease.
const RESTING: f64 = 0.05;
/// Something is wrong when a step takes longer.
const LIMIT: Duration = Duration::from_mins(15);

/// The limits that were set before anything was measured.
mod limits {
    /// MiB of memory.
    pub(crate) const MEMORY: f64 = 300.0;
    /// Writes per TrainingJob of one worker: a policy, a Job and one status.
    pub(crate) const WRITES: f64 = 3.0;
    /// Seconds from a change to the write that it asks for.
    pub(crate) const CHANGE: f64 = 1.0;
    /// Cores, at twenty changes a second.
    pub(crate) const CORES: f64 = 0.25;
    /// Seconds until another operator has taken over.
    pub(crate) const TAKE_OVER: f64 = 20.0;
}

/// Measures the operator on a real API server
#[derive(Debug, Parser)]
struct Options {
    /// TrainingJobs
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(200..))]
    jobs: u32,
    /// ServingJobs, which wait for a model; a tenth of --jobs by default
    #[arg(long)]
    servings: Option<u32>,
    /// Seconds of twenty changes each
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=200))]
    seconds: u32,
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    let (jobs, servings) = (options.jobs as usize, options.servings.unwrap_or(options.jobs / 10) as usize);
    let mut report = Report::new("operator")?;
    let case = |name: &str| format!("{jobs}-jobs/{name}");

    let cluster = ApiCluster::shared()?;
    let controllers = Controllers::of(cluster)?;
    let namespace = cluster.namespace("bench").await?;
    let kubeconfig = cluster.kubeconfig();

    let mut clock = Clock::start(cluster)?;
    controllers.stop()?;
    clock.step(&format!("creating {jobs} TrainingJobs and {servings} ServingJobs"))?;
    create::<TrainingJob>(&namespace, (0..jobs).map(|index| training(&format!("j{index}")))).await?;
    create::<ServingJob>(&namespace, (0..servings).map(|index| serving(&format!("s{index}")))).await?;

    clock.step("the first pass")?;
    let start = Instant::now();
    let mut operator = Operator::start(&kubeconfig, namespace.name(), &[])?;
    until_count::<Job>(&namespace, jobs).await?;
    let ours = jobs as f64 / start.elapsed().as_secs_f64();
    until_quiet(&operator).await?;
    let (writes, first_memory) = (Metrics::of(&operator)?, memory(&operator)?);
    eprintln!("  {} objects a second; writes: {}", ours.round(), writes.list("sensorium_writes_total"));
    eprintln!("  the operator: {}", writes.visits(&operator)?);

    clock.step("the job controller joins in")?;
    controllers.go_on()?;
    until_count::<Pod>(&namespace, jobs).await?;
    until_quiet(&operator).await?;
    clock.step("the controllers of Kubernetes come to rest")?;
    controllers.until_rest().await?;

    clock.step(&format!("{} s of changes", options.seconds))?;
    let steady = change(&namespace, &operator, jobs, options.seconds).await?;
    let steady_memory = memory(&operator)?;
    eprintln!("  the operator: {}", Metrics::of(&operator)?.visits(&operator)?);

    clock.step("a restart without changes")?;
    operator.kill()?;
    let start = Instant::now();
    operator.restart()?;
    until_visited(&operator, jobs).await?;
    let restart = start.elapsed().as_secs_f64();
    until_quiet(&operator).await?;
    let (restarted, restart_memory) = (Metrics::of(&operator)?, memory(&operator)?);
    eprintln!("  all visited after {restart:.2} s; writes: {}", restarted.list("sensorium_writes_total"));
    eprintln!("  the operator: {}", restarted.visits(&operator)?);
    drop(operator);

    clock.step("another leader")?;
    let (take_over, next_memory) = take_over(&kubeconfig, &namespace, jobs).await?;

    clock.step("the same Jobs by the job controller alone")?;
    let peer = job_controller(cluster, &controllers, &namespace, jobs).await?;
    clock.step("done")?;
    eprintln!(
        "  memory in MiB: {first_memory:.0} after the first pass, {steady_memory:.0} after the changes, \
         {restart_memory:.0} after the restart, {next_memory:.0} of the next leader"
    );
    let most_memory = [steady_memory, restart_memory, next_memory].into_iter().fold(first_memory, f64::max);

    let per_second = "objects/s";
    report.row(case("first-pass/objects-per-second"), per_second, Better::Higher, ours, ("job-controller", peer));
    report.row(case("memory"), "MiB", Better::Lower, most_memory, ("limit", limits::MEMORY));
    let writes = writes.sum("sensorium_writes_total", &["kind=\"TrainingJob\""]) / jobs as f64;
    report.row(case("writes-per-object"), "writes", Better::Lower, writes, ("least", limits::WRITES));
    report.row(case("change-to-write/p50"), "s", Better::Lower, steady.median, ("limit", limits::CHANGE));
    report.row(case("change-to-write/p99"), "s", Better::Lower, steady.p99, ("limit", limits::CHANGE));
    report.row(case("reaction/p99"), "s", Better::Lower, steady.reaction, ("limit", limits::CHANGE));
    report.row(case("cpu"), "cores", Better::Lower, steady.cores, ("limit", limits::CORES));
    let resync = restarted.sum("sensorium_writes_total", &[]);
    report.row(case("no-change-resync/writes"), "writes", Better::Lower, resync, ("limit", 0.0));
    report.row(case("leader-killed/resync"), "s", Better::Lower, take_over, ("limit", limits::TAKE_OVER));
    report.finish()
}

/// Tells what is being done, and what the step before took of the machine.
struct Clock {
    programs: Vec<(&'static str, u32)>,
    since: Instant,
    before: Vec<f64>,
}

impl Clock {
    fn start(cluster: &ApiCluster) -> Result<Self> {
        let names = ["etcd", "kube-apiserver", "kube-controller-manager"];
        let programs = names.map(|name| Ok((name, process_of(cluster, name)?.as_raw_nonzero().get().unsigned_abs())));
        let programs = programs.into_iter().collect::<Result<Vec<_>>>()?;
        let mut clock = Self { programs, since: Instant::now(), before: Vec::new() };
        clock.before = clock.used()?;
        Ok(clock)
    }

    /// Seconds of a core that each program has had.
    fn used(&self) -> Result<Vec<f64>> {
        self.programs.iter().map(|(_, process)| cpu_seconds(*process)).collect()
    }

    fn step(&mut self, what: &str) -> Result<()> {
        let (took, now) = (self.since.elapsed().as_secs_f64(), self.used()?);
        if took >= 1.0 {
            let cores = self.programs.iter().zip(now.iter().zip(&self.before));
            let cores = cores.map(|((name, _), (now, before))| format!("{name} {:.2}", (now - before) / took));
            eprintln!("  {took:.0} s; cores: {}", cores.collect::<Vec<_>>().join(", "));
        }
        eprintln!("{} {what}", jiff::Timestamp::now().strftime("%H:%M:%S"));
        (self.since, self.before) = (Instant::now(), now);
        Ok(())
    }
}

/// A TrainingJob of one worker.
fn training(name: &str) -> Value {
    json!({
        "apiVersion": "sensorium.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"architecture": {
                "width": 8,
                "text": {"layers": 1, "width": 8, "heads": 1, "maxLength": 4},
                "image": {"size": 8, "stem": [{"channels": 8, "kernel": 8, "stride": 8}], "layers": 1, "width": 8, "heads": 1},
                "fusion": {"layers": 1, "heads": 1},
            }},
            "data": {"train": "pvc://datasets/train", "evaluation": "pvc://datasets/test"},
            "tasks": [{"type": "vqa"}],
            "training": {"steps": 10, "batch": {"images": 12}},
            "parallelism": {"data": 1},
            "workers": 1,
            // There is no node, so nothing ever runs; jobs that give up waiting for it are not what is measured.
            "preRunningDeadlineSeconds": 86_400,
            "output": {"artifact": format!("{name}-model")},
        },
    })
}

/// A ServingJob of a model that nobody has made yet.
fn serving(name: &str) -> Value {
    json!({
        "apiVersion": "sensorium.dev/v1alpha1",
        "kind": "ServingJob",
        "metadata": {"name": name},
        "spec": {"model": {"artifact": "nothing"}, "replicas": 2},
    })
}

/// Creates objects, many at a time.
async fn create<K>(namespace: &Namespace, manifests: impl Iterator<Item = Value>) -> Result<()>
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + Serialize + DeserializeOwned,
    K::DynamicType: Default,
{
    let api = &namespace.api::<K>();
    let creation = |manifest| async move {
        let object: K = serde_json::from_value(manifest)?;
        api.create(&PostParams::default(), &object).await?;
        anyhow::Ok(())
    };
    futures::stream::iter(manifests).map(creation).buffer_unordered(CREATORS).try_collect().await
}

/// How many objects of a kind there are, and the version of the list. Costs the API server next to nothing.
async fn count<K>(namespace: &Namespace) -> Result<(usize, String)>
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + DeserializeOwned,
    K::DynamicType: Default,
{
    let list = namespace.api::<K>().list_metadata(&ListParams::default().limit(1)).await?;
    let remaining = list.metadata.remaining_item_count.unwrap_or_default();
    Ok((list.items.len() + usize::try_from(remaining)?, list.metadata.resource_version.unwrap_or_default()))
}

async fn until_count<K>(namespace: &Namespace, wanted: usize) -> Result<()>
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + DeserializeOwned,
    K::DynamicType: Default,
{
    let deadline = Instant::now() + LIMIT;
    while count::<K>(namespace).await?.0 < wanted {
        ensure!(Instant::now() < deadline, "there are not {wanted} {}s", K::kind(&K::DynamicType::default()));
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// The metrics of an operator.
struct Metrics(String);

impl Metrics {
    fn of(operator: &Operator) -> Result<Self> {
        let (status, text) = operator.get("/metrics")?;
        ensure!(status == 200, "/metrics answers with {status}");
        Ok(Self(text))
    }

    /// The series of a metric: labels and value.
    fn series(&self, name: &str) -> impl Iterator<Item = (&str, f64)> {
        let lines = self.0.lines().filter_map(move |line| line.strip_prefix(name)?.rsplit_once(' '));
        lines.filter_map(|(labels, value)| Some((labels, value.parse().ok()?)))
    }

    /// The sum of the series that have all these labels.
    fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let wanted = |found: &str| labels.iter().all(|label| found.contains(label));
        // Not `sum()`, which is -0 where there is nothing.
        self.series(name).filter(|(found, _)| wanted(found)).fold(0.0, |sum, (_, value)| sum + value)
    }

    fn list(&self, name: &str) -> String {
        let all: Vec<String> = self.series(name).map(|(labels, value)| format!("{labels} {value}")).collect();
        if all.is_empty() { "none".to_owned() } else { all.join(", ") }
    }
}

impl Metrics {
    /// What has been added to counters and histograms since `earlier`.
    fn since(&self, earlier: &Self) -> Self {
        let before: HashMap<&str, f64> = earlier.samples().collect();
        let lines = self
            .samples()
            .map(|(series, value)| format!("{series} {}\n", value - before.get(series).copied().unwrap_or_default()));
        Self(lines.collect())
    }

    fn samples(&self) -> impl Iterator<Item = (&str, f64)> {
        let lines = self.0.lines().filter(|line| !line.starts_with('#'));
        lines.filter_map(|line| line.rsplit_once(' ')).filter_map(|(series, value)| Some((series, value.parse().ok()?)))
    }

    /// The upper bound of the bucket of a histogram below which `share` of its values lie.
    fn quantile(&self, name: &str, labels: &[&str], share: f64) -> f64 {
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for (found, count) in self.series(&format!("{name}_bucket")) {
            let bound = found.split("le=\"").nth(1).and_then(|rest| rest.split('"').next());
            let bound = bound.and_then(|bound| bound.parse().ok()).unwrap_or(f64::INFINITY);
            if labels.iter().all(|label| found.contains(label)) {
                buckets.push((bound, count));
            }
        }
        buckets.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        let wanted = buckets.last().map_or(0.0, |(_, all)| all * share);
        buckets.iter().find(|(_, count)| *count >= wanted).map_or(f64::NAN, |(bound, _)| *bound)
    }

    /// What the visits took, and what the process did.
    fn visits(&self, operator: &Operator) -> Result<String> {
        let sum = |name: &str| self.sum(name, &[]);
        let (seconds, visits) =
            (sum("sensorium_reconcile_duration_seconds_sum"), sum("sensorium_reconcile_duration_seconds_count"));
        Ok(format!(
            "{visits} visits of {:.1} ms on average, {:.1} s of a core, {:.0} MiB at most",
            1000.0 * seconds / visits.max(1.0),
            cpu_seconds(operator.id())?,
            memory(operator)?
        ))
    }
}

/// Waits until the operator leads and has seen to `jobs` TrainingJobs.
async fn until_visited(operator: &Operator, jobs: usize) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    let visited = |metrics: &Metrics| {
        let visits = metrics.sum("sensorium_reconcile_total", &["kind=\"TrainingJob\"", "outcome=\"ok\""]);
        metrics.sum("sensorium_leader", &[]) >= 1.0 && visits >= jobs as f64
    };
    // It does not listen in its first moments.
    while !Metrics::of(operator).is_ok_and(|metrics| visited(&metrics)) {
        ensure!(Instant::now() < deadline, "the operator does not visit its jobs:\n{}", operator.log());
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

async fn until_leading(operator: &Operator) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while Metrics::of(operator)?.sum("sensorium_leader", &[]) < 1.0 {
        ensure!(Instant::now() < deadline, "the operator does not lead:\n{}", operator.log());
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Waits until the operator has nothing to do any more.
async fn until_quiet(operator: &Operator) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    let (mut last, mut since) = (f64::NEG_INFINITY, Instant::now());
    while since.elapsed() < QUIET {
        ensure!(Instant::now() < deadline, "the operator never comes to rest:\n{}", operator.log());
        tokio::time::sleep(POLL).await;
        let visits = Metrics::of(operator)?.sum("sensorium_reconcile_total", &[]);
        if visits > last {
            (last, since) = (visits, Instant::now());
        }
    }
    Ok(())
}

/// The most memory that the operator ever had, in MiB.
fn memory(operator: &Operator) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", operator.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("the kernel tells no VmHWM")?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes / 1024.0)
}

/// The seconds for which a process has had a core.
fn cpu_seconds(process: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(") ").context("a name in parentheses")?.1.split(' ').collect();
    // Fields 14 and 15 of proc(5), which counts from 1 and has two before these.
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    // Linux counts these in hundredths of a second on every machine that we run on.
    Ok(ticks as f64 / 100.0)
}

/// Waits until a process takes next to nothing of a core.
async fn until_rest(process: u32) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let before = cpu_seconds(process)?;
        tokio::time::sleep(QUIET).await;
        if (cpu_seconds(process)? - before) / QUIET.as_secs_f64() < RESTING {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "process {process} never comes to rest");
    }
}

/// What a phase of changes showed.
struct Steady {
    median: f64,
    p99: f64,
    /// The operator's share of it, from the news until it has sent its write: 99 in 100 take no longer.
    reaction: f64,
    cores: f64,
}

/// Suspends jobs and lets them go on, and takes the time until their batch Job says so.
async fn change(namespace: &Namespace, operator: &Operator, jobs: usize, seconds: u32) -> Result<Steady> {
    let mut told = Seen::<TrainingJob>::follow(namespace, |job| (job.name_any(), job.spec.suspend)).await?;
    let mut written = Seen::<Job>::follow(namespace, |job| {
        let owner = job.owner_references().first().map(|owner| owner.name.clone()).unwrap_or_default();
        (owner, job.spec.as_ref().and_then(|spec| spec.suspend).unwrap_or_default())
    })
    .await?;
    let (before, start, metrics) = (cpu_seconds(operator.id())?, Instant::now(), Metrics::of(operator)?);
    let mut interval = tokio::time::interval(CHANGE_INTERVAL);
    let mut patches = JoinSet::new();
    for round in 0..seconds as usize * CHANGES_PER_SECOND {
        interval.tick().await;
        // At the same time as others, so that a slow answer does not make the changes fewer. A job is changed again after
        // all others only: its last change must have had its effect.
        patches.spawn(patch(namespace.api(), round * STRIDE % jobs, (round / jobs).is_multiple_of(2)));
    }
    let changes = patches.join_all().await.into_iter().collect::<Result<Vec<Change>>>()?;
    let cores = (cpu_seconds(operator.id())? - before) / start.elapsed().as_secs_f64();
    let written = written.after(&changes).await?;
    eprintln!("  {} changes; cores {cores:.3}", changes.len());
    eprintln!("  until a watch of TrainingJobs tells of one, seconds: {}", in_words(&told.after(&changes).await?));
    eprintln!("  until the batch Job has changed, seconds: {}", in_words(&written));
    until_quiet(operator).await?;
    let metrics = Metrics::of(operator)?.since(&metrics);
    let reaction = |until: &str, share| {
        metrics.quantile("sensorium_reaction_seconds", &["kind=\"TrainingJob\"", &format!("until=\"{until}\"")], share)
    };
    for until in ["sent", "answered"] {
        let shares = [0.5, 0.9, 0.99].map(|share| format!("{:.3}", reaction(until, share)));
        eprintln!("  from the operator's news until its write was {until}, seconds at most: {}", shares.join(", "));
    }
    let visits = metrics.sum("sensorium_reconcile_total", &[]);
    let took = |share| metrics.quantile("sensorium_reconcile_duration_seconds", &["kind=\"TrainingJob\""], share);
    let took = [0.5, 0.9, 0.99].map(|share| format!("{:.3}", took(share)));
    eprintln!("  {visits} visits, seconds at most: {}", took.join(", "));
    eprintln!("  writes: {}", metrics.list("sensorium_writes_total"));
    Ok(Steady { median: at(&written, 0.5), p99: at(&written, 0.99), reaction: reaction("sent", 0.99), cores })
}

/// The value below which a share of all lies, of values in order.
fn at(values: &[f64], share: f64) -> f64 {
    values[((values.len() - 1) as f64 * share).round() as usize]
}

fn in_words(values: &[f64]) -> String {
    let shares = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)];
    shares.map(|(name, share)| format!("{name} {:.3}", at(values, share))).join(", ")
}

/// A change that was made to a TrainingJob.
struct Change {
    job: String,
    suspend: bool,
    asked: Instant,
    answered: Instant,
}

async fn patch(api: Api<TrainingJob>, job: usize, suspend: bool) -> Result<Change> {
    let (job, asked) = (format!("j{job}"), Instant::now());
    let change = Patch::Merge(json!({"spec": {"suspend": suspend}}));
    api.patch(&job, &PatchParams::default(), &change).await?;
    Ok(Change { job, suspend, asked, answered: Instant::now() })
}

/// What a watch of our own tells of objects of kind `K`: the TrainingJob, whether it is suspended, and when that was seen.
struct Seen<K> {
    news: mpsc::UnboundedReceiver<(String, bool, Instant)>,
    watch: tokio::task::JoinHandle<Result<()>>,
    kind: PhantomData<fn() -> K>,
}

impl<K> Seen<K>
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
    K::DynamicType: Default,
{
    async fn follow(namespace: &Namespace, read: impl Fn(&K) -> (String, bool) + Send + 'static) -> Result<Self> {
        let (_, version) = count::<K>(namespace).await?;
        let (send, news) = mpsc::unbounded_channel();
        let api = namespace.api::<K>();
        let watch = tokio::spawn(async move {
            let parameters = WatchParams::default().disable_bookmarks().timeout(WATCH_SECONDS);
            let mut events = api.watch(&parameters, &version).await?.boxed();
            while let Some(event) = events.try_next().await? {
                match event {
                    WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                        let (job, suspend) = read(&object);
                        send.send((job, suspend, Instant::now()))?;
                    }
                    WatchEvent::Error(error) => bail!("the watch ended: {error}"),
                    WatchEvent::Deleted(_) | WatchEvent::Bookmark(_) => {}
                }
            }
            Ok(())
        });
        Ok(Self { news, watch, kind: PhantomData })
    }

    /// Seconds from the answer to each of the changes until it was seen, in order.
    async fn after(&mut self, changes: &[Change]) -> Result<Vec<f64>> {
        let mut awaited: Vec<&Change> = changes.iter().collect();
        let mut latencies = Vec::new();
        while !awaited.is_empty() {
            let next = tokio::time::timeout(EFFECT_LIMIT, self.news.recv()).await;
            let Ok(Some((job, suspend, at))) = next else { bail!("{} changes had no effect", awaited.len()) };
            let is_its = |change: &&Change| change.job == job && change.suspend == suspend && change.asked < at;
            if let Some(index) = awaited.iter().position(is_its) {
                let change = awaited.swap_remove(index);
                latencies.push(at.saturating_duration_since(change.answered).as_secs_f64());
            }
        }
        latencies.sort_by(f64::total_cmp);
        Ok(latencies)
    }
}

impl<K> Drop for Seen<K> {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

/// Seconds from the end of a leader, by `kill -9`, until the other operator has seen to all jobs; and the most memory that
/// this one had, in MiB.
async fn take_over(kubeconfig: &Path, namespace: &Namespace, jobs: usize) -> Result<(f64, f64)> {
    let start = |name: &str| {
        Operator::start(kubeconfig, namespace.name(), &["--leader-elect=true", &format!("--identity={name}")])
    };
    let mut first = start("first")?;
    until_visited(&first, jobs).await?;
    let mut second = start("second")?;
    second.wait_until_ready(LIMIT)?;
    until_quiet(&first).await?;
    // It stands by: it knows all objects by now.
    until_rest(second.id()).await?;
    first.kill()?;
    let killed = Instant::now();
    until_leading(&second).await?;
    let led = killed.elapsed().as_secs_f64();
    until_visited(&second, jobs).await?;
    let took = killed.elapsed().as_secs_f64();
    eprintln!("  leads after {led:.1} s, has visited all after {took:.1} s");
    until_quiet(&second).await?;
    eprintln!("  the next leader: {}", Metrics::of(&second)?.visits(&second)?);
    Ok((took, memory(&second)?))
}

/// Pods per second that the job controller makes of the Jobs that the operator made.
async fn job_controller(cluster: &ApiCluster, controllers: &Controllers, ours: &Namespace, jobs: usize) -> Result<f64> {
    let mut made = ours.api::<Job>().list(&ListParams::default().limit(1)).await?;
    let mut spec = made.items.pop().and_then(|job| job.spec).context("there is no Job")?;
    // The API server makes a selector for each Job and labels its pods accordingly.
    spec.selector = None;
    spec.suspend = None;
    if let Some(metadata) = &mut spec.template.metadata {
        metadata
            .labels
            .get_or_insert_default()
            .retain(|label, _| !label.contains("controller-uid") && !label.contains("job-name"));
    }
    let namespace = cluster.namespace("peer").await?;
    controllers.stop()?;
    let job = |index| json!({"metadata": {"name": format!("j{index}")}, "spec": spec});
    create::<Job>(&namespace, (0..jobs).map(job)).await?;
    let start = Instant::now();
    controllers.go_on()?;
    until_count::<Pod>(&namespace, jobs).await?;
    Ok(jobs as f64 / start.elapsed().as_secs_f64())
}

/// The process of one of the cluster's programs.
fn process_of(cluster: &ApiCluster, program: &str) -> Result<Pid> {
    let path = cluster.logs().with_file_name("pids").join(program);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let id = text.split(' ').next().and_then(|id| id.parse().ok()).and_then(Pid::from_raw);
    id.context("a file of process ids begins with one")
}

/// The controllers of Kubernetes, as a process that can be stopped for a while.
struct Controllers(Pid);

impl Controllers {
    fn of(cluster: &ApiCluster) -> Result<Self> {
        Ok(Self(process_of(cluster, "kube-controller-manager")?))
    }

    fn stop(&self) -> Result<()> {
        Ok(kill_process(self.0, Signal::STOP)?)
    }

    /// Waits until they have nothing left to do for the pods that they made: EndpointSlices, owners, status.
    async fn until_rest(&self) -> Result<()> {
        until_rest(self.0.as_raw_nonzero().get().unsigned_abs()).await
    }

    fn go_on(&self) -> Result<()> {
        Ok(kill_process(self.0, Signal::CONT)?)
    }
}

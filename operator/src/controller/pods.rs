//! What running pods say themselves, over HTTP: progress and metrics. Asked rarely, and never for long.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use sensorium_api::run::Progress;

use crate::status::TrackLoad;

/// Time that a pod has for its answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// An answer that is longer is cut off: it is not what was asked for.
const LONGEST: usize = 4 << 20;
/// A job is asked no more often than this.
const INTERVAL: Duration = Duration::from_secs(10);
/// Questions per second over all jobs: with ten thousand of them each is asked every eight minutes.
const RATE: f64 = 20.0;
/// A job whose turn has come and gone so many times is gone too.
const FORGOTTEN: u32 = 4;

/// Asks pods.
#[derive(Debug, Default)]
pub(super) struct Pods {
    http: reqwest::Client,
    asked: Mutex<Asked>,
    steps: Mutex<Steps>,
}

/// What a pod has done since it started.
#[derive(Clone, Debug)]
pub(super) struct Load {
    /// The pod's uid.
    pod: String,
    /// When the pod was made.
    made: Option<Timestamp>,
    done: TrackLoad,
}

/// A step of a rollout.
#[derive(Debug)]
pub(super) struct Step<'a> {
    /// Of the job.
    pub(super) uid: &'a str,
    /// What is being rolled out.
    pub(super) revision: &'a str,
    /// Which step it is.
    pub(super) number: u32,
    /// When it began.
    pub(super) began: Timestamp,
}

/// The steps of rollouts that are looked at, by job. Who starts anew looks at a step from then on.
#[derive(Debug, Default)]
struct Steps(HashMap<String, KnownStep>);

#[derive(Debug, Default)]
struct KnownStep {
    revision: String,
    number: u32,
    /// What pods had done when it began, by uid.
    before: HashMap<String, TrackLoad>,
}

impl Steps {
    /// What `pods` have done in a step.
    fn since(&mut self, step: &Step<'_>, pods: &[Load]) -> TrackLoad {
        let known = self.0.entry(step.uid.to_owned()).or_default();
        if (known.revision.as_str(), known.number) != (step.revision, step.number) {
            *known = KnownStep { revision: step.revision.to_owned(), number: step.number, before: HashMap::new() };
        }
        let mut all = TrackLoad::default();
        for Load { pod, made, done } in pods {
            let is_new = made.is_some_and(|made| made >= step.began);
            let before = known.before.entry(pod.clone()).or_insert(if is_new { TrackLoad::default() } else { *done });
            if done.requests < before.requests {
                // It has started again, and counts from zero.
                *before = TrackLoad::default();
            }
            all.requests += done.requests - before.requests;
            all.failures += done.failures - before.failures;
            all.seconds += done.seconds - before.seconds;
        }
        all
    }
}

/// When each job was last asked.
#[derive(Debug, Default)]
struct Asked {
    jobs: HashMap<String, Instant>,
    /// When those that are not asked any more were last looked for.
    swept: Option<Instant>,
}

impl Asked {
    /// Whether it is the turn of the job `uid`, and when it is again.
    fn turn(&mut self, uid: &str, now: Instant) -> (bool, Duration) {
        let interval = INTERVAL.max(Duration::from_secs_f64(self.jobs.len() as f64 / RATE));
        // A job that is gone says nothing, and must not make the others wait.
        let forgotten = interval * FORGOTTEN;
        if self.swept.is_none_or(|swept| now.duration_since(swept) > forgotten) {
            self.jobs.retain(|_, last| now.duration_since(*last) <= forgotten);
            self.swept = Some(now);
        }
        let rest = self.jobs.get(uid).and_then(|last| interval.checked_sub(now.duration_since(*last)));
        match rest {
            Some(rest) if !rest.is_zero() => (false, rest),
            _ => {
                self.jobs.insert(uid.to_owned(), now);
                (true, interval)
            }
        }
    }
}

impl Pods {
    /// Whether it is the turn of the job `uid`, and when it is again.
    pub(super) fn turn(&self, uid: &str) -> (bool, Duration) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).turn(uid, Instant::now())
    }

    /// The job runs no more.
    pub(super) fn forget(&self, uid: &str) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).jobs.remove(uid);
    }

    /// What a worker reports.
    pub(super) async fn progress(&self, pod: &Pod, port: u16) -> Option<Progress> {
        serde_json::from_slice(&self.get(pod, port, "/progress").await?).ok()
    }

    /// What servers have done, of those that say so.
    pub(super) async fn loads(&self, pods: &[&Pod], port: u16) -> Vec<Load> {
        let mut loads = Vec::new();
        for pod in pods {
            let Some(text) = self.get(pod, port, "/metrics").await else { continue };
            let made = pod.creation_timestamp().map(|time| time.0);
            loads.push(Load { pod: pod.uid().unwrap_or_default(), made, done: load(&String::from_utf8_lossy(&text)) });
        }
        loads
    }

    /// What the pods of both tracks have done in a step.
    pub(super) fn since(&self, step: &Step<'_>, tracks: [Vec<Load>; 2]) -> [TrackLoad; 2] {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        tracks.map(|pods| steps.since(step, &pods))
    }

    /// No step of the job `uid` is looked at any more.
    pub(super) fn forget_steps(&self, uid: &str) {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).0.remove(uid);
    }

    async fn get(&self, pod: &Pod, port: u16, path: &str) -> Option<Vec<u8>> {
        let address: IpAddr = pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()?;
        let url = format!("http://{}{path}", std::net::SocketAddr::new(address, port));
        let ask = async {
            let mut response = self.http.get(url).send().await.ok()?.error_for_status().ok()?;
            let mut body = Vec::new();
            while let Some(chunk) = response.chunk().await.ok()? {
                body.extend_from_slice(&chunk);
                if body.len() > LONGEST {
                    return None;
                }
            }
            Some(body)
        };
        tokio::time::timeout(TIMEOUT, ask).await.ok()?
    }
}

/// Codes of failures that are the server's; the others are the client's.
const SERVER_FAULTS: [&str; 5] = ["INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED"];

/// What one server's metrics say.
fn load(text: &str) -> TrackLoad {
    let mut load = TrackLoad::default();
    for line in text.lines() {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let Ok(value) = value.parse::<f64>() else { continue };
        if series.starts_with("sensorium_server_requests_total{") {
            load.requests += value;
            if SERVER_FAULTS.iter().any(|code| series.contains(&format!("code=\"{code}\""))) {
                load.failures += value;
            }
        } else if series.starts_with("sensorium_server_request_seconds_sum{") {
            load.seconds += value;
        }
    }
    load
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_has_its_turn_and_those_that_are_gone_make_nobody_wait() {
        let (mut asked, start) = (Asked::default(), Instant::now());
        for job in 0..1000 {
            assert!(asked.turn(&job.to_string(), start).0);
        }
        assert_eq!(asked.turn("0", start), (false, Duration::from_secs(50)));
        let later = start + Duration::from_secs(201);
        assert!(asked.turn("0", later).0);
        assert_eq!(asked.turn("0", later), (false, INTERVAL));
    }

    #[test]
    fn a_servers_metrics_are_summed_and_only_its_own_faults_are_failures() {
        let text = "# HELP x y\n\
            sensorium_server_requests_total{model=\"vqa\",code=\"OK\"} 90\n\
            sensorium_server_requests_total{model=\"vqa\",code=\"INTERNAL\"} 4\n\
            sensorium_server_requests_total{model=\"vqa\",code=\"INVALID_ARGUMENT\"} 6\n\
            sensorium_server_request_seconds_sum{model=\"vqa\"} 0.5\n# EOF\n";
        assert_eq!(load(text), TrackLoad { requests: 100.0, failures: 4.0, seconds: 0.5 });
    }

    #[test]
    fn what_counts_in_a_step_is_what_happened_in_it_whatever_pods_come_and_start_again() {
        let began = Timestamp::from_second(1_800_000_000).unwrap();
        let pod = |name: &str, made: i64, requests: f64, failures: f64| Load {
            pod: name.to_owned(),
            made: Timestamp::from_second(1_800_000_000 + made).ok(),
            done: TrackLoad { requests, failures, seconds: requests / 100.0 },
        };
        let mut steps = Steps::default();
        let step = |number| Step { uid: "job", revision: "r", number, began };
        let old = [pod("old", -900, 5000.0, 50.0), pod("new", 1, 7.0, 1.0)];
        assert_eq!(steps.since(&step(0), &old), TrackLoad { requests: 7.0, failures: 1.0, seconds: 0.07 });
        let later = [pod("old", -900, 5100.0, 50.0), pod("new", 1, 3.0, 2.0)];
        let found = steps.since(&step(0), &later);
        assert_eq!((found.requests, found.failures), (103.0, 2.0), "one of them has started again");
        let next = steps.since(&step(1), &[pod("old", -900, 5100.0, 50.0)]);
        assert_eq!(next, TrackLoad::default(), "another step begins from there");
    }
}

//! What running pods say themselves, over HTTP: progress and metrics. Asked rarely, and never for long.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
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

    /// What servers have done since they started.
    pub(super) async fn load(&self, pods: &[&Pod], port: u16) -> TrackLoad {
        let mut load = TrackLoad::default();
        for pod in pods {
            let Some(text) = self.get(pod, port, "/metrics").await else { continue };
            add(&mut load, &String::from_utf8_lossy(&text));
        }
        load
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

/// Adds what one server's metrics say.
fn add(load: &mut TrackLoad, text: &str) {
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
        let mut load = TrackLoad::default();
        add(&mut load, text);
        assert_eq!(load, TrackLoad { requests: 100.0, failures: 4.0, seconds: 0.5 });
    }
}

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

/// Asks pods.
#[derive(Debug, Default)]
pub(super) struct Pods {
    http: reqwest::Client,
    asked: Mutex<HashMap<String, Instant>>,
}

impl Pods {
    /// Whether it is the turn of the job `uid`, and when it is again.
    pub(super) fn turn(&self, uid: &str) -> (bool, Duration) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let interval = INTERVAL.max(Duration::from_secs_f64(asked.len() as f64 / RATE));
        let now = Instant::now();
        match asked.get(uid) {
            Some(last) if now.duration_since(*last) < interval => {
                (false, interval.saturating_sub(now.duration_since(*last)))
            }
            _ => {
                asked.insert(uid.to_owned(), now);
                (true, interval)
            }
        }
    }

    /// The job runs no more.
    pub(super) fn forget(&self, uid: &str) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
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

//! More than the server can do: it does what it can, in time, and says no to the rest at once.

use std::time::Duration;

use anyhow::Result;
use sensorium_bench::{Better, Report};
use sensorium_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use tokio::{task::JoinSet, time};
use tonic::{Code, Request, transport::Channel};

use crate::server::{Server, one};

/// What callers are ready to wait.
const DEADLINE: Duration = Duration::from_millis(200);
const CONNECTIONS: usize = 8;
/// So often the best load and twice as much take turns: a machine is quicker in some seconds than in others.
const ROUNDS: u32 = 6;

/// What came of a load.
#[derive(Debug, Default)]
struct Outcome {
    seconds: f64,
    /// Times of requests that were answered in time, in seconds.
    good: Vec<f64>,
    /// Times of requests that were neither answered in time nor refused.
    late: Vec<f64>,
    /// Times of refusals.
    refused: Vec<f64>,
    errors: usize,
}

impl Outcome {
    fn goodput(&self) -> f64 {
        self.good.len() as f64 / self.seconds
    }

    /// Adds what came of the same load later.
    fn add(&mut self, later: Self) {
        self.seconds += later.seconds;
        self.good.extend(later.good);
        self.late.extend(later.late);
        self.refused.extend(later.refused);
        self.errors += later.errors;
    }

    /// Of everything that was not refused.
    fn accepted(&self) -> Vec<f64> {
        [&self.good[..], &self.late].concat()
    }
}

fn percentile(mut times: Vec<f64>, share: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    let at = (times.len() as f64 * share).ceil() as usize;
    times.get(at.saturating_sub(1)).copied().unwrap_or(0.0)
}

/// Sends `rate` requests a second, whatever comes back.
async fn offer(channels: &[Channel], rate: f64, duration: Duration) -> Result<Outcome> {
    let mut requests = JoinSet::new();
    let start = time::Instant::now();
    let count = (rate * duration.as_secs_f64()) as u32;
    for index in 0..count {
        time::sleep_until(start + duration.mul_f64(f64::from(index) / f64::from(count))).await;
        let mut client = GrpcInferenceServiceClient::new(channels[index as usize % channels.len()].clone());
        requests.spawn(async move {
            let mut request = Request::new(one("work", 1.0));
            request.set_timeout(DEADLINE);
            let asked = time::Instant::now();
            let answer = client.model_infer(request).await;
            (answer.map(drop).map_err(|status| status.code()), asked.elapsed())
        });
    }
    let mut outcome = Outcome { seconds: duration.as_secs_f64(), ..Outcome::default() };
    while let Some(done) = requests.join_next().await {
        let (answer, took) = done?;
        let seconds = took.as_secs_f64();
        match answer {
            Ok(()) if took <= DEADLINE => outcome.good.push(seconds),
            Ok(()) | Err(Code::DeadlineExceeded | Code::Cancelled) => outcome.late.push(seconds),
            Err(Code::ResourceExhausted) => outcome.refused.push(seconds),
            Err(code) => {
                eprintln!("overload: {code:?}");
                outcome.errors += 1;
            }
        }
    }
    Ok(outcome)
}

/// The rate of requests of which most a second are answered in time, and how many these are: until twice in turn more brings no
/// more.
async fn best(channels: &[Channel], step: Duration) -> Result<(f64, f64)> {
    let (mut best, mut most, mut rate, mut misses) = (0.0, 0.0_f64, 30.0_f64, 0);
    while misses < 2 && rate < 20_000.0 {
        let goodput = offer(channels, rate, step).await?.goodput();
        eprintln!("overload: {rate:.0}/s offered, {goodput:.0}/s in time");
        misses = if goodput > most * 1.02 { 0 } else { misses + 1 };
        if goodput > most {
            (best, most) = (rate, goodput);
        }
        rate *= 1.3;
    }
    Ok((best, most))
}

pub(crate) async fn run(report: &mut Report, server: &Server, step: Duration) -> Result<()> {
    let mut channels = Vec::new();
    for _ in 0..CONNECTIONS {
        channels.push(server.channel().await?);
    }
    offer(&channels, 20.0, step / 2).await?;
    let (rate, most) = best(&channels, step).await?;
    let (mut best, mut twice) = (Outcome::default(), Outcome::default());
    for _ in 0..ROUNDS {
        best.add(offer(&channels, rate, step / 2).await?);
        twice.add(offer(&channels, most * 2.0, step / 2).await?);
    }
    eprintln!("overload: {rate:.0}/s offered, in turn with twice as many: {:.0}/s in time", best.goodput());
    eprintln!(
        "overload: twice the best, {:.0}/s: {} in time, {} late, {} refused, {} failed",
        most * 2.0,
        twice.good.len(),
        twice.late.len(),
        twice.refused.len(),
        twice.errors
    );
    report.row(
        "overload/goodput-at-twice-the-best".to_owned(),
        "requests/s",
        Better::Higher,
        twice.goodput(),
        ("nine-tenths-of-best", 0.9 * best.goodput()),
    );
    let p99 = percentile(twice.accepted(), 0.99);
    report.row("overload/accepted-p99".to_owned(), "s", Better::Lower, p99, ("deadline", DEADLINE.as_secs_f64()));
    report.row("overload/refused-p99".to_owned(), "s", Better::Lower, percentile(twice.refused, 0.99), ("limit", 0.1));
    report.row("overload/errors".to_owned(), "errors", Better::Lower, twice.errors as f64, ("limit", 0.0));
    Ok(())
}

//! What a model version has done since it was loaded, as `ModelStatistics` reports it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use sensorium_proto::inference::{
    InferBatchStatistics, InferResponseStatistics, InferStatistics, ModelStatistics, StatisticDuration,
};

use tonic::Code;

use super::Timings;

/// Responses of one request that are counted each by itself; what comes after them is counted with the last. A scrape must
/// not grow with the longest request that ever was.
const RESPONSES: usize = 64;

/// Counters of one model version.
#[derive(Debug, Default)]
pub struct Statistics(Mutex<Counters>);

#[derive(Clone, Debug, Default)]
struct Counters {
    /// Rows that were inferred; those of cache hits are not among them.
    inferences: u64,
    /// Batches that an engine ran.
    executions: u64,
    /// Milliseconds since 1970; 0 before the first.
    last_inference: u64,
    success: Sum,
    fail: Sum,
    /// Of these, in the order of [`Failure::ALL`].
    failures: [u64; Failure::ALL.len()],
    queue: Sum,
    compute_input: Sum,
    compute_infer: Sum,
    compute_output: Sum,
    cache_hit: Sum,
    cache_miss: Sum,
    batches: BTreeMap<u64, [Sum; 3]>,
    /// By their place among the responses of a request, for models that give several.
    responses: Vec<Responses>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Responses {
    compute_infer: Sum,
    compute_output: Sum,
    success: Sum,
    fail: Sum,
    cancel: Sum,
}

/// How one of the responses of a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Responded {
    /// It was made, with this much computing.
    Made(Timings),
    /// It would have come, and an error came instead after this time.
    Failed(Duration),
    /// Nobody waited for it any more; so much time had gone into it.
    Cancelled(Duration),
}

/// Why a request has no answer, as `nv_inference_request_failure` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There was too much to do, or nobody to do it.
    Rejected,
    /// Its caller left, or stopped waiting.
    Canceled,
    /// What runs the model failed.
    Backend,
    /// Anything else, such as a request that does not fit.
    Other,
}

impl Failure {
    /// Each of them.
    pub const ALL: [Self; 4] = [Self::Rejected, Self::Canceled, Self::Backend, Self::Other];

    /// The word in the metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rejected => "REJECTED",
            Self::Canceled => "CANCELED",
            Self::Backend => "BACKEND",
            Self::Other => "OTHER",
        }
    }
}

impl From<Code> for Failure {
    fn from(code: Code) -> Self {
        match code {
            Code::ResourceExhausted | Code::Unavailable => Self::Rejected,
            Code::Cancelled | Code::DeadlineExceeded => Self::Canceled,
            Code::Internal => Self::Backend,
            _ => Self::Other,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    count: u64,
    nanoseconds: u64,
}

impl Sum {
    fn add(&mut self, took: Duration) {
        self.count += 1;
        self.nanoseconds = self.nanoseconds.saturating_add(nanoseconds(took));
    }
}

impl From<Sum> for Option<StatisticDuration> {
    fn from(sum: Sum) -> Self {
        Some(StatisticDuration { count: sum.count, ns: sum.nanoseconds })
    }
}

impl Statistics {
    /// A request of `rows` rows was answered after `took`. An answer from the cache counts as a success of its own kind:
    /// no inference, no computing, and in the queue as long as it waited for somebody who ran the same.
    pub fn succeeded(&self, took: Duration, rows: usize, timings: &Timings) {
        self.change(|counters| {
            counters.last_inference = now();
            counters.success.add(took);
            counters.queue.add(timings.queue);
            if timings.cache_hit {
                counters.cache_hit.add(took.saturating_sub(timings.queue));
                return;
            }
            counters.inferences += rows as u64;
            counters.compute_input.add(timings.compute_input);
            counters.compute_infer.add(timings.compute_infer);
            counters.compute_output.add(timings.compute_output);
        });
    }

    /// A request ended without an answer after `took`.
    pub fn failed(&self, took: Duration, why: Failure) {
        self.change(|counters| {
            counters.fail.add(took);
            counters.failures[why as usize] += 1;
        });
    }

    /// Requests without an answer by the reason, in the order of [`Failure::ALL`].
    pub fn failures(&self) -> [u64; Failure::ALL.len()] {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).failures
    }

    /// The response with this place among those of its request, from 0 on, ended.
    pub fn responded(&self, index: usize, ended: Responded) {
        let index = index.min(RESPONSES - 1);
        self.change(|counters| {
            let length = counters.responses.len().max(index + 1);
            counters.responses.resize(length, Responses::default());
            let own = &mut counters.responses[index];
            match ended {
                Responded::Made(timings) => {
                    own.compute_infer.add(timings.compute_infer);
                    own.compute_output.add(timings.compute_output);
                    own.success.add(timings.compute_infer + timings.compute_output);
                }
                Responded::Failed(took) => own.fail.add(took),
                Responded::Cancelled(took) => own.cancel.add(took),
            }
        });
    }

    /// A request was not in the cache; looking it up and keeping its answer took `took`.
    pub fn missed(&self, took: Duration) {
        self.change(|counters| counters.cache_miss.add(took));
    }

    /// An engine ran a batch that failed.
    pub fn ran_in_vain(&self) {
        self.change(|counters| counters.executions += 1);
    }

    /// An engine ran a batch of `rows` rows.
    pub fn executed(&self, rows: usize, timings: &Timings) {
        self.change(|counters| {
            counters.executions += 1;
            let [input, infer, output] = counters.batches.entry(rows as u64).or_default();
            input.add(timings.compute_input);
            infer.add(timings.compute_infer);
            output.add(timings.compute_output);
        });
    }

    /// A model made of other models ran once.
    pub fn composed(&self) {
        self.change(|counters| counters.executions += 1);
    }

    /// The counters as they are now.
    pub fn report(&self, name: &str, version: &str) -> ModelStatistics {
        let counters = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let batch = |(&batch_size, [input, infer, output]): (&u64, &[Sum; 3])| InferBatchStatistics {
            batch_size,
            compute_input: (*input).into(),
            compute_infer: (*infer).into(),
            compute_output: (*output).into(),
        };
        let response = |(index, own): (usize, &Responses)| {
            let statistics = InferResponseStatistics {
                compute_infer: own.compute_infer.into(),
                compute_output: own.compute_output.into(),
                success: own.success.into(),
                fail: own.fail.into(),
                empty_response: Sum::default().into(),
                cancel: own.cancel.into(),
            };
            (index.to_string(), statistics)
        };
        ModelStatistics {
            name: name.to_owned(),
            version: version.to_owned(),
            last_inference: counters.last_inference,
            inference_count: counters.inferences,
            execution_count: counters.executions,
            inference_stats: Some(InferStatistics {
                success: counters.success.into(),
                fail: counters.fail.into(),
                queue: counters.queue.into(),
                compute_input: counters.compute_input.into(),
                compute_infer: counters.compute_infer.into(),
                compute_output: counters.compute_output.into(),
                cache_hit: counters.cache_hit.into(),
                cache_miss: counters.cache_miss.into(),
            }),
            batch_stats: counters.batches.iter().map(batch).collect(),
            response_stats: counters.responses.iter().enumerate().map(response).collect(),
            ..ModelStatistics::default()
        }
    }

    /// Only additions run under the lock, so a panic elsewhere leaves it whole.
    fn change(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Saturates after five centuries.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hit_is_a_success_without_inference_and_a_batch_counts_once() {
        let statistics = Statistics::default();
        let ran = Timings { compute_infer: Duration::from_nanos(700), ..Timings::default() };
        statistics.executed(3, &ran);
        statistics.succeeded(Duration::from_nanos(900), 2, &ran);
        statistics.succeeded(Duration::from_nanos(900), 1, &ran);
        statistics.succeeded(Duration::from_nanos(10), 1, &Timings { cache_hit: true, ..Timings::default() });
        statistics.failed(Duration::from_nanos(5), Code::Internal.into());
        statistics.ran_in_vain();
        let report = statistics.report("m", "1");
        assert_eq!((report.inference_count, report.execution_count), (3, 2));
        assert_eq!(statistics.failures(), [0, 0, 1, 0]);
        let stats = report.inference_stats.unwrap();
        assert_eq!(stats.success, Some(StatisticDuration { count: 3, ns: 1810 }));
        assert_eq!(stats.compute_infer, Some(StatisticDuration { count: 2, ns: 1400 }));
        assert_eq!(stats.cache_hit, Some(StatisticDuration { count: 1, ns: 10 }));
        assert_eq!(stats.fail, Some(StatisticDuration { count: 1, ns: 5 }));
        assert_eq!(report.batch_stats[0].batch_size, 3);
        assert_eq!(report.batch_stats[0].compute_infer, Some(StatisticDuration { count: 1, ns: 700 }));
        assert!(report.response_stats.is_empty(), "requests with one response are counted as requests alone");
    }

    #[test]
    fn responses_are_counted_by_their_place_and_those_far_behind_together() {
        let statistics = Statistics::default();
        let made =
            |nanos| Responded::Made(Timings { compute_infer: Duration::from_nanos(nanos), ..Timings::default() });
        statistics.responded(0, made(3));
        statistics.responded(0, made(4));
        statistics.responded(1, Responded::Failed(Duration::from_nanos(5)));
        statistics.responded(RESPONSES - 1, made(1));
        statistics.responded(1_000_000, made(1));
        statistics.responded(1_000_000, Responded::Cancelled(Duration::from_nanos(9)));
        let report = statistics.report("m", "1").response_stats;
        assert_eq!(report.len(), RESPONSES);
        assert_eq!(report["0"].success, Some(StatisticDuration { count: 2, ns: 7 }));
        assert_eq!(report["1"].fail, Some(StatisticDuration { count: 1, ns: 5 }));
        assert_eq!(report["2"].success, Some(StatisticDuration::default()));
        let last = &report[&(RESPONSES - 1).to_string()];
        assert_eq!(last.success, Some(StatisticDuration { count: 2, ns: 2 }));
        assert_eq!(last.cancel, Some(StatisticDuration { count: 1, ns: 9 }));
    }
}

//! Answers that are known already.
//!
//! The key is a hash of everything that an answer depends on: which load of which model or models, every input with its name, type,
//! shape and bytes, the outputs asked for, and the parameters. 256 bits of BLAKE3: two questions do not share one. Equal
//! questions that come at the same time are run once.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, resume_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::FutureExt as _;
use moka::{future::Cache, notification::RemovalCause};
use sensorium_engine::{RawTensor, dtype_name};

use super::{Fitted, Parameter};
use crate::{error::InferError, metrics::CacheCounts};

/// Answers of all models, bounded by their bytes. Clones share them.
#[derive(Clone, Debug)]
pub struct ResponseCache {
    answers: Cache<Key, Answer>,
    counted: Arc<Counted>,
}

/// What [`CacheCounts`] tells.
#[derive(Debug, Default)]
struct Counted {
    evictions: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    lookup_nanos: AtomicU64,
    insertion_nanos: AtomicU64,
}

type Key = [u8; 32];
type Answer = Arc<Vec<RawTensor>>;

/// What an answer costs beside its tensors' bytes: the key, the tensors themselves, the cache's own records.
const OVERHEAD: usize = 512;

impl ResponseCache {
    /// A cache of at most `bytes`; the answers that were not asked for lately go first.
    pub fn new(bytes: u64) -> Self {
        let weigh = |_: &Key, answer: &Answer| {
            let tensors =
                answer.iter().map(|tensor| tensor.data().len() + size_of::<RawTensor>() + 8 * tensor.shape().len());
            u32::try_from(tensors.sum::<usize>() + OVERHEAD).unwrap_or(u32::MAX)
        };
        let counted = Arc::new(Counted::default());
        let counter = counted.clone();
        let evicted = move |_: Arc<Key>, _: Answer, cause: RemovalCause| {
            if cause == RemovalCause::Size {
                counter.evictions.fetch_add(1, Ordering::Relaxed);
            }
        };
        let answers = Cache::builder().max_capacity(bytes).weigher(weigh).eviction_listener(evicted).build();
        Self { answers, counted }
    }

    /// What it has done, and how full it is, roughly.
    pub fn counts(&self) -> CacheCounts {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let most = self.answers.policy().max_capacity().unwrap_or(0).max(1);
        CacheCounts {
            entries: self.answers.entry_count(),
            used: self.answers.weighted_size() as f64 / most as f64,
            evictions: count(&self.counted.evictions),
            hits: count(&self.counted.hits),
            misses: count(&self.counted.misses),
            lookups: Duration::from_nanos(count(&self.counted.lookup_nanos)),
            insertions: Duration::from_nanos(count(&self.counted.insertion_nanos)),
        }
    }

    /// A request was looked for, which took so long.
    pub(super) fn looked(&self, is_hit: bool, took: Duration) {
        let counter = if is_hit { &self.counted.hits } else { &self.counted.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        self.counted.lookup_nanos.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }

    /// An answer was kept, which took so long.
    pub(super) fn kept(&self, took: Duration) {
        self.counted.insertion_nanos.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }

    /// The answer to `key`, if somebody knows it.
    pub(super) async fn find(&self, key: &Key) -> Option<Vec<RawTensor>> {
        self.answers.get(key).await.map(|answer| answer.as_ref().clone())
    }

    /// The answer to `key`, from `run` if nobody knows it; whoever asks meanwhile waits for the same run.
    ///
    /// # Errors
    /// What `run` says, to everybody who waited for it, unless it was one caller's patience that ended. The next one
    /// tries again.
    pub(super) async fn answer<R>(&self, key: Key, run: impl Fn() -> R) -> Result<Vec<RawTensor>, InferError>
    where
        R: Future<Output = Result<Vec<RawTensor>, InferError>>,
    {
        loop {
            let mut is_own = false;
            let keep = async {
                is_own = true;
                // A row of a large batch must not keep the whole of it alive.
                Ok(Arc::new(run().await?.iter().map(RawTensor::detached).collect::<Vec<_>>()))
            };
            // Whoever has waited for two hundred others, each of which had begun to run it and left, is given up by a panic.
            let answer = AssertUnwindSafe(self.answers.try_get_with::<_, InferError>(key, keep)).catch_unwind().await;
            match answer {
                Ok(Ok(answer)) => return Ok(answer.as_ref().clone()),
                Ok(Err(error)) if is_own || !error.is_one_callers() => return Err(InferError::Shared(error)),
                Err(panic) if is_own => resume_unwind(panic),
                Ok(Err(_)) | Err(_) => {}
            }
        }
    }
}

/// What an answer depends on.
pub(super) fn key(loads: &[u64], request: &Fitted, parameters: &BTreeMap<String, Parameter>) -> Key {
    let mut hasher = blake3::Hasher::new();
    // Every part is preceded by its length, so that no two lists of parts look alike.
    let mut part = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    part(bytemuck::cast_slice(loads));
    for tensor in &request.inputs {
        part(dtype_name(tensor.dtype()).as_bytes());
        part(bytemuck::cast_slice(tensor.shape()));
        part(tensor.data());
    }
    // The inputs are in the model's order, so their names are in the load's.
    part(b"outputs");
    for output in &request.outputs {
        part(&output.to_le_bytes());
    }
    part(b"parameters");
    for (name, value) in parameters {
        part(name.as_bytes());
        match value {
            Parameter::Bool(value) => part(&[0, u8::from(*value)]),
            Parameter::Int(value) => part(&[&[1], &value.to_le_bytes()[..]].concat()),
            Parameter::Uint(value) => part(&[&[2], &value.to_le_bytes()[..]].concat()),
            Parameter::Double(value) => part(&[&[3], &value.to_bits().to_le_bytes()[..]].concat()),
            Parameter::Text(value) => part(&[&[4], value.as_bytes()].concat()),
        }
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        task::Poll,
    };

    use sensorium_engine::DType;

    use super::*;
    use crate::scheduler::ScheduleError;

    fn tensor(dtype: DType, shape: &[i64]) -> RawTensor {
        RawTensor::zeros(dtype, shape.to_vec()).unwrap()
    }

    fn request(inputs: Vec<RawTensor>, outputs: &[usize]) -> Fitted {
        Fitted { inputs, rows: 1, outputs: outputs.to_vec() }
    }

    #[test]
    fn whatever_an_answer_depends_on_changes_the_key() {
        let f32s = |shape: &[i64]| tensor(DType::Fp32, shape);
        let none = BTreeMap::new();
        let one = |name: &str, value| BTreeMap::from([(name.to_owned(), value)]);
        let base = || request(vec![f32s(&[2, 3]), f32s(&[1])], &[0]);
        let keys = [
            key(&[1], &base(), &none),
            key(&[2], &base(), &none),
            key(&[1, 2], &base(), &none),
            key(&[1], &request(vec![f32s(&[3, 2]), f32s(&[1])], &[0]), &none),
            key(&[1], &request(vec![tensor(DType::Int32, &[2, 3]), f32s(&[1])], &[0]), &none),
            key(&[1], &request(vec![f32s(&[1]), f32s(&[2, 3])], &[0]), &none),
            key(&[1], &request(vec![f32s(&[2, 3]), f32s(&[1])], &[0, 1]), &none),
            key(&[1], &request(vec![f32s(&[2, 3]), f32s(&[1])], &[]), &none),
            key(&[1], &base(), &one("p", Parameter::Int(1))),
            key(&[1], &base(), &one("p", Parameter::Uint(1))),
            key(&[1], &base(), &one("q", Parameter::Int(1))),
            key(&[1], &base(), &one("p", Parameter::Bool(true))),
        ];
        let distinct: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(key(&[1], &base(), &none), keys[0]);
    }

    #[tokio::test]
    async fn equal_questions_at_the_same_time_run_once_and_a_failure_is_not_kept() {
        let (cache, runs) = (ResponseCache::new(1 << 20), AtomicUsize::new(0));
        let count = async || {
            runs.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
        };
        let fail = async || {
            count().await;
            Err(InferError::NotReady { model: "m".to_owned(), reason: "test".to_owned() })
        };
        let succeed = async || {
            count().await;
            Ok(vec![tensor(DType::Fp32, &[1])])
        };
        let (a, b) = tokio::join!(cache.answer([1; 32], fail), cache.answer([1; 32], fail));
        assert!(matches!((a, b), (Err(InferError::Shared(_)), Err(InferError::Shared(_)))));
        assert_eq!(runs.load(Ordering::Relaxed), 1);
        let (a, b) = tokio::join!(cache.answer([1; 32], succeed), cache.answer([1; 32], succeed));
        assert_eq!(a.unwrap(), b.unwrap());
        cache.answer([1; 32], fail).await.expect("it is known");
        assert_eq!(runs.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn one_callers_deadline_is_not_the_others() {
        let cache = ResponseCache::new(1 << 20);
        let hasty = async || {
            tokio::task::yield_now().await;
            Err(InferError::Schedule(ScheduleError::DeadlineExceeded { graph: "m".to_owned() }))
        };
        let patient = async || Ok(vec![tensor(DType::Fp32, &[1])]);
        let (a, b) = tokio::join!(cache.answer([1; 32], hasty), cache.answer([1; 32], patient));
        assert!(a.is_err() && b.is_ok());
    }

    #[tokio::test]
    async fn who_waits_behind_hundreds_who_leave_is_answered() {
        let cache = ResponseCache::new(1 << 20);
        let never = async || std::future::pending().await;
        let mut leavers: Vec<_> = (0..300).map(|_| Box::pin(cache.answer([1; 32], never))).collect();
        let mut patient = Box::pin(cache.answer([1; 32], async || Ok(vec![tensor(DType::Fp32, &[1])])));
        for leaver in &mut leavers {
            assert!(futures::poll!(leaver).is_pending());
        }
        assert!(futures::poll!(&mut patient).is_pending(), "the first one runs it");
        let mut answer = None;
        while answer.is_none() && !leavers.is_empty() {
            drop(leavers.remove(0));
            if let Some(next) = leavers.first_mut() {
                assert!(futures::poll!(next).is_pending(), "it runs it now");
            }
            if let Poll::Ready(ready) = futures::poll!(&mut patient) {
                answer = Some(ready);
            }
        }
        let answer = if let Some(answer) = answer { answer } else { patient.await };
        assert!(answer.is_ok());
    }

    #[tokio::test]
    async fn memory_is_bounded() {
        let cache = ResponseCache::new(64 << 10);
        for question in 0..200_u8 {
            cache.answer([question; 32], async || Ok(vec![tensor(DType::Uint8, &[1024])])).await.unwrap();
        }
        cache.answers.run_pending_tasks().await;
        let counts = cache.counts();
        assert!(counts.used <= 1.0 && counts.used > 0.5, "{counts:?}");
        assert!(counts.entries > 0 && counts.entries + counts.evictions == 200, "{counts:?}");
    }
}

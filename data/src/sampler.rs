//! Which samples, questions and flips a step uses: pure functions of the seed and the step.

use std::ops::Range;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

use crate::DataError;

/// Draws each sample once per epoch, in an order of its own for each epoch, in batches of constant size.
///
/// The epochs follow each other without a gap: a batch may hold the end of one and the beginning of the next, and no
/// sample is ever left out. There is no state; step `k` has the same samples whoever asks, and whenever.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sampler {
    len: usize,
    seed: u64,
    batch: usize,
}

impl Sampler {
    /// A sampler of `batch` samples per step, over all ranks together, from `len` samples.
    ///
    /// # Errors
    /// [`DataError::InvalidSampler`] when `len` or `batch` is 0.
    pub fn new(len: usize, seed: u64, batch: usize) -> Result<Self, DataError> {
        if len == 0 || batch == 0 {
            return Err(DataError::InvalidSampler { len, batch });
        }
        Ok(Self { len, seed, batch })
    }

    /// Samples per step, over all ranks together.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// The order of the samples in `epoch`: a permutation of `0..len`.
    pub fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.len).collect();
        shuffle(&mut order, &mut stream(Purpose::Order, self.seed, epoch, 0));
        order
    }

    /// The `batch` samples of `step`, in the order of their slots. Computes the order of the epochs that it touches: about
    /// ten nanoseconds per sample of the data set.
    pub fn indices(&self, step: u64) -> Vec<usize> {
        let len = self.len as u128;
        let first = u128::from(step) * self.batch as u128;
        let mut indices = Vec::with_capacity(self.batch);
        while indices.len() < self.batch {
            let position = first + indices.len() as u128;
            let wanted = self.batch - indices.len();
            // An epoch past 2^64 would need more steps than a u64 counts, unless a batch is larger than the data set.
            let order = self.order((position / len) as u64);
            indices.extend(order.into_iter().skip((position % len) as usize).take(wanted));
        }
        indices
    }

    /// The slots of a step's batch that rank `rank` of `ranks` data-parallel ranks works on: contiguous, disjoint, all
    /// together `0..batch`, and of equal size when `ranks` divides the batch.
    ///
    /// A sample is `indices(step)[slot]`; [`choose`] and [`flip`] take the same slot, and so do not depend on `ranks`.
    /// A rank past the last one has no slots.
    pub fn slots(&self, rank: u32, ranks: u32) -> Range<usize> {
        let bound = |rank: u32| (self.batch as u128 * u128::from(rank.min(ranks)) / u128::from(ranks.max(1))) as usize;
        bound(rank)..bound(rank.saturating_add(1))
    }
}

/// Which `wanted` of `available` questions the sample in `slot` of `step` is trained on. None comes again before all
/// have come; there are none only when `available` is 0.
pub fn choose(seed: u64, step: u64, slot: u64, available: usize, wanted: usize) -> Vec<usize> {
    let mut rng = stream(Purpose::Questions, seed, step, slot);
    let mut chosen = Vec::with_capacity(wanted);
    while available > 0 && chosen.len() < wanted {
        let mut round: Vec<usize> = (0..available).collect();
        shuffle(&mut round, &mut rng);
        chosen.extend(round.into_iter().take(wanted - chosen.len()));
    }
    chosen
}

/// Whether the image in `slot` of `step` is mirrored: one time in two.
pub fn flip(seed: u64, step: u64, slot: u64) -> bool {
    stream(Purpose::Flip, seed, step, slot).next_u32() & 1 == 1
}

/// Keeps the streams of one seed apart. The numbers are part of what a seed means: never reuse one.
#[derive(Clone, Copy)]
enum Purpose {
    Order = 0,
    Questions = 1,
    Flip = 2,
}

/// A generator of its own for each purpose, seed and pair of numbers. They are hashed, not added up: neighbouring seeds
/// and steps must not share streams.
fn stream(purpose: Purpose, seed: u64, a: u64, b: u64) -> ChaCha8Rng {
    let mut hasher = Sha256::new();
    for number in [purpose as u64, seed, a, b] {
        hasher.update(number.to_le_bytes());
    }
    ChaCha8Rng::from_seed(hasher.finalize().into())
}

/// Fisher and Yates. Written out because a library may change which permutation a seed gives, and a resumed run must not
/// notice an upgrade.
fn shuffle(items: &mut [usize], rng: &mut ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        // 64 random bits scaled to 0..=last; the bias is below 2^-32 for any data set that fits in memory.
        let pick = (u128::from(rng.next_u64()) * (last as u128 + 1)) >> 64;
        items.swap(last, pick as usize);
    }
}

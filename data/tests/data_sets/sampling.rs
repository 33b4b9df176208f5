//! What a step sees: the laws of the order, and that no step depends on ranks or on what ran before.

use std::collections::BTreeSet;

use proptest::prelude::*;
use sensorium_data::{DataError, Sampler, choose, flip};

proptest! {
    #[test]
    fn each_epoch_is_a_permutation(len in 1_usize..300, seed: u64, epoch: u64) {
        let mut order = Sampler::new(len, seed, 1).unwrap().order(epoch);
        order.sort_unstable();
        prop_assert_eq!(order, (0..len).collect::<Vec<_>>());
    }

    #[test]
    fn the_steps_go_through_the_epochs_without_a_gap(len in 1_usize..40, seed: u64, batch in 1_usize..90, steps in 1_u64..20) {
        let sampler = Sampler::new(len, seed, batch).unwrap();
        let seen: Vec<_> = (0..steps).flat_map(|step| sampler.indices(step)).collect();
        let epochs: Vec<_> = (0..).flat_map(|epoch| sampler.order(epoch)).take(seen.len()).collect();
        prop_assert_eq!(seen, epochs);
    }

    #[test]
    fn the_slices_of_all_ranks_make_the_same_batch(len in 1_usize..200, seed: u64, batch in 1_usize..70, step in 0_u64..1000) {
        let sampler = Sampler::new(len, seed, batch).unwrap();
        let whole = sampler.indices(step);
        prop_assert_eq!(whole.len(), batch);
        for ranks in [1, 2, 3, 4] {
            let slices: Vec<_> = (0..ranks).flat_map(|rank| whole[sampler.slots(rank, ranks)].to_vec()).collect();
            prop_assert_eq!(&slices, &whole);
            let sizes: BTreeSet<_> = (0..ranks).map(|rank| sampler.slots(rank, ranks).len()).collect();
            let spread = sizes.last().unwrap() - sizes.first().unwrap();
            prop_assert!(spread <= usize::from(batch % ranks as usize != 0));
        }
        prop_assert!(sampler.slots(4, 4).is_empty());
    }

    #[test]
    fn resuming_at_a_step_equals_having_run_to_it(len in 1_usize..100, seed: u64, step in 0_u64..50) {
        let ran = Sampler::new(len, seed, 8).unwrap();
        for earlier in 0..step {
            ran.indices(earlier);
        }
        prop_assert_eq!(ran.indices(step), Sampler::new(len, seed, 8).unwrap().indices(step));
    }

    #[test]
    fn no_question_is_chosen_twice_before_all_were_chosen_once(seed: u64, step: u64, slot: u64, available in 0_usize..20, wanted in 0_usize..60) {
        let chosen = choose(seed, step, slot, available, wanted);
        prop_assert_eq!(chosen.len(), if available == 0 { 0 } else { wanted });
        for round in chosen.chunks(available.max(1)) {
            let distinct: BTreeSet<_> = round.iter().collect();
            prop_assert_eq!(distinct.len(), round.len());
            prop_assert!(round.iter().all(|question| *question < available));
        }
    }

    #[test]
    fn very_late_steps_still_have_samples(len in 1_usize..100, seed: u64, step in u64::MAX - 5..) {
        let indices = Sampler::new(len, seed, 3).unwrap().indices(step);
        prop_assert!(indices.len() == 3 && indices.iter().all(|index| *index < len));
    }
}

#[test]
fn epochs_and_neighbouring_seeds_have_orders_of_their_own() {
    let orders: BTreeSet<_> =
        (0..20).flat_map(|seed| (0..20).map(move |epoch| Sampler::new(50, seed, 1).unwrap().order(epoch))).collect();
    assert_eq!(orders.len(), 400);
}

#[test]
fn every_place_of_an_order_is_equally_likely() {
    // Each count is binomial with mean 1000 and standard deviation 30; 6 of them leave 2e-9 per count.
    let mut counts = [[0_i32; 10]; 10];
    for seed in 0..10_000 {
        for (place, sample) in Sampler::new(10, seed, 1).unwrap().order(3).into_iter().enumerate() {
            counts[place][sample] += 1;
        }
    }
    assert!(counts.iter().flatten().all(|count| (count - 1000).abs() < 180), "{counts:?}");
}

#[test]
fn half_of_the_images_are_mirrored_in_every_slot_and_step() {
    let share = |flips: &mut dyn Iterator<Item = bool>| flips.filter(|flip| *flip).count();
    // Binomial, mean 5000, standard deviation 50.
    assert!((4700..5300).contains(&share(&mut (0..10_000).map(|step| flip(1, step, 0)))));
    assert!((4700..5300).contains(&share(&mut (0..10_000).map(|slot| flip(1, 0, slot)))));
    assert!((4700..5300).contains(&share(&mut (0..10_000).map(|seed| flip(seed, 0, 0)))));
}

#[test]
fn a_seed_means_the_same_in_every_version() {
    // Computed by another implementation of SHA-256, ChaCha8 and the shuffle. A change here breaks the promise that a
    // resumed run sees the data it would have seen.
    let sampler = Sampler::new(10, 42, 4).unwrap();
    assert_eq!(sampler.order(0), GOLDEN_ORDER);
    assert_eq!(choose(42, 7, 3, 6, 4), GOLDEN_QUESTIONS);
    let flips: Vec<_> = (0..8).map(|slot| flip(42, 7, slot)).collect();
    assert_eq!(flips, GOLDEN_FLIPS);
}

const GOLDEN_ORDER: [usize; 10] = [2, 3, 0, 1, 5, 9, 4, 7, 6, 8];
const GOLDEN_QUESTIONS: [usize; 4] = [3, 5, 2, 1];
const GOLDEN_FLIPS: [bool; 8] = [true, false, true, false, true, false, true, false];

#[test]
fn a_sampler_of_nothing_is_refused() {
    for (len, batch) in [(0, 1), (1, 0)] {
        let error = Sampler::new(len, 0, batch).unwrap_err();
        assert!(matches!(error, DataError::InvalidSampler { len: l, batch: b } if (l, b) == (len, batch)), "{error}");
    }
}

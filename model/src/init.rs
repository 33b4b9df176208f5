//! Starting weights: the same numbers for the same seed and name, whatever the layout of the run.

use rand::RngExt;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::network::Network;
use crate::params::{HostTensor, Init, Weights};

/// Draws all parameters of `network`. Each has a stream of its own, keyed by its name: adding a block, or splitting the
/// network over ranks, changes no other parameter.
pub fn initialise(network: &Network, seed: u64) -> Weights {
    let mut weights = Weights::new();
    for block in network.blocks() {
        for spec in block.params() {
            let name = block.full_name(spec);
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(fnv1a(&name));
            let count = spec.numel() as usize;
            let data = match spec.init {
                Init::Uniform { fan_in, gain } => {
                    let bound = (gain / (fan_in as f64).sqrt()) as f32;
                    (0..count).map(|_| rng.random_range(-bound..bound)).collect()
                }
                Init::Normal(std) => (0..count).map(|_| (normal(&mut rng) * std) as f32).collect(),
                Init::Constant(value) => vec![value as f32; count],
            };
            weights.insert(name, HostTensor { shape: spec.shape.clone(), data });
        }
    }
    weights
}

/// A standard normal number by the Box-Muller transform.
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let radius: f64 = 1.0 - rng.random::<f64>(); // in (0, 1], so that the logarithm is finite
    let angle: f64 = rng.random::<f64>() * std::f64::consts::TAU;
    (-2.0 * radius.ln()).sqrt() * angle.cos()
}

/// 64-bit FNV-1a; only spreads names over streams.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::quickstart;

    #[test]
    fn a_seed_gives_the_same_weights_whatever_else_the_network_has() {
        let small = initialise(&Network::new(quickstart()).unwrap(), 7);
        let mut config = quickstart();
        config.embedding_dim = Some(16);
        let large = initialise(&Network::new(config).unwrap(), 7);
        assert!(small.iter().all(|(name, tensor)| large[name] == *tensor));
        assert_ne!(small, initialise(&Network::new(quickstart()).unwrap(), 8));
    }

    #[test]
    fn embeddings_start_with_the_stated_spread() {
        let weights = initialise(&Network::new(quickstart()).unwrap(), 0);
        let table = &weights["text.embedding.table"].data;
        let variance = table.iter().map(|x| f64::from(x * x)).sum::<f64>() / table.len() as f64;
        assert!((variance.sqrt() - 0.1).abs() < 0.01, "{}", variance.sqrt());
    }
}

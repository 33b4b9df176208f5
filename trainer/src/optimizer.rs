//! AdamW on flat buffers, its learning-rate schedule, and gradient clipping.

use std::collections::BTreeSet;

use sensorium_api::OptimizerSpec;
use sensorium_dist::autograd::{addcdiv_, addcmul_};
use tch::Tensor;

use crate::error::TrainError;
use crate::flat::Parameters;

/// Linear warm-up to the peak, then half a cosine down to a fraction of it (Loshchilov & Hutter 2017), which is the last
/// step's.
///
/// `step` counts updates from 0; the first one already learns.
pub fn learning_rate(spec: &OptimizerSpec, step: u64, steps: u64) -> f64 {
    let done = (step + 1) as f64;
    if step < spec.warmup_steps {
        return spec.learning_rate * done / spec.warmup_steps as f64;
    }
    let span = steps.saturating_sub(spec.warmup_steps + 1).max(1) as f64;
    let at = ((step - spec.warmup_steps) as f64 / span).min(1.0);
    let floor = spec.final_learning_rate_fraction;
    spec.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * at).cos()))
}

/// AdamW (Loshchilov & Hutter 2019): decoupled weight decay on matrices and kernels only.
#[derive(Debug)]
pub struct AdamW {
    spec: OptimizerSpec,
    /// Per block: running means of the gradient and of its square.
    moments: Vec<(Tensor, Tensor)>,
    trained: BTreeSet<usize>,
}

impl AdamW {
    /// With moments of zero.
    ///
    /// * `trained`: the blocks that get gradients. The others stay as they are: decay alone would wear them down.
    pub fn new(spec: OptimizerSpec, parameters: &Parameters, trained: BTreeSet<usize>) -> Result<Self, TrainError> {
        let moments = parameters
            .blocks()
            .iter()
            .map(|block| Ok((block.values().f_zeros_like()?, block.values().f_zeros_like()?)))
            .collect::<Result<_, TrainError>>()?;
        Ok(Self { spec, moments, trained })
    }

    /// Means of the gradient and of its square, one pair per block, laid out like the block's values.
    pub fn moments(&self) -> &[(Tensor, Tensor)] {
        &self.moments
    }

    /// Scales all gradients so that their joint L2 norm is at most the limit; returns the norm before.
    pub fn clip(&self, parameters: &Parameters) -> Result<f64, TrainError> {
        let mut square = 0.0;
        for block in parameters.blocks() {
            square += block.gradient().f_dot(block.gradient())?.f_double_value(&[])?;
        }
        let norm = square.sqrt();
        if norm > self.spec.clip_norm {
            let scale = self.spec.clip_norm / (norm + 1e-6);
            for block in parameters.blocks() {
                let _ = block.gradient().shallow_clone().f_mul_scalar_(scale)?;
            }
        }
        Ok(norm)
    }

    /// One update with the gradients at hand. `step` counts updates from 0.
    pub fn step(&mut self, parameters: &Parameters, step: u64, learning_rate: f64) -> Result<(), TrainError> {
        let [beta1, beta2] = self.spec.betas;
        let updates = (step + 1) as f64;
        let correction1 = 1.0 - beta1.powf(updates);
        let correction2 = (1.0 - beta2.powf(updates)).sqrt();
        tch::no_grad(|| {
            for (at, (block, (mean, square))) in parameters.blocks().iter().zip(&self.moments).enumerate() {
                if !self.trained.contains(&at) {
                    continue;
                }
                let gradient = block.gradient();
                let decayed = block.values().f_narrow(0, 0, block.decay_len())?;
                let _ = decayed.shallow_clone().f_mul_scalar_(1.0 - learning_rate * self.spec.weight_decay)?;
                let _ = mean.shallow_clone().f_lerp_(gradient, 1.0 - beta1)?;
                let _ = square.shallow_clone().f_mul_scalar_(beta2)?;
                addcmul_(square, gradient, gradient, 1.0 - beta2)?;
                let spread = square.f_sqrt()?.f_div_scalar_(correction2)?.f_add_scalar_(self.spec.eps)?;
                addcdiv_(block.values(), mean, &spread, -learning_rate / correction1)?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use sensorium_model::{Task, initialise};

    use super::*;
    use crate::setup::tests::small;

    fn spec() -> OptimizerSpec {
        OptimizerSpec {
            learning_rate: 2e-3,
            warmup_steps: 100,
            final_learning_rate_fraction: 0.01,
            ..OptimizerSpec::default()
        }
    }

    #[test]
    fn the_learning_rate_climbs_peaks_and_ends_at_its_floor() {
        let rate = |step| learning_rate(&spec(), step, 1500);
        assert!((rate(0) - 2e-5).abs() < 1e-12);
        assert!((rate(99) - 2e-3).abs() < 1e-12);
        assert!((rate(100) - 2e-3).abs() < 1e-12);
        assert!((rate(1499) - 2e-5).abs() < 1e-12, "the last step's");
        assert!((100..1499).all(|step| rate(step + 1) < rate(step)));
    }

    #[test]
    fn a_run_shorter_than_its_warm_up_still_learns() {
        assert!(learning_rate(&spec(), 0, 10) > 0.0);
    }

    #[test]
    fn what_no_task_trains_keeps_every_bit_and_the_rest_decays() {
        let network = small();
        let parameters = Parameters::new(&network, &initialise(&network, 1)).unwrap();
        let trained: BTreeSet<usize> = network.path(Task::Contrastive).into_iter().collect();
        let before = parameters.weights().unwrap();
        let spec = OptimizerSpec { weight_decay: 0.5, ..spec() };
        let mut optimizer = AdamW::new(spec, &parameters, trained.clone()).unwrap();
        optimizer.step(&parameters, 0, 0.1).unwrap();
        let after = parameters.weights().unwrap();
        for (at, block) in network.blocks().iter().enumerate() {
            for matrix in block.params().iter().filter(|spec| spec.decays()) {
                let name = block.full_name(matrix);
                assert_eq!(after[&name] != before[&name], trained.contains(&at), "{name}");
            }
        }
        assert!(trained.len() < network.blocks().len());
    }
}

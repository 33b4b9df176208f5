//! Runs blocks one by one, forward and backward. Autograd lives inside a block only.
//!
//! Forward hands each block detached inputs and notes them on a [`Tape`]; backward walks the tape from its end, runs
//! autograd through one block at a time, and carries gradients from slot to slot by hand. What a block keeps between the
//! two is a choice of this file ([`Memory`]), not of the network: that is all there is to activation checkpointing.

use std::collections::BTreeMap;

use sensorium_dist::autograd;
use sensorium_model::{Acts, Eager, Network, Slot};
use tch::Tensor;

use crate::error::TrainError;
use crate::flat::Parameters;

/// What is kept between forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Each block's graph: fastest.
    KeepGraphs,
    /// Only each block's inputs; the block runs again in backward (activation checkpointing, Chen et al. 2016).
    Recompute,
}

/// Gradients by slot.
pub type Gradients = BTreeMap<Slot, Tensor>;

/// What forward leaves for backward.
pub struct Tape {
    steps: Vec<Step>,
}

struct Step {
    block: usize,
    /// Detached; the differentiable ones are leaves of the block's graph.
    inputs: Acts<Tensor>,
    /// Ends of the block's graph; none when it is to be run again.
    outputs: Option<Acts<Tensor>>,
}

/// Runs the blocks of a network with the parameters of this rank.
pub struct Executor<'a> {
    network: &'a Network,
    parameters: &'a Parameters,
    memory: Memory,
}

impl<'a> Executor<'a> {
    /// Of `network`, whose parameters are `parameters`.
    pub fn new(network: &'a Network, parameters: &'a Parameters, memory: Memory) -> Self {
        Self { network, parameters, memory }
    }

    /// Runs the blocks of `path` without keeping anything: the activations they leave, and `acts` that none replaced.
    pub fn infer(&self, path: &[usize], mut acts: Acts<Tensor>) -> Result<Acts<Tensor>, TrainError> {
        tch::no_grad(|| {
            for &block in path {
                let written = self.run(block, &acts)?;
                acts.extend(written);
            }
            Ok(acts)
        })
    }

    /// Runs the blocks of `path` and notes what backward needs.
    pub fn forward(&self, path: &[usize], mut acts: Acts<Tensor>) -> Result<(Acts<Tensor>, Tape), TrainError> {
        let mut steps = Vec::with_capacity(path.len());
        for &block in path {
            let inputs = self.leaves(block, &acts)?;
            let outputs = match self.memory {
                Memory::KeepGraphs => self.run(block, &inputs)?,
                Memory::Recompute => tch::no_grad(|| self.run(block, &inputs))?,
            };
            for (&slot, value) in &outputs {
                acts.insert(slot, value.f_detach()?);
            }
            let outputs = (self.memory == Memory::KeepGraphs).then_some(outputs);
            steps.push(Step { block, inputs, outputs });
        }
        Ok((acts, Tape { steps }))
    }

    /// Adds to every parameter's gradient, from the gradients of what the path left. `finished` is told each block as soon
    /// as it is done, last block first, so that its gradient can be sent while the others are computed.
    pub fn backward(
        &self,
        tape: Tape,
        mut gradients: Gradients,
        mut finished: impl FnMut(usize) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        for Step { block, inputs, outputs } in tape.steps.into_iter().rev() {
            let outputs = match outputs {
                Some(outputs) => outputs,
                None => self.run(block, &inputs)?,
            };
            let (mut ends, mut given) = (Vec::new(), Vec::new());
            for (slot, end) in outputs {
                if let Some(gradient) = gradients.remove(&slot) {
                    ends.push(end);
                    given.push(gradient);
                }
            }
            if !ends.is_empty() {
                autograd::backward(&ends, &given)?;
                for (slot, leaf) in inputs {
                    if !leaf.requires_grad() {
                        continue;
                    }
                    let gradient = leaf.f_grad()?;
                    if gradient.defined() {
                        let total = match gradients.remove(&slot) {
                            Some(other) => other.f_add(&gradient)?,
                            None => gradient,
                        };
                        gradients.insert(slot, total);
                    }
                }
            }
            finished(block)?;
        }
        Ok(())
    }

    fn run(&self, block: usize, acts: &Acts<Tensor>) -> Result<Acts<Tensor>, TrainError> {
        let params = self.parameters.blocks()[block].view();
        Ok(self.network.blocks()[block].forward(&mut Eager, params, acts)?)
    }

    /// The slots that `block` reads, cut off from what made them.
    fn leaves(&self, block: usize, acts: &Acts<Tensor>) -> Result<Acts<Tensor>, TrainError> {
        let block = &self.network.blocks()[block];
        let mut leaves = Acts::new();
        for (slot, required) in block.reads() {
            match acts.get(&slot) {
                Some(value) => {
                    let leaf = value.f_detach()?;
                    let leaf = if slot.is_differentiable() { leaf.f_set_requires_grad(true)? } else { leaf };
                    leaves.insert(slot, leaf);
                }
                None if required => {
                    return Err(TrainError::MissingInput { block: block.name().to_owned(), slot });
                }
                None => {}
            }
        }
        Ok(leaves)
    }
}

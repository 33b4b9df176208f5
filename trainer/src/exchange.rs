//! Averages gradients over the ranks while the rest of the backward pass goes on.

use sensorium_dist::{ProcessGroup, ReduceOp, Work};
use tch::Tensor;

use crate::error::TrainError;
use crate::flat::Parameters;

/// Gradients travel in parcels of at least this many bytes, but for the last: each costs a fraction of a millisecond
/// however small it is, and one that is too large starts too late to travel while others are computed.
const PARCEL_BYTES: usize = 1 << 20;

/// One step's exchange of gradients. Every rank hands in the same blocks in the same order.
pub struct Exchange<'a> {
    group: &'a ProcessGroup,
    parameters: &'a Parameters,
    /// Blocks whose gradients are whole and wait for company.
    waiting: Vec<usize>,
    waiting_bytes: usize,
    sent: Vec<Parcel>,
}

struct Parcel {
    blocks: Vec<usize>,
    content: Tensor,
    work: Work,
}

impl<'a> Exchange<'a> {
    /// Of gradients of `parameters`, among the ranks of `group`.
    pub fn new(group: &'a ProcessGroup, parameters: &'a Parameters) -> Self {
        Self { group, parameters, waiting: Vec::new(), waiting_bytes: 0, sent: Vec::new() }
    }

    /// Takes the gradient of `block`, to which nothing will be added any more.
    pub fn add(&mut self, block: usize) -> Result<(), TrainError> {
        if self.group.size() == 1 {
            return Ok(());
        }
        self.waiting.push(block);
        self.waiting_bytes += size_of::<f32>() * self.parameters.blocks()[block].gradient().numel();
        if self.waiting_bytes >= PARCEL_BYTES { self.send() } else { Ok(()) }
    }

    /// Sends what still waits, and returns when every gradient is the mean over the ranks.
    pub fn finish(mut self) -> Result<(), TrainError> {
        self.send()?;
        for Parcel { blocks, content, work } in self.sent {
            work.wait()?;
            let mut start = 0;
            for block in blocks {
                let gradient = self.parameters.blocks()[block].gradient();
                let length = gradient.size()[0];
                gradient.shallow_clone().f_copy_(&content.f_narrow(0, start, length)?)?;
                start += length;
            }
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), TrainError> {
        let blocks = std::mem::take(&mut self.waiting);
        self.waiting_bytes = 0;
        if blocks.is_empty() {
            return Ok(());
        }
        let gradients: Vec<&Tensor> = blocks.iter().map(|&block| self.parameters.blocks()[block].gradient()).collect();
        let content = Tensor::f_cat(&gradients, 0)?;
        let work = self.group.all_reduce(&content, ReduceOp::Avg)?;
        self.sent.push(Parcel { blocks, content, work });
        Ok(())
    }
}

//! Parameters as the trainer holds them: one flat buffer per block, and one for its gradient.
//!
//! Flat buffers are what gets reduced over ranks, clipped, updated and saved in one go; the tensors that a block computes
//! with are views into them, and autograd writes gradients through views into the other. Matrices and kernels come first,
//! so that weight decay is one slice of the buffer.

use sensorium_dist::autograd;
use sensorium_model::{Block, HostTensor, Network, ParamSpec, ParamView, Weights};
use tch::{Device, Kind, Tensor};

use crate::error::TrainError;

/// One block's parameters.
#[derive(Debug)]
pub struct FlatBlock {
    specs: Vec<ParamSpec>,
    names: Vec<String>,
    /// Where each parameter starts in the buffer, in the order of `specs`.
    offsets: Vec<i64>,
    decay_len: i64,
    values: Tensor,
    gradient: Tensor,
    /// Leaves of autograd that share `values`, in the order of `specs`.
    views: Vec<Tensor>,
}

impl FlatBlock {
    fn new(block: &Block, weights: &Weights) -> Result<Self, TrainError> {
        let specs = block.params().to_vec();
        let mut order: Vec<usize> = (0..specs.len()).collect();
        order.sort_by_key(|&at| !specs[at].decays()); // stable: declaration order within each half
        let mut offsets = vec![0; specs.len()];
        let (mut end, mut decay_len) = (0, 0);
        for at in order {
            offsets[at] = end;
            end += specs[at].numel();
            if specs[at].decays() {
                decay_len = end;
            }
        }
        let options = (Kind::Float, Device::Cpu);
        let values = Tensor::f_zeros([end], options)?;
        let gradient = Tensor::f_zeros([end], options)?;
        let names: Vec<String> = specs.iter().map(|spec| block.full_name(spec)).collect();
        let mut views = Vec::with_capacity(specs.len());
        for ((spec, name), &offset) in specs.iter().zip(&names).zip(&offsets) {
            let HostTensor { shape, data } =
                weights.get(name).ok_or_else(|| TrainError::MissingParameter { name: name.clone() })?;
            if *shape != spec.shape {
                let (found, expected) = (shape.clone(), spec.shape.clone());
                return Err(TrainError::ParameterShape { name: name.clone(), found, expected });
            }
            let mut view = values.f_narrow(0, offset, spec.numel())?.f_view(spec.shape.as_slice())?;
            view.f_copy_(&Tensor::f_from_slice(data)?.f_view(shape.as_slice())?)?;
            let view = view.f_detach()?.f_set_requires_grad(true)?;
            autograd::set_grad(&view, &gradient.f_narrow(0, offset, spec.numel())?.f_view(spec.shape.as_slice())?)?;
            views.push(view);
        }
        Ok(Self { specs, names, offsets, decay_len, values, gradient, views })
    }

    /// The parameters for [`Block::forward`].
    pub fn view(&self) -> ParamView<'_, Tensor> {
        ParamView::new(&self.specs, &self.views)
    }

    /// All values, `[n]`.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// The gradient of all values, `[n]`.
    pub fn gradient(&self) -> &Tensor {
        &self.gradient
    }

    /// How many values, from the start, weight decay applies to.
    pub fn decay_len(&self) -> i64 {
        self.decay_len
    }

    /// Cuts a buffer that is laid out like the values into named tensors on the host.
    pub fn unflatten(&self, buffer: &Tensor, into: &mut Weights) -> Result<(), TrainError> {
        for ((spec, name), &offset) in self.specs.iter().zip(&self.names).zip(&self.offsets) {
            let data = Vec::<f32>::try_from(buffer.f_narrow(0, offset, spec.numel())?)?;
            into.insert(name.clone(), HostTensor { shape: spec.shape.clone(), data });
        }
        Ok(())
    }

    /// The reverse of [`FlatBlock::unflatten`]: fills `buffer` from named tensors.
    pub fn fill(&self, buffer: &Tensor, from: &Weights) -> Result<(), TrainError> {
        for ((spec, name), &offset) in self.specs.iter().zip(&self.names).zip(&self.offsets) {
            let host = from.get(name).ok_or_else(|| TrainError::MissingParameter { name: name.clone() })?;
            if host.shape != spec.shape {
                let (found, expected) = (host.shape.clone(), spec.shape.clone());
                return Err(TrainError::ParameterShape { name: name.clone(), found, expected });
            }
            let source = Tensor::f_from_slice(&host.data)?;
            tch::no_grad(|| buffer.f_narrow(0, offset, spec.numel())?.f_copy_(&source))?;
        }
        Ok(())
    }
}

/// All blocks' parameters, in the order of the network.
#[derive(Debug)]
pub struct Parameters {
    blocks: Vec<FlatBlock>,
}

impl Parameters {
    /// Lays out `network`'s parameters and fills them from `weights`.
    ///
    /// # Errors
    /// When a parameter is missing or has another shape.
    pub fn new(network: &Network, weights: &Weights) -> Result<Self, TrainError> {
        let blocks = network.blocks().iter().map(|block| FlatBlock::new(block, weights)).collect::<Result<_, _>>()?;
        Ok(Self { blocks })
    }

    /// One entry per block of the network.
    pub fn blocks(&self) -> &[FlatBlock] {
        &self.blocks
    }

    /// Sets every gradient to zero.
    pub fn zero_gradients(&self) -> Result<(), TrainError> {
        for block in &self.blocks {
            let _ = block.gradient.shallow_clone().f_zero_()?;
        }
        Ok(())
    }

    /// All values by name, on the host.
    pub fn weights(&self) -> Result<Weights, TrainError> {
        let mut weights = Weights::new();
        for block in &self.blocks {
            block.unflatten(&block.values, &mut weights)?;
        }
        Ok(weights)
    }
}

//! How the tensors that clients send and get map to those of the graph. Pure.

use sensorium_engine::{RawTensor, RawTensorError};

use super::Ragged;

/// Which tensor of a request goes where, and in which shape.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Binding {
    /// For each input of the graph, the input of the interface that it takes; `None` for one that the server fills.
    pub(crate) inputs: Vec<Option<Bound>>,
    /// For each output of the interface, the output of the graph that it is.
    pub(crate) outputs: Vec<Bound>,
    /// What lies one request behind the other.
    pub(crate) ragged: Ragged,
}

/// The other side of one tensor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bound {
    /// Its index there.
    pub(crate) index: usize,
    /// The shape it has to get on the way, where that is another.
    pub(crate) reshape: Option<Reshape>,
}

/// Another shape for the same elements; the batch axis, where there is one, stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reshape {
    /// Axes before those that change: 1 for the batch, or 0.
    pub(crate) kept: usize,
    /// Sizes as they come, -1 for those a request decides.
    pub(crate) from: Vec<i64>,
    /// Sizes as they go; the n-th -1 here is the n-th of `from`.
    pub(crate) to: Vec<i64>,
}

impl Reshape {
    fn apply(&self, tensor: RawTensor) -> Result<RawTensor, RawTensorError> {
        let (kept, sizes) = tensor.shape().split_at(self.kept.min(tensor.shape().len()));
        let mut chosen = self.from.iter().zip(sizes).filter(|(from, _)| **from < 0).map(|(_, size)| *size);
        let to = self.to.iter().map(|&size| if size < 0 { chosen.next().unwrap_or(1) } else { size });
        let shape = kept.iter().copied().chain(to).collect();
        tensor.reshaped(shape)
    }
}

impl Binding {
    /// Each input and output of the graph as it is.
    pub(crate) fn identity(inputs: usize, outputs: usize) -> Self {
        let same = |index| Bound { index, reshape: None };
        Self {
            inputs: (0..inputs).map(|index| Some(same(index))).collect(),
            outputs: (0..outputs).map(same).collect(),
            ragged: Ragged::default(),
        }
    }

    /// The inputs of a request as the graph takes them, and the graph's indices of the outputs that it wants; inputs that
    /// the server fills are `None`.
    ///
    /// # Errors
    /// A shape that cannot be changed, which configurations that were checked do not ask for.
    pub(super) fn bind(
        &self,
        inputs: Vec<RawTensor>,
        wanted: &[usize],
    ) -> Result<(Vec<Option<RawTensor>>, Vec<usize>), RawTensorError> {
        let mut given: Vec<Option<RawTensor>> = inputs.into_iter().map(Some).collect();
        let input = |bound: &Option<Bound>| {
            let Some(bound) = bound else { return Ok(None) };
            let tensor = given.get_mut(bound.index).and_then(Option::take);
            match (tensor, &bound.reshape) {
                (Some(tensor), Some(reshape)) => reshape.apply(tensor).map(Some),
                (tensor, _) => Ok(tensor),
            }
        };
        let inputs = self.inputs.iter().map(input).collect::<Result<_, _>>()?;
        Ok((inputs, wanted.iter().map(|&output| self.outputs[output].index).collect()))
    }

    /// Gives tensors that are in the order of the graph, and in the shapes of clients, the shapes of the graph.
    ///
    /// # Errors
    /// As [`Binding::bind`].
    pub(crate) fn shape(&self, inputs: &mut [RawTensor]) -> Result<(), RawTensorError> {
        for (tensor, bound) in inputs.iter_mut().zip(&self.inputs) {
            if let Some(Bound { reshape: Some(reshape), .. }) = bound {
                *tensor = reshape.apply(tensor.clone())?;
            }
        }
        Ok(())
    }

    /// The graph's outputs as clients get them; `wanted` are indices of the interface's outputs.
    ///
    /// # Errors
    /// As [`Binding::bind`].
    pub(super) fn unbind(&self, wanted: &[usize], found: Vec<RawTensor>) -> Result<Vec<RawTensor>, RawTensorError> {
        let output = |(&output, tensor): (&usize, RawTensor)| match &self.outputs[output].reshape {
            Some(reshape) => reshape.apply(tensor),
            None => Ok(tensor),
        };
        wanted.iter().zip(found).map(output).collect()
    }
}

#[cfg(test)]
mod tests {
    use sensorium_engine::DType;

    use super::*;

    #[test]
    fn a_reshape_keeps_the_batch_and_carries_sizes_that_the_request_decides() {
        let reshape = Reshape { kept: 1, from: vec![1, -1], to: vec![-1] };
        let tensor = RawTensor::zeros(DType::Fp32, vec![2, 1, 5]).unwrap();
        assert_eq!(reshape.apply(tensor).unwrap().shape(), [2, 5]);
        let to_scalar = Reshape { kept: 0, from: vec![1], to: vec![] };
        assert_eq!(to_scalar.apply(RawTensor::zeros(DType::Fp32, vec![1]).unwrap()).unwrap().shape(), [0_i64; 0]);
    }
}

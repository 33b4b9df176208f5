//! A request, held against what a model takes and gives. Pure.

use sensorium_artifact::TensorSpec;
use sensorium_engine::{RawTensor, dtype_name};

use super::NamedTensor;
use crate::wire::{InvalidRequest, excerpt};

/// What clients see of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// What it takes, in the order of its configuration; the batch axis, where it has one, is the first of each.
    pub inputs: Vec<TensorSpec>,
    /// What it gives.
    pub outputs: Vec<TensorSpec>,
    /// Rows of a request at most; `None` for a model whose tensors have no batch axis.
    pub max_rows: Option<usize>,
}

/// A request that fits.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    /// In the order of [`Interface::inputs`].
    pub inputs: Vec<RawTensor>,
    /// Size of the batch axis; 1 without one.
    pub rows: usize,
    /// Indices into [`Interface::outputs`].
    pub outputs: Vec<usize>,
}

impl Interface {
    /// Orders a request's tensors as the model takes them.
    ///
    /// # Errors
    /// [`InvalidRequest`] for the first thing that does not fit.
    pub fn fit<'a>(&'a self, inputs: Vec<NamedTensor>, outputs: &[String]) -> Result<Fitted, InvalidRequest> {
        let outputs = self.outputs_wanted(outputs)?;
        // Bounded by the model: an input that is not its own, or comes twice, ends the loop.
        let mut slots: Vec<Option<RawTensor>> = vec![None; self.inputs.len()];
        for NamedTensor { name, tensor } in inputs {
            let Some(index) = self.inputs.iter().position(|spec| spec.name == name) else {
                let expected = self.inputs.iter().map(|spec| spec.name.clone()).collect();
                return Err(InvalidRequest::UnknownInput { input: excerpt(&name), expected });
            };
            if slots[index].is_some() {
                return Err(InvalidRequest::DuplicateInput { input: name });
            }
            let tensor = number(&self.inputs[index], tensor);
            check(&self.inputs[index], &tensor, self.max_rows.is_some())?;
            slots[index] = Some(tensor);
        }
        let mut first: Option<(&'a str, usize)> = None;
        let take = |(slot, spec): (Option<RawTensor>, &'a TensorSpec)| {
            let tensor = slot.ok_or_else(|| InvalidRequest::MissingInput {
                input: spec.name.clone(),
                datatype: dtype_name(spec.dtype),
                shape: shape_text(spec),
            })?;
            if self.max_rows.is_some() {
                let rows = tensor.row_count().unwrap_or(1);
                let (other, other_rows) = *first.get_or_insert((&spec.name, rows));
                if rows != other_rows {
                    let (input, other) = (spec.name.clone(), other.to_owned());
                    return Err(InvalidRequest::UnequalRows { input, rows, other, other_rows });
                }
            }
            Ok(tensor)
        };
        let inputs = slots.into_iter().zip(&self.inputs).map(take).collect::<Result<_, _>>()?;
        let rows = first.map_or(1, |(_, rows)| rows);
        match self.max_rows {
            Some(max) if rows > max => Err(InvalidRequest::TooManyRows { rows, max }),
            _ => Ok(Fitted { inputs, rows, outputs }),
        }
    }

    /// The outputs to return, in the order of the request; all of the model's when it names none.
    fn outputs_wanted(&self, requested: &[String]) -> Result<Vec<usize>, InvalidRequest> {
        if requested.is_empty() {
            return Ok((0..self.outputs.len()).collect());
        }
        let mut wanted: Vec<usize> = Vec::with_capacity(self.outputs.len());
        for output in requested {
            let Some(index) = self.outputs.iter().position(|spec| spec.name == *output) else {
                let expected = self.outputs.iter().map(|spec| spec.name.clone()).collect();
                return Err(InvalidRequest::UnknownOutput { output: excerpt(output), expected });
            };
            if wanted.contains(&index) {
                return Err(InvalidRequest::DuplicateOutput { output: output.clone() });
            }
            wanted.push(index);
        }
        Ok(wanted)
    }
}

/// A number for each row, or one alone, may come with or without the size of 1 that says so.
fn number(spec: &TensorSpec, tensor: RawTensor) -> RawTensor {
    let (wanted, found) = (spec.shape.len(), tensor.shape().len());
    if found + 1 != wanted || wanted > 2 || spec.shape.last() != Some(&Some(1)) {
        return tensor;
    }
    let shape = tensor.shape().iter().copied().chain([1]).collect();
    // The same elements.
    tensor.clone().reshaped(shape).unwrap_or(tensor)
}

/// A size the request decides may be anything, but that of the batch is not zero: nothing would answer.
fn check(spec: &TensorSpec, tensor: &RawTensor, is_batched: bool) -> Result<(), InvalidRequest> {
    if tensor.dtype() != spec.dtype {
        let (found, expected) = (dtype_name(tensor.dtype()).to_owned(), dtype_name(spec.dtype));
        return Err(InvalidRequest::Datatype { input: spec.name.clone(), found, expected });
    }
    let fits = |(&size, expected): (&i64, &Option<u64>)| {
        size >= 0 && expected.is_none_or(|expected| u64::try_from(size) == Ok(expected))
    };
    let has_rows = !is_batched || tensor.shape().first().is_none_or(|rows| *rows > 0);
    let found = tensor.shape();
    if !has_rows || found.len() != spec.shape.len() || !found.iter().zip(&spec.shape).all(fits) {
        let input = spec.name.clone();
        // More dimensions than any model has would only make the message long.
        let found = found.iter().copied().take(16).collect();
        return Err(InvalidRequest::Shape { input, found, expected: shape_text(spec) });
    }
    Ok(())
}

/// A model's shape as messages show it: `[-1, 3, 64, 64]`.
fn shape_text(spec: &TensorSpec) -> String {
    let sizes: Vec<_> =
        spec.shape.iter().map(|size| size.map_or_else(|| "-1".to_owned(), |size| size.to_string())).collect();
    format!("[{}]", sizes.join(", "))
}

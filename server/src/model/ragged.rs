//! Requests of unequal length that lie one behind the other in a batch, without padding, and what the server tells a
//! model about where each of them begins: `allow_ragged_batch`, `batch_input` and `batch_output` of a configuration. Pure.
//!
//! A request is made complete here as a batch of its own, so that whoever joins several needs to know nothing but how
//! each input continues.

use std::collections::BTreeMap;

use sensorium_engine::{DType, RawTensor, RawTensorError, Signature};
use sensorium_proto::inference::{
    BatchInput, DataType, ModelConfig, batch_input::Kind, model_config::SchedulingChoice,
};

use super::Interface;
use crate::scheduler::{Join, write_counts};

/// Which tensors of a graph are put together like that.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ragged {
    /// Inputs that lie one behind the other, by their index in the graph, with the axes that they have there.
    flat: BTreeMap<usize, usize>,
    made: Vec<Made>,
    scattered: Vec<Scattered>,
}

/// An input of the graph that the server makes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Made {
    input: usize,
    kind: Kind,
    dtype: DType,
    /// The input of the graph that it speaks of.
    source: usize,
}

/// An output of the graph that is taken apart as an input was put together.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Scattered {
    output: usize,
    /// Without the batch; -1 for the size that the source has there.
    dims: Vec<i64>,
    source: usize,
}

/// A request with what its graph takes beside what it brought.
#[derive(Debug)]
pub(crate) struct Completed {
    pub(crate) inputs: Vec<RawTensor>,
    /// The shape that it gets of each output that is taken apart, with the output's index.
    pub(crate) scattered: Vec<(usize, Vec<i64>)>,
}

impl Ragged {
    /// What a configuration says, whose inputs and outputs fit the graph.
    ///
    /// # Errors
    /// The first option that makes no sense, as a sentence about the model.
    pub(crate) fn new(config: &ModelConfig, signature: &Signature) -> Result<Self, String> {
        let mut ragged = Self::default();
        for input in config.input.iter().filter(|input| input.allow_ragged_batch) {
            if config.max_batch_size == 0 {
                return Err(format!("input `{}` has allow_ragged_batch, which needs max_batch_size", input.name));
            }
            if matches!(config.scheduling_choice, Some(SchedulingChoice::SequenceBatching(_))) {
                return Err(format!("input `{}` has allow_ragged_batch, which no sequence can have", input.name));
            }
            let index =
                position(signature, &input.name).ok_or_else(|| format!("its file has no input `{}`", input.name))?;
            ragged.flat.insert(index, signature.inputs()[index].shape.len());
        }
        if config.max_batch_size == 0 && !(config.batch_input.is_empty() && config.batch_output.is_empty()) {
            return Err("it has a batch_input or batch_output, which need max_batch_size".to_owned());
        }
        for input in &config.batch_input {
            ragged.made.extend(made(input, config, signature)?);
        }
        for output in &config.batch_output {
            let source = source("batch_output", &output.source_input, config, signature)?;
            for name in &output.target_name {
                let known = signature.outputs().iter().position(|spec| spec.name == *name);
                let index = known.ok_or_else(|| format!("its batch_output names `{name}`, which its file has not"))?;
                // One that clients do not see has no shape for them.
                let Some(seen) = config.output.iter().find(|output| output.name == *name) else { continue };
                let axes = config.input.iter().find(|input| input.name == signature.inputs()[source].name);
                let axes = axes.map_or(0, |input| input.dims.len());
                if seen.dims.iter().rposition(|size| *size < 0).is_some_and(|axis| axis >= axes) {
                    return Err(format!(
                        "its batch_output `{name}` leaves a size open that its source_input has not: {:?}",
                        seen.dims
                    ));
                }
                ragged.scattered.push(Scattered { output: index, dims: seen.dims.clone(), source });
            }
        }
        Ok(ragged)
    }

    /// How inputs of several requests become one, by their index in the graph.
    pub(crate) fn joins(&self) -> BTreeMap<usize, Join> {
        let join = |kind| match kind {
            Kind::BatchElementCount | Kind::BatchItemShape | Kind::BatchItemShapeFlatten => Join::Listed,
            Kind::BatchAccumulatedElementCount => Join::Summed { with_zero: false },
            Kind::BatchAccumulatedElementCountWithZero => Join::Summed { with_zero: true },
            Kind::BatchMaxElementCountAsShape => Join::Longest,
        };
        let flat = self.flat.keys().map(|input| (*input, Join::Flat));
        flat.chain(self.made.iter().map(|made| (made.input, join(made.kind)))).collect()
    }

    /// A request by itself with all inputs of the graph.
    ///
    /// # Errors
    /// Elements that are not those of the shape, which requests that were checked do not have.
    pub(crate) fn complete(&self, mut inputs: Vec<Option<RawTensor>>) -> Result<Completed, RawTensorError> {
        let shapes: BTreeMap<usize, Vec<i64>> = self
            .made
            .iter()
            .map(|made| made.source)
            .chain(self.scattered.iter().map(|scattered| scattered.source))
            .filter_map(|source| Some((source, inputs.get(source)?.as_ref()?.shape().to_vec())))
            .collect();
        let shape = |source: usize| shapes.get(&source).map_or(&[][..], Vec::as_slice);
        for made in &self.made {
            if let Some(place) = inputs.get_mut(made.input) {
                *place = Some(made.tensor(shape(made.source))?);
            }
        }
        for (input, axes) in &self.flat {
            let Some(place) = inputs.get_mut(*input) else { continue };
            if let Some(tensor) = place.take() {
                *place = Some(flattened(tensor, *axes)?);
            }
        }
        let scattered = self.scattered.iter().map(|scattered| {
            let (rows, sizes) = shape(scattered.source).split_first().unwrap_or((&1, &[]));
            let own = |(axis, size): (usize, &i64)| {
                if *size < 0 { sizes.get(axis).copied().unwrap_or(1) } else { *size }
            };
            (scattered.output, std::iter::once(*rows).chain(scattered.dims.iter().enumerate().map(own)).collect())
        });
        let scattered = scattered.collect();
        #[expect(
            clippy::filter_map_identity,
            reason = "unlike `flatten`, it stays in the memory of what it is made of"
        )]
        let inputs = inputs.into_iter().filter_map(|input| input).collect();
        Ok(Completed { inputs, scattered })
    }

    /// A request of zeros, as far as that can be guessed; `None` where nothing is made of others, and zeros of any kind do.
    pub(crate) fn sample(&self, interface: &Interface, signature: &Signature) -> Option<Vec<RawTensor>> {
        if self.made.is_empty() && self.flat.is_empty() {
            return None;
        }
        let input = |spec: &sensorium_artifact::TensorSpec| {
            let seen = interface.inputs.iter().find(|seen| seen.name == spec.name)?;
            RawTensor::smallest(seen, 1).ok()
        };
        self.complete(signature.inputs().iter().map(input).collect()).ok().map(|completed| completed.inputs)
    }
}

impl Made {
    /// What it says of a request whose source has this shape: that of a tensor, so that no product of its sizes overflows, and
    /// with no more rows than the model takes.
    fn tensor(&self, shape: &[i64]) -> Result<RawTensor, RawTensorError> {
        let count = shape.iter().product::<i64>();
        let (rows, sizes) = shape.split_first().unwrap_or((&1, &[]));
        let items = || sizes.repeat(usize::try_from(*rows).unwrap_or(0));
        match self.kind {
            Kind::BatchElementCount | Kind::BatchAccumulatedElementCount => write_counts(self.dtype, vec![1], &[count]),
            Kind::BatchAccumulatedElementCountWithZero => write_counts(self.dtype, vec![2], &[0, count]),
            Kind::BatchMaxElementCountAsShape => RawTensor::zeros(self.dtype, vec![count]),
            Kind::BatchItemShape => write_counts(self.dtype, vec![*rows, sizes.len() as i64], &items()),
            Kind::BatchItemShapeFlatten => write_counts(self.dtype, vec![rows * sizes.len() as i64], &items()),
        }
    }
}

/// The same elements without the batch axis, in `axes` axes, which are one or those behind the batch.
fn flattened(tensor: RawTensor, axes: usize) -> Result<RawTensor, RawTensorError> {
    let shape = match tensor.shape() {
        [rows, first, tail @ ..] if axes == tail.len() + 1 => {
            std::iter::once(rows * first).chain(tail.iter().copied()).collect()
        }
        _ => vec![tensor.len() as i64],
    };
    tensor.reshaped(shape)
}

fn position(signature: &Signature, name: &str) -> Option<usize> {
    signature.inputs().iter().position(|spec| spec.name == name)
}

/// The one input of clients that a `batch_input` or `batch_output` speaks of.
fn source(kind: &str, names: &[String], config: &ModelConfig, signature: &Signature) -> Result<usize, String> {
    let [name] = names else {
        return Err(format!("its {kind} has {} source_inputs, it must have one", names.len()));
    };
    let is_input = config.input.iter().any(|input| input.name == *name);
    position(signature, name)
        .filter(|_| is_input)
        .ok_or_else(|| format!("its {kind} has source_input `{name}`, which is no input of its configuration"))
}

fn made(input: &BatchInput, config: &ModelConfig, signature: &Signature) -> Result<Vec<Made>, String> {
    let source = source("batch_input", &input.source_input, config, signature)?;
    let kind =
        Kind::try_from(input.kind).map_err(|_| format!("its batch_input has kind {}, which is none", input.kind))?;
    let one = |name: &String| {
        let index = position(signature, name).filter(|index| *index != source);
        let index = index.ok_or_else(|| format!("its batch_input names `{name}`, which is no input of its file"))?;
        if config.input.iter().any(|input| input.name == *name) {
            return Err(format!("its configuration has `{name}` as an input and as a batch_input, which contradict"));
        }
        let dtype = signature.inputs()[index].dtype;
        if !matches!(dtype, DType::Int32 | DType::Int64 | DType::Fp32) {
            let dtype = sensorium_engine::dtype_name(dtype);
            return Err(format!("its batch_input `{name}` is {dtype} in its file, it must be INT32, INT64 or FP32"));
        }
        let axes = if kind == Kind::BatchItemShape { 2 } else { 1 };
        let written = DataType::try_from(input.data_type).unwrap_or_default();
        let wanted = match dtype {
            DType::Int32 => DataType::TypeInt32,
            DType::Int64 => DataType::TypeInt64,
            _ => DataType::TypeFp32,
        };
        if written != wanted && written != DataType::TypeInvalid {
            return Err(format!(
                "its batch_input `{name}` is {} in its configuration and {} in its file",
                written.as_str_name(),
                wanted.as_str_name()
            ));
        }
        let found = signature.inputs()[index].shape.len();
        if found != axes {
            return Err(format!("its batch_input `{name}` has {found} axes in its file, its kind has {axes}"));
        }
        Ok(Made { input: index, kind, dtype, source })
    };
    input.target_name.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use sensorium_artifact::TensorSpec;
    use sensorium_proto::inference::{BatchOutput, ModelInput, ModelOutput};

    use super::*;

    fn spec(name: &str, dtype: DType, shape: &[Option<u64>]) -> TensorSpec {
        TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    fn input(name: &str, dims: &[i64]) -> ModelInput {
        ModelInput { name: name.to_owned(), dims: dims.to_vec(), allow_ragged_batch: true, ..ModelInput::default() }
    }

    #[test]
    fn sizes_beside_a_0_do_not_overflow() {
        let source = RawTensor::zeros(DType::Fp32, vec![2, 1 << 59, 0]).unwrap();
        let made = |kind| Made { input: 0, kind, dtype: DType::Int64, source: 0 }.tensor(source.shape()).unwrap();
        assert_eq!(*made(Kind::BatchElementCount).numbers::<i64>(), [0]);
        assert_eq!(*made(Kind::BatchItemShape).numbers::<i64>(), [1 << 59, 0, 1 << 59, 0]);
        assert_eq!(flattened(source.clone(), 2).unwrap().shape(), [1 << 60, 0]);
        assert_eq!(flattened(source, 1).unwrap().shape(), [0]);
    }

    #[test]
    fn a_request_is_made_complete_by_what_is_said_of_it() {
        let signature = Signature::of_manifest(
            &[
                spec("x", DType::Fp32, &[None, Some(2)]),
                spec("shape", DType::Int64, &[None, None]),
                spec("ends", DType::Int32, &[None]),
            ],
            &[spec("y", DType::Fp32, &[None])],
        );
        let made = |name: &str, kind: Kind| BatchInput {
            kind: kind.into(),
            target_name: vec![name.to_owned()],
            source_input: vec!["x".to_owned()],
            ..BatchInput::default()
        };
        let scattered = BatchOutput {
            target_name: vec!["y".to_owned()],
            source_input: vec!["x".to_owned()],
            ..BatchOutput::default()
        };
        let config = ModelConfig {
            max_batch_size: 4,
            input: vec![input("x", &[-1, 2])],
            output: vec![ModelOutput { name: "y".to_owned(), dims: vec![-1], ..ModelOutput::default() }],
            batch_input: vec![
                made("shape", Kind::BatchItemShape),
                made("ends", Kind::BatchAccumulatedElementCountWithZero),
            ],
            batch_output: vec![scattered],
            ..ModelConfig::default()
        };
        let ragged = Ragged::new(&config, &signature).unwrap();
        let x = RawTensor::zeros(DType::Fp32, vec![2, 3, 2]).unwrap();
        let Completed { inputs, scattered } = ragged.complete(vec![Some(x), None, None]).unwrap();
        assert_eq!(inputs[0].shape(), [6, 2]);
        assert_eq!(inputs[1], RawTensor::from_vec(DType::Int64, vec![2, 2], vec![3_i64, 2, 3, 2]).unwrap());
        assert_eq!(inputs[2], RawTensor::from_vec(DType::Int32, vec![2], vec![0_i32, 12]).unwrap());
        assert_eq!(scattered, [(0, vec![2, 3])]);
        assert!(signature.validate(&inputs).is_ok());
        let all: Vec<Join> = ragged.joins().into_values().collect();
        assert_eq!(all, [Join::Flat, Join::Listed, Join::Summed { with_zero: true }]);
    }
}

//! The inputs of a graph that the server fills: a sequence's controls and state.

use std::path::Path;

use sensorium_artifact::{DType, TensorSpec};
use sensorium_engine::{RawTensor, Signature, dtype_name, smallest_shape};
use sensorium_proto::inference::{
    ModelSequenceBatching,
    model_sequence_batching::{Control, InitialState, State, control::Kind, initial_state::StateData},
};

use super::SequenceError;
use crate::{
    files::{self, inside},
    model::{Sequence, SequenceId},
};

/// What each input of the graph that is not a client's gets.
#[derive(Debug)]
pub(super) struct Fills {
    /// By input of the graph; `None` for a client's.
    by_input: Vec<Option<Fill>>,
    /// The state of a sequence that begins.
    pub(super) initial: Vec<RawTensor>,
    /// Outputs of the graph that are state, in the order of `initial`.
    pub(super) state_outputs: Vec<usize>,
}

#[derive(Debug)]
enum Fill {
    /// Whether this is the first request; the values for no and yes.
    Start([RawTensor; 2]),
    End([RawTensor; 2]),
    /// Whether there is a request in the row; the values for no and yes.
    Ready([RawTensor; 2]),
    /// The sequence's id.
    Id(DType, Vec<i64>),
    /// This part of the state.
    State(usize),
}

impl Fills {
    pub(super) fn new(
        config: &ModelSequenceBatching,
        signature: &Signature,
        batches: bool,
        folder: &Path,
    ) -> Result<Self, String> {
        let mut fills = Self {
            by_input: (0..signature.inputs().len()).map(|_| None).collect(),
            initial: Vec::new(),
            state_outputs: Vec::new(),
        };
        for input in &config.control_input {
            let index = position("control_input", &input.name, signature.inputs())?;
            let [control] = input.control.as_slice() else {
                return Err(format!(
                    "its control_input `{}` has {} controls, it needs one",
                    input.name,
                    input.control.len()
                ));
            };
            fills.by_input[index] = Some(control_fill(control, &signature.inputs()[index])?);
        }
        for state in &config.state {
            let input = position("state input_name", &state.input_name, signature.inputs())?;
            let output = position("state output_name", &state.output_name, signature.outputs())?;
            let (taken, given) = (&signature.inputs()[input], &signature.outputs()[output]);
            if taken.dtype != given.dtype {
                return Err(format!(
                    "its state goes from output `{}`, {}, to input `{}`, {}; they must be of one type",
                    given.name,
                    dtype_name(given.dtype),
                    taken.name,
                    dtype_name(taken.dtype)
                ));
            }
            fills.by_input[input] = Some(Fill::State(fills.initial.len()));
            fills.initial.push(initial(state, taken, batches, folder)?);
            fills.state_outputs.push(output);
        }
        Ok(fills)
    }

    /// Whether the model can take such an id.
    pub(super) fn check_id(&self, model: &str, id: &SequenceId) -> Result<(), SequenceError> {
        let takes_numbers =
            self.by_input.iter().any(|fill| matches!(fill, Some(Fill::Id(dtype, _)) if *dtype != DType::Bytes));
        match id {
            SequenceId::Number(0) => Err(SequenceError::NoId { model: model.to_owned() }),
            SequenceId::Text(text) if text.is_empty() => Err(SequenceError::NoId { model: model.to_owned() }),
            SequenceId::Text(_) if takes_numbers => Err(SequenceError::TextId { model: model.to_owned() }),
            SequenceId::Number(_) | SequenceId::Text(_) => Ok(()),
        }
    }

    /// For each input of the graph, the row of a seat of which nothing came; `None` for zeros.
    pub(super) fn empty(&self) -> Vec<Option<RawTensor>> {
        let empty = |fill: &Option<Fill>| match fill {
            Some(Fill::Start([no, _]) | Fill::End([no, _]) | Fill::Ready([no, _])) => Some(no.clone()),
            Some(Fill::State(index)) => self.initial.get(*index).cloned(),
            Some(Fill::Id(..)) | None => None,
        };
        self.by_input.iter().map(empty).collect()
    }

    /// Whether the graph is told which rows have a request.
    pub(super) fn has_ready(&self) -> bool {
        self.by_input.iter().any(|fill| matches!(fill, Some(Fill::Ready(_))))
    }

    /// The graph's inputs, complete.
    pub(super) fn fill(
        &self,
        inputs: Vec<Option<RawTensor>>,
        sequence: &Sequence,
        state: &[RawTensor],
    ) -> Vec<RawTensor> {
        let whole = |(given, fill): (Option<RawTensor>, &Option<Fill>)| match fill {
            None => given,
            Some(Fill::Start(values)) => Some(values[usize::from(sequence.start)].clone()),
            Some(Fill::End(values)) => Some(values[usize::from(sequence.end)].clone()),
            Some(Fill::Ready([_, yes])) => Some(yes.clone()),
            Some(Fill::Id(dtype, shape)) => id_tensor(*dtype, shape, &sequence.id),
            Some(Fill::State(index)) => state.get(*index).cloned(),
        };
        inputs.into_iter().zip(&self.by_input).filter_map(whole).collect()
    }
}

fn position(what: &str, name: &str, specs: &[TensorSpec]) -> Result<usize, String> {
    specs.iter().position(|spec| spec.name == name).ok_or_else(|| {
        let known: Vec<_> = specs.iter().map(|spec| spec.name.as_str()).collect();
        format!("its sequence_batching has {what} `{name}`, which its file has not; there it has {}", known.join(", "))
    })
}

fn control_fill(control: &Control, spec: &TensorSpec) -> Result<Fill, String> {
    let unfit = |reason: &str| format!("its control_input `{}` {reason}", spec.name);
    if control.kind() == Kind::ControlSequenceCorrid {
        return match spec.dtype {
            DType::Uint64 | DType::Int64 | DType::Uint32 | DType::Int32 | DType::Bytes => {
                Ok(Fill::Id(spec.dtype, smallest_shape(spec)))
            }
            other => Err(unfit(&format!("is {} in its file, which holds no correlation ID", dtype_name(other)))),
        };
    }
    let bytes: [Vec<u8>; 2] =
        match (spec.dtype, &*control.int32_false_true, &*control.fp32_false_true, &*control.bool_false_true) {
            (DType::Int32, [no, yes], [], []) => [no, yes].map(|value| value.to_le_bytes().to_vec()),
            (DType::Fp32, [], [no, yes], []) => [no, yes].map(|value| value.to_le_bytes().to_vec()),
            (DType::Bool, [], [], [no, yes]) => [no, yes].map(|value| vec![u8::from(*value)]),
            (dtype, ..) => {
                return Err(unfit(&format!(
                    "needs two values of {}, the type that it has in its file: int32_false_true, fp32_false_true or \
                 bool_false_true",
                    dtype_name(dtype)
                )));
            }
        };
    let tensor = |bytes: Vec<u8>| {
        let tensor = RawTensor::new(spec.dtype, smallest_shape(spec), bytes.into());
        tensor.map_err(|error| unfit(&format!("takes no single value: {error}")))
    };
    let [no, yes] = bytes;
    let values = [tensor(no)?, tensor(yes)?];
    Ok(match control.kind() {
        Kind::ControlSequenceStart => Fill::Start(values),
        Kind::ControlSequenceEnd => Fill::End(values),
        Kind::ControlSequenceReady => Fill::Ready(values),
        Kind::ControlSequenceCorrid => Fill::Id(spec.dtype, smallest_shape(spec)),
    })
}

fn id_tensor(dtype: DType, shape: &[i64], id: &SequenceId) -> Option<RawTensor> {
    let bytes = match (dtype, id) {
        (DType::Uint64 | DType::Int64, SequenceId::Number(number)) => number.to_le_bytes().to_vec(),
        // As Triton does, the low half.
        (DType::Uint32 | DType::Int32, SequenceId::Number(number)) => (*number as u32).to_le_bytes().to_vec(),
        (DType::Bytes, SequenceId::Number(number)) => {
            return RawTensor::from_strings(shape.to_vec(), &[number.to_string()]).ok();
        }
        (DType::Bytes, SequenceId::Text(text)) => return RawTensor::from_strings(shape.to_vec(), &[text]).ok(),
        _ => return None,
    };
    RawTensor::new(dtype, shape.to_vec(), bytes.into()).ok()
}

/// The state of a sequence that begins: zeros, or a file's bytes.
fn initial(state: &State, spec: &TensorSpec, batches: bool, folder: &Path) -> Result<RawTensor, String> {
    let unfit = |reason: String| format!("its state `{}` {reason}", state.input_name);
    let ([] | [_]) = state.initial_state.as_slice() else {
        return Err(unfit(format!("has {} initial states, one is enough", state.initial_state.len())));
    };
    let written = state.initial_state.first();
    let dims = written.map_or(&state.dims, |initial| &initial.dims);
    let sizes: Vec<i64> = match dims.as_slice() {
        [] => smallest_shape(spec).into_iter().skip(usize::from(batches)).collect(),
        dims => dims.iter().map(|size| if *size < 0 { 1 } else { *size }).collect(),
    };
    let shape: Vec<i64> = std::iter::repeat_n(1, usize::from(batches)).chain(sizes).collect();
    let fits = |(size, file): (&i64, &Option<u64>)| file.is_none_or(|file| u64::try_from(*size) == Ok(file));
    if shape.len() != spec.shape.len() || !shape.iter().zip(&spec.shape).all(fits) {
        return Err(unfit(format!("begins as {shape:?}, which does not fit {:?} in its file", spec.shape)));
    }
    match written.and_then(|initial: &InitialState| initial.state_data.as_ref()) {
        None | Some(StateData::ZeroData(_)) => {
            RawTensor::zeros(spec.dtype, shape).map_err(|error| unfit(error.to_string()))
        }
        Some(StateData::DataFile(file)) => {
            // Triton keeps these in a folder of this name.
            let path = inside(&folder.join("initial_state"), file).map_err(unfit)?;
            let mut bytes =
                files::read(&path).map_err(|error| unfit(format!("begins with {}: {error}", path.display())))?;
            // As with Triton, a file may have more than that.
            if let Some(count) = RawTensor::byte_count(spec.dtype, &shape) {
                bytes.truncate(count);
            }
            RawTensor::new(spec.dtype, shape, bytes.into()).map_err(|error| unfit(error.to_string()))
        }
    }
}

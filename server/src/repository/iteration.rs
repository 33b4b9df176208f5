//! When the loops of a model that iterates end, as its configuration says. Pure.

use std::time::Duration;

use sensorium_engine::{DType, Signature};
use sensorium_proto::inference::{ModelConfig, model_config::SchedulingChoice};

use super::engines;
use crate::model::Bounds;

/// Names the output that ends a request, by not being zero.
const END: &str = "iteration_end";
/// Steps of a request at most.
const MOST_STEPS: &str = "iteration_most_steps";
/// What that may be at most: beyond it, a model that never says that it is done is a mistake that nobody would notice.
const LIMIT: usize = 1_000_000;
/// How long a response waits for its reader where `max_sequence_idle_microseconds` does not say: as long as the server waits
/// for the rest of a request.
const PATIENCE: Duration = Duration::from_mins(1);

/// The bounds of a model whose requests are loops; `None` for all others.
///
/// # Errors
/// An option that makes no sense, as a sentence about the model.
pub(super) fn bounds(config: &ModelConfig, signature: &Signature) -> Result<Option<Bounds>, String> {
    let sequence = match &config.scheduling_choice {
        Some(SchedulingChoice::SequenceBatching(sequence)) if sequence.iterative_sequence => sequence,
        _ => {
            return match [END, MOST_STEPS].into_iter().find(|name| config.parameters.contains_key(*name)) {
                None => Ok(None),
                Some(name) => Err(format!(
                    "its parameter {name} is for models whose sequence_batching has iterative_sequence: true"
                )),
            };
        }
    };
    if !config.model_transaction_policy.is_some_and(|policy| policy.decoupled) {
        return Err("its sequence_batching is iterative, so that a request has several responses; write \
                    model_transaction_policy { decoupled: true } as well"
            .to_owned());
    }
    if sequence.state.is_empty() {
        return Err(
            "its sequence_batching is iterative and has no state, so that every step would be the first again; \
                    write down what one step leaves for the next as state"
                .to_owned(),
        );
    }
    let most_steps = engines::number(config, MOST_STEPS)?.ok_or_else(|| {
        format!("its sequence_batching is iterative and nothing bounds it; write the parameter {MOST_STEPS}")
    })?;
    if !(1..=LIMIT).contains(&most_steps) {
        return Err(format!("its parameter {MOST_STEPS} is {most_steps}, it must be 1 to {LIMIT}"));
    }
    let end = engines::parameter(config, END).map(|name| end(name, config, signature)).transpose()?;
    let patience = match sequence.max_sequence_idle_microseconds {
        0 => PATIENCE,
        microseconds => Duration::from_micros(microseconds),
    };
    Ok(Some(Bounds { end, most_steps, patience }))
}

/// The output of the graph that ends a request.
fn end(name: &str, config: &ModelConfig, signature: &Signature) -> Result<usize, String> {
    let outputs = signature.outputs();
    let index = outputs.iter().position(|spec| spec.name == name).ok_or_else(|| {
        let known: Vec<_> = outputs.iter().map(|spec| spec.name.as_str()).collect();
        format!("its parameter {END} names `{name}`, which its file has not; there it has {}", known.join(", "))
    })?;
    let spec = &outputs[index];
    if spec.dtype == DType::Bytes {
        return Err(format!("its parameter {END} names `{name}`, which is BYTES; it must be BOOL or numbers"));
    }
    let sizes: Vec<u64> = spec.shape.iter().skip(usize::from(config.max_batch_size > 0)).copied().flatten().collect();
    if sizes.iter().any(|size| *size != 1) {
        return Err(format!("its parameter {END} names `{name}`, of sizes {sizes:?}; it must be one element"));
    }
    Ok(index)
}

#[cfg(test)]
mod tests {
    use sensorium_artifact::TensorSpec;
    use sensorium_engine::DType;

    use super::*;
    use crate::repository::{complete, config};

    #[test]
    fn a_reader_is_waited_for_a_minute_unless_the_configuration_says_for_how_long() {
        let spec = |name: &str| TensorSpec { name: name.to_owned(), dtype: DType::Fp32, shape: vec![None, Some(1)] };
        let signature = Signature::of_manifest(&[spec("x"), spec("s")], &[spec("y"), spec("s_out")]);
        let patience = |idle: &str| {
            let text = format!(
                r#"max_batch_size: 4 model_transaction_policy {{ decoupled: true }}
                   sequence_batching {{ {idle} iterative_sequence: true
                     state {{ input_name: "s" output_name: "s_out" data_type: TYPE_FP32 dims: 1 }} }}
                   parameters {{ key: "{MOST_STEPS}" value {{ string_value: "9" }} }}"#
            );
            let complete = complete::complete(config::from_text(&text).unwrap(), &signature, 4).unwrap();
            bounds(&complete.config, &signature).unwrap().unwrap().patience
        };
        assert_eq!(patience(""), PATIENCE);
        assert_eq!(patience("max_sequence_idle_microseconds: 7"), Duration::from_micros(7));
    }
}

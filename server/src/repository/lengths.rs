//! Which sizes of outputs follow those of padded inputs, so that what padding adds to them can be cut off.
//!
//! A file may give both sizes one name, which most exporters do not, and TorchScript never. So the model is run at two lengths, with each
//! padded size by itself where the model takes that, and with all of them together otherwise.

use std::{
    task::Poll,
    time::{Duration, Instant},
};

use sensorium_engine::{Engine, RawTensor, Signature, Waiters};

use crate::{
    model::guesses,
    scheduler::{Follows, Padding},
};

/// How long all of it may take: a start waits for it.
const LIMIT: Duration = Duration::from_secs(10);

/// What a size is at least that is not small.
const LARGE: i64 = 16;

/// A size of an input beyond the batch that requests decide and that is padded.
type Size = (usize, usize);

/// For each output of the engine, of which `shown` are anybody's, which of its sizes follow which padded one. `None` where the model took nothing
/// that was tried.
///
/// # Errors
/// An output that grows with its inputs otherwise than by as much, as a sentence about the model.
pub(super) fn follows(
    engine: &mut dyn Engine,
    padding: &Padding,
    shown: &[usize],
) -> Result<Option<Vec<Vec<Follows>>>, String> {
    let signature = engine.signature().clone();
    let sizes = padded(&signature, padding);
    let outputs: Vec<usize> = (0..signature.outputs().len()).collect();
    let started = Instant::now();
    let mut run = |inputs: &[RawTensor]| {
        let deadline = Some(started + LIMIT);
        let waiters = Waiters { deadline, poll_gone: &mut |_| Poll::Pending };
        engine.run_for(inputs, &outputs, waiters).ok()
    };
    let Some(&first) = sizes.first() else { return Ok(None) };
    // At sizes that are not small first: a window of a few elements is not seen to move in fewer.
    let (large, mut small): (Vec<_>, Vec<_>) = guesses(&signature).partition(|guess| lengths(guess, first)[0] >= LARGE);
    small.reverse();
    for guess in large.into_iter().chain(small) {
        if started.elapsed() >= LIMIT {
            break;
        }
        let Some(short) = run(&guess) else { continue };
        let mut found = vec![Vec::new(); outputs.len()];
        let mut note = |long: Option<Vec<RawTensor>>, of: Size, lengths: [i64; 2]| -> Option<Result<(), String>> {
            let long = long?;
            let noted = shown.iter().try_for_each(|&output| {
                let own = compare(short[output].shape(), long[output].shape(), lengths);
                let own = own.map_err(|found| refusal(&signature, output, lengths, found))?;
                found[output].extend(own.into_iter().map(|axis| Follows { axis, input: of.0, followed: of.1 }));
                Ok(())
            });
            Some(noted)
        };
        let mut together = Vec::new();
        for &size in &sizes {
            let lengths = lengths(&guess, size);
            match longer(&guess, &[size]).and_then(|inputs| note(run(&inputs), size, lengths)) {
                Some(noted) => noted?,
                None => together.push(size),
            }
        }
        if let Some(&first) = together.first() {
            let lengths = lengths(&guess, first);
            match longer(&guess, &together).and_then(|inputs| note(run(&inputs), first, lengths)) {
                Some(noted) => noted?,
                // Another length, perhaps.
                None => continue,
            }
        }
        return Ok(Some(found));
    }
    Ok(None)
}

fn padded(signature: &Signature, padding: &Padding) -> Vec<Size> {
    let inputs = signature.inputs().iter().enumerate().filter(|(_, spec)| padding.values.contains_key(&spec.name));
    let open = |(input, spec): (usize, &sensorium_artifact::TensorSpec)| {
        let axes = spec.shape.iter().enumerate().skip(1).filter(|(_, size)| size.is_none());
        axes.map(|(axis, _)| (input, axis)).collect::<Vec<_>>()
    };
    inputs.flat_map(open).collect()
}

/// What a size is, and what it is made.
fn lengths(guess: &[RawTensor], (input, axis): Size) -> [i64; 2] {
    let short = guess[input].shape()[axis];
    [short, 2 * short]
}

/// The same with these sizes twice as large.
fn longer(guess: &[RawTensor], sizes: &[Size]) -> Option<Vec<RawTensor>> {
    let mut inputs = guess.to_vec();
    for &(input, axis) in sizes {
        let mut shape = inputs[input].shape().to_vec();
        shape[axis] *= 2;
        inputs[input] = RawTensor::zeros(inputs[input].dtype(), shape).ok()?;
    }
    Some(inputs)
}

/// The axes in which an output has grown as its input has, or the first size that has changed otherwise.
fn compare(short: &[i64], long: &[i64], lengths: [i64; 2]) -> Result<Vec<usize>, [i64; 2]> {
    let changed = short.iter().zip(long).enumerate().filter(|(_, (short, long))| short != long);
    changed
        .map(|(axis, (&short, &long))| if [short, long] == lengths { Ok(axis) } else { Err([short, long]) })
        .collect()
}

fn refusal(signature: &Signature, output: usize, [short, long]: [i64; 2], found: [i64; 2]) -> String {
    let name = signature.outputs().get(output).map_or("?", |spec| &spec.name);
    let [of_short, of_long] = found;
    format!(
        "its parameter padding makes inputs longer, and a size of output `{name}` is {of_short} for {short} and {of_long} for {long}, so that nobody \
         can cut off what padding adds to it; leave padding out, or make that size the input's, or one that does not change"
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use sensorium_artifact::TensorSpec;
    use sensorium_engine::{DType, EngineError};

    use super::*;

    /// Outputs of these shapes for inputs `x` and `y`, both [-1, -1].
    struct Shaped(Signature, fn([i64; 2]) -> Option<Vec<Vec<i64>>>);

    impl Engine for Shaped {
        fn signature(&self) -> &Signature {
            &self.0
        }

        fn run_raw(&mut self, inputs: &[RawTensor], _: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
            let shapes = self.1([inputs[0].shape()[1], inputs[1].shape()[1]]);
            let shapes = shapes.ok_or_else(|| EngineError::Run { reason: "not this".to_owned() })?;
            Ok(shapes.into_iter().map(|shape| RawTensor::zeros(DType::Fp32, shape).unwrap()).collect())
        }
    }

    fn found(shapes: fn([i64; 2]) -> Option<Vec<Vec<i64>>>) -> Result<Option<Vec<Vec<Follows>>>, String> {
        let spec = |name: &str| TensorSpec { name: name.to_owned(), dtype: DType::Fp32, shape: vec![None, None] };
        let signature = Signature::of_manifest(&[spec("x"), spec("y")], &[spec("out"), spec("other")]);
        let padding = Padding { values: BTreeMap::from([("x".to_owned(), 0.0), ("y".to_owned(), 0.0)]), follows: None };
        follows(&mut Shaped(signature, shapes), &padding, &[0, 1])
    }

    #[test]
    fn a_size_follows_the_one_that_changes_it() {
        let follow = |axis, input| Follows { axis, input, followed: 1 };
        let apart = found(|[x, y]| Some(vec![vec![1, x, 7], vec![1, 7, y]]));
        assert_eq!(apart, Ok(Some(vec![vec![follow(1, 0)], vec![follow(2, 1)]])));
        let equal = found(|[x, y]| (x == y && x < 9).then(|| vec![vec![1, x], vec![1, 768]]));
        assert_eq!(equal, Ok(Some(vec![vec![follow(1, 0)], Vec::new()])), "they have to be equal");
        assert_eq!(found(|_| None), Ok(None));
    }

    #[test]
    fn what_grows_otherwise_cannot_be_cut() {
        let told = found(|[x, _]| Some(vec![vec![1, 3], vec![1, x + 2]])).unwrap_err();
        assert!(told.contains("`other` is 18 for 16 and 34 for 32"), "{told}");
        let window = found(|[x, _]| Some(vec![vec![1, 3], vec![1, (x - 4).max(0)]]));
        assert!(window.is_err(), "{window:?}");
    }
}

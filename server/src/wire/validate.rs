//! What a request claims, held against the model's signature, before any of its data is touched.

use sensorium_artifact::TensorSpec;

use super::{InvalidRequest, datatype, error::excerpt};

/// A model's shape as messages show it: `[-1, 3, 64, 64]`.
pub(super) fn shape_text(spec: &TensorSpec) -> String {
    let dims: Vec<_> =
        spec.shape.iter().map(|dim| dim.map_or_else(|| "-1".to_owned(), |dim| dim.to_string())).collect();
    format!("[{}]", dims.join(", "))
}

/// The datatype, which must be the model's.
pub(super) fn datatype(spec: &TensorSpec, found: &str) -> Result<(), InvalidRequest> {
    let expected = datatype::name(spec.dtype);
    if found == expected {
        Ok(())
    } else {
        Err(InvalidRequest::Datatype { input: spec.name.clone(), found: excerpt(found), expected })
    }
}

/// The shape as sizes, and its number of elements.
pub(super) fn shape(spec: &TensorSpec, found: &[i64]) -> Result<(Vec<usize>, usize), InvalidRequest> {
    let fits = |(&dim, expected): (&i64, &Option<u64>)| {
        dim >= 1 && expected.is_none_or(|expected| u64::try_from(dim) == Ok(expected))
    };
    if found.len() != spec.shape.len() || !found.iter().zip(&spec.shape).all(fits) {
        let input = spec.name.clone();
        // More dimensions than any model has would only make the message long.
        let found = found.iter().copied().take(16).collect();
        return Err(InvalidRequest::Shape { input, found, expected: shape_text(spec) });
    }
    let sizes: Option<Vec<usize>> = found.iter().map(|&dim| usize::try_from(dim).ok()).collect();
    let overflow = || InvalidRequest::ShapeOverflow { input: spec.name.clone(), found: found.to_vec() };
    let sizes = sizes.ok_or_else(overflow)?;
    // The widest element is eight bytes: from here on, elements times element size cannot overflow.
    let bytes = sizes.iter().try_fold(8_usize, |product, &size| product.checked_mul(size)).ok_or_else(overflow)?;
    Ok((sizes, bytes / 8))
}

/// The outputs to return, in the order of the request; all of the model's when it names none.
pub(super) fn outputs<'a>(
    specs: &[TensorSpec],
    requested: impl ExactSizeIterator<Item = &'a str>,
) -> Result<Vec<String>, InvalidRequest> {
    if requested.len() == 0 {
        return Ok(specs.iter().map(|spec| spec.name.clone()).collect());
    }
    // Bounded by the model: a name that is not its own, or comes twice, ends the loop.
    let mut outputs: Vec<String> = Vec::with_capacity(specs.len());
    for output in requested {
        if outputs.iter().any(|name| name == output) {
            return Err(InvalidRequest::DuplicateOutput { output: output.to_owned() });
        }
        if !specs.iter().any(|spec| spec.name == output) {
            let expected = specs.iter().map(|spec| spec.name.clone()).collect();
            return Err(InvalidRequest::UnknownOutput { output: excerpt(output), expected });
        }
        outputs.push(output.to_owned());
    }
    Ok(outputs)
}

//! Joining requests to one run and splitting its outputs. Pure.

use std::collections::BTreeMap;

use sensorium_engine::Named;
use sensorium_modality::{Tensor, TensorError};

use super::{Work, admit::Job};

/// Takes the oldest job, and with it, in order of arrival, each that fits: of the same shapes, `max_rows` in all. A job
/// that does not fit is not overtaken for long: whatever is ahead of it, it is the oldest soon.
pub(super) fn take(waiting: &mut BTreeMap<u64, Job>, max_rows: usize) -> Vec<Job> {
    let Some((_, first)) = waiting.pop_first() else { return Vec::new() };
    let mut rows = first.work.rows;
    let mut fitting = Vec::new();
    for (&place, job) in &*waiting {
        if rows >= max_rows {
            break;
        }
        if rows.saturating_add(job.work.rows) <= max_rows && job.work.joins(&first.work) {
            rows += job.work.rows;
            fitting.push(place);
        }
    }
    let mut jobs = vec![first];
    jobs.extend(fitting.into_iter().filter_map(|place| waiting.remove(&place)));
    jobs
}

/// One piece of work with the rows of all, one after the other, and every output that any of them wants.
pub(super) fn join(works: &[&Work]) -> Result<Work, TensorError> {
    let first = works.first().ok_or(TensorError::Nothing)?;
    let column = |(index, (name, _)): (usize, &(String, Tensor))| {
        let parts: Vec<&Tensor> = works.iter().map(|work| &work.inputs[index].1).collect();
        Ok((name.clone(), Tensor::concat(&parts)?))
    };
    let inputs = first.inputs.iter().enumerate().map(column).collect::<Result<_, TensorError>>()?;
    let mut outputs = first.outputs.clone();
    for output in works.iter().flat_map(|work| &work.outputs) {
        if !outputs.contains(output) {
            outputs.push(output.clone());
        }
    }
    Ok(Work { inputs, rows: works.iter().map(|work| work.rows).sum(), outputs })
}

/// What each of `works` gets of the outputs of their common run: its own rows of the outputs that it wants.
pub(super) fn split(works: &[&Work], outputs: &Named) -> Result<Vec<Named>, TensorError> {
    let rows: usize = works.iter().map(|work| work.rows).sum();
    if let Some((_, tensor)) = outputs.iter().find(|(_, tensor)| tensor.row_count() != Some(rows)) {
        return Err(TensorError::NoSuchRow { row: rows, shape: tensor.shape().to_vec() });
    }
    let mut start = 0;
    let mut answers = Vec::with_capacity(works.len());
    for work in works {
        let range = start..start + work.rows;
        start = range.end;
        let own = |name: &String| {
            let (_, tensor) = outputs.iter().find(|(output, _)| output == name).ok_or(TensorError::Nothing)?;
            Ok((name.clone(), tensor.rows(range.clone())?))
        };
        answers.push(work.outputs.iter().map(own).collect::<Result<_, TensorError>>()?);
    }
    Ok(answers)
}

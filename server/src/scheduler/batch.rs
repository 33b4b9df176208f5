//! Joining requests to one run and splitting its outputs. Pure.

use std::collections::BTreeMap;

use sensorium_engine::{RawTensor, RawTensorError};

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

/// The rows of all, one after the other, and every output that any of them wants.
pub(super) fn join(works: &[&Work]) -> Result<(Vec<RawTensor>, Vec<usize>), RawTensorError> {
    let inputs = works.first().map_or(0, |work| work.inputs.len());
    let column = |index: usize| RawTensor::concat(&works.iter().map(|work| &work.inputs[index]).collect::<Vec<_>>());
    let inputs = (0..inputs).map(column).collect::<Result<_, RawTensorError>>()?;
    let mut outputs: Vec<usize> = works.iter().flat_map(|work| &work.outputs).copied().collect();
    outputs.sort_unstable();
    outputs.dedup();
    Ok((inputs, outputs))
}

/// What each of `works` gets of `found`, the outputs `indices` of their common run: its own rows of those it wants.
/// `None` when the rows of an output are not theirs.
pub(super) fn split(works: &[&Work], indices: &[usize], found: &[RawTensor]) -> Option<Vec<Vec<RawTensor>>> {
    // Alone, there is nothing to split, and the outputs of a model without a batch axis could not be.
    let split = |tensor: &RawTensor| match works {
        [_] => Some(vec![tensor.clone()]),
        works => tensor.split(works.iter().map(|work| work.rows)),
    };
    let columns: Vec<Vec<RawTensor>> = found.iter().map(split).collect::<Option<_>>()?;
    let answer = |(member, work): (usize, &&Work)| {
        let own = |output: &usize| Some(columns[indices.binary_search(output).ok()?][member].clone());
        work.outputs.iter().map(own).collect()
    };
    works.iter().enumerate().map(answer).collect()
}

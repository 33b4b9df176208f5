//! Whether a job has to run: not if everything it depends on is as it was, and what it made is still there and whole.
//!
//! A job's inputs are a map of words to digests: its spec (without what changes no result), each data set by its index,
//! the artifact it starts from, and the version of this program. Two runs with the same map would make the same thing.

use std::collections::BTreeMap;

use sensorium_artifact::{Artifact, ArtifactError, Store};
use sensorium_operator::plan::WorkloadPlan;

use crate::data;
use crate::error::Error;
use crate::local::state_dir::{JobRecord, Phase, StateDir};
use crate::references::{ArtifactReference, References};

/// Everything that a job's result depends on.
///
/// # Errors
/// When a data set or the source artifact is not there.
pub async fn inputs(
    plan: &WorkloadPlan,
    references: &References,
    state: &StateDir,
) -> Result<BTreeMap<String, String>, Error> {
    let mut inputs = BTreeMap::from([
        ("spec".to_owned(), plan.spec_hash.clone()),
        ("sensorium".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
    ]);
    for uri in &references.data {
        inputs.insert(format!("data {uri}"), data::open(state, uri)?.digest().to_owned());
    }
    if let Some(source) = &references.source {
        let artifact = open_store(source, state)?.resolve(&source.artifact).await?;
        inputs.insert(format!("artifact {} in {}", source.artifact, source.store), artifact.digest.to_string());
    }
    Ok(inputs)
}

/// The artifact of an earlier run that would come out again; `None` when the job has to run.
///
/// # Errors
/// When the store cannot be read. A damaged or missing artifact is no error: the job makes it again.
pub async fn reusable(
    record: Option<&JobRecord>,
    inputs: &BTreeMap<String, String>,
    output: &ArtifactReference,
    state: &StateDir,
) -> Result<Option<Artifact>, Error> {
    let Some(record) = record.filter(|record| record.phase == Phase::Succeeded && record.inputs == *inputs) else {
        return Ok(None);
    };
    let Some(digest) = record.artifact.as_ref().and_then(|artifact| artifact.digest.parse().ok()) else {
        return Ok(None);
    };
    let store = open_store(output, state)?;
    // Somebody may have given the name to something else, or the manifest's output may have a new name.
    if store.names().await?.get(&output.artifact) != Some(&digest) {
        return Ok(None);
    }
    match store.verify(&digest).await {
        Ok(artifact) => Ok(Some(artifact)),
        Err(ArtifactError::Corrupt { .. } | ArtifactError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Opens the store of a reference.
///
/// # Errors
/// When its URI is none.
pub fn open_store(reference: &ArtifactReference, state: &StateDir) -> Result<Store, Error> {
    Ok(Store::open(&reference.store, &state.volumes_of(&[&reference.store])?)?)
}

#[cfg(test)]
mod tests;

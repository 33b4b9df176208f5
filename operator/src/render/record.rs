//! What a revision is made of, kept for as long as a newer one may be tried beside it.
//!
//! The spec speaks of the newest revision alone. If an object of an older one is deleted, this is what it is made again from.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use serde::{Deserialize, Serialize};

use super::Owner;
use super::encoders::{ENCODERS_ANNOTATION, Encoder};
use super::names::{child_name, short_digest};
use super::serving::{REVISION_ANNOTATION, SERVER, Servers, metadata};

/// Annotation of a record: name of the file that the revision's pods read.
pub const CONFIG_ANNOTATION: &str = "sensorium.dev/config";

/// What may have to be made again. The servers themselves are not of it: without them, a revision is over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MadeOf {
    /// The file that all pods read.
    pub config: ConfigMap,
    /// What the servers call.
    pub encoders: Vec<Encoder>,
}

impl MadeOf {
    /// Reads a record; none where another version wrote it.
    pub fn read(record: &ControllerRevision) -> Option<Self> {
        serde_json::from_value(record.data.0.clone()).ok()
    }
}

/// Renders the record of a revision. Its name has a digest of its content, which can't be changed: numbers of pods may be
/// others, and the revision the same.
///
/// # Errors
/// When an object is no JSON, which none of ours is.
pub fn render_record(
    owner: &Owner,
    servers: &Servers,
    encoders: &[Encoder],
) -> Result<ControllerRevision, serde_json::Error> {
    let Servers { config, revision, .. } = servers;
    let data = serde_json::to_value(MadeOf { config: config.clone(), encoders: encoders.to_vec() })?;
    let content = short_digest(&data.to_string());
    let names: Vec<&str> = encoders.iter().map(|encoder| encoder.name.as_str()).collect();
    let mut metadata = metadata(owner, child_name(&owner.job.name, &format!("{revision}-{content}")), SERVER);
    metadata.annotations = Some(BTreeMap::from([
        (REVISION_ANNOTATION.to_owned(), revision.clone()),
        (CONFIG_ANNOTATION.to_owned(), config.metadata.name.clone().unwrap_or_default()),
        (ENCODERS_ANNOTATION.to_owned(), names.join(",")),
    ]));
    Ok(ControllerRevision { metadata, data: RawExtension(data), revision: Some(1) })
}

//! The file that tells a program what to do, and the environment that every program gets.

use std::collections::BTreeMap;

use sensorium_api::run::{JobKey, RunConfig};
use serde::Serialize;

use super::PlanError;
use super::storage::Claims;
use super::template::{Part, Template};

/// Name of the run configuration among a plan's files.
const FILE: &str = "job.json";

/// The plan's files: one, the job's [`RunConfig`].
pub(super) fn config_files<S: Serialize>(
    job: &JobKey,
    spec_hash: &str,
    spec: &S,
) -> Result<BTreeMap<String, String>, PlanError> {
    let config = RunConfig { job: job.clone(), spec_hash: spec_hash.to_owned(), spec };
    let text =
        serde_json::to_string_pretty(&config).map_err(|source| PlanError::Spec { job: job.to_string(), source })?;
    Ok(BTreeMap::from([(FILE.to_owned(), text + "\n")]))
}

/// `--config FILE` and a `--volume CLAIM=DIR` for each claim: what every program is told.
pub(super) fn config_args(claims: &Claims) -> Vec<Template> {
    let file = [Part::MountPath("config".to_owned()), Part::Text(format!("/{FILE}"))];
    [Template::text("--config"), Template::new(file)].into_iter().chain(claims.volume_args()).collect()
}

/// What every program finds in its environment: a place for temporary files that does not fill the root file system.
pub(super) fn common_env() -> BTreeMap<String, Template> {
    BTreeMap::from([("TMPDIR".to_owned(), Template::new([Part::MountPath("scratch".to_owned())]))])
}

/// `FLAG ADDRESS:PORT` on which this process offers its port `name`.
pub(super) fn listen_args(flag: &str, name: &str) -> [Template; 2] {
    [Template::text(flag), Template::new([Part::Listen { name: name.to_owned() }])]
}

/// What a job that runs to completion is told on top: where to serve its progress and leave its result.
pub(super) fn report_args() -> impl Iterator<Item = Template> {
    listen_args("--progress-addr", PROGRESS)
        .into_iter()
        .chain([Template::text("--result-file"), Template::new([Part::ResultFile])])
}

/// Name of the port that serves `/progress`.
pub(super) const PROGRESS: &str = "progress";
/// Number of that port inside a pod.
pub(super) const PROGRESS_PORT: u16 = 8080;

//! Which plan runs first: producers before those who need what they make.

use std::collections::{BTreeMap, BTreeSet};

use super::workload::WorkloadPlan;

/// Why plans cannot be put in order.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// Two documents for one job.
    #[error("{job} is planned twice; give one of them another name")]
    DuplicateJob {
        /// The job.
        job: String,
    },
    /// Two jobs that would overwrite each other's result.
    #[error("artifact {artifact} is the output of {first} and of {second}; name one of them differently")]
    TwoProducers {
        /// Name of the artifact.
        artifact: String,
        /// The one job.
        first: String,
        /// The other.
        second: String,
    },
    /// An artifact that neither exists nor is made by one of the jobs.
    #[error("{job} needs artifact {artifact}, which is in no store and which no given job makes{}", made(.produced))]
    MissingProducer {
        /// The job that needs it.
        job: String,
        /// Name of the artifact.
        artifact: String,
        /// What the given jobs do make.
        produced: Vec<String>,
    },
    /// Jobs that wait for each other.
    #[error("these jobs wait for each other: {}", .jobs.join(" needs "))]
    Cycle {
        /// The jobs in the order of their need; the first one again at the end.
        jobs: Vec<String>,
    },
}

fn made(produced: &[String]) -> String {
    if produced.is_empty() { String::new() } else { format!(" (they make {})", produced.join(", ")) }
}

/// Puts producers before consumers; where nothing else decides, the given order stays. `available` are the names of
/// artifacts that exist already; an artifact named by its `sha256:` digest is taken to exist, since nobody can know
/// the digest of one that does not.
///
/// # Errors
/// [`OrderError`], which names the jobs and artifacts concerned.
pub fn order(plans: Vec<WorkloadPlan>, available: &BTreeSet<String>) -> Result<Vec<WorkloadPlan>, OrderError> {
    let producers = producers(&plans)?;
    let mut visit = Visit { plans: &plans, producers: &producers, available, path: Vec::new(), done: Vec::new() };
    for index in 0..plans.len() {
        visit.visit(index)?;
    }
    let position: BTreeMap<usize, usize> =
        visit.done.iter().enumerate().map(|(place, index)| (*index, place)).collect();
    let mut placed: Vec<(Option<&usize>, WorkloadPlan)> =
        plans.into_iter().enumerate().map(|(index, plan)| (position.get(&index), plan)).collect();
    placed.sort_by_key(|(place, _)| *place);
    Ok(placed.into_iter().map(|(_, plan)| plan).collect())
}

/// The plan that makes each artifact.
fn producers(plans: &[WorkloadPlan]) -> Result<BTreeMap<String, usize>, OrderError> {
    let mut jobs = BTreeSet::new();
    let mut producers = BTreeMap::new();
    for (index, plan) in plans.iter().enumerate() {
        if !jobs.insert(&plan.job) {
            return Err(OrderError::DuplicateJob { job: plan.job.to_string() });
        }
        let Some(artifact) = &plan.produces else { continue };
        if let Some(earlier) = producers.insert(artifact.clone(), index) {
            return Err(OrderError::TwoProducers {
                artifact: artifact.clone(),
                first: plans[earlier].job.to_string(),
                second: plan.job.to_string(),
            });
        }
    }
    Ok(producers)
}

/// A depth-first walk from each plan to what it needs.
struct Visit<'a> {
    plans: &'a [WorkloadPlan],
    producers: &'a BTreeMap<String, usize>,
    available: &'a BTreeSet<String>,
    /// The plans being visited, each needed by the one before it.
    path: Vec<usize>,
    /// The plans in order.
    done: Vec<usize>,
}

impl Visit<'_> {
    fn visit(&mut self, index: usize) -> Result<(), OrderError> {
        if self.done.contains(&index) {
            return Ok(());
        }
        if let Some(start) = self.path.iter().position(|earlier| *earlier == index) {
            let cycle = self.path[start..].iter().chain([&index]);
            return Err(OrderError::Cycle { jobs: cycle.map(|i| self.plans[*i].job.to_string()).collect() });
        }
        self.path.push(index);
        for artifact in &self.plans[index].requires {
            // A producer among the plans wins over what exists: it may be about to make a newer one.
            if let Some(producer) = self.producers.get(artifact) {
                self.visit(*producer)?;
            } else if !self.available.contains(artifact) && !artifact.starts_with("sha256:") {
                return Err(OrderError::MissingProducer {
                    job: self.plans[index].job.to_string(),
                    artifact: artifact.clone(),
                    produced: self.producers.keys().cloned().collect(),
                });
            }
        }
        self.path.pop();
        self.done.push(index);
        Ok(())
    }
}

//! `sensorium up`: the jobs of some manifests, one after the other, on this machine.
//!
//! ```text
//! manifests -> plans in order -> for each: unchanged? reuse : run -> record -> questions to servers -> report
//! ```

mod questions;
mod run;
mod summary;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Instant;

use sensorium_operator::plan::{Lifetime, order};

use crate::args::UpArgs;
use crate::error::Error;
use crate::local::interrupt::Interrupt;
use crate::local::placement::{PortMap, PortWishes};
use crate::local::programs::Programs;
use crate::local::reuse::open_store;
use crate::local::state_dir::StateDir;
use crate::manifests::{self, Job};
use crate::references::References;
use crate::text::shorten;
use crate::view::View;
use crate::{data, report};
use run::Run;

/// Runs the jobs and writes the report; with `--keep`, then serves until it is interrupted.
///
/// # Errors
/// The first job that fails, a manifest that is wrong, or [`Error::Interrupted`]. No process is left in any case. A
/// failed run leaves a report too, an interrupted one leaves the last report as it was.
pub async fn run(args: &UpArgs, state: StateDir) -> Result<(), Error> {
    let began = Instant::now();
    let interrupt = Interrupt::install().map_err(Error::Signals)?;
    let jobs = manifests::load(&args.paths)?.into_iter().map(Job::on_this_machine).collect::<Result<_, _>>()?;
    let _lock = state.lock()?;
    let jobs = interrupt.or(in_order(jobs, &state)).await?;
    let programs = Programs::from_env();
    let wishes = wishes(args);
    check(&jobs, &state, &programs, &wishes)?;

    let view = View::new(args.plain);
    let mut run = Run::new(&state, &programs, &wishes, &view, &interrupt);
    let mut outcome = Ok(());
    for job in &jobs {
        outcome = run.job(job).await;
        if outcome.is_err() {
            break;
        }
    }
    if !matches!(outcome, Err(Error::Interrupted)) {
        let (report, details) = run.report(began.elapsed());
        match report::write(state.root(), &report, &details) {
            Ok(()) => view.line(&format!("Report: {}", shorten(&state.root().join("report.html")).display())),
            // The first thing that went wrong is what is told, and a full disk stops both.
            Err(error) if outcome.is_err() => view.line(&format!("There is no report: {error}")),
            Err(error) => outcome = Err(error),
        }
    }
    if outcome.is_ok() {
        view.line(&summary::how_to_go_on(&args.paths, args.keep, run.served()));
        if args.keep {
            outcome = run.keep().await;
        }
    }
    run.stop().await;
    outcome
}

fn wishes(args: &UpArgs) -> PortWishes {
    let wishes = [("grpc", args.grpc_port), ("http", args.http_port), ("metrics", args.metrics_port)];
    wishes.into_iter().filter_map(|(name, port)| Some((name, port?))).collect()
}

/// Producers before consumers; an artifact of an earlier run counts as there.
async fn in_order(jobs: Vec<Job>, state: &StateDir) -> Result<Vec<Job>, Error> {
    let mut available = BTreeSet::new();
    for job in &jobs {
        if let Some(source) = References::of(&job.resource).source
            && open_store(&source, state)?.names().await?.contains_key(&source.artifact)
        {
            available.insert(source.artifact);
        }
    }
    let plans = order(jobs.iter().map(|job| job.plan.clone()).collect(), &available)?;
    let position = |job: &Job| plans.iter().position(|plan| plan.job == job.plan.job);
    let mut jobs = jobs;
    jobs.sort_by_key(position);
    Ok(jobs)
}

/// What would stop a later job is said now, and not when the first has trained for minutes.
fn check(jobs: &[Job], state: &StateDir, programs: &Programs, wishes: &PortWishes) -> Result<(), Error> {
    for job in jobs {
        for uri in &References::of(&job.resource).data {
            data::open(state, uri)?;
        }
        for role in &job.plan.roles {
            programs.find(role.program)?;
        }
        if job.plan.lifetime == Lifetime::Service {
            PortMap::choose(&job.plan, wishes)?;
        }
    }
    Ok(())
}

/// The manifests as they were typed, for a command to copy.
fn typed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" ")
}

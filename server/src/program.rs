//! The server as a program. Which engines it has is decided by whoever calls [`main`]: one that links a large library is
//! a program of its own.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, FromArgMatches as _};
use sensorium_engine::Opener;
use sensorium_lifecycle::{NO_ONNXRUNTIME_TELEMETRY, start_over_with};
use sensorium_telemetry::{Lines, Options, Sampling, Telemetry};

use crate::{
    allocator,
    config::{ServerArgs, ServerConfig},
    repository::{ControlMode, IndexEntry, Openers, RepositoryConfig, State},
    serve::{self, Controls, Listeners},
};

/// Serves as the command line says, with `more` engines beside onnxruntime. `name` is the program's own.
pub fn main(name: &'static str, more: &[Opener]) -> ExitCode {
    let matches = ServerArgs::command().name(name).bin_name(name).get_matches();
    let args = ServerArgs::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let settings = [&allocator::SETTINGS[..], &[NO_ONNXRUNTIME_TELEMETRY]].concat();
    start_over_with(name, &settings);
    let openers = Openers::with(more);
    match prepare(name, args) {
        Ok((args, runtime, telemetry)) => {
            let outcome = run(args, openers, &runtime, &telemetry).unwrap_or_else(|error| {
                tracing::error!("{error:#}");
                ExitCode::FAILURE
            });
            telemetry.shutdown();
            // The deadline has passed or nothing is left: a thread in the middle of an image must not hold the process.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => {
            eprintln!("{name}: {error:#}"); // there is no log to write it to
            ExitCode::FAILURE
        }
    }
}

fn prepare(name: &'static str, args: ServerArgs) -> anyhow::Result<(ServerArgs, tokio::runtime::Runtime, Telemetry)> {
    let args = args.with_settings()?;
    let runtime = tokio::runtime::Runtime::new().context("could not start the async runtime")?;
    let _inside = runtime.enter();
    let telemetry = sensorium_telemetry::start(Options {
        service: name,
        otlp_endpoint: args.otlp_endpoint.clone().filter(|endpoint| !endpoint.is_empty()),
        sampling: Sampling { rate: args.trace_rate.map_or(1, |rate| rate.get().into()), ..Sampling::default() },
        lines: Lines::Aside,
    })?;
    Ok((args, runtime, telemetry))
}

fn run(
    args: ServerArgs,
    openers: Openers,
    runtime: &tokio::runtime::Runtime,
    telemetry: &Telemetry,
) -> anyhow::Result<ExitCode> {
    let check = args.check;
    let config = ServerConfig { openers, ..ServerConfig::try_from(args)? };
    if check {
        return runtime.block_on(report(&config));
    }
    config.make_room().context(
        "the limit of open files (ulimit -n) leaves no room for --max-connections and what else is opened; raise it, or lower that",
    )?;
    tracing::info!(?config, "starting");
    let controls = Controls { logs: telemetry.logs.clone(), traces: telemetry.traces.clone() };
    runtime.block_on(async {
        // Before anything else, so that a signal during the start is not lost.
        let asked = sensorium_lifecycle::asked_to_end().context("could not listen for signals")?;
        let listeners = Listeners::bind(config.addresses).await?;
        serve::serve(config, listeners, controls, asked).await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Prints what would be served, one line for each version of a model, and fails if one could not be.
async fn report(config: &ServerConfig) -> anyhow::Result<ExitCode> {
    let mut index = serve::check(config).await?;
    let RepositoryConfig { repositories, mode, load, .. } = &config.repository;
    let repositories = repositories.join(", ");
    if index.is_empty() {
        println!("no model in {repositories}");
    }
    if *mode == ControlMode::Explicit {
        index.extend(lacking(load, &index, &repositories));
    }
    for entry in &index {
        println!("{:<40} {:>8} {:<12} {}", entry.name, entry.version, entry.state.as_str(), entry.reason);
    }
    let is_whole = !index.is_empty() && index.iter().all(|entry| is_well(entry, *mode));
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Models that are to be loaded and that no repository has.
fn lacking(load: &[String], index: &[IndexEntry], repositories: &str) -> Vec<IndexEntry> {
    let is_known = |name: &String| name == "*" || index.iter().any(|entry| entry.name == *name);
    let entry = |name: &String| IndexEntry {
        name: name.clone(),
        version: String::new(),
        state: State::Unavailable,
        reason: format!("no such model in {repositories}; --load-model names it"),
    };
    load.iter().filter(|name| !is_known(name)).map(entry).collect()
}

/// Whether a model is as it was asked to be: in mode explicit, those that nobody asked for are not loaded.
fn is_well(entry: &IndexEntry, mode: ControlMode) -> bool {
    entry.state == State::Ready || mode == ControlMode::Explicit && entry.state == State::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, state: State) -> IndexEntry {
        IndexEntry { name: name.to_owned(), version: "1".to_owned(), state, reason: String::new() }
    }

    #[test]
    fn what_nobody_asked_for_is_well_in_mode_explicit_alone() {
        let (ready, unknown) = (entry("a", State::Ready), entry("b", State::Unknown));
        for (mode, wanted) in [(ControlMode::Explicit, true), (ControlMode::None, false)] {
            assert!(is_well(&ready, mode));
            assert_eq!(is_well(&unknown, mode), wanted);
            assert!(!is_well(&entry("c", State::Unavailable), mode));
        }
    }

    #[test]
    fn a_model_that_is_asked_for_and_not_there_is_reported() {
        let load = ["*", "a", "ten"].map(str::to_owned);
        let found = lacking(&load, &[entry("a", State::Ready)], "/models");
        assert_eq!(
            found.iter().map(|entry| (&*entry.name, entry.state)).collect::<Vec<_>>(),
            [("ten", State::Unavailable)]
        );
        assert!(found[0].reason.contains("no such model in /models"), "{}", found[0].reason);
    }
}

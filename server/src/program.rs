//! The server as a program. Which engines it has is decided by whoever calls [`main`]: one that links a large library is
//! a program of its own.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, FromArgMatches as _};
use sensorium_engine::Opener;
use sensorium_telemetry::{Options, Sampling, Telemetry};

use crate::{
    allocator::give_memory_back,
    config::{ServerArgs, ServerConfig},
    repository::{Openers, State},
    serve::{self, Controls, Listeners},
};

/// Serves as the command line says, with `more` engines beside onnxruntime. `name` is the program's own.
pub fn main(name: &'static str, more: &[Opener]) -> ExitCode {
    let matches = ServerArgs::command().name(name).bin_name(name).get_matches();
    let args = ServerArgs::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    give_memory_back(name);
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
    config.make_room().context("could not raise the limit of open files for --max-connections; lower it")?;
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
    let index = serve::check(config).await?;
    for entry in &index {
        println!("{:<40} {:>8} {:<12} {}", entry.name, entry.version, entry.state.as_str(), entry.reason);
    }
    let is_whole = !index.is_empty() && index.iter().all(|entry| entry.state == State::Ready);
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

//! `sensorium-server`: see `--help`.

use std::{
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
};

use anyhow::Context as _;
use clap::Parser as _;
use sensorium_server::{
    config::{ServerArgs, ServerConfig},
    repository::State,
    serve::{self, Controls, Listeners},
};
use sensorium_telemetry::{Options, Sampling, Telemetry};

fn main() -> ExitCode {
    let args = ServerArgs::parse();
    give_memory_back();
    match prepare(args) {
        Ok((args, runtime, telemetry)) => {
            let outcome = run(args, &runtime, &telemetry).unwrap_or_else(|error| {
                tracing::error!("{error:#}");
                ExitCode::FAILURE
            });
            telemetry.shutdown();
            // The deadline has passed or nothing is left: a thread in the middle of an image must not hold the process.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => {
            eprintln!("sensorium-server: {error:#}"); // there is no log to write it to
            ExitCode::FAILURE
        }
    }
}

/// Starts this program over in its place, once, with an allocator that gives large pieces of memory back to the system when they
/// are free.
///
/// glibc does so from a size that it raises with every such piece, up to 32 MiB: from then on weights lie in its heaps, among
/// small things that stay, and a model that is let go leaves most of its memory with the process (of 100 MiB of weights
/// 125 MiB were kept, now 11 MiB are). Its settings are read from the environment before `main`, and changing them later
/// takes `unsafe`. What the environment says already is left as it is.
fn give_memory_back() {
    const LARGE: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "1048576");
    const KEPT: (&str, &str) = ("MALLOC_TRIM_THRESHOLD_", "2097152");
    if !cfg!(target_env = "gnu") || std::env::var_os(LARGE.0).is_some() {
        return;
    }
    let mut arguments = std::env::args_os();
    let (name, Ok(program)) = (arguments.next(), std::env::current_exe()) else { return };
    let mut again = Command::new(program);
    again.args(arguments).envs([LARGE, KEPT]);
    if let Some(name) = name {
        again.arg0(name);
    }
    // Returns only where it failed: then memory stays with the process, and everything else is as it would be.
    let error = again.exec();
    eprintln!("sensorium-server: could not set up the allocator: {error}");
}

fn prepare(args: ServerArgs) -> anyhow::Result<(ServerArgs, tokio::runtime::Runtime, Telemetry)> {
    let args = args.with_settings()?;
    let runtime = tokio::runtime::Runtime::new().context("could not start the async runtime")?;
    let _inside = runtime.enter();
    let telemetry = sensorium_telemetry::start(Options {
        service: "sensorium-server",
        otlp_endpoint: args.otlp_endpoint.clone().filter(|endpoint| !endpoint.is_empty()),
        sampling: Sampling { rate: args.trace_rate.map_or(1, |rate| rate.get().into()), ..Sampling::default() },
    })?;
    Ok((args, runtime, telemetry))
}

fn run(args: ServerArgs, runtime: &tokio::runtime::Runtime, telemetry: &Telemetry) -> anyhow::Result<ExitCode> {
    let check = args.check;
    let config = ServerConfig::try_from(args)?;
    if check {
        return runtime.block_on(report(&config));
    }
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

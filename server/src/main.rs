//! `sensorium-server`: see `--help`.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use sensorium_server::{
    config::{ServerArgs, ServerConfig},
    serve::{self, Listeners},
};

fn main() -> ExitCode {
    let args = ServerArgs::parse();
    if let Err(error) = sensorium_telemetry::init("sensorium-server") {
        eprintln!("sensorium-server: {:#}", anyhow::Error::from(error)); // there is no log to write it to
        return ExitCode::FAILURE;
    }
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: ServerArgs) -> anyhow::Result<()> {
    let config = ServerConfig::try_from(args)?;
    tracing::info!(?config, "starting");
    let runtime = tokio::runtime::Runtime::new().context("could not start the async runtime")?;
    let result = runtime.block_on(async {
        // Before anything else, so that a signal during the start is not lost.
        let asked = sensorium_lifecycle::asked_to_end().context("could not listen for signals")?;
        let listeners = Listeners::bind(config.addresses).await?;
        serve::serve(config, listeners, asked).await?;
        anyhow::Ok(())
    });
    // The deadline has passed or nothing is left: a thread in the middle of an image must not hold the process.
    runtime.shutdown_background();
    result
}

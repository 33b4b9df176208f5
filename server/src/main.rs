//! `sensorium-server`: see `--help`.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use sensorium_server::{
    config::{ServerArgs, ServerConfig},
    serve::{self, Listeners},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
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
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let orphaned = orphaned();
        let asked = async move {
            tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} () = orphaned => {} }
        };
        let listeners = Listeners::bind(config.addresses).await?;
        serve::serve(config, listeners, asked).await?;
        anyhow::Ok(())
    });
    // The deadline has passed or nothing is left: a thread in the middle of an image must not hold the process.
    runtime.shutdown_background();
    result
}

/// Completes when standard input ends, where `SENSORIUM_EXIT_WITH_PARENT` is set: whoever started this process holds the
/// other end, and its death, however sudden, ends this one as SIGTERM would.
fn orphaned() -> impl Future<Output = ()> {
    let (gone, ended) = oneshot::channel();
    let follows = std::env::var_os("SENSORIUM_EXIT_WITH_PARENT").is_some();
    if follows {
        // Reading blocks and cannot be cancelled; this thread ends with the process.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            let _ = gone.send(());
        });
    }
    async move {
        if !follows || ended.await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

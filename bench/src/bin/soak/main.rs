//! The released server under stress, on this machine alone: what is asked of it beside being right and fast.
//!
//! Every figure stands beside a limit that was set beforehand, and a ratio below 1 is a limit that was missed.

mod drain;
mod fuzzing;
mod overload;
mod reload;
mod server;
mod streams;

use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use sensorium_bench::Report;

use crate::server::{Server, repository};

/// Streams that are cut, overload, wrong requests, SIGTERM and reloads.
#[derive(Debug, Parser)]
#[command(name = "bench-soak")]
struct Args {
    /// How long the streams run, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Wrong requests
    #[arg(long, default_value_t = 100_000)]
    requests: usize,
    /// What the wrong requests are made from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Loads of a model under load
    #[arg(long, default_value_t = 100)]
    loads: usize,
    /// Only these parts: streams, overload, fuzz, drain, reload
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let is_wanted = |part: &str| args.only.is_empty() || args.only.iter().any(|only| only == part);
    let folder = tempfile::tempdir()?;
    repository(folder.path(), true)?;
    let small = tempfile::tempdir()?;
    repository(small.path(), false)?;
    let mut report = Report::new("soak")?;
    if is_wanted("streams") {
        let server = Server::start(small.path(), &["--engine-threads", "1"]).await?;
        streams::run(&mut report, &server, Duration::from_secs(args.seconds)).await?;
    }
    if is_wanted("overload") {
        let server = Server::start(small.path(), &["--engine-threads", "1"]).await?;
        overload::run(&mut report, &server, Duration::from_secs(3)).await?;
    }
    if is_wanted("fuzz") {
        let mut server = Server::start(small.path(), &["--max-request-bytes", "1048576"]).await?;
        fuzzing::run(&mut report, &mut server, args.requests, args.seed).await?;
    }
    if is_wanted("drain") {
        drain::run(&mut report, small.path(), 3).await?;
    }
    if is_wanted("reload") {
        reload::run(&mut report, folder.path(), args.loads).await?;
    }
    report.finish()
}

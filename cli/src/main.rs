//! `sensorium`.

use std::process::ExitCode;

use clap::Parser as _;
use sensorium_cli::args::Cli;
use sensorium_cli::command;

fn main() -> ExitCode {
    command::run(Cli::parse())
}

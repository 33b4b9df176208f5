//! `sensorium-server`: see `--help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    sensorium_server::program::main("sensorium-server", &[])
}

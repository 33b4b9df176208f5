//! `sensorium-server-torch`: `sensorium-server` that also serves TorchScript. See `--help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    sensorium_server::program::main("sensorium-server-torch", &[sensorium_engine_torch::OPENER])
}

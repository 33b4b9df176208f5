//! `sensorium-server-torch`: `sensorium-server` that also serves TorchScript. See `--help`.

use std::process::ExitCode;

use sensorium_server::Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    sensorium_server::program::main("sensorium-server-torch", &[sensorium_engine_torch::OPENER])
}

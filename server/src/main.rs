//! `sensorium-server`: see `--help`.

use std::process::ExitCode;

use sensorium_server::Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    sensorium_server::program::main("sensorium-server", &[])
}

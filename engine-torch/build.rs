//! Compiles the C++ shim against libtorch and gives this crate's tests its run-time path.

use std::error::Error;

use sensorium_torch_build::Libtorch;

fn main() -> Result<(), Box<dyn Error>> {
    let libtorch = Libtorch::from_env()?;
    libtorch.shim().try_compile("sensorium_engine_torch_shim")?;
    libtorch.link();
    Ok(())
}

//! Compiles the C++ shim against libtorch and gives this crate's tests its run-time path.

use std::error::Error;

use sensorium_torch_build::Libtorch;

fn main() -> Result<(), Box<dyn Error>> {
    let libtorch = Libtorch::from_env()?;
    libtorch
        .shim()
        .include("cpp/gloo_fwd")
        // How the wheel was built: c10d with Gloo.
        .define("USE_DISTRIBUTED", None)
        .define("USE_C10D_GLOO", None)
        .try_compile("sensorium_dist_shim")?;
    libtorch.link();
    Ok(())
}

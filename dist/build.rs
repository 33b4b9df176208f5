//! Compiles the C++ shim against the libtorch in `LIBTORCH` and gives this crate's tests its run-time path.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// The release whose c10d headers the shim was written for; tch 0.24 wants the same.
const LIBTORCH_VERSION: &str = "2.11.0";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-changed=build.rs");

    let libtorch = env::var_os("LIBTORCH").map(PathBuf::from).ok_or(
        "LIBTORCH is not set; it names the folder of libtorch 2.11.0 that holds include/ and lib/ (scripts/setup writes it)",
    )?;
    check_version(&libtorch)?;

    let include = libtorch.join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("cpp/shim.cpp")
        .include("cpp")
        .include("cpp/gloo_fwd")
        // libtorch's own headers are not warning-free.
        .flag("-isystem")
        .flag(include.to_str().ok_or("LIBTORCH is not valid UTF-8")?)
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include").to_str().ok_or("LIBTORCH is not valid UTF-8")?)
        .flag("-Wno-unused-parameter")
        // How the wheel was built: c10d with Gloo, and the C++11 ABI of libstdc++.
        .define("USE_DISTRIBUTED", None)
        .define("USE_C10D_GLOO", None)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .try_compile("sensorium_dist_shim")?;

    let lib = libtorch.join("lib");
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    Ok(())
}

/// A wheel says its version in `version.py`, a plain libtorch archive in `build-version`.
fn check_version(libtorch: &Path) -> Result<(), String> {
    let wheel = libtorch.join("version.py");
    let archive = libtorch.join("build-version");
    println!("cargo:rerun-if-changed={}", if wheel.exists() { wheel.display() } else { archive.display() });

    let text = fs::read_to_string(&wheel)
        .or_else(|_| fs::read_to_string(&archive))
        .map_err(|_| format!("LIBTORCH={} has neither version.py nor build-version", libtorch.display()))?;
    let found = text
        .lines()
        .find_map(|line| line.strip_prefix("__version__ = "))
        .unwrap_or(&text)
        .trim()
        .trim_matches(['\'', '"']);
    if found.split('+').next() == Some(LIBTORCH_VERSION) {
        Ok(())
    } else {
        Err(format!("LIBTORCH={} is libtorch {found}, this crate needs {LIBTORCH_VERSION}", libtorch.display()))
    }
}

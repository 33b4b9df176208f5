//! Compiles the C++ shim against the libtorch in `LIBTORCH` and gives this crate's tests its run-time path.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-changed=build.rs");

    let libtorch = std::env::var_os("LIBTORCH").map(PathBuf::from).ok_or(
        "LIBTORCH is not set; it names the folder of libtorch 2.11.0 that holds include/ and lib/ (scripts/setup writes it)",
    )?;
    let include = libtorch.join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("cpp/shim.cpp")
        .include("cpp")
        // libtorch's own headers are not warning-free.
        .flag("-isystem")
        .flag(include.to_str().ok_or("LIBTORCH is not valid UTF-8")?)
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include").to_str().ok_or("LIBTORCH is not valid UTF-8")?)
        .flag("-Wno-unused-parameter")
        // How the wheel was built: the C++11 ABI of libstdc++.
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .try_compile("sensorium_engine_torch_shim")?;

    let lib = libtorch.join("lib");
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    Ok(())
}

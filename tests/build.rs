//! Compiles the kubelet's interface to device plugins, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    tonic_prost_build::configure().compile_fds(protox::compile(["device_plugin.proto"], ["proto"])?)?;
    Ok(())
}

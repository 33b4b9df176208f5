//! Compiles the `.proto` files without protoc.

use std::{env, fs, path::Path};

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const FILES: [&str; 2] = ["inference/service.proto", "sensorium/v1/multimodal.proto"];
    for folder in ["inference", "sensorium"] {
        println!("cargo:rerun-if-changed={folder}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    let mut names = tonic_prost_build::Config::new();
    names
        .enable_type_names()
        // Most tensors have none: without room for them, a list of tensors is small.
        .boxed(".inference.ModelInferRequest.InferInputTensor.contents")
        .boxed(".inference.ModelInferResponse.InferOutputTensor.contents");
    tonic_prost_build::configure()
        // Tensor and media bytes are slices of the received message, not copies of it.
        .bytes(".inference.ModelInferRequest.raw_input_contents")
        .bytes(".inference.ModelInferResponse.raw_output_contents")
        .bytes(".inference.InferTensorContents.bytes_contents")
        .bytes(".inference.ModelRepositoryParameter.bytes_param")
        .bytes(".sensorium.v1.Image.data")
        .codec_path("crate::codec::BoundedCodec")
        .compile_fds_with_config(descriptors.clone(), names)?;

    let mut described = descriptors;
    for file in &mut described.file {
        file.source_code_info = None; // comments are for readers of the .proto files, and most of the bytes
    }
    fs::write(Path::new(&env::var("OUT_DIR")?).join("descriptors.bin"), described.encode_to_vec())?;
    Ok(())
}

//! Compiles the `.proto` files without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const FILES: [&str; 2] = ["inference/service.proto", "sensorium/v1/multimodal.proto"];
    for folder in ["inference", "sensorium"] {
        println!("cargo:rerun-if-changed={folder}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    tonic_prost_build::configure()
        // Tensor and media bytes are slices of the received message, not copies of it.
        .bytes(".inference.ModelInferRequest.raw_input_contents")
        .bytes(".inference.ModelInferResponse.raw_output_contents")
        .bytes(".inference.InferTensorContents.bytes_contents")
        .bytes(".sensorium.v1.Image.data")
        .codec_path("crate::codec::BoundedCodec")
        .compile_fds(descriptors)?;
    Ok(())
}

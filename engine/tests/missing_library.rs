//! The library is looked for when it is first needed. Alone in its process, because it is loaded once per process.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use sensorium_engine::{EngineError, onnxruntime};

#[test]
fn a_missing_library_is_named_and_a_later_try_can_succeed() {
    for wrong in ["/nowhere/libonnxruntime.so", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")] {
        let error = onnxruntime::load_from(Path::new(wrong)).unwrap_err();
        assert!(matches!(&error, EngineError::Library { path, .. } if path == Path::new(wrong)), "{error:?}");
        let message = error.to_string();
        assert!(message.contains(wrong) && message.contains("set SENSORIUM_ONNXRUNTIME"), "{message}");
    }
    onnxruntime::load().unwrap();
}

//! TorchScript models behind [`sensorium_engine::Engine`], run by libtorch.
//!
//! * [`TorchScript`] is a `model.pt` that is open: `forward` of its module, in inference mode, with as many threads as the
//!   options say, which are those of the thread that runs it and of no other.
//! * [`OPENER`] is what a server is given to serve such files.
//! * [`compile`] writes TorchScript source to such a file: models without Python, and wrappers around the modules of
//!   other files.
//!
//! A file says how many inputs `forward` takes and what they are called, and which of them are numbers; it says nothing
//! about the types and shapes of tensors, which therefore have to be declared.
//!
//! Why this is no cargo feature of the engine crate, and why it has a C++ shim of its own beside tch:
//! `docs/decisions/0009-libtorch-is-another-program.md`.

#[expect(unsafe_code, reason = "calls C++; the rest of the crate uses its safe types")]
mod ffi;
mod message;
mod ports;
mod torchscript;

use std::path::Path;

use sensorium_engine::{EngineError, Opener};

pub use self::ffi::Attribute;
pub use self::torchscript::{TorchScript, thread_count};

/// TorchScript models, as Triton names them.
pub const OPENER: Opener = Opener {
    backend: "pytorch",
    platform: "pytorch_libtorch",
    file: "model.pt",
    open: |path, options, declared| Ok(Box::new(TorchScript::open(path, options, declared)?)),
};

/// Compiles TorchScript source, `def forward(self, x): ...` and other methods of one module, and writes it to `path`.
/// `attributes` are what the source finds in `self`.
///
/// # Errors
/// [`EngineError::Open`]: what libtorch says about the source, or that the file cannot be written.
pub fn compile(source: &str, attributes: &[(&str, Attribute<'_>)], path: &Path) -> Result<(), EngineError> {
    ffi::compile(source, attributes, path)
        .map_err(|reason| EngineError::Open { origin: path.display().to_string(), reason: message::brief(&reason) })
}

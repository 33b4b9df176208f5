use sensorium_modality::Tensor;

use crate::{EngineError, Signature};

/// Tensors by the name of a graph's input or output.
pub type Named = Vec<(String, Tensor)>;

/// One graph, ready to run. It is owned by one thread at a time, because the libraries behind it are not safe to call
/// concurrently on one graph.
pub trait Engine: Send {
    /// What the graph takes and gives.
    fn signature(&self) -> &Signature;

    /// Runs the graph once. `inputs` must have every input of the signature, in any order; `outputs` names the
    /// wanted outputs, and none means all. The answer has them in the order of `outputs`, or of the signature.
    ///
    /// # Errors
    /// As [`Signature::validate`], before anything runs; [`EngineError::UnknownOutput`]; [`EngineError::Run`].
    fn run(&mut self, inputs: Named, outputs: &[String]) -> Result<Named, EngineError>;
}

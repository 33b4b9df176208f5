use std::task::{Context, Poll};
use std::time::Instant;

use sensorium_modality::Tensor;

use crate::raw::RawTensor;
use crate::signature::dtype_name;
use crate::{EngineError, Signature};

/// Tensors by the name of a graph's input or output.
pub type Named = Vec<(String, Tensor)>;

/// Those who wait for a run.
pub struct Waiters<'a> {
    /// When the last of them stops waiting; `None` where one waits for as long as it takes.
    pub deadline: Option<Instant>,
    /// Ready once none of them waits any more; it is polled as a future is.
    pub poll_gone: &'a mut (dyn FnMut(&mut Context<'_>) -> Poll<()> + Send),
}

/// One graph, ready to run. It is owned by one thread at a time, because the libraries behind it are not safe to call
/// concurrently on one graph.
pub trait Engine: Send {
    /// What the graph takes and gives.
    fn signature(&self) -> &Signature;

    /// Runs the graph once on tensors that [`Signature::validate`] accepts: `inputs` in the signature's order. `outputs`
    /// are indices of the signature's outputs; the answer has those, in that order. Neither inputs nor outputs are copied
    /// where the engine can read and share their memory.
    ///
    /// # Errors
    /// [`EngineError::Run`], or [`EngineError::NotUtf8`] for text that is none.
    fn run_raw(&mut self, inputs: &[RawTensor], outputs: &[usize]) -> Result<Vec<RawTensor>, EngineError>;

    /// As [`Engine::run_raw`], for `waiters`. An engine whose runs can be cut short does that when nobody waits any more; others run
    /// to the end.
    ///
    /// # Errors
    /// As [`Engine::run_raw`], and [`EngineError::CutShort`].
    fn run_for(
        &mut self,
        inputs: &[RawTensor],
        outputs: &[usize],
        waiters: Waiters<'_>,
    ) -> Result<Vec<RawTensor>, EngineError> {
        let _ = waiters;
        self.run_raw(inputs, outputs)
    }

    /// Whether a run is computation and nothing else, which any thread may do: whoever waits for it may run it. One that
    /// asks another machine, or that keeps things for each thread that has ever called it, says no.
    fn runs_on_any_thread(&self) -> bool {
        false
    }

    /// Whether a run may leave something for the next ones that only this engine has. Then a sequence stays with it, and a run that
    /// failed is not done again.
    fn keeps_state(&self) -> bool {
        false
    }

    /// Makes the graph forget what it keeps from run to run, where it does and can be told to.
    ///
    /// # Errors
    /// [`EngineError::Run`].
    fn reset(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    /// Runs the graph once. `inputs` must have every input of the signature, in any order; `outputs` names the
    /// wanted outputs, and none means all. The answer has them in the order of `outputs`, or of the signature.
    ///
    /// # Errors
    /// Inputs that are missing, unknown or refused by [`Signature::validate`], before anything runs;
    /// [`EngineError::UnknownOutput`]; [`EngineError::Run`].
    fn run(&mut self, inputs: Named, outputs: &[String]) -> Result<Named, EngineError> {
        let signature = self.signature();
        let inputs = signature.place(inputs)?;
        signature.validate(&inputs)?;
        let names: Vec<String> = signature.outputs().iter().map(|output| output.name.clone()).collect();
        let index = |wanted: &String| {
            let found = names.iter().position(|name| name == wanted);
            found.ok_or_else(|| EngineError::UnknownOutput { output: wanted.clone(), known: names.clone() })
        };
        let indices: Vec<usize> = match outputs {
            [] => (0..names.len()).collect(),
            outputs => outputs.iter().map(index).collect::<Result<_, _>>()?,
        };
        let found = self.run_raw(&inputs, &indices).map_err(|error| self.signature().explain(&inputs, error))?;
        let typed = |(index, raw): (usize, RawTensor)| {
            let name = names[index].clone();
            match Tensor::try_from(raw) {
                Ok(tensor) => Ok((name, tensor)),
                Err(dtype) => Err(EngineError::UnsupportedType {
                    origin: "its result".to_owned(),
                    tensor: name,
                    found: dtype_name(dtype).to_owned(),
                }),
            }
        };
        indices.into_iter().zip(found).map(typed).collect()
    }
}

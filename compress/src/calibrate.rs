//! Calibration: the f32 graphs answer questions while every activation that will be quantised is watched.
//!
//! The graphs run as they will in production, one feeding the next, so the fusion graph is calibrated with what the
//! encoders really give it. Each graph is opened once, with the watched values as additional outputs; memory does not
//! grow with the number of samples.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use sensorium_api::CalibrationMethod;
use sensorium_engine::{Engine, GraphRunner, Named, OnnxRuntime, Options, PipelineError};
use sensorium_onnx::Model;

use crate::affine::{ActivationType, Range};
use crate::error::CompressError;
use crate::observe::{NotFinite, Observer};
use crate::plan::GraphPlan;

/// Runs graphs by name and watches them.
pub struct Calibrator {
    graphs: BTreeMap<String, Mutex<Watched>>,
}

struct Watched {
    engine: OnnxRuntime,
    observers: BTreeMap<String, Observer>,
    /// The outputs that are only there for the observers.
    extra: Vec<String>,
    /// The first value that was not finite. Kept here because a runner's error type is the pipeline's.
    broken: Option<(String, NotFinite)>,
}

impl Calibrator {
    /// Opens every graph with the activations of its plan watched.
    /// # Errors
    /// `Onnx` or `Engine` for a graph that cannot be opened.
    pub fn open<'a>(
        graphs: impl IntoIterator<Item = (&'a str, &'a Model, &'a GraphPlan)>,
        method: CalibrationMethod,
    ) -> Result<Self, CompressError> {
        let watched = |(name, model, plan): (&'a str, &'a Model, &'a GraphPlan)| {
            Ok((name.to_owned(), Mutex::new(Watched::open(name, model, plan, method)?)))
        };
        Ok(Self { graphs: graphs.into_iter().map(watched).collect::<Result<_, CompressError>>()? })
    }

    /// The first NaN or infinity that was seen, if any: `NotFinite`.
    pub fn check(&self) -> Result<(), CompressError> {
        for (graph, watched) in &self.graphs {
            if let Some((value, NotFinite(found))) = lock(watched).broken.clone() {
                return Err(CompressError::NotFinite { graph: graph.clone(), value, found });
            }
        }
        Ok(())
    }

    /// By graph and activation, the range that was seen. Activations that were never computed are left out.
    pub fn ranges(&self, kind: ActivationType) -> BTreeMap<String, BTreeMap<String, Range>> {
        let of_graph = |watched: &Watched| {
            let ranges = watched.observers.iter().map(|(value, observer)| Some((value.clone(), observer.range(kind)?)));
            ranges.flatten().collect()
        };
        self.graphs.iter().map(|(graph, watched)| (graph.clone(), of_graph(&lock(watched)))).collect()
    }
}

impl GraphRunner for Calibrator {
    type Error = PipelineError;

    async fn run(&self, graph: &str, inputs: Named) -> Result<Named, PipelineError> {
        let watched = self.graphs.get(graph).ok_or_else(|| PipelineError::NotAPipeline {
            artifact: "that is calibrated".to_owned(),
            reason: format!("there is no graph {graph}"),
        })?;
        lock(watched).run(inputs).map_err(|source| PipelineError::Engine { graph: graph.to_owned(), source })
    }
}

impl Watched {
    fn open(name: &str, model: &Model, plan: &GraphPlan, method: CalibrationMethod) -> Result<Self, CompressError> {
        let observed = plan.observed();
        let visible = |value: &str| model.inputs().chain(model.outputs()).any(|visible| visible.name == value);
        let extra: Vec<&str> = observed.iter().copied().filter(|value| !visible(value)).collect();
        let bytes = model.with_outputs(&extra)?.to_bytes();
        let engine = OnnxRuntime::open_bytes(name, &bytes, Options::default())
            .map_err(|source| CompressError::Engine { graph: name.to_owned(), source })?;
        let observers = observed.iter().map(|&value| (value.to_owned(), Observer::new(method))).collect();
        Ok(Self { engine, observers, extra: extra.into_iter().map(str::to_owned).collect(), broken: None })
    }

    fn run(&mut self, inputs: Named) -> Result<Named, sensorium_engine::EngineError> {
        self.observe(&inputs);
        let mut outputs = self.engine.run(inputs, &[])?;
        self.observe(&outputs);
        outputs.retain(|(name, _)| !self.extra.contains(name));
        Ok(outputs)
    }

    fn observe(&mut self, values: &Named) {
        for (name, tensor) in values {
            let Some(observer) = self.observers.get_mut(name) else { continue };
            // What multiplies an f32 weight is f32.
            let Ok(elements) = tensor.as_slice::<f32>() else { continue };
            if let Err(found) = observer.add(elements) {
                self.broken.get_or_insert((name.clone(), found));
            }
        }
    }
}

/// Observers are whole after every step, so what another thread left behind when it panicked can be used.
fn lock(watched: &Mutex<Watched>) -> MutexGuard<'_, Watched> {
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}

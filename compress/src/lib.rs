//! Compression: INT8 post-training quantisation as ONNX Q/DQ, and the acceptance gate.
//!
//! [`run`] is a whole job: it reads its source from an artifact store, quantises it, compares the candidate with its
//! parent on held-out questions, and commits it, promoted or not. The steps on the way are modules of their own:
//!
//! * [`plan`](GraphPlan) decides what is quantised in a graph and which activations matter (pure).
//! * [`Calibrator`] runs the f32 graphs and watches those activations; [`Observer`] remembers what it needs of them in
//!   bounded memory: a range, or a [`Histogram`] that [`entropy_threshold`] clips.
//! * [`rewrite()`] puts the graph into Q/DQ form (pure); [`Affine`] is the arithmetic.
//! * [`decide`] is the gate (pure).
//!
//! The same spec, source and data give the same bytes. What we gave up: quantising products of two activations and the
//! operators between the products, which would save little here and cost accuracy; and simulating integer arithmetic
//! ourselves: the engine that will serve the model measures it.

mod affine;
mod calibrate;
mod entropy;
mod error;
mod gate;
mod histogram;
mod job;
mod measure;
mod observe;
mod plan;
mod questions;
mod result;
mod rewrite;

pub use affine::{ActivationType, Affine, QuantizedWeight, Range, WeightRange, quantize_weight};
pub use calibrate::Calibrator;
pub use entropy::entropy_threshold;
pub use error::CompressError;
pub use gate::{Measured, decide};
pub use histogram::Histogram;
pub use job::{Control, run};
pub use observe::{NotFinite, Observer};
pub use plan::{GraphPlan, Target, plan_graph};
pub use result::artifact_result;
pub use rewrite::{Representation, rewrite};

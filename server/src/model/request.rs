//! What a model is asked and what it answers, whatever the wire.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use sensorium_engine::RawTensor;

/// One inference, as a client asks for it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// The client's name for it; may be empty.
    pub id: String,
    /// Tensors in any order.
    pub inputs: Vec<NamedTensor>,
    /// Names of the outputs to return, in this order; none means all.
    pub outputs: Vec<String>,
    /// 1 is served first; 0 is the model's default.
    pub priority: u64,
    /// How long it may wait in the queue, where the model lets requests say so.
    pub timeout: Option<Duration>,
    /// When its caller stops waiting.
    pub deadline: Option<Instant>,
    /// The sequence that it is part of, for models that keep state.
    pub sequence: Option<Sequence>,
    /// Everything else that the client said.
    pub parameters: BTreeMap<String, Parameter>,
}

/// A tensor and the name of the input or output that it stands for.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Name of the input or output.
    pub name: String,
    /// Its value.
    pub tensor: RawTensor,
}

/// A request's place in a sequence of requests that share state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Which sequence.
    pub id: SequenceId,
    /// Whether it is the first.
    pub start: bool,
    /// Whether it is the last.
    pub end: bool,
}

/// Correlation id, never 0 or empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SequenceId {
    /// A number.
    Number(u64),
    /// A text.
    Text(String),
}

/// Value of a request's parameter.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each variant is named like its type")]
pub enum Parameter {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Double(f64),
    Text(String),
}

/// What a model answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Response {
    /// The outputs asked for, in that order.
    pub outputs: Vec<NamedTensor>,
    /// Where the time went.
    pub timings: Timings,
}

/// Where the time of one request went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Waiting for an engine.
    pub queue: Duration,
    /// Putting the batch together.
    pub compute_input: Duration,
    /// Running it.
    pub compute_infer: Duration,
    /// Taking it apart.
    pub compute_output: Duration,
    /// Whether the answer was known already.
    pub cache_hit: bool,
}

impl std::ops::AddAssign for Timings {
    /// The times of both; the rest is of the later one.
    fn add_assign(&mut self, later: Self) {
        *self = Self {
            queue: self.queue + later.queue,
            compute_input: self.compute_input + later.compute_input,
            compute_infer: self.compute_infer + later.compute_infer,
            compute_output: self.compute_output + later.compute_output,
            ..later
        };
    }
}

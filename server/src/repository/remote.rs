//! Graphs of an artifact that run in servers of their own: an encoder that takes most of the time, say, while everything
//! else runs here.
//!
//! Such a graph is an [`Engine`] like any other, behind a queue like any other; its runs are calls over gRPC. Every call
//! names the artifact that it is meant for, and a server of another one refuses it, so that no rollout can mix the parts of
//! two models.

use std::{
    collections::HashMap,
    future::poll_fn,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    str::FromStr,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message as _;
use sensorium_artifact::Manifest;
use sensorium_engine::{Engine, EngineError, RawTensor, Signature, Waiters, dtype_name};
use sensorium_proto::inference::{
    InferParameter, ModelInferRequest, ModelInferResponse,
    infer_parameter::ParameterChoice,
    model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    model_infer_response::InferOutputTensor,
};
use sensorium_telemetry::{Parent, error_line};
use tokio::{runtime::Handle, time};
use tonic::{Code, Request, Status};

use super::{
    LoadError, Opening,
    peers::{Client, Peers},
};
use crate::{
    model::ARTIFACT_DIGEST,
    security::{OwnTokens, Reloaded},
    wire,
};

/// Calls of one graph that may be under way at a time: enough that the other server always has one to go on with while
/// answers travel, few enough that requests still meet in batches here.
const CALLS: usize = 4;
/// How often a call is made when nobody answers, and how long the first pause is; each next one is twice as long.
const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// How long all attempts together may take, if nobody asks for less. A batch takes milliseconds; a server that takes this long is stuck.
const LIMIT: Duration = Duration::from_secs(30);

/// Which graphs of artifacts a server serves, and which of these run elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GraphPlaces {
    /// Names of the only graphs that are served; empty for all.
    pub only: Vec<String>,
    /// Graphs that are called instead of run.
    pub remote: Vec<RemoteGraph>,
}

/// Where a graph runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteGraph {
    /// Its name in the artifact.
    pub graph: String,
    /// `HOST:PORT` of gRPC; a host may stand for several machines.
    pub addresses: Vec<String>,
}

/// Text that is not `GRAPH=HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not where a graph runs; write GRAPH=HOST:PORT, such as image_encoder=encoders:8001")]
pub struct RemoteGraphError {
    value: String,
}

impl FromStr for RemoteGraph {
    type Err = RemoteGraphError;

    /// `GRAPH=HOST:PORT`, with more of the latter after commas.
    fn from_str(value: &str) -> Result<Self, RemoteGraphError> {
        let parse = || {
            let (graph, addresses) = value.split_once('=').filter(|(graph, _)| !graph.is_empty())?;
            let address = |address: &str| {
                let (host, port) = address.rsplit_once(':')?;
                (!host.is_empty() && port.parse::<u16>().is_ok()).then(|| address.to_owned())
            };
            let addresses = addresses.split(',').map(address).collect::<Option<_>>()?;
            Some(Self { graph: graph.to_owned(), addresses })
        };
        parse().ok_or_else(|| RemoteGraphError { value: value.to_owned() })
    }
}

impl GraphPlaces {
    /// Whether `manifest`, of model `name`, has every graph that is named here.
    ///
    /// # Errors
    /// [`LoadError::UnknownGraph`].
    pub(super) fn check(&self, name: &str, manifest: &Manifest) -> Result<(), LoadError> {
        let mut named = self.only.iter().chain(self.remote.iter().map(|remote| &remote.graph));
        match named.find(|graph| manifest.graph(graph).is_none()) {
            None => Ok(()),
            Some(graph) => Err(LoadError::UnknownGraph {
                name: name.to_owned(),
                graph: graph.clone(),
                known: manifest.graphs.iter().map(|graph| graph.name.clone()).collect(),
            }),
        }
    }

    /// Whether `graph` is served.
    pub(super) fn is_served(&self, graph: &str) -> bool {
        self.are_all_served() || self.only.iter().any(|only| only == graph)
    }

    /// Whether every graph is served.
    pub(super) fn are_all_served(&self) -> bool {
        self.only.is_empty()
    }

    /// Where `graph` runs; nowhere for one that runs here.
    pub(super) fn addresses(&self, graph: &str) -> Vec<String> {
        let remote = self.remote.iter().filter(|remote| remote.graph == graph);
        remote.flat_map(|remote| remote.addresses.clone()).collect()
    }
}

/// The calls of `model` that may be under way at a time. Nobody is called yet. Must be called inside a Tokio runtime, on
/// which the calls then run; they are made from other threads.
pub(super) fn open(
    model: &str,
    signature: Signature,
    digest: String,
    addresses: Vec<String>,
    opening: &Opening,
) -> Vec<RemoteEngine> {
    let Opening { outgoing, max_message_bytes, .. } = opening;
    let peers = Peers::watch(addresses, outgoing.tls.clone());
    let (model, tokens, runtime) = (model.to_owned(), outgoing.tokens.clone(), Handle::current());
    vec![
        RemoteEngine { model, signature, digest, peers, tokens, max_message_bytes: *max_message_bytes, runtime };
        CALLS
    ]
}

/// A graph that another server runs.
#[derive(Clone, Debug)]
pub(super) struct RemoteEngine {
    model: String,
    signature: Signature,
    digest: String,
    peers: Arc<Peers>,
    tokens: Option<Reloaded<OwnTokens>>,
    max_message_bytes: usize,
    runtime: Handle,
}

impl Engine for RemoteEngine {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run_raw(&mut self, inputs: &[RawTensor], outputs: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
        self.run_for(inputs, outputs, Waiters { deadline: None, poll_gone: &mut |_| Poll::Pending })
    }

    fn run_for(
        &mut self,
        inputs: &[RawTensor],
        outputs: &[usize],
        waiters: Waiters<'_>,
    ) -> Result<Vec<RawTensor>, EngineError> {
        let request = self.request(inputs, outputs);
        // Rows that were prepared may be larger than what was sent. Half of a batch may fit, and is tried next.
        let (bytes, most) = (request.encoded_len(), self.max_message_bytes);
        if bytes > most {
            let reason = format!(
                "a call of {} would take {bytes} bytes, more than {most}, the limit of a message",
                self.peers.text()
            );
            return Err(EngineError::Run { reason });
        }
        let response = self.runtime.block_on(self.call(&request, waiters))?;
        let tensors = tensors(response, &request);
        tensors.map_err(|reason| EngineError::Run { reason: format!("{}: {reason}", self.peers.text()) })
    }
}

impl RemoteEngine {
    fn request(&self, inputs: &[RawTensor], outputs: &[usize]) -> ModelInferRequest {
        let input = |(spec, tensor): (&sensorium_engine::TensorSpec, &RawTensor)| InferInputTensor {
            name: spec.name.clone(),
            datatype: dtype_name(tensor.dtype()).to_owned(),
            shape: tensor.shape().to_vec(),
            ..InferInputTensor::default()
        };
        let output = |&output: &usize| InferRequestedOutputTensor {
            name: self.signature.outputs()[output].name.clone(),
            ..InferRequestedOutputTensor::default()
        };
        let digest = InferParameter { parameter_choice: Some(ParameterChoice::StringParam(self.digest.clone())) };
        ModelInferRequest {
            model_name: self.model.clone(),
            parameters: HashMap::from([(ARTIFACT_DIGEST.to_owned(), digest)]),
            inputs: self.signature.inputs().iter().zip(inputs).map(input).collect(),
            outputs: outputs.iter().map(output).collect(),
            raw_input_contents: inputs.iter().map(|tensor| tensor.data().clone()).collect(),
            ..ModelInferRequest::default()
        }
    }

    /// Asks until somebody answers, the time is over, or nobody waits any more. Dropping a call takes it back where it runs,
    /// too: there it leaves its queue.
    async fn call(&self, request: &ModelInferRequest, waiters: Waiters<'_>) -> Result<ModelInferResponse, EngineError> {
        let limit = Instant::now() + LIMIT;
        let deadline = waiters.deadline.map_or(limit, |deadline| deadline.min(limit));
        let address = || self.peers.text();
        tokio::select! {
            // What is there already counts, whoever has left meanwhile.
            biased;
            answer = self.ask(request, deadline) => answer,
            () = time::sleep_until(deadline.into()) => Err(if deadline < limit {
                EngineError::CutShort
            } else {
                EngineError::Unavailable { address: address(), reason: format!("no answer within {LIMIT:?}") }
            }),
            () = poll_fn(|context| (waiters.poll_gone)(context)) => Err(EngineError::CutShort),
        }
    }

    /// Asks one server after the other until one answers.
    async fn ask(&self, request: &ModelInferRequest, deadline: Instant) -> Result<ModelInferResponse, EngineError> {
        let mut pause = FIRST_PAUSE;
        let mut reason = "no address is known yet".to_owned();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                time::sleep(jittered(pause)).await;
                pause *= 2;
            }
            let Some(client) = self.peers.next() else { continue };
            match self.ask_one(client, request, deadline).await {
                Ok(response) => return Ok(response),
                Err(status) if is_absence(&status) => reason = error_line(&status),
                // Whoever says so goes by our own clock: the moment is here.
                Err(status) if status.code() == Code::DeadlineExceeded => std::future::pending().await,
                Err(status) => return Err(self.refused(&status)),
            }
        }
        Err(EngineError::Unavailable { address: self.peers.text(), reason })
    }

    /// Asks one server, with the next token where it does not know the one before: it may read a changed file later, or
    /// earlier, than this server does.
    async fn ask_one(
        &self,
        mut client: Client,
        request: &ModelInferRequest,
        deadline: Instant,
    ) -> Result<ModelInferResponse, Status> {
        let tokens = self.tokens.as_ref().map(Reloaded::get);
        let mut tokens = tokens.iter().flat_map(|tokens| tokens.headers());
        let mut token = tokens.next();
        loop {
            let mut call = Request::new(request.clone());
            call.set_timeout(deadline.saturating_duration_since(Instant::now()));
            if let Some(trace) = Parent::current().and_then(|parent| parent.traceparent().parse().ok()) {
                call.metadata_mut().insert("traceparent", trace);
            }
            if let Some(token) = token {
                call.metadata_mut().insert("authorization", token.clone());
            }
            match client.model_infer(call).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) if status.code() == Code::Unauthenticated => match tokens.next() {
                    Some(next) => token = Some(next),
                    None => return Err(status),
                },
                Err(status) => return Err(status),
            }
        }
    }

    /// What an answer other than tensors means: that the graph failed, or that this server can't run it for anybody,
    /// because it is of another artifact, say, or overloaded.
    fn refused(&self, status: &Status) -> EngineError {
        let address = self.peers.text();
        let reason = format!("{:?}: {}", status.code(), status.message());
        match status.code() {
            Code::Internal | Code::InvalidArgument => {
                EngineError::Run { reason: format!("{address} answered {reason}") }
            }
            _ => EngineError::Unavailable { address, reason },
        }
    }
}

/// The tensors of an answer, which has to have those that were asked for.
fn tensors(response: ModelInferResponse, request: &ModelInferRequest) -> Result<Vec<RawTensor>, String> {
    let names = |outputs: &mut dyn Iterator<Item = &String>| outputs.cloned().collect::<Vec<_>>().join(", ");
    let found = names(&mut response.outputs.iter().map(|output| &output.name));
    let wanted = names(&mut request.outputs.iter().map(|output| &output.name));
    if found != wanted || response.raw_output_contents.len() != response.outputs.len() {
        return Err(format!("it was asked for {wanted} and answered {found}"));
    }
    let tensor = |(output, data): (_, Bytes)| {
        let InferOutputTensor { name, datatype, shape, .. } = output;
        let dtype = wire::datatype(&datatype).ok_or_else(|| format!("its output {name} is of type {datatype}"))?;
        RawTensor::new(dtype, shape, data).map_err(|error| format!("its output {name}: {error}"))
    };
    response.outputs.into_iter().zip(response.raw_output_contents).map(tensor).collect()
}

/// Whether nobody answered, or somebody who is about to leave. Only what happened on this side has a cause; an inference
/// changes nothing, so that it can be asked again whatever became of it.
fn is_absence(status: &Status) -> bool {
    status.code() == Code::Unavailable || std::error::Error::source(status).is_some()
}

/// Between half and all of `pause`, so that those who failed together do not come back together.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish() >> 32;
    pause.mul_f64(0.5 + 0.5 * random as f64 / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_graph_is_a_name_and_addresses() {
        let remote: RemoteGraph = "image_encoder=10.0.0.1:8001,[::1]:9".parse().unwrap();
        assert_eq!((remote.graph.as_str(), remote.addresses.len()), ("image_encoder", 2));
        for value in ["image_encoder", "=a:1", "g=", "g=host", "g=:1", "g=a:1,", "g=a:70000", "g=http://a"] {
            let error = value.parse::<RemoteGraph>().unwrap_err();
            assert!(error.to_string().contains("GRAPH=HOST:PORT"), "{error}");
        }
    }

    #[test]
    fn pauses_differ_and_stay_within_their_bounds() {
        let pauses: Vec<Duration> = (0..64).map(|_| jittered(FIRST_PAUSE)).collect();
        assert!(pauses.iter().all(|pause| (FIRST_PAUSE / 2..=FIRST_PAUSE).contains(pause)), "{pauses:?}");
        assert!(pauses.iter().any(|pause| *pause != pauses[0]));
    }

    #[test]
    fn only_what_nobody_answered_is_asked_again() {
        assert!(is_absence(&Status::unavailable("draining")));
        assert!(is_absence(&Status::from_error(Box::new(std::io::Error::from(std::io::ErrorKind::BrokenPipe)))));
        assert!(!is_absence(&Status::failed_precondition("another artifact")));
        assert!(!is_absence(&Status::unknown("it said so itself")));
    }
}

//! Inference: decode, run, encode.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use futures::future::{Either, ready};
use sensorium_proto::inference::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse};
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::task::{AbortOnDropHandle, task_tracker::TaskTrackerToken};
use tonic::{Code, Status, Streaming, codegen::http::HeaderMap};
use tracing::{Instrument as _, Span};

use super::{
    Call, Service, mark,
    replies::{Begun, End, Replies},
};
use crate::{
    budget::{Taken, Tally},
    error::InferError,
    model::{ModelVersion, Request},
    spans, wire,
};

/// Requests of one stream that are worked on at a time; many more where they are of sequences, which may wait for what comes behind
/// them. A client that sends more waits, by the flow control of HTTP/2.
const IN_FLIGHT: usize = 64;
/// Bytes of a request that is under way, beside its message: its task, and what it waits with.
const UNDER_WAY: usize = 8 << 10;
/// A stream on which nothing has happened for so long does not hold a drain: its client may be about to send for longer than a
/// message takes to come, and not for longer than anybody wants to wait.
const QUIET: Duration = Duration::from_secs(1);

impl Service {
    /// One request, one response.
    ///
    /// # Errors
    /// What the caller is told: [`InferError::code`] chooses the code.
    pub async fn infer(&self, request: ModelInferRequest, call: &Call) -> Result<ModelInferResponse, Status> {
        let model = self.model(&request.model_name, &request.model_version);
        self.counted(model, request, call, |model| {
            if model.is_decoupled() { Err(InferError::Decoupled { model: model.name().to_owned() }) } else { Ok(()) }
        })
        .await
    }

    /// As [`Service::infer`], for ways in that could carry several responses and get one all the same.
    ///
    /// # Errors
    /// As there, but that the model may be decoupled. One that iterates is for [`Service::infer_many`].
    pub(crate) async fn infer_one(
        &self,
        model: Arc<ModelVersion>,
        request: ModelInferRequest,
        call: &Call,
    ) -> Result<ModelInferResponse, Status> {
        self.counted(Ok(model), request, call, |_| Ok(())).await
    }

    /// Answers the requests of a stream: those that have one response in their order, each as soon as it and those before it
    /// are done, and those that have several beside them. A request that fails is answered in its place, and the stream
    /// goes on, unless it `ends_on_error`, with the status of that.
    pub(super) fn infer_stream(
        self,
        requests: Streaming<ModelInferRequest>,
        call: Call,
        tally: Option<Tally>,
        ends_on_error: bool,
    ) -> impl Stream<Item = Result<ModelStreamInferResponse, Status>> {
        let end = End::new(self.draining.clone(), QUIET);
        let shared = Arc::new((self, call));
        let answer = move |request: Result<ModelInferRequest, Status>| {
            let request = request.map_err(as_other_servers_say);
            let shared = shared.clone();
            // A stream may last for days: each of its messages gives its bytes back when it is answered.
            let message = tally.as_ref().filter(|_| request.is_ok()).and_then(Tally::claim_message);
            let grown = request.as_ref().map_or(Ok(None), |request| shared.0.claim_growth(request));
            let found = request.as_ref().map(|request| {
                let model = shared.0.model(&request.model_name, &request.model_version);
                (model, request.id.clone(), request.model_name.clone())
            });
            let found = found.map_err(Status::clone);
            let is_of_sequence = matches!(&found, Ok((Ok(model), ..)) if model.has_sequences());
            // Of these there may be many, each of which is more than its message.
            let kept = grown.and_then(|grown| {
                let kept = is_of_sequence.then(|| shared.0.budget.claim(UNDER_WAY)).transpose();
                kept.map(|kept| (grown, kept)).map_err(Status::from)
            });
            let grown = kept.inspect_err(|status| shared.0.refused(status.code()));
            match (found, request) {
                (Ok((Ok(model), id, name)), Ok(request)) if model.iterates() && grown.is_ok() => {
                    let answers = shared.0.infer_many(model, request, shared.1.clone());
                    Begun::Many(answers.map(move |answer| {
                        let _held = (&message, &grown);
                        (in_band(answer, id.clone(), name.clone(), ends_on_error), None)
                    }))
                }
                (found, request) => {
                    let answer = async move {
                        let _message = message;
                        let (service, call) = &*shared;
                        // The connection, or what came over it, is broken: there is nothing to answer.
                        let (model, id, name) = found?;
                        let answer = match grown {
                            Ok(_grown) => service.counted(model, request?, call, |_| Ok(())).await,
                            Err(status) => Err(status),
                        };
                        // It may wait for those before it, and for a client that does not read.
                        let bytes = answer.iter().flat_map(|answer| &answer.raw_output_contents).map(Bytes::len).sum();
                        Ok((in_band(answer, id, name, ends_on_error)?, service.budget.overdraw(bytes)))
                    };
                    // It begins here, so that those of a sequence enter it in their order. A stream is polled while its client reads,
                    // and a request goes on all the same: others may wait for it, in a batch, a cache or a line.
                    let mut answer = Box::pin(answer.in_current_span());
                    let answer = match answer.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                        Poll::Ready(answer) => Either::Left(ready(Ok(answer))),
                        Poll::Pending => Either::Right(AbortOnDropHandle::new(tokio::spawn(answer))),
                    };
                    let answer = async move {
                        match answer.await.unwrap_or_else(|_| Err(Status::internal("the request was cut short"))) {
                            Ok((answer, room)) => (Ok(answer), Some(room)),
                            Err(status) => (Err(status), None),
                        }
                    };
                    if is_of_sequence { Begun::InSequence(answer) } else { Begun::One(answer) }
                }
            }
        };
        // Whoever is about to send more learns that it has to go elsewhere.
        let over = || (Err(Status::unavailable("this server ends; send what comes next to another one")), None);
        Replies::new(requests, answer, IN_FLIGHT, end, over).map(|(answer, _room)| answer)
    }

    /// Runs a request to `model`, if there is one and `accept` has nothing against it, counted and traced.
    async fn counted(
        &self,
        model: Result<Arc<ModelVersion>, Status>,
        request: ModelInferRequest,
        call: &Call,
        accept: impl FnOnce(&ModelVersion) -> Result<(), InferError>,
    ) -> Result<ModelInferResponse, Status> {
        let name = request.model_name.clone();
        let served = model.as_ref().ok().cloned();
        let version = served.as_ref().map(|model| model.version());
        let span = self.traces.request_span(&name, version, &request.id, call.parent.as_ref());
        // Pinned here: a future that is handed on by value has room for itself in each of those that it is handed to.
        let answer = pin!(async {
            let model = model?;
            accept(&model)
                .inspect_err(|error| model.refused(error.code()))
                .map_err(|error| error.into_status(&name))?;
            self.run(&model, request, call).await.map_err(|error| error.into_status(&name))
        });
        self.observed(served.as_deref().map(ModelVersion::name), answer).instrument(span).await
    }

    async fn run(
        &self,
        model: &ModelVersion,
        request: ModelInferRequest,
        call: &Call,
    ) -> Result<ModelInferResponse, InferError> {
        let id = request.id.clone();
        let begun = self.begin(model, request, call).inspect_err(|error| model.refused(error.code()));
        let (_running, _room, request, reply) = begun?;
        let answer = within(call, pin!(model.infer(request))).await?;
        spans::timed(&Span::current(), &answer.timings);
        Ok(wire::encode(model, id, answer, &reply)?)
    }

    /// What a request needs before its model hears of it: a place among those that the drain waits for, and room for its answer.
    fn begin(
        &self,
        model: &ModelVersion,
        request: ModelInferRequest,
        call: &Call,
    ) -> Result<(TaskTrackerToken, Taken, Request, wire::Reply), InferError> {
        let running = self.admit(call)?;
        let wire::Decoded { mut request, reply } = wire::decode(request, &self.memory)?;
        request.deadline = call.deadline;
        // Before anything runs: what is refused here has changed nothing, and may be tried again. Nobody knows how long an answer
        // stays that nobody reads.
        // One that finds little under way is let in whatever is expected, and shows whether that still holds.
        let expected = model.expected_answer(&request).min(self.budget.limit() / 2);
        let room = self.budget.claim(expected)?;
        Ok((running, room, request, reply))
    }

    /// A call that has come so far: the drain waits for the rest of it.
    ///
    /// # Errors
    /// That there is one already.
    pub(crate) fn call(&self, headers: &HeaderMap) -> Result<Call, Status> {
        let mut call = Call::new(headers);
        let running = self.admit(&call).map_err(|error| error.into_status(""));
        call.running = Some(running.inspect_err(|status| self.refused(status.code()))?);
        Ok(call)
    }

    /// A place among those that the drain waits for.
    pub(super) fn admit(&self, call: &Call) -> Result<TaskTrackerToken, InferError> {
        match &call.running {
            Some(running) => Ok(running.clone()),
            None if self.running.is_closed() => Err(InferError::Draining),
            None => Ok(self.running.token()),
        }
    }
}

/// Waits for `answer` until the call's deadline. What is given up leaves its queue by being dropped.
pub(super) async fn within<T>(
    call: &Call,
    answer: Pin<&mut impl Future<Output = Result<T, InferError>>>,
) -> Result<T, InferError> {
    match call.deadline {
        None => answer.await,
        Some(deadline) => {
            tokio::time::timeout_at(deadline.into(), answer).await.unwrap_or(Err(InferError::DeadlineExceeded))
        }
    }
}

/// An answer as streams carry it: an error in words beside the request's id, so that the stream goes on, unless it ends with that.
fn in_band(
    answer: Result<ModelInferResponse, Status>,
    id: String,
    model_name: String,
    ends_on_error: bool,
) -> Result<ModelStreamInferResponse, Status> {
    let (error_message, mut response) = match answer {
        Ok(response) => (String::new(), response),
        Err(status) if ends_on_error => return Err(status),
        Err(status) => {
            (status.message().to_owned(), ModelInferResponse { model_name, id, ..ModelInferResponse::default() })
        }
    };
    // The responses of a request that has several say so themselves, but for an error, which is the last.
    mark(&mut response, true);
    Ok(ModelStreamInferResponse { error_message, infer_response: Some(response) })
}

/// As every gRPC library but tonic says that a message is too long, which is the only thing here to be out of a range.
fn as_other_servers_say(status: Status) -> Status {
    match status.code() {
        Code::OutOfRange => Status::resource_exhausted(status.message()),
        _ => status,
    }
}

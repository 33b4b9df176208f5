//! Requests that have several responses: the loop over the steps, and who waits for whom.
//!
//! The loop is a task of its own, so that its deadline passes and its place is given back also while its reader is slow. It
//! is one response ahead of the reader at most, and ends with whoever holds the [`Answers`].

use std::{
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};

use sensorium_proto::inference::{
    InferParameter, ModelInferRequest, ModelInferResponse, infer_parameter::ParameterChoice,
};
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};
use tokio_stream::Stream;
use tokio_util::task::{AbortOnDropHandle, task_tracker::TaskTrackerToken};
use tonic::Status;
use tracing::Instrument as _;

use super::{Call, Service, infer::within};
use crate::{
    error::InferError,
    model::ModelVersion,
    wire::{self, Form, InvalidRequest},
};

/// Marks a request's last response on a stream.
const FINAL_RESPONSE: &str = "triton_final_response";

/// Says of a response whether it is its request's last, unless that is said already.
pub(crate) fn mark(response: &mut ModelInferResponse, is_last: bool) {
    let parameter = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(is_last)) };
    response.parameters.entry(FINAL_RESPONSE.to_owned()).or_insert(parameter);
}

type Answer = Result<ModelInferResponse, Status>;

/// The responses of one request, each marked; the last one is marked as that, or an error. Dropping this ends the request.
#[derive(Debug)]
pub(crate) struct Answers {
    responses: mpsc::Receiver<Result<(ModelInferResponse, bool), Status>>,
    is_over: bool,
    _loop: AbortOnDropHandle<()>,
}

impl Stream for Answers {
    type Item = Answer;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Answer>> {
        let answer = match std::task::ready!(self.responses.poll_recv(context)) {
            Some(Ok((mut response, is_last))) => {
                mark(&mut response, is_last);
                self.is_over = is_last;
                Ok(response)
            }
            Some(Err(status)) => {
                self.is_over = true;
                Err(status)
            }
            None if self.is_over => return Poll::Ready(None),
            // The loop panicked, and who waits for its end shall hear of it.
            None => {
                self.is_over = true;
                Err(Status::internal("the request ended without its last response"))
            }
        };
        Poll::Ready(Some(answer))
    }
}

impl Service {
    /// Answers a request to a model that iterates, counted and traced as one.
    pub(crate) fn infer_many(&self, model: Arc<ModelVersion>, request: ModelInferRequest, call: Call) -> Answers {
        let (out, responses) = mpsc::channel(1);
        let service = self.clone();
        let span =
            self.traces.request_span(&request.model_name, Some(model.version()), &request.id, call.parent.as_ref());
        let answered = async move {
            let name = request.model_name.clone();
            let ended = {
                let steps = pin!(async {
                    let steps = pin!(service.iterate(&model, request, &call, &out));
                    within(&call, steps).await.map_err(|error| error.into_status(&name))
                });
                service.observed(Some(model.name()), steps).await
            };
            // Whoever unloads the model waits for this.
            drop(model);
            if let Err(status) = ended {
                // The place is free already: this may wait for a slow reader as long as that wants.
                let _ = out.send(Err(status)).await;
            }
        };
        Answers { responses, is_over: false, _loop: AbortOnDropHandle::new(tokio::spawn(answered.instrument(span))) }
    }

    /// Runs step after step, each when the response before it was taken.
    async fn iterate(
        &self,
        model: &Arc<ModelVersion>,
        request: ModelInferRequest,
        call: &Call,
        out: &mpsc::Sender<Result<(ModelInferResponse, bool), Status>>,
    ) -> Result<(), InferError> {
        let id = request.id.clone();
        let decoded = self.decoded(request, call).inspect_err(|error| model.refused(error.code()));
        let (_running, wire::Decoded { mut request, reply }) = decoded?;
        request.deadline = call.deadline;
        let (patience, asked) = (model.patience(), Instant::now());
        let steps = async {
            let mut is_first = true;
            let mut steps = model.clone().begin(request).await?;
            loop {
                // A step begins when there is room for its response: a slow reader stops the loop.
                let room = time::timeout(patience, out.reserve()).await;
                // Where nobody is left to read, nobody is left to be told.
                let Ok(Ok(room)) = room else { return Err(InferError::Unread { patience }) };
                let Some(step) = steps.next().await else { return Ok(()) };
                let (response, is_last) = step?;
                if std::mem::take(&mut is_first) {
                    self.metrics.first_response(model.name(), model.version(), asked.elapsed());
                }
                let response = wire::encode(model, id.clone(), response, &reply)?;
                room.send(Ok((response, is_last)));
                if is_last {
                    return Ok(());
                }
            }
        };
        tokio::select! {
            ended = steps => ended,
            () = self.cut_short.cancelled() => Err(InferError::Draining),
        }
    }

    /// A place among those that the drain waits for, and what is asked.
    fn decoded(
        &self,
        request: ModelInferRequest,
        call: &Call,
    ) -> Result<(TaskTrackerToken, wire::Decoded), InferError> {
        let running = self.admit(call)?;
        let decoded = wire::decode(request, &self.memory)?;
        if let Some((output, _)) = decoded.reply.outputs.iter().find(|(_, form)| matches!(form, Form::Shared(_))) {
            return Err(InferError::Invalid(InvalidRequest::Parameter {
                at: format!("output {:?}", wire::excerpt(output)),
                name: "shared_memory_region".to_owned(),
                reason: "the model has several responses, and each would overwrite the one before",
            }));
        }
        Ok((running, decoded))
    }
}

//! `sensorium.v1`: typed parts in, answers or embeddings out.

use std::pin::pin;

use sensorium_proto::multimodal::{
    Answer, Embedding, Image, InferRequest, InferResponse, Part, multimodal_service_server::MultimodalService,
    part::Content,
};
use tonic::{Request, Response, Status, async_trait};
use tracing::Instrument as _;

use super::{Call, Service, infer::within};
use crate::{
    error::{InferError, PartsError},
    model::{Item, Multimodal, Task},
    wire::excerpt,
};

/// Parts of a request at most, before anything is known about its task.
const MAX_PARTS: usize = 1024;

#[async_trait]
impl MultimodalService for Service {
    async fn infer(&self, request: Request<InferRequest>) -> Result<Response<InferResponse>, Status> {
        let call = Call::new(request.metadata().as_ref());
        let request = request.into_inner();
        let name = request.model.clone();
        let model = self.repository()?.multimodal(&name);
        let is_served = model.is_ok();
        let span = self.traces.request_span(&name, is_served.then_some(""), &request.id, call.parent.as_ref());
        let answer = async {
            let _running = self.admit(&call)?;
            let (model, rows) = (model?, request.parts.len());
            let rows = if model.task(&request.task).is_ok_and(|task| task == Task::Embed) { rows } else { 1 };
            model.counted(rows, within(&call, pin!(perform(&model, request, &call)))).await
        };
        let answer = pin!(async { answer.await.map_err(|error: InferError| error.into_status(&name)) });
        self.observed(is_served.then_some(&name), answer).instrument(span).await.map(Response::new)
    }
}

async fn perform(model: &Multimodal, request: InferRequest, call: &Call) -> Result<InferResponse, InferError> {
    let task = model.task(&request.task)?;
    if request.parts.len() > MAX_PARTS {
        return Err(PartsError::Count { task: task.as_str(), found: request.parts.len(), max: MAX_PARTS }.into());
    }
    let items: Vec<Item> = request.parts.into_iter().enumerate().map(item).collect::<Result<_, PartsError>>()?;
    let mut response = InferResponse {
        model: request.model,
        model_digest: model.digest().to_owned(),
        id: request.id,
        task: task.as_str().to_owned(),
        ..InferResponse::default()
    };
    match task {
        Task::Vqa => {
            let top = request.parameters.map_or(0, |parameters| parameters.top_k).max(1) as usize;
            let ranked = model.answer(items, call.deadline).await?.ranked;
            response.answers = ranked.into_iter().take(top).map(|(text, score)| Answer { text, score }).collect();
        }
        Task::Embed => {
            let modalities: Vec<&str> = items.iter().map(|item| item.modality).collect();
            let vectors = model.embed(items, call.deadline).await?;
            let embedding = |(modality, values): (&str, Vec<f32>)| Embedding { modality: modality.to_owned(), values };
            response.embeddings = modalities.into_iter().zip(vectors).map(embedding).collect();
        }
    }
    Ok(response)
}

fn item((index, part): (usize, Part)) -> Result<Item, PartsError> {
    match part.content {
        Some(Content::Text(text)) => Ok(Item { modality: "text", bytes: text.text.into() }),
        Some(Content::Image(image)) => {
            check_media_type(index, &image)?;
            Ok(Item { modality: "image", bytes: image.data })
        }
        None => Err(PartsError::Empty { part: index }),
    }
}

/// A declared type has to be the file's: a client that mixes files up should hear of it, not get an answer.
fn check_media_type(part: usize, image: &Image) -> Result<(), PartsError> {
    const KNOWN: [&str; 3] = ["image/png", "image/jpeg", "image/webp"];
    let declared = image.media_type.as_str();
    if declared.is_empty() {
        return Ok(());
    }
    let refuse = |reason: String| Err(PartsError::MediaType { part, declared: excerpt(declared), reason });
    if !KNOWN.contains(&declared) {
        return refuse(format!("use {}, or leave it empty", KNOWN.join(", ")));
    }
    match sniff(&image.data) {
        // Files of no known type are left to the decoder, which says what they look like.
        Some(found) if found != declared => refuse(format!("but its first bytes are those of {found}")),
        _ => Ok(()),
    }
}

/// The media type that the first bytes of a file stand for.
fn sniff(data: &[u8]) -> Option<&'static str> {
    if data.starts_with(b"\x89PNG\r\n\x1a\n") {
        Some("image/png")
    } else if data.starts_with(b"\xff\xd8\xff") {
        Some("image/jpeg")
    } else if data.starts_with(b"RIFF") && data.get(8..12) == Some(b"WEBP") {
        Some("image/webp")
    } else {
        None
    }
}

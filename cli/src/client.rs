//! Questions to a running server, through its public API.

use sensorium_proto::multimodal::multimodal_service_client::MultimodalServiceClient;
use sensorium_proto::multimodal::part::Content;
use sensorium_proto::multimodal::{Image, InferParameters, InferRequest, InferResponse, Part, Text};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

use crate::error::Error;

/// A server that has not accepted a connection by then is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A question takes milliseconds; a server that takes this long is stuck.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to one server.
pub struct Client {
    address: String,
    service: MultimodalServiceClient<Channel>,
}

impl Client {
    /// Connects to `HOST:PORT`, or to an `http://` URL.
    ///
    /// # Errors
    /// [`Error::Connect`] when nobody answers there.
    pub async fn connect(address: &str) -> Result<Self, Error> {
        let url = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
        let refused = |source| Error::Connect { address: address.to_owned(), source };
        let endpoint = Endpoint::from_shared(url).map_err(refused)?;
        let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT).timeout(ANSWER_TIMEOUT);
        let channel = endpoint.connect().await.map_err(refused)?;
        Ok(Self { address: address.to_owned(), service: MultimodalServiceClient::new(channel) })
    }

    /// Asks `model` a question about an image (a PNG, JPEG or WebP file). The answer has at least one entry, best first.
    ///
    /// # Errors
    /// [`Error::Ask`] with the server's own words.
    pub async fn ask(
        &mut self,
        model: &str,
        image: Vec<u8>,
        question: &str,
        top_k: u32,
    ) -> Result<InferResponse, Error> {
        let part = |content| Part { content: Some(content) };
        let request = InferRequest {
            model: model.to_owned(),
            task: "vqa".to_owned(),
            parts: vec![
                part(Content::Image(Image { data: image.into(), media_type: String::new() })),
                part(Content::Text(Text { text: question.to_owned() })),
            ],
            parameters: Some(InferParameters { top_k }),
            ..InferRequest::default()
        };
        let failed = |status: tonic::Status| Error::Ask {
            address: self.address.clone(),
            code: status.code(),
            message: status.message().to_owned(),
        };
        let response = self.service.infer(request).await.map_err(failed)?.into_inner();
        if response.answers.is_empty() {
            return Err(failed(tonic::Status::internal("the server returned no answer")));
        }
        Ok(response)
    }
}

//! Objects of any size, over connections that break.

use bytes::Bytes;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use object_store::aws::AmazonS3;
use object_store::path::Path as Key;
use object_store::{Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt};

/// An object on its way here.
///
/// The client takes a transfer that broke up where it was, but no more than three minutes after it asked: a file that takes
/// longer would not survive its first break. So what breaks is asked for anew, from where it was, as long as every
/// request brings something.
pub(crate) struct Transfer<'a> {
    client: &'a AmazonS3,
    key: &'a Key,
    /// Of the object that the bytes are from: another may have taken its key since.
    tag: Option<String>,
    pieces: BoxStream<'static, object_store::Result<Bytes>>,
    received_bytes: u64,
    /// Whether the last request brought something.
    has_progressed: bool,
}

impl<'a> Transfer<'a> {
    /// Asks for an object; `None` when there is none.
    pub(crate) async fn begin(client: &'a AmazonS3, key: &'a Key) -> object_store::Result<Option<Self>> {
        let object = match client.get(key).await {
            Ok(object) => object,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let tag = object.meta.e_tag.clone();
        Ok(Some(Self { client, key, tag, pieces: object.into_stream(), received_bytes: 0, has_progressed: false }))
    }

    /// The next piece; `None` after the last.
    pub(crate) async fn next(&mut self) -> object_store::Result<Option<Bytes>> {
        loop {
            let error = match self.pieces.try_next().await {
                Ok(Some(piece)) => {
                    self.received_bytes += piece.len() as u64;
                    self.has_progressed = true;
                    return Ok(Some(piece));
                }
                Ok(None) => return Ok(None),
                Err(error) => error,
            };
            if !std::mem::take(&mut self.has_progressed) || self.tag.is_none() {
                return Err(error);
            }
            tracing::info!(key = %self.key, received_bytes = self.received_bytes, %error, "a download broke and goes on");
            let rest = GetOptions { range: Some(GetRange::Offset(self.received_bytes)), ..GetOptions::default() };
            let object = self.client.get_opts(self.key, rest).await?;
            if object.meta.e_tag != self.tag {
                return Err(error);
            }
            self.pieces = object.into_stream();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use axum::Router;
    use axum::body::Body;
    use axum::extract::Request;
    use axum::http::{Response, StatusCode, header};
    use futures::{StreamExt, stream};
    use object_store::RetryConfig;
    use object_store::aws::AmazonS3Builder;

    use super::*;

    const CONTENT: &[u8] = b"a file that takes many requests";

    /// A server of one object, of which no request brings more than `bytes` before its connection breaks. Each request finds
    /// the tag that `tag` has for its number.
    async fn server(bytes: usize, tag: fn(usize) -> &'static str) -> AmazonS3 {
        let requests = Arc::new(AtomicUsize::new(0));
        let answer = move |request: Request| {
            let tag = tag(requests.fetch_add(1, Ordering::Relaxed));
            let range = request.headers().get(header::RANGE).map(|range| range.to_str().unwrap());
            let begin = range.map_or(0, |range| range["bytes=".len()..].trim_end_matches('-').parse().unwrap());
            let (rest, last) = (&CONTENT[begin..], CONTENT.len() - 1);
            let mut response = Response::builder()
                .header(header::CONTENT_LENGTH, rest.len())
                .header(header::ETAG, tag)
                .header(header::LAST_MODIFIED, "Wed, 21 Oct 2015 07:28:00 GMT");
            if range.is_some() {
                let range = format!("bytes {begin}-{last}/{}", CONTENT.len());
                response = response.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, range);
            }
            let sent = rest.len().min(bytes);
            let piece = (sent > 0).then(|| Ok(Bytes::from_static(&rest[..sent])));
            let is_broken = sent < rest.len();
            let breaks = stream::iter(is_broken.then_some(())).then(|()| async {
                // What breaks before it is flushed would never have begun.
                tokio::time::sleep(Duration::from_millis(20)).await;
                Err(std::io::Error::other("the connection breaks"))
            });
            let response = response.body(Body::from_stream(stream::iter(piece).chain(breaks))).unwrap();
            async move { response }
        };
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        // Ends with the test's runtime.
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let builder = AmazonS3Builder::new().with_endpoint(endpoint).with_allow_http(true).with_bucket_name("models");
        builder.with_skip_signature(true).with_retry(retry).build().unwrap()
    }

    async fn download(client: &AmazonS3) -> object_store::Result<Vec<u8>> {
        let key = Key::from("model");
        let mut transfer = Transfer::begin(client, &key).await?.unwrap();
        let mut received = Vec::new();
        while let Some(piece) = transfer.next().await? {
            received.extend_from_slice(&piece);
        }
        Ok(received)
    }

    #[tokio::test]
    async fn a_download_that_breaks_goes_on_where_it_was_as_often_as_that_brings_something() {
        assert_eq!(download(&server(5, |_| "\"one\"").await).await.unwrap(), CONTENT);
        download(&server(0, |_| "\"one\"").await).await.unwrap_err();
    }

    #[tokio::test]
    async fn halves_of_two_objects_are_not_put_together() {
        let another = |request| if request < 2 { "\"one\"" } else { "\"two\"" };
        download(&server(5, another).await).await.unwrap_err();
    }
}

//! Bodies of requests and responses: bounded, compressed where the client wants it, in pieces where that saves a copy.

use std::{
    collections::VecDeque,
    convert::Infallible,
    error::Error,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::Body,
    extract::{FromRequest, Request},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use flate2::{
    Compression,
    write::{GzEncoder, ZlibEncoder},
};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt as _;
use serde::de::DeserializeOwned;

use super::{Refusal, response::Written};
use crate::{
    aligned::Aligned,
    blocking::aside,
    budget::{Spent, Tally},
    coding::{Coding, InflateError},
};

/// Tells where the JSON of a body with binary tensors ends.
pub(super) const HEADER_LENGTH: &str = "inference-header-content-length";

/// A body that is on its way, and what holds its bytes.
#[derive(Debug)]
pub(super) struct Arriving {
    body: Body,
    /// `None` where nobody counts them.
    tally: Option<Tally>,
}

impl<S: Sync> FromRequest<S> for Arriving {
    type Rejection = Infallible;

    async fn from_request(request: Request, _: &S) -> Result<Self, Infallible> {
        let tally = request.extensions().get::<Tally>().cloned();
        Ok(Self { body: request.into_body(), tally })
    }
}

impl Arriving {
    pub(super) fn new(body: Body, tally: Tally) -> Self {
        Self { body, tally: Some(tally) }
    }

    /// What holds the bytes of the request; for whoever needs them after its answer has begun.
    pub(super) fn tally(&self) -> Option<Tally> {
        self.tally.clone()
    }
}

/// Reads a whole body of at most `max` bytes, decompressed if need be.
///
/// # Errors
/// 413 for more than that, 429 where requests hold too much already, 415 for an unknown compression, 400 for a body that is
/// not what it says or does not arrive.
pub(super) async fn read(headers: &HeaderMap, arriving: Arriving, max: usize) -> Result<Bytes, Refusal> {
    read_as(headers, arriving, max, false).await
}

/// As [`read`], of a body that may not be compressed although a header says so: Triton's client writes what it says of an inference into the
/// headers of its caller, who hands them on to calls that are about something else.
///
/// # Errors
/// As there.
pub(super) async fn read_settings(headers: &HeaderMap, arriving: Arriving, max: usize) -> Result<Bytes, Refusal> {
    read_as(headers, arriving, max, true).await
}

async fn read_as(headers: &HeaderMap, arriving: Arriving, max: usize, may_be_plain: bool) -> Result<Bytes, Refusal> {
    let Arriving { body, tally } = arriving;
    let too_large = || {
        let message = format!("the body has more than {max} bytes, the limit of this server");
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let encoding = headers.get(header::CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("?").trim());
    let coding = match encoding.filter(|name| !name.is_empty() && *name != "identity") {
        None => None,
        Some(name) => Some(Coding::parse(name).ok_or_else(|| {
            let message = format!("Content-Encoding is {:?}; use gzip, deflate or none", crate::wire::excerpt(name));
            Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
        })?),
    };
    // Said in advance, so there is no need to read any of it.
    let announced = body.size_hint().lower();
    if announced > max as u64 {
        return Err(too_large());
    }
    if let Some(tally) = &tally {
        tally.foresee(announced as usize)?;
    }
    let header_length = headers.get(HEADER_LENGTH).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    let body = gathered(body, max, header_length.unwrap_or(0)).await.map_err(|error| match error {
        None => too_large(),
        Some(error) => match cause::<Spent>(&error) {
            Some(found) => (*found).into(),
            None => Refusal::invalid(format!("the body did not arrive: {error}")),
        },
    })?;
    let is_packed = |coding: &Coding| !body.is_empty() && (!may_be_plain || coding.begins(&body));
    let Some(coding) = coding.filter(is_packed) else { return Ok(body) };
    let inflated = aside(usize::MAX, move || {
        let inflated = coding.inflate(&body, max, tally.as_ref());
        if let Some(tally) = &tally {
            tally.give(body.len());
        }
        inflated
    });
    inflated.await.map_err(|error| match error {
        InflateError::TooLarge => too_large(),
        InflateError::Spent(found) => found.into(),
        InflateError::Broken(error) => Refusal::invalid(format!("the body is no {}: {error}", coding.name())),
    })
}

/// The pieces of a body as one. Where there are several, each is copied when it comes: the connection can use its memory for
/// the next one, and what begins at `start` comes to lie as engines want it.
///
/// # Errors
/// Why it did not arrive, `None` for more than `max` bytes.
async fn gathered(mut body: Body, max: usize, start: usize) -> Result<Bytes, Option<axum::Error>> {
    let announced = body.size_hint().exact();
    let mut whole: Option<Aligned> = None;
    while let Some(frame) = body.frame().await {
        // Trailers mean nothing.
        let Ok(piece) = frame?.into_data() else { continue };
        if piece.len() > max - whole.as_ref().map_or(0, Aligned::len) {
            return Err(None);
        }
        if whole.is_none() && body.is_end_stream() {
            return Ok(piece);
        }
        // No more than is allowed, as whoever calls has seen.
        let length = announced.map_or(piece.len(), |announced| announced as usize);
        whole.get_or_insert_with(|| Aligned::new(length, start)).put(piece);
    }
    Ok(whole.map(Aligned::freeze).unwrap_or_default())
}

/// The first error of this kind among an error and its causes.
fn cause<'a, E: Error + 'static>(mut error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    loop {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        error = error.source()?;
    }
}

/// Reads a body of JSON; an empty one is the default.
pub(super) async fn read_json<T: DeserializeOwned + Default>(
    headers: &HeaderMap,
    arriving: Arriving,
    max: usize,
) -> Result<T, Refusal> {
    let body = read_settings(headers, arriving, max).await?;
    if body.trim_ascii().is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&body).map_err(|error| Refusal::invalid(format!("the body is not as it should be: {error}")))
}

/// The response to an inference, compressed if the client asks for nothing else.
pub(super) async fn respond(headers: &HeaderMap, written: Written) -> Response {
    let mut response = Response::default();
    let set = response.headers_mut();
    if written.tensors.is_empty() {
        set.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    } else {
        set.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        set.insert(HEADER_LENGTH, HeaderValue::from(written.json.len()));
    }
    let mut pieces = VecDeque::with_capacity(1 + written.tensors.len());
    pieces.push_back(Bytes::from(written.json));
    pieces.extend(written.tensors);
    // Clients that list what they could read are most of all there are, and compressing floats gains them little: only
    // one that names a single compression means it.
    let accepted = headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok()).and_then(Coding::parse);
    if let Some(coding) = accepted {
        set.insert(header::CONTENT_ENCODING, HeaderValue::from_static(coding.name()));
        pieces = VecDeque::from([aside(usize::MAX, move || deflate(coding, &pieces)).await]);
    }
    *response.body_mut() = Body::new(Pieces(pieces));
    response
}

fn deflate(coding: Coding, pieces: &VecDeque<Bytes>) -> Bytes {
    fn all<W: io::Write>(mut out: W, pieces: &VecDeque<Bytes>) -> W {
        for piece in pieces {
            // Into memory, which does not fail.
            let _ = out.write_all(piece);
        }
        out
    }
    let level = Compression::fast();
    let out = match coding {
        Coding::Gzip => all(GzEncoder::new(Vec::new(), level), pieces).finish(),
        Coding::Deflate => all(ZlibEncoder::new(Vec::new(), level), pieces).finish(),
    };
    out.unwrap_or_default().into()
}

/// A body of several pieces of known length, each sent as it is.
#[derive(Debug)]
struct Pieces(VecDeque<Bytes>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.iter().map(|piece| piece.len() as u64).sum())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn arriving(body: impl Into<Body>) -> Arriving {
        Arriving { body: body.into(), tally: None }
    }

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    async fn compressed(coding: &str, body: &[u8]) -> (Option<HeaderValue>, Bytes) {
        let written = Written { json: body.to_vec(), tensors: vec![Bytes::from_static(b"tail")] };
        let response = respond(&headers(header::ACCEPT_ENCODING, coding), written).await;
        let coding = response.headers().get(header::CONTENT_ENCODING).cloned();
        (coding, response.into_body().collect().await.unwrap().to_bytes())
    }

    #[tokio::test]
    async fn what_is_sent_compressed_is_read_again() {
        let head = [7; 996];
        for coding in ["gzip", "deflate"] {
            let (said, body) = compressed(coding, &head).await;
            assert_eq!(said.unwrap(), coding);
            let headers = headers(header::CONTENT_ENCODING, coding);
            assert_eq!(read(&headers, arriving(body.clone()), 1000).await.unwrap(), [&head[..], b"tail"].concat());
            assert_eq!(read(&headers, arriving(body.clone()), 999).await.unwrap_err().status(), 413);
            let cut = body.slice(..body.len() - 5);
            assert_eq!(read(&headers, arriving(cut), 1000).await.unwrap_err().status(), 400);
        }
        for list in ["gzip, deflate", "br", "*", "identity"] {
            assert_eq!(compressed(list, b"head").await, (None, Bytes::from_static(b"headtail")), "{list}");
        }
    }

    #[tokio::test]
    async fn what_follows_the_header_is_aligned_in_a_body_of_many_pieces() {
        let (first, second, third) = (vec![1; 50], vec![2; 500], vec![3; 70]);
        let all = [&first[..], &second, &third].concat();
        let pieces = || VecDeque::from([&first, &second, &third].map(|piece| Bytes::from(piece.clone())));
        for header in [0, 1, 63, 64, 97] {
            let announced = Body::new(Pieces(pieces()));
            let chunked = pieces().into_iter().map(Ok::<_, Infallible>);
            for body in [announced, Body::from_stream(futures::stream::iter(chunked))] {
                let whole = gathered(body, all.len(), header).await.unwrap();
                assert_eq!(whole, all);
                assert_eq!(whole[header..].as_ptr().addr() % 64, 0);
            }
        }
        let one = Bytes::from_static(b"one piece");
        assert_eq!(gathered(one.clone().into(), one.len(), 5).await.unwrap().as_ptr(), one.as_ptr());
        assert_eq!(gathered(Body::empty(), 0, 5).await.unwrap(), Bytes::new());
        assert!(gathered(Body::new(Pieces(pieces())), all.len() - 1, 0).await.unwrap_err().is_none());
    }

    #[tokio::test]
    async fn a_bomb_costs_no_more_than_the_limit() {
        let mut bomb = GzEncoder::new(Vec::new(), Compression::best());
        bomb.write_all(&vec![0; 1 << 24]).unwrap();
        let bomb = Bytes::from(bomb.finish().unwrap());
        assert!(bomb.len() < 1 << 15);
        let refusal = read(&headers(header::CONTENT_ENCODING, "gzip"), arriving(bomb), 1 << 15).await.unwrap_err();
        assert_eq!(refusal.status(), 413);
    }

    #[tokio::test]
    async fn bodies_that_are_too_large_or_strangely_coded_are_refused() {
        let refusal = read(&HeaderMap::new(), arriving("12345"), 4).await.unwrap_err();
        assert_eq!(refusal.status(), 413);
        let refusal = read(&headers(header::CONTENT_ENCODING, "zstd"), arriving("1"), 4).await.unwrap_err();
        assert_eq!(refusal.status(), 415);
    }

    #[tokio::test]
    async fn the_length_is_known_before_the_pieces_are_sent() {
        let written = Written { json: b"{}".to_vec(), tensors: vec![Bytes::from_static(b"1234")] };
        let response = respond(&HeaderMap::new(), written).await;
        assert_eq!(response.headers()[HEADER_LENGTH], "2");
        assert_eq!(http_body::Body::size_hint(response.body()).exact(), Some(6));
    }
}

//! Bodies of requests that are read to their end, also by those who do not want them.
//!
//! Who is refused before all of his request is here goes on sending it. Where nobody reads that, the system tells him that the
//! connection is gone, and many clients then say so instead of what they were answered: over HTTP/2 they take the end of the
//! stream for an error, over HTTP/1 they never come to read.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::{runtime::Handle, time};

/// How long the rest of a body is read and thrown away, and how long its sender may be silent meanwhile.
const LONGEST: Duration = Duration::from_secs(30);
const SILENCE: Duration = Duration::from_secs(5);

/// A body of which what nobody has read by the time that it is dropped is read then, and thrown away.
#[derive(Debug)]
pub(super) struct Drained {
    /// `None` once it has ended.
    body: Option<Incoming>,
    /// Whether it comes without anybody asking for it, and ends.
    comes: bool,
}

impl Drained {
    /// The body of a request with these headers. One of a call that sends any number of messages has no end of which others know: who does
    /// not want more of them lets it go.
    pub(super) fn new(body: Incoming, headers: &HeaderMap, is_stream: bool) -> Self {
        // Who expects to be told to go on, and is told something else, sends nothing.
        Self { body: Some(body), comes: !is_stream && !headers.contains_key(header::EXPECT) }
    }
}

impl Body for Drained {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(body).poll_frame(context));
        if !matches!(frame, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        let Some(body) = self.body.take().filter(|body| self.comes && !body.is_end_stream()) else { return };
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(time::timeout(LONGEST, discard(body)));
        }
    }
}

async fn discard(mut body: Incoming) {
    while let Ok(Some(Ok(_))) = time::timeout(SILENCE, body.frame()).await {}
}

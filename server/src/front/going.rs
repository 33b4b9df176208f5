//! Answers on their way: what they hold of the budget, how long a client may leave one unread, and that their connection knows of
//! them.
//!
//! A client that asks and does not read costs more than one that sends and does not end: an answer can be much larger than its
//! question, and HTTP/2 lets a client ask thousands of times before it reads anything.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time;
use tokio_util::task::AbortOnDropHandle;

use crate::budget::{Budget, Taken};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Answers go in pieces of this at most: the connection keeps each until it may be sent.
const PIECE: usize = 64 << 10;
/// Whoever takes so much of an answer in a second is not cut off.
const SLOWEST: u64 = 64 << 10;

/// The body of an answer.
#[derive(Debug)]
pub(super) struct Going<B> {
    body: Sending<B>,
    /// Of one that is small; others hold theirs themselves.
    _taken: Option<Taken>,
    /// Its connection counts these.
    _under_way: Arc<()>,
}

#[derive(Debug)]
enum Sending<B> {
    Small(B),
    /// One that is large, or a stream.
    Watched {
        shared: Arc<Shared<B>>,
        _watch: AbortOnDropHandle<()>,
    },
}

#[derive(Debug)]
struct Shared<B> {
    /// `None` once it was given up.
    rest: Mutex<Option<Rest<B>>>,
    /// Whether the connection asked for more since the watch looked last.
    has_moved: AtomicBool,
    /// Whether it waits for what is not there yet: then nobody leaves anything unread.
    waits: AtomicBool,
}

#[derive(Debug)]
struct Rest<B> {
    body: B,
    /// What it yielded last and is not taken yet.
    piece: Bytes,
    _taken: Option<Taken>,
}

impl<B> Going<B>
where
    B: Body<Data = Bytes, Error: Into<Error>> + Send + Unpin + 'static,
{
    /// An answer, of which what is there already counts against `budget`. What is large, or a stream, and of which nobody takes
    /// anything for `patience` is let go; a large one has more time, as the system may keep much of it before the connection
    /// has to ask for more.
    pub(super) fn new(body: B, budget: &Budget, under_way: Arc<()>, patience: Duration) -> Self {
        let bytes = body.size_hint().lower();
        let taken = (bytes > 0).then(|| budget.overdraw(usize::try_from(bytes).unwrap_or(usize::MAX)));
        if body.size_hint().exact().is_some_and(|bytes| bytes <= PIECE as u64) {
            return Self { body: Sending::Small(body), _taken: taken, _under_way: under_way };
        }
        let rest = Mutex::new(Some(Rest { body, piece: Bytes::new(), _taken: taken }));
        let (has_moved, waits) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { rest, has_moved, waits });
        let patience = patience + Duration::from_secs(bytes / SLOWEST);
        let watch = AbortOnDropHandle::new(tokio::spawn(watch(shared.clone(), patience)));
        Self { body: Sending::Watched { shared, _watch: watch }, _taken: None, _under_way: under_way }
    }
}

async fn watch<B>(shared: Arc<Shared<B>>, patience: Duration) {
    loop {
        time::sleep(patience).await;
        if !shared.has_moved.swap(false, Ordering::Relaxed) && !shared.waits.load(Ordering::Relaxed) {
            drop(shared.lock().take());
            return;
        }
    }
}

impl<B> Shared<B> {
    /// Only this module's few lines run under the lock.
    fn lock(&self) -> MutexGuard<'_, Option<Rest<B>>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Body<Data = Bytes, Error: Into<Error>> + Unpin> Rest<B> {
    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if self.piece.is_empty() {
            let frame = match std::task::ready!(Pin::new(&mut self.body).poll_frame(context)) {
                None => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                Some(Ok(frame)) => frame,
            };
            match frame.into_data() {
                Ok(data) => self.piece = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
        let next = self.piece.split_to(self.piece.len().min(PIECE));
        Poll::Ready(Some(Ok(Frame::data(next))))
    }
}

impl<B> Body for Going<B>
where
    B: Body<Data = Bytes, Error: Into<Error>> + Unpin,
{
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let shared = match &mut self.body {
            Sending::Small(body) => {
                return Pin::new(body).poll_frame(context).map(|frame| frame.map(|frame| frame.map_err(Into::into)));
            }
            Sending::Watched { shared, .. } => shared,
        };
        let polled = match &mut *shared.lock() {
            Some(rest) => rest.poll_frame(context),
            None => Poll::Ready(Some(Err("the answer was given up, as nobody read it".into()))),
        };
        shared.has_moved.store(true, Ordering::Relaxed);
        shared.waits.store(polled.is_pending(), Ordering::Relaxed);
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.body {
            Sending::Small(body) => body.is_end_stream(),
            Sending::Watched { shared, .. } => {
                shared.lock().as_ref().is_some_and(|rest| rest.piece.is_empty() && rest.body.is_end_stream())
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        let shared = match &self.body {
            Sending::Small(body) => return body.size_hint(),
            Sending::Watched { shared, .. } => shared,
        };
        let mut all = SizeHint::new();
        if let Some(Rest { body, piece, .. }) = &*shared.lock() {
            let (hint, more) = (body.size_hint(), piece.len() as u64);
            all.set_lower(hint.lower() + more);
            if let Some(upper) = hint.upper() {
                all.set_upper(upper + more);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, Full};

    use super::*;
    use crate::metrics::Metrics;

    fn budget() -> Budget {
        Budget::new(PIECE, Metrics::new().budget())
    }

    fn going(bytes: usize, budget: &Budget, patience: Duration) -> Going<Full<Bytes>> {
        let body = Full::new(Bytes::from((0..bytes).map(|at| at as u8).collect::<Vec<_>>()));
        Going::new(body, budget, Arc::new(()), patience)
    }

    #[tokio::test]
    async fn answers_come_out_as_they_went_in_and_large_ones_in_pieces() {
        for bytes in [0, 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7] {
            let mut body = going(bytes, &budget(), Duration::from_mins(1));
            let (mut found, mut left) = (Vec::new(), bytes as u64);
            loop {
                assert_eq!(body.size_hint().exact(), Some(left), "{bytes}");
                assert_eq!(body.is_end_stream(), left == 0, "{bytes}");
                let Some(frame) = body.frame().await else { break };
                let piece = frame.unwrap().into_data().unwrap();
                assert!(piece.len() <= PIECE);
                left -= piece.len() as u64;
                found.extend_from_slice(&piece);
            }
            assert!(found.iter().enumerate().all(|(at, byte)| *byte == at as u8) && found.len() == bytes);
        }
    }

    #[tokio::test]
    async fn an_answer_that_nobody_reads_is_let_go_with_what_it_holds_and_a_stream_may_rest() {
        const PATIENCE: Duration = Duration::from_millis(20);
        let budget = budget();
        let mut body = going(PIECE + 1, &budget, PATIENCE);
        budget.claim(PIECE).expect_err("it holds more than there is");
        assert!(body.frame().await.unwrap().is_ok());
        let is_gone = async {
            while budget.claim(PIECE).is_err() {
                time::sleep(PATIENCE).await;
            }
        };
        time::timeout(Duration::from_mins(2), is_gone).await.unwrap();
        assert!(body.frame().await.unwrap().is_err());

        let piece = futures::stream::once(async { Ok::<_, Error>(Frame::data(Bytes::from_static(b"7"))) });
        let resting =
            http_body_util::StreamBody::new(Box::pin(futures::StreamExt::chain(piece, futures::stream::pending())));
        let mut body = Going::new(resting, &budget, Arc::new(()), PATIENCE);
        assert!(body.frame().await.unwrap().is_ok());
        assert!(time::timeout(PATIENCE * 10, body.frame()).await.is_err(), "it waits, and so does its client");
    }
}

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

use crate::budget::Taken;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Answers of more than this are watched, and go in pieces of this: the connection keeps each until it may be sent.
const PIECE: usize = 64 << 10;

/// The body of an answer.
#[derive(Debug)]
pub(super) struct Going<B> {
    body: Sending<B>,
    _taken: Option<Taken>,
    /// Its connection counts these.
    _under_way: Arc<()>,
}

#[derive(Debug)]
enum Sending<B> {
    Small(B),
    Large { shared: Arc<Shared<B>>, _watch: AbortOnDropHandle<()> },
}

#[derive(Debug)]
struct Shared<B> {
    /// `None` once it was given up.
    rest: Mutex<Option<Rest<B>>>,
    /// Whether somebody took a piece since the watch looked last.
    has_moved: AtomicBool,
}

#[derive(Debug)]
struct Rest<B> {
    body: B,
    /// What it yielded last and is not taken yet.
    piece: Bytes,
}

impl<B> Going<B>
where
    B: Body<Data = Bytes, Error: Into<Error>> + Send + Unpin + 'static,
{
    /// An answer with what it holds of the budget. What is large and of which nobody takes anything for `patience` is let go.
    pub(super) fn new(body: B, taken: Option<Taken>, under_way: Arc<()>, patience: Duration) -> Self {
        let body = if body.size_hint().lower() > PIECE as u64 {
            let rest = Mutex::new(Some(Rest { body, piece: Bytes::new() }));
            let shared = Arc::new(Shared { rest, has_moved: AtomicBool::new(false) });
            let watch = AbortOnDropHandle::new(tokio::spawn(watch(shared.clone(), patience)));
            Sending::Large { shared, _watch: watch }
        } else {
            Sending::Small(body)
        };
        Self { body, _taken: taken, _under_way: under_way }
    }
}

async fn watch<B>(shared: Arc<Shared<B>>, patience: Duration) {
    loop {
        time::sleep(patience).await;
        if !shared.has_moved.swap(false, Ordering::Relaxed) {
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
            Sending::Large { shared, .. } => shared,
        };
        shared.has_moved.store(true, Ordering::Relaxed);
        let mut rest = shared.lock();
        let Some(Rest { body, piece }) = &mut *rest else {
            return Poll::Ready(Some(Err("it was given up, as nobody read it".into())));
        };
        if piece.is_empty() {
            let frame = match std::task::ready!(Pin::new(body).poll_frame(context)) {
                None => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                Some(Ok(frame)) => frame,
            };
            match frame.into_data() {
                Ok(data) => *piece = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
        let next = piece.split_to(piece.len().min(PIECE));
        Poll::Ready(Some(Ok(Frame::data(next))))
    }

    fn is_end_stream(&self) -> bool {
        match &self.body {
            Sending::Small(body) => body.is_end_stream(),
            Sending::Large { shared, .. } => {
                shared.lock().as_ref().is_some_and(|rest| rest.piece.is_empty() && rest.body.is_end_stream())
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            Sending::Small(body) => body.size_hint(),
            Sending::Large { shared, .. } => match &*shared.lock() {
                None => SizeHint::default(),
                Some(Rest { body, piece }) => {
                    let (hint, more) = (body.size_hint(), piece.len() as u64);
                    let mut all = SizeHint::new();
                    all.set_lower(hint.lower() + more);
                    if let Some(upper) = hint.upper() {
                        all.set_upper(upper + more);
                    }
                    all
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, Full};

    use super::*;

    fn going(bytes: usize, patience: Duration) -> Going<Full<Bytes>> {
        let body = Full::new(Bytes::from((0..bytes).map(|at| at as u8).collect::<Vec<_>>()));
        Going::new(body, None, Arc::new(()), patience)
    }

    #[tokio::test]
    async fn answers_come_out_as_they_went_in_and_large_ones_in_pieces() {
        for bytes in [0, 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7] {
            let mut body = going(bytes, Duration::from_mins(1));
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
    async fn an_answer_that_nobody_reads_is_let_go() {
        let mut body = going(3 * PIECE, Duration::from_millis(20));
        assert!(body.frame().await.unwrap().is_ok());
        let Sending::Large { shared, .. } = &body.body else { panic!("it is large") };
        let is_gone = async {
            while shared.lock().is_some() {
                time::sleep(Duration::from_millis(5)).await;
            }
        };
        time::timeout(Duration::from_mins(1), is_gone).await.unwrap();
        assert!(body.frame().await.unwrap().is_err());
    }
}

//! Answers on their way: what they hold of the budget, that their connection knows of them, and that they are read.
//!
//! A client that asks and does not read costs more than one that sends and does not end: an answer can be much larger than its
//! question, and HTTP/2 lets a client ask thousands of times before it reads anything.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::readers::Reader;
use crate::budget::{Budget, Taken};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Answers go in pieces of this at most: the connection keeps each until it may be sent.
pub(super) const PIECE: usize = 64 << 10;
/// Pieces of less than this are not worth to be told when they have gone.
const SMALL: usize = 4 << 10;
/// Whoever takes so much of an answer in a second is not cut off.
const SLOWEST: u64 = 64 << 10;

/// The body of an answer.
#[derive(Debug)]
pub(super) struct Going<B> {
    body: B,
    /// What it yielded last and is not taken yet.
    piece: Bytes,
    reader: Option<Arc<Reader>>,
    /// A large answer gives its reader more time, as the system may keep much of it before the connection has to ask for more.
    longer: Duration,
    holds: Holds,
    /// Whether its last byte goes by itself: a connection of HTTP/2 forgets an answer as soon as it has all of it, and takes what is
    /// left only once its client has made room for what came before.
    holds_back: bool,
    /// Its connection counts these.
    _under_way: Arc<()>,
}

/// What an answer holds of the budget.
#[derive(Debug)]
enum Holds {
    /// All that it will be.
    Whole { _taken: Option<Taken> },
    /// What it yielded last, of one that is made while it goes.
    Last { budget: Budget, taken: Option<Taken> },
}

impl<B> Going<B>
where
    B: Body<Data = Bytes, Error: Into<Error>> + Unpin,
{
    /// An answer for `reader`, of which what is there already counts against `budget`.
    pub(super) fn new(
        body: B,
        budget: &Budget,
        under_way: Arc<()>,
        reader: Option<Arc<Reader>>,
        holds_back: bool,
    ) -> Self {
        let bytes = body.size_hint().lower();
        let overdraw = |bytes: u64| budget.overdraw(usize::try_from(bytes).unwrap_or(usize::MAX));
        let holds = match body.size_hint().exact() {
            Some(bytes) => Holds::Whole { _taken: (bytes > 0).then(|| overdraw(bytes)) },
            None => Holds::Last { budget: budget.clone(), taken: None },
        };
        let longer = Duration::from_secs(bytes / SLOWEST);
        if let Some(reader) = &reader {
            reader.owes(longer);
        }
        Self { body, piece: Bytes::new(), reader, longer, holds, holds_back, _under_way: under_way }
    }

    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if self.piece.is_empty() {
            // Who asks for more has passed on what there was.
            if let Holds::Last { taken, .. } = &mut self.holds {
                *taken = None;
            }
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                None => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                Some(Ok(frame)) => frame,
            };
            match frame.into_data() {
                Ok(data) => self.piece = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
            if let Holds::Last { budget, taken } = &mut self.holds {
                *taken = Some(budget.overdraw(self.piece.len()));
            }
        }
        let most = self.piece.len().min(PIECE);
        // Trailers may follow, and the connection takes those at once. Of an answer that is made while it goes any piece may be
        // the last, and is held until there is room for all of it.
        let is_last = most == self.piece.len()
            && match self.holds {
                Holds::Whole { .. } => self.body.size_hint().exact() == Some(0),
                Holds::Last { .. } => true,
            };
        let held_back = usize::from(self.holds_back && is_last && most > SMALL);
        let next = self.piece.split_to(most - held_back);
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
        let polled = self.poll_piece(context);
        if let Some(reader) = &self.reader {
            // While it waits for what is not there yet, nobody leaves anything unread.
            if polled.is_pending() { reader.rests() } else { reader.owes(self.longer) }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.piece.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (hint, more) = (self.body.size_hint(), self.piece.len() as u64);
        let mut all = SizeHint::new();
        all.set_lower(hint.lower() + more);
        if let Some(upper) = hint.upper() {
            all.set_upper(upper + more);
        }
        all
    }
}

impl<B> Drop for Going<B> {
    fn drop(&mut self) {
        if let Some(reader) = &self.reader {
            reader.rests();
        }
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

    fn going(bytes: usize, budget: &Budget) -> Going<Full<Bytes>> {
        let body = Full::new(Bytes::from((0..bytes).map(|at| at as u8).collect::<Vec<_>>()));
        Going::new(body, budget, Arc::new(()), None, false)
    }

    #[tokio::test]
    async fn answers_come_out_as_they_went_in_and_large_ones_in_pieces() {
        for bytes in [0, 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7] {
            let mut body = going(bytes, &budget());
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
    async fn the_last_byte_of_what_is_not_small_goes_by_itself_and_is_held_until_then() {
        for (bytes, sizes) in [(SMALL, vec![SMALL]), (PIECE, vec![PIECE - 1, 1]), (PIECE + 1, vec![PIECE, 1])] {
            let (budget, mut found) = (budget(), Vec::new());
            let mut body = going(bytes, &budget);
            body.holds_back = true;
            while let Some(frame) = body.frame().await {
                found.push(frame.unwrap().into_data().unwrap().len());
                assert_eq!(body.is_end_stream(), found.len() == sizes.len());
            }
            assert_eq!(found, sizes);
        }
    }

    #[tokio::test]
    async fn the_last_byte_goes_by_itself_also_where_trailers_follow_or_more_may_come() {
        let frames = |is_known: bool| {
            let data = Frame::data(Bytes::from(vec![7; 2 * SMALL]));
            let frames = [data, Frame::trailers(axum::http::HeaderMap::new())].map(Ok::<_, Error>);
            let body = http_body_util::StreamBody::new(futures::stream::iter(frames));
            Sized { body, left: is_known.then_some(2 * SMALL as u64) }
        };
        for is_known in [true, false] {
            let budget = Budget::new(1 << 20, Metrics::new().budget());
            let mut body = Going::new(frames(is_known), &budget, Arc::new(()), None, true);
            let mut found = Vec::new();
            while let Some(frame) = body.frame().await {
                found.push(frame.unwrap().into_data().map_or(0, |data| data.len()));
            }
            assert_eq!(found, [2 * SMALL - 1, 1, 0], "{is_known}");
        }
    }

    /// A body of which it is known how much is left, where that is so.
    struct Sized<B> {
        body: B,
        left: Option<u64>,
    }

    impl<B: Body<Data = Bytes, Error = Error> + Unpin> Body for Sized<B> {
        type Data = Bytes;
        type Error = Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
            let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
            if let (Some(left), Some(Ok(frame))) = (&mut self.left, &frame) {
                *left -= frame.data_ref().map_or(0, |data| data.len() as u64);
            }
            Poll::Ready(frame)
        }

        fn size_hint(&self) -> SizeHint {
            self.left.map_or_else(SizeHint::new, SizeHint::with_exact)
        }
    }

    #[tokio::test]
    async fn an_answer_holds_what_it_is_until_it_has_gone_and_a_stream_what_it_gave_last() {
        let budget = budget();
        let body = going(PIECE, &budget);
        budget.claim(1).expect_err("all of it is held");
        drop(body);
        drop(budget.claim(PIECE).unwrap());

        let pieces = [PIECE, 1].map(|bytes| Ok::<_, Error>(Frame::data(Bytes::from(vec![0; bytes]))));
        let stream = http_body_util::StreamBody::new(futures::stream::iter(pieces));
        let mut body = Going::new(stream, &budget, Arc::new(()), None, false);
        drop(budget.claim(PIECE).unwrap());
        assert!(body.frame().await.unwrap().is_ok());
        budget.claim(1).expect_err("its first piece is held");
        assert!(body.frame().await.unwrap().is_ok());
        drop(budget.claim(PIECE - 1).unwrap());
    }
}

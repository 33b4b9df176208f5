//! Bodies of requests as they arrive: every byte is taken from the budget before anybody keeps it.
//!
//! Compressed messages of gRPC are inflated here, within the budget and the limit of a message: further in, nobody could
//! tell how much memory one of them is about to take.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::http::HeaderMap;
use bytes::{BufMut as _, Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use tokio::time::{self, Sleep};
use tonic::Status;

use super::is_grpc;
use crate::{
    blocking::in_place,
    budget::Tally,
    coding::{Coding, InflateError},
};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// A body that takes what it yields from a budget. Its errors are [`Spent`](crate::budget::Spent), or a [`Status`] where it is gRPC's.
#[derive(Debug)]
pub(super) struct Metered<B> {
    body: B,
    tally: Tally,
    /// Where the body is one of gRPC.
    messages: Option<Messages>,
    /// What was read and not yielded yet.
    ready: VecDeque<Bytes>,
    /// How long it may rest while it holds what has arrived, or take for the next [`PROGRESS`] bytes.
    patience: Duration,
    /// When that is over.
    until: Option<Pin<Box<Sleep>>>,
    /// Bytes since that began.
    since: usize,
}

/// Who sends less than this in a client's patience is as good as silent.
const PROGRESS: usize = 16 << 10;

/// A client that began to send, and stopped.
#[derive(Debug, thiserror::Error)]
#[error("it comes too slowly: less than {PROGRESS} bytes of it in {patience:?}")]
struct Stalled {
    patience: Duration,
}

/// The messages in the body of a gRPC call.
#[derive(Debug)]
struct Messages {
    /// How some of them are compressed.
    coding: Option<Coding>,
    /// Bytes of one at most.
    max: usize,
    head: [u8; HEAD],
    place: Place,
    sent: Sent,
}

/// How many messages a call sends, and who gives their bytes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// One, whose bytes the call holds.
    One,
    /// Any number, each of which is claimed by who reads it.
    Claimed,
    /// Any number that nobody claims: small questions, which are done with when they are read.
    Unclaimed,
}

/// A flag, which is 1 for a compressed message, and the length.
pub(super) const HEAD: usize = 5;

/// Where in a message the body is.
#[derive(Debug)]
enum Place {
    /// So far in its head.
    Head(usize),
    /// In one that passes as it is.
    Plain { length: usize, left: usize },
    /// In one that is kept until it can be inflated.
    Packed { left: usize, packed: BytesMut },
}

impl<B> Metered<B> {
    /// The body of a call with these headers, whose messages have at most `max` bytes and do not rest for longer than
    /// `patience` while they arrive.
    pub(super) fn new(body: B, headers: &HeaderMap, tally: Tally, max: usize, patience: Duration) -> Self {
        let coding = || headers.get("grpc-encoding").and_then(|name| name.to_str().ok()).and_then(Coding::parse);
        let messages = is_grpc(headers).then(|| Messages {
            coding: coding(),
            max,
            head: [0; HEAD],
            place: Place::Head(0),
            sent: Sent::One,
        });
        Self { body, tally, messages, ready: VecDeque::new(), patience, until: None, since: 0 }
    }

    /// As one of a call that may ask again and again, as late as it likes.
    pub(super) fn of_stream(self, sent: Sent) -> Self {
        let messages = self.messages.map(|messages| Messages { sent, ..messages });
        Self { messages, ..self }
    }

    /// Nothing is there: whether that has been so for too long.
    fn rest(&mut self, context: &mut Context<'_>) -> Result<(), Error> {
        // A stream may rest between two messages as long as it likes, once somebody has claimed the last one. The one message of
        // a call that does not end is nobody's, and holds its bytes.
        let is_between = self
            .messages
            .as_ref()
            .is_some_and(|messages| messages.sent != Sent::One && matches!(messages.place, Place::Head(0)));
        if is_between && self.tally.holds_nothing() {
            (self.until, self.since) = (None, 0);
            return Ok(());
        }
        let patience = self.patience;
        let until = self.until.get_or_insert_with(|| Box::pin(time::sleep(patience)));
        if until.as_mut().poll(context).is_pending() {
            return Ok(());
        }
        let stalled = Stalled { patience };
        Err(if self.messages.is_some() {
            Status::deadline_exceeded(stalled.to_string()).into()
        } else {
            stalled.into()
        })
    }
}

impl<B> Body for Metered<B>
where
    B: Body<Data = Bytes, Error: Into<Error>> + Unpin,
{
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = self.get_mut();
        loop {
            if let Some(piece) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(context) else {
                return match this.rest(context) {
                    Ok(()) => Poll::Pending,
                    Err(error) => Poll::Ready(Some(Err(error))),
                };
            };
            let Some(frame) = frame else {
                this.tally.end();
                return Poll::Ready(None);
            };
            let data = match frame.map_err(Into::into)?.into_data() {
                Ok(data) => data,
                Err(frame) => return Poll::Ready(Some(Ok(frame))),
            };
            if this.body.is_end_stream() {
                this.tally.end();
            }
            this.since += data.len();
            if this.since >= PROGRESS {
                (this.until, this.since) = (None, 0);
            }
            let Some(messages) = &mut this.messages else {
                this.tally.take(data.len())?;
                return Poll::Ready(Some(Ok(Frame::data(data))));
            };
            this.tally.take(data.len()).map_err(Status::from)?;
            messages.pass(&data, &this.tally, &mut this.ready)?;
            if messages.coding.is_none() {
                // Nothing of it can be compressed: it passes in one piece.
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ready.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // What is inflated has another size.
        if self.messages.is_some() { SizeHint::default() } else { self.body.size_hint() }
    }
}

impl Messages {
    /// Follows the messages through `chunk`; where they may be compressed, puts into `out` what is to be read of it.
    fn pass(&mut self, chunk: &Bytes, tally: &Tally, out: &mut VecDeque<Bytes>) -> Result<(), Status> {
        let mut rest = chunk.clone();
        while !rest.is_empty() {
            match &mut self.place {
                Place::Head(filled) => {
                    let piece = rest.split_to(rest.len().min(HEAD - *filled));
                    self.head[*filled..*filled + piece.len()].copy_from_slice(&piece);
                    *filled += piece.len();
                    if *filled == HEAD {
                        self.begin(rest.len(), tally, out)?;
                    }
                }
                Place::Plain { length, left } => {
                    let piece = rest.split_to(rest.len().min(*left));
                    *left -= piece.len();
                    if *left == 0 {
                        let length = *length;
                        self.end(length, tally);
                    }
                    if self.coding.is_some() {
                        out.push_back(piece);
                    }
                }
                Place::Packed { left, packed } => {
                    let piece = rest.split_to(rest.len().min(*left));
                    *left -= piece.len();
                    packed.extend_from_slice(&piece);
                    if *left == 0 {
                        let packed = std::mem::take(packed);
                        self.inflate(&packed, tally, out)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The head is there, and `here` bytes behind it.
    fn begin(&mut self, here: usize, tally: &Tally, out: &mut VecDeque<Bytes>) -> Result<(), Status> {
        let [flag, length @ ..] = self.head;
        let length = u32::from_be_bytes(length) as usize;
        // One that is too long for a message is refused as that, by whoever reads it.
        if length <= self.max {
            tally.foresee(length.saturating_sub(here)).map_err(Status::from)?;
        }
        if flag == 1 && self.coding.is_some() && length <= self.max {
            self.place = Place::Packed { left: length, packed: BytesMut::new() };
            return if length == 0 { self.inflate(&[], tally, out) } else { Ok(()) };
        }
        if self.coding.is_some() {
            out.push_back(Bytes::copy_from_slice(&self.head));
        }
        self.place = Place::Plain { length, left: length };
        if length == 0 {
            self.end(0, tally);
        }
        Ok(())
    }

    /// One of this length is whole.
    fn end(&mut self, length: usize, tally: &Tally) {
        self.place = Place::Head(0);
        match self.sent {
            Sent::One => {}
            Sent::Claimed => tally.end_message(HEAD + length),
            Sent::Unclaimed => tally.give(HEAD + length),
        }
    }

    fn inflate(&mut self, packed: &[u8], tally: &Tally, out: &mut VecDeque<Bytes>) -> Result<(), Status> {
        self.place = Place::Head(0);
        let Some(coding) = self.coding else { return Ok(()) };
        // A byte may become a thousand.
        let inflated = in_place(packed.len().saturating_mul(64), || coding.inflate(packed, self.max, Some(tally)));
        let message = inflated.map_err(|error| match error {
            InflateError::Spent(spent) => spent.into(),
            InflateError::TooLarge => Status::resource_exhausted(format!(
                "the message has more than {} bytes when it is decompressed, the limit of this server",
                self.max
            )),
            // As other servers of gRPC say it.
            InflateError::Broken(error) => Status::internal(format!("the message is no {}: {error}", coding.name())),
        })?;
        tally.give(packed.len());
        self.end(message.len(), tally);
        let mut head = BytesMut::with_capacity(HEAD);
        head.put_u8(0);
        head.put_u32(message.len() as u32); // no more than `max`, which a length of gRPC can say
        out.push_back(head.freeze());
        out.push_back(message);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use axum::http::header;
    use flate2::{Compression, write::GzEncoder, write::ZlibEncoder};
    use futures::StreamExt as _;
    use http_body_util::{BodyExt as _, StreamBody};
    use tonic::Code;

    use super::*;
    use crate::{budget::Budget, metrics::Metrics};

    fn frame(flag: u8, data: &[u8]) -> Vec<u8> {
        [&[flag][..], &u32::try_from(data.len()).unwrap().to_be_bytes(), data].concat()
    }

    fn packed(coding: Coding, data: &[u8]) -> Vec<u8> {
        match coding {
            Coding::Gzip => {
                let mut out = GzEncoder::new(Vec::new(), Compression::fast());
                out.write_all(data).unwrap();
                out.finish().unwrap()
            }
            Coding::Deflate => {
                let mut out = ZlibEncoder::new(Vec::new(), Compression::fast());
                out.write_all(data).unwrap();
                out.finish().unwrap()
            }
        }
    }

    /// What is read of a stream whose body arrives in pieces of this size.
    async fn read(body: &[u8], piece: usize, coding: &str, tally: &Tally) -> Result<Bytes, Status> {
        let pieces: Vec<_> =
            body.chunks(piece).map(|piece| Ok::<_, Error>(Frame::data(Bytes::copy_from_slice(piece)))).collect();
        let headers = HeaderMap::from_iter([
            (header::CONTENT_TYPE, "application/grpc".parse().unwrap()),
            ("grpc-encoding".parse().unwrap(), coding.parse().unwrap()),
        ]);
        let body = Metered::new(
            StreamBody::new(tokio_stream::iter(pieces)),
            &headers,
            tally.clone(),
            1000,
            Duration::from_mins(1),
        )
        .of_stream(Sent::Claimed);
        let collected = body.collect().await.map_err(|error| *error.downcast::<Status>().unwrap())?;
        Ok(collected.to_bytes())
    }

    #[tokio::test]
    async fn messages_come_out_as_they_went_in_however_they_are_cut() {
        let (a, b) = (vec![7; 300], b"b".repeat(20));
        let plain = [frame(0, &a), frame(0, &[]), frame(0, &b)].concat();
        for coding in [Coding::Gzip, Coding::Deflate] {
            let mixed = [frame(1, &packed(coding, &a)), frame(0, &[]), frame(1, &packed(coding, &b))].concat();
            for piece in [1, 2, 3, 5, 7, 64, 10_000] {
                let budget = Budget::new(10_000, Metrics::new().budget());
                for (name, body) in [("identity", &plain), (coding.name(), &plain), (coding.name(), &mixed)] {
                    let tally = budget.tally();
                    assert_eq!(read(body, piece, name, &tally).await.unwrap(), plain, "{name}, {piece}");
                    let messages = std::iter::from_fn(|| tally.claim_message()).count();
                    assert_eq!(messages, 3, "{name}, {piece}");
                    // The messages hold all that was taken.
                    tally.foresee(10_000).unwrap();
                }
            }
        }
    }

    #[tokio::test]
    async fn messages_of_what_is_no_stream_are_not_written_down() {
        let budget = Budget::new(10_000, Metrics::new().budget());
        let (tally, headers) =
            (budget.tally(), HeaderMap::from_iter([(header::CONTENT_TYPE, "application/grpc".parse().unwrap())]));
        // Each five bytes of them are a message.
        let zeros = StreamBody::new(tokio_stream::iter([Ok::<_, Error>(Frame::data(Bytes::from(vec![0; 5000])))]));
        let body = Metered::new(zeros, &headers, tally.clone(), 1000, Duration::from_mins(1));
        assert_eq!(body.collect().await.unwrap().to_bytes().len(), 5000);
        assert!(tally.claim_message().is_none());
        tally.foresee(5001).expect_err("their bytes are taken all the same");
    }

    #[tokio::test]
    async fn the_budget_bounds_what_is_inflated_and_what_is_only_announced() {
        let budget = Budget::new(500, Metrics::new().budget());
        let bomb = frame(1, &packed(Coding::Gzip, &[0; 900]));
        let status = read(&bomb, 64, "gzip", &budget.tally()).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().contains("may hold 500; try again later"), "{status:?}");
        let larger = frame(1, &packed(Coding::Gzip, &[0; 1001]));
        let roomy = Budget::new(5000, Metrics::new().budget());
        let status = read(&larger, 64, "gzip", &roomy.tally()).await.unwrap_err();
        assert!(status.message().contains("more than 1000 bytes when it is decompressed"), "{status:?}");
        let head = &frame(0, &[0; 600])[..HEAD];
        let status = read(head, 64, "identity", &budget.tally()).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "nothing of it has to come first");
        let noise = read(&frame(1, b"noise"), 64, "gzip", &budget.tally()).await.unwrap_err();
        assert_eq!(noise.code(), Code::Internal, "{noise:?}");
        budget.tally().foresee(500).expect("everything was given back");
    }

    #[tokio::test]
    async fn a_body_that_comes_a_byte_at_a_time_is_given_up() {
        const PATIENCE: Duration = Duration::from_millis(50);
        let bytes = futures::stream::repeat_with(|| Ok::<_, Error>(Frame::data(Bytes::from_static(b"7"))));
        let slow = StreamBody::new(bytes.then(async |byte| {
            time::sleep(PATIENCE / 10).await;
            byte
        }));
        let budget = Budget::new(10_000, Metrics::new().budget());
        let mut body = Metered::new(Box::pin(slow), &HeaderMap::new(), budget.tally(), 1000, PATIENCE);
        let ended = async { while body.frame().await.unwrap().is_ok() {} };
        time::timeout(Duration::from_mins(1), ended).await.expect("the first bytes do not count for the next ones");
    }

    #[tokio::test]
    async fn a_body_that_stops_in_the_middle_is_given_up_and_a_stream_between_messages_is_not() {
        const PATIENCE: Duration = Duration::from_millis(20);
        let budget = Budget::new(10_000, Metrics::new().budget());
        let whole = frame(0, &[7; 300]);
        for (kind, sent, is_claimed, is_given_up) in [
            ("application/grpc", whole.len(), true, false),
            ("application/grpc", whole.len(), false, true),
            ("application/grpc", whole.len() - 1, false, true),
            ("application/grpc", 3, false, true),
            ("application/json", whole.len(), false, true),
        ] {
            let piece = Ok::<_, Error>(Frame::data(Bytes::copy_from_slice(&whole[..sent])));
            let pieces = tokio_stream::once(piece).chain(futures::stream::pending());
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, kind.parse().unwrap())]);
            let tally = budget.tally();
            let mut body =
                Metered::new(StreamBody::new(pieces), &headers, tally.clone(), 1000, PATIENCE).of_stream(Sent::Claimed);
            assert!(body.frame().await.unwrap().is_ok());
            assert_eq!(is_claimed.then(|| tally.claim_message().is_some()), is_claimed.then_some(true));
            // Ten times as long says that it is never; who is given up ends the wait.
            let wait = if is_given_up { Duration::from_mins(1) } else { PATIENCE * 10 };
            match time::timeout(wait, body.frame()).await {
                Ok(more) => assert!(is_given_up && more.unwrap().is_err(), "{kind}, {sent}"),
                Err(_) => assert!(!is_given_up, "{kind}, {sent}"),
            }
        }
        budget.tally().foresee(10_000).expect("everything was given back");
    }

    #[tokio::test]
    async fn a_call_whose_message_never_begins_is_given_up() {
        let budget = Budget::new(10_000, Metrics::new().budget());
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, "application/grpc".parse().unwrap())]);
        let silent = StreamBody::new(futures::stream::pending::<Result<Frame<Bytes>, Error>>());
        let mut body = Metered::new(silent, &headers, budget.tally(), 1000, Duration::from_millis(20));
        let ended = time::timeout(Duration::from_mins(1), body.frame()).await.expect("it is not waited for");
        assert!(ended.unwrap().is_err());
    }
}

//! In which order a stream answers: requests that have one response in the order of their coming, and those that have
//! several side by side, each response as it comes.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::stream::{FuturesOrdered, SelectAll};
use tokio::time::{self, Sleep};
use tokio_stream::Stream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// What a request turned out to be.
pub(super) enum Begun<F, S> {
    /// One that has one response.
    One(F),
    /// The same of one that may wait for another of the stream that has not come yet, such as the end of a sequence.
    InSequence(F),
    /// One that has several.
    Many(S),
}

/// When a stream ends that its client keeps open: once it is asked for, and nothing has happened for a while.
#[derive(Debug)]
pub(super) struct End {
    asked: Pin<Box<WaitForCancellationFutureOwned>>,
    is_asked: bool,
    quiet: Duration,
    until: Option<Pin<Box<Sleep>>>,
}

impl End {
    pub(super) fn new(asked: CancellationToken, quiet: Duration) -> Self {
        Self { asked: Box::pin(asked.cancelled_owned()), is_asked: false, quiet, until: None }
    }

    /// Something happens.
    fn put_off(&mut self) {
        self.until = None;
    }

    /// Nothing happens.
    fn has_come(&mut self, context: &mut Context<'_>) -> bool {
        self.is_asked = self.is_asked || self.asked.as_mut().poll(context).is_ready();
        let quiet = self.quiet;
        self.is_asked
            && self.until.get_or_insert_with(|| Box::pin(time::sleep(quiet))).as_mut().poll(context).is_ready()
    }
}

/// Those that may wait for others to come count as this part of the rest among those that are worked on at a time: what they wait for has to be
/// read. The bytes of all of them are bounded as they are.
const SHARE_IN_SEQUENCE: usize = 128;

/// Requests that begin in one go at most: others share the thread.
const AT_ONCE: usize = 64;

/// The answers to a stream of requests. No more than a number of them are worked on at a time, and none of that goes on
/// while nobody takes what is there: whoever sends without reading waits.
pub(super) struct Replies<R, B, F: Future, S> {
    requests: R,
    end: End,
    /// What the client is told then.
    over: fn() -> F::Output,
    /// Whether more of them may come.
    is_open: bool,
    begin: B,
    ones: FuturesOrdered<F>,
    /// What each of these counts, and all together.
    weights: VecDeque<usize>,
    weight: usize,
    many: SelectAll<S>,
    limit: usize,
    /// Which of the two is asked first, in turn: neither keeps the other from being heard.
    is_turn_of_many: bool,
}

/// Nothing in it is pinned in place: both collections keep their members on the heap.
impl<R, B, F: Future, S> Unpin for Replies<R, B, F, S> {}

impl<R, B, F, S> Replies<R, B, F, S>
where
    R: Stream + Unpin,
    B: FnMut(R::Item) -> Begun<F, S>,
    F: Future,
    S: Stream<Item = F::Output> + Unpin,
{
    /// Answers `requests`, at most `limit` at a time; after the `end`, with `over`.
    pub(super) fn new(requests: R, begin: B, limit: usize, end: End, over: fn() -> F::Output) -> Self {
        let (ones, many, weights) = (FuturesOrdered::new(), SelectAll::new(), VecDeque::new());
        Self {
            requests,
            end,
            over,
            is_open: true,
            begin,
            ones,
            weights,
            weight: 0,
            many,
            limit,
            is_turn_of_many: false,
        }
    }

    fn is_full(&self) -> bool {
        self.weight + self.many.len() * SHARE_IN_SEQUENCE >= self.limit * SHARE_IN_SEQUENCE
    }

    fn push(&mut self, answer: F, weight: usize) {
        self.ones.push_back(answer);
        self.weights.push_back(weight);
        self.weight += weight;
    }

    /// Takes requests while there is room for more; whether there is some left because none came, or because others are to go on first.
    fn fill(&mut self, context: &mut Context<'_>) -> bool {
        for _ in 0..AT_ONCE {
            if !self.is_open || self.is_full() {
                return false;
            }
            match Pin::new(&mut self.requests).poll_next(context) {
                Poll::Ready(Some(request)) => {
                    // Also where its answer is there at once.
                    self.end.put_off();
                    match (self.begin)(request) {
                        Begun::One(answer) => self.push(answer, SHARE_IN_SEQUENCE),
                        Begun::InSequence(answer) => self.push(answer, 1),
                        Begun::Many(answers) => self.many.push(answers),
                    }
                }
                Poll::Ready(None) => self.is_open = false,
                Poll::Pending => return true,
            }
        }
        context.waker().wake_by_ref();
        true
    }

    fn answer(&mut self, context: &mut Context<'_>) -> Option<F::Output> {
        for _ in 0..2 {
            self.is_turn_of_many = !self.is_turn_of_many;
            let answer = if self.is_turn_of_many {
                Pin::new(&mut self.many).poll_next(context)
            } else {
                let answer = Pin::new(&mut self.ones).poll_next(context);
                if let Poll::Ready(Some(_)) = &answer {
                    // They are answered in their order.
                    self.weight -= self.weights.pop_front().unwrap_or_default();
                }
                answer
            };
            if let Poll::Ready(Some(answer)) = answer {
                return Some(answer);
            }
        }
        None
    }
}

impl<R, B, F, S> Stream for Replies<R, B, F, S>
where
    R: Stream + Unpin,
    B: FnMut(R::Item) -> Begun<F, S>,
    F: Future,
    S: Stream<Item = F::Output> + Unpin,
{
    type Item = F::Output;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let has_asked = self.fill(context);
            if let Some(answer) = self.answer(context) {
                return Poll::Ready(Some(answer));
            }
            let under_way = self.ones.len() + self.many.len();
            if !self.is_open && under_way == 0 {
                return Poll::Ready(None);
            }
            if under_way > 0 {
                self.end.put_off();
            } else if has_asked && self.end.has_come(context) {
                self.is_open = false;
                return Poll::Ready(Some((self.over)()));
            }
            // What had several answers may end without another word, and makes room that nobody would be told of.
            if has_asked || !self.is_open || self.is_full() {
                return Poll::Pending;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc};

    use futures::{FutureExt as _, StreamExt as _, future::LocalBoxFuture, stream::LocalBoxStream};
    use tokio::sync::{mpsc, oneshot};
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    type Reply = Begun<LocalBoxFuture<'static, &'static str>, LocalBoxStream<'static, &'static str>>;

    fn never() -> End {
        End::new(CancellationToken::new(), Duration::ZERO)
    }

    fn over() -> &'static str {
        "over"
    }

    fn one(answer: oneshot::Receiver<&'static str>) -> Reply {
        Begun::One(async move { answer.await.unwrap() }.boxed_local())
    }

    fn many(answers: mpsc::Receiver<&'static str>) -> Reply {
        Begun::Many(ReceiverStream::new(answers).boxed_local())
    }

    #[tokio::test]
    async fn single_answers_come_in_order_and_others_do_not_wait_for_them() {
        let (first, a) = oneshot::channel();
        let (second, b) = oneshot::channel();
        let (several, c) = mpsc::channel(4);
        let requests = futures::stream::iter([one(a), many(c), one(b)]);
        let mut replies = Replies::new(requests, |reply| reply, 64, never(), over);
        second.send("second").unwrap();
        several.send("several 1").await.unwrap();
        assert_eq!(replies.next().await, Some("several 1"), "although the first request is not answered");
        several.send("several 2").await.unwrap();
        assert_eq!(replies.next().await, Some("several 2"));
        assert_eq!(replies.next().now_or_never(), None, "the second waits for the first");
        first.send("first").unwrap();
        assert_eq!(replies.next().await, Some("first"));
        assert_eq!(replies.next().await, Some("second"));
        drop(several);
        assert_eq!(replies.next().await, None);
    }

    #[tokio::test]
    async fn a_stream_ends_when_it_is_asked_to_and_nothing_happens_on_it() {
        const QUIET: Duration = Duration::from_millis(20);
        let (asked, (ask, requests)) = (CancellationToken::new(), mpsc::channel(1));
        let end = End::new(asked.clone(), QUIET);
        let mut replies = Replies::new(ReceiverStream::new(requests), |reply| reply, 64, end, over);
        assert!(time::timeout(QUIET * 10, replies.next()).await.is_err(), "nobody asked it to");
        asked.cancel();
        let (answer, a) = oneshot::channel();
        ask.send(one(a)).await.unwrap();
        assert!(time::timeout(QUIET * 10, replies.next()).await.is_err(), "a request is under way");
        answer.send("answered").unwrap();
        assert_eq!(replies.next().await, Some("answered"));
        assert_eq!(replies.next().await, Some("over"));
        assert_eq!(replies.next().await, None);
    }

    #[tokio::test]
    async fn those_that_may_wait_for_others_do_not_keep_them_from_being_read() {
        let begun = Rc::new(RefCell::new(0));
        let counter = begun.clone();
        let begin = move |_: usize| {
            *counter.borrow_mut() += 1;
            Reply::InSequence(futures::future::pending().boxed_local())
        };
        let requests = futures::stream::iter(0..1000).chain(futures::stream::pending());
        let mut replies = Replies::new(requests, begin, 2, never(), over);
        assert_eq!(replies.next().now_or_never(), None);
        assert_eq!(*begun.borrow(), AT_ONCE, "others share the thread");
        for _ in 0..10 {
            assert_eq!(replies.next().now_or_never(), None);
        }
        assert_eq!(*begun.borrow(), 2 * SHARE_IN_SEQUENCE, "and these are bounded as well");
    }

    #[tokio::test]
    async fn those_that_always_have_an_answer_take_turns() {
        let (chatty, _chatty) = (futures::stream::repeat("many").boxed_local(), ());
        let answered: Vec<Reply> = (0..4).map(|_| Begun::One(futures::future::ready("one").boxed_local())).collect();
        let requests = futures::stream::iter(std::iter::once(Begun::Many(chatty)).chain(answered));
        let found: Vec<_> = Replies::new(requests, |reply: Reply| reply, 64, never(), over).take(8).collect().await;
        assert_eq!(found.iter().filter(|answer| **answer == "one").count(), 4, "{found:?}");
    }

    #[tokio::test]
    async fn no_more_begin_than_may_and_an_end_without_a_word_makes_room() {
        let begun = Rc::new(RefCell::new(0));
        let (held, a) = mpsc::channel(1);
        let (_never, b) = mpsc::channel(1);
        let (after, c) = mpsc::channel(1);
        let counter = begun.clone();
        let begin = move |reply: Reply| {
            *counter.borrow_mut() += 1;
            reply
        };
        let requests = futures::stream::iter([many(a), many(b), many(c)]).chain(futures::stream::pending());
        let mut replies = Replies::new(requests, begin, 2, never(), over);
        assert_eq!(replies.next().now_or_never(), None);
        assert_eq!(*begun.borrow(), 2);
        after.send("the third").await.unwrap();
        drop(held);
        assert_eq!(replies.next().now_or_never(), Some(Some("the third")));
        assert_eq!(*begun.borrow(), 3);
    }
}

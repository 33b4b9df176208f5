//! Writes of one turn of a connection, sent together.
//!
//! HTTP/2 writes and flushes an answer frame by frame, of 16 KiB where the client does not ask for more, as few do. Each is a
//! system call, and wakes the client: 49 KiB of hidden states came in four pieces. What is written here is kept until the
//! connection has done all it can, or until it is enough.
//!
//! The answers of a batch are many at once, and the runtime runs a connection as soon as one of them is there. So a
//! connection of HTTP/2 lets others come first who are ready: what was a system call for each answer is one for every few.

use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker, ready},
    time::Duration,
};

use bytes::{Buf as _, BytesMut};
use futures::task::AtomicWaker;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{self, Sleep},
};

/// Turns of a connection whose answers go together at most: a client that gets some of them can work while others are
/// written. One that gets all at once makes the server wait for it, and then all its requests come at once again.
const GATHERED: usize = 4;

/// What is kept at most, and the smallest piece that is not worth to be copied.
const ENOUGH: usize = 64 << 10;
/// Room that a connection which is at rest may keep.
const KEPT: usize = 8 << 10;

/// A stream whose writes wait for the end of the turn, and what ends it. It is broken once its other end has taken nothing for
/// `patience`.
pub(super) fn corked<S: AsyncWrite + Unpin>(stream: S, patience: Duration) -> (Corked<S>, Cork<S>) {
    let held = Arc::new(Mutex::new(Held {
        stream,
        is_blocked: false,
        written: BytesMut::new(),
        sent: 0,
        is_flushed: true,
        broken: None,
    }));
    (Corked(held.clone()), Cork { held, patience })
}

/// See [`corked`]. Flushing it does nothing: who owns the connection ends each of its turns by [`Cork::turns`].
#[derive(Debug)]
pub(super) struct Corked<S>(Arc<Mutex<Held<S>>>);

/// See [`corked`].
#[derive(Debug)]
pub(super) struct Cork<S> {
    held: Arc<Mutex<Held<S>>>,
    patience: Duration,
}

/// What had been sent when somebody began to wait, and how long that may last.
type Clock = (u64, Pin<Box<Sleep>>);

#[derive(Debug)]
struct Held<S> {
    stream: S,
    /// Whether the connection itself waits for the stream.
    is_blocked: bool,
    written: BytesMut,
    /// Bytes that the stream has taken.
    sent: u64,
    /// Whether it has also passed on all of them: one that encrypts may keep some until it is flushed.
    is_flushed: bool,
    /// What sending failed with, and every write fails with from then on.
    broken: Option<io::ErrorKind>,
}

impl<S: AsyncWrite + Unpin> Cork<S> {
    /// Runs `connection`, which writes to this cork's stream, and sends what it has written after each of its turns; where
    /// `gathers` says so, after those of all tasks that are ready now and may have more to write. May be dropped, and called
    /// again, as long as it has not ended.
    pub(super) async fn turns<C>(&self, connection: &mut Connection<C>, gathers: &AtomicBool) -> C::Output
    where
        C: Future + Unpin,
    {
        let others = Arc::new(Others::default());
        loop {
            let written = self.turn(connection).await;
            if written > 0 && gathers.load(Ordering::Relaxed) && !connection.has_ended() {
                self.gather(connection, &others, written).await;
            }
            self.send(connection).await;
            if let Connection::Ended(outcome) = connection {
                return match outcome.take() {
                    Some(outcome) => outcome,
                    None => std::future::pending().await,
                };
            }
        }
    }

    /// Sends all that is kept, while `connection` goes on. A stream that is broken says so to the connection as well, when it is used.
    async fn send<C: Future + Unpin>(&self, connection: &mut Connection<C>) {
        // Nearly always it is sent at once, without a clock.
        let mut clock = None;
        poll_fn(|context| {
            connection.turn(context);
            if lock(&self.held).send(context).is_ready() {
                Poll::Ready(())
            } else {
                self.poll_late(&mut clock, context)
            }
        })
        .await;
    }

    /// Runs `connection` until there is something to send, or it has ended: the bytes that wait.
    async fn turn<C: Future + Unpin>(&self, connection: &mut Connection<C>) -> usize {
        let mut clock = None;
        poll_fn(|context| {
            loop {
                let has_ended = connection.turn(context);
                let (written, is_flushed, is_blocked) = {
                    let held = lock(&self.held);
                    (held.written.len(), held.is_flushed, held.is_blocked)
                };
                if has_ended || written > 0 || !is_flushed {
                    return Poll::Ready(written);
                }
                if !is_blocked {
                    clock = None;
                    return Poll::Pending;
                }
                // What it writes is too large to be kept. It hears of it when it goes on.
                ready!(self.poll_late(&mut clock, context));
            }
        })
        .await
    }

    /// Gives the stream up, and is ready, once its other end has taken nothing for too long. For who waits for it.
    fn poll_late(&self, clock: &mut Option<Clock>, context: &mut Context<'_>) -> Poll<()> {
        loop {
            let (before, until) = clock.get_or_insert_with(|| (self.sent(), Box::pin(time::sleep(self.patience))));
            ready!(until.as_mut().poll(context));
            let mut held = lock(&self.held);
            if held.sent == *before {
                held.give_up(io::ErrorKind::TimedOut);
                return Poll::Ready(());
            }
            *clock = None;
        }
    }

    /// Runs `connection`, of which `written` bytes wait, until all `others` that are ready now have run, or it is enough.
    async fn gather<C: Future + Unpin>(
        &self,
        connection: &mut Connection<C>,
        others: &Arc<Others>,
        mut written: usize,
    ) {
        others.let_pass();
        let mut turns = 1;
        poll_fn(|context| {
            let passed = others.poll_passed(context);
            let (has_ended, before) = (connection.turn(context), written);
            written = self.written();
            turns += usize::from(written != before);
            if has_ended || turns >= GATHERED { Poll::Ready(()) } else { passed }
        })
        .await;
    }
}

impl<S> Cork<S> {
    /// Bytes that were sent so far.
    pub(super) fn sent(&self) -> u64 {
        lock(&self.held).sent
    }

    /// Bytes that wait to be sent.
    fn written(&self) -> usize {
        lock(&self.held).written.len()
    }
}

/// A connection, and what it ended with while its last words are sent.
pub(super) enum Connection<C: Future> {
    Open(C),
    Ended(Option<C::Output>),
}

impl<C: Future + Unpin> Connection<C> {
    /// The connection, if it has not ended.
    pub(super) fn open(&mut self) -> Option<&mut C> {
        if let Self::Open(connection) = self { Some(connection) } else { None }
    }

    /// Lets it do all it can; whether it has ended.
    fn turn(&mut self, context: &mut Context<'_>) -> bool {
        if let Self::Open(connection) = self
            && let Poll::Ready(outcome) = Pin::new(connection).poll(context)
        {
            *self = Self::Ended(Some(outcome));
        }
        self.has_ended()
    }

    fn has_ended(&self) -> bool {
        matches!(self, Self::Ended(_))
    }
}

/// The other tasks that were ready at some time. That a task is woken does not mean that they have run: any of them may
/// have woken it.
#[derive(Debug, Default)]
struct Others {
    have_passed: AtomicBool,
    task: AtomicWaker,
}

impl Others {
    /// From now on.
    fn let_pass(self: &Arc<Self>) {
        self.have_passed.store(false, Ordering::Relaxed);
        let waker = Waker::from(self.clone());
        // The runtime keeps the waker until it has run what is ready: there is no more to be had of the future.
        if pin!(tokio::task::yield_now()).poll(&mut Context::from_waker(&waker)).is_ready() {
            self.have_passed.store(true, Ordering::Relaxed);
        }
    }

    fn poll_passed(&self, context: &mut Context<'_>) -> Poll<()> {
        self.task.register(context.waker());
        if self.have_passed.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Wake for Others {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.have_passed.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl<S: AsyncWrite + Unpin> Held<S> {
    /// Sends all that is kept, and what the stream keeps.
    fn send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = ready!(self.try_send(context));
        if let Err(error) = &sent {
            self.give_up(error.kind());
        }
        Poll::Ready(sent)
    }

    /// Nothing more is sent.
    fn give_up(&mut self, why: io::ErrorKind) {
        self.written.clear();
        (self.is_flushed, self.is_blocked) = (true, false);
        self.broken = Some(why);
    }

    fn try_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.written.is_empty() {
            let sent = ready!(Pin::new(&mut self.stream).poll_write(context, &self.written))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written.advance(sent);
            self.took(sent);
        }
        if self.written.capacity() > KEPT {
            self.written = BytesMut::new();
        }
        if !self.is_flushed {
            ready!(Pin::new(&mut self.stream).poll_flush(context))?;
            self.is_flushed = true;
        }
        Poll::Ready(Ok(()))
    }

    /// The stream has taken so many bytes.
    fn took(&mut self, bytes: usize) {
        self.sent += bytes as u64;
        self.is_flushed = false;
    }

    /// Whether so many bytes are to be kept: else what is kept already has been sent, and they can follow.
    fn keeps(&mut self, bytes: usize, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if let Some(broken) = self.broken {
            return Poll::Ready(Err(broken.into()));
        }
        if self.written.len() + bytes <= ENOUGH {
            return Poll::Ready(Ok(true));
        }
        ready!(self.send(context))?;
        Poll::Ready(Ok(bytes < ENOUGH))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Corked<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut held = lock(&self.0);
        // Who takes nothing may still send, and would be waited for.
        match held.broken {
            Some(broken @ io::ErrorKind::TimedOut) => Poll::Ready(Err(broken.into())),
            _ => Pin::new(&mut held.stream).poll_read(context, buffer),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Corked<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut held = lock(&self.0);
        if ready!(held.keeps(bytes.len(), context))? {
            held.written.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        let sent = Pin::new(&mut held.stream).poll_write(context, bytes);
        held.is_blocked = sent.is_pending();
        let sent = ready!(sent)?;
        held.took(sent);
        Poll::Ready(Ok(sent))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut held = lock(&self.0);
        let bytes = pieces.iter().map(|piece| piece.len()).sum();
        if ready!(held.keeps(bytes, context))? {
            for piece in pieces {
                held.written.extend_from_slice(piece);
            }
            return Poll::Ready(Ok(bytes));
        }
        let sent = Pin::new(&mut held.stream).poll_write_vectored(context, pieces);
        held.is_blocked = sent.is_pending();
        let sent = ready!(sent)?;
        held.took(sent);
        Poll::Ready(Ok(sent))
    }

    fn is_write_vectored(&self) -> bool {
        lock(&self.0).stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut held = lock(&self.0);
        ready!(held.send(context))?;
        Pin::new(&mut held.stream).poll_shutdown(context)
    }
}

/// One task has both ends, so nobody waits for it; a panic in a stream leaves nothing half-done that matters here.
fn lock<S>(held: &Mutex<Held<S>>) -> MutexGuard<'_, Held<S>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const PATIENCE: Duration = Duration::from_mins(1);

    /// A stream that takes `room` bytes of each write, after it was not ready once, and counts the writes.
    #[derive(Debug, Default)]
    struct Narrow {
        room: usize,
        is_ready: bool,
        taken: Vec<u8>,
        writes: usize,
    }

    impl AsyncWrite for Narrow {
        fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.is_ready = !self.is_ready;
            if self.is_ready {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            let taken = bytes.len().min(self.room);
            self.taken.extend_from_slice(&bytes[..taken]);
            self.writes += 1;
            Poll::Ready(Ok(taken))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// Writes of these sizes with a flush after each, in one turn: the writes that the stream saw.
    async fn writes(room: usize, sizes: &[usize]) -> usize {
        let (mut stream, cork) = corked(Narrow { room, ..Narrow::default() }, PATIENCE);
        let all: Vec<u8> = (0..sizes.iter().sum()).map(|at: usize| (at % 251) as u8).collect();
        let connection = async {
            let mut rest = all.as_slice();
            for size in sizes {
                let (own, after) = rest.split_at(*size);
                stream.write_all(own).await.unwrap();
                stream.flush().await.unwrap();
                rest = after;
            }
        };
        cork.turns(&mut Connection::Open(Box::pin(connection)), &AtomicBool::new(false)).await;
        let held = lock(&cork.held);
        assert!(held.taken() == all, "{sizes:?} by {room}");
        held.stream.writes
    }

    impl Held<Narrow> {
        fn taken(&self) -> &[u8] {
            assert!(self.written.is_empty());
            &self.stream.taken
        }
    }

    #[tokio::test]
    async fn frames_of_one_turn_are_one_write_and_large_pieces_are_not_copied() {
        const FRAME: usize = 16 << 10;
        assert_eq!(writes(usize::MAX, &[9, FRAME, FRAME, FRAME, 40]).await, 1);
        assert_eq!(writes(usize::MAX, &[9, 10 * ENOUGH, 40]).await, 3);
        assert_eq!(writes(usize::MAX, &[FRAME; 8]).await, 2);
        assert_eq!(writes(1000, &[9, 2000, 3, 100_000]).await, 3 + 100);
    }

    #[tokio::test]
    async fn what_is_written_before_a_pause_is_there_during_it() {
        let (near, mut far) = tokio::io::duplex(1 << 10);
        let (mut stream, cork) = corked(near, PATIENCE);
        let connection = async {
            stream.write_all(b"first").await.unwrap();
            stream.flush().await.unwrap();
            tokio::time::sleep(Duration::from_hours(1)).await;
        };
        let (gathers, mut said) = (AtomicBool::new(true), [0; 5]);
        let mut connection = Connection::Open(Box::pin(connection));
        tokio::select! {
            () = cork.turns(&mut connection, &gathers) => panic!("it pauses"),
            read = far.read_exact(&mut said) => assert_eq!(read.unwrap(), 5),
        }
        assert_eq!(&said, b"first");
    }

    /// A stream that passes on what it has taken when it is flushed, and cannot do that at once.
    #[derive(Debug, Default)]
    struct Encrypting {
        taken: usize,
        passed_on: usize,
        is_ready: bool,
    }

    impl AsyncWrite for Encrypting {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.taken += bytes.len();
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.is_ready = !self.is_ready;
            if self.is_ready {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            self.passed_on = self.taken;
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn what_a_stream_keeps_is_flushed_however_large_it_was() {
        for size in [5, ENOUGH - 1, ENOUGH, 3 * ENOUGH] {
            let (mut stream, cork) = corked(Encrypting::default(), PATIENCE);
            let connection = async {
                stream.write_all(&vec![1; size]).await.unwrap();
                std::future::pending::<()>().await;
            };
            let (mut connection, gathers) = (Connection::Open(Box::pin(connection)), AtomicBool::new(true));
            let turns = cork.turns(&mut connection, &gathers);
            assert!(tokio::time::timeout(Duration::from_millis(50), turns).await.is_err());
            assert_eq!(lock(&cork.held).stream.passed_on, size);
        }
    }

    #[tokio::test]
    async fn the_last_words_of_a_connection_are_sent_although_nobody_waits_for_them_for_a_moment() {
        let (mut stream, cork) = corked(Narrow { room: usize::MAX, ..Narrow::default() }, PATIENCE);
        let connection = async {
            stream.write_all(b"goodbye").await.unwrap();
            "ended"
        };
        let (mut connection, gathers) = (Connection::Open(Box::pin(connection)), AtomicBool::new(false));
        assert_eq!(cork.turns(&mut connection, &gathers).now_or_never(), None, "the stream is not ready");
        assert!(connection.open().is_none());
        assert_eq!(cork.turns(&mut connection, &gathers).await, "ended");
        assert_eq!(lock(&cork.held).taken(), b"goodbye");
    }

    #[tokio::test]
    async fn answers_that_are_ready_at_the_same_time_are_one_write() {
        for (gathers, writes) in [(false, 9), (true, 2)] {
            let (mut stream, cork) = corked(Narrow { room: usize::MAX, ..Narrow::default() }, PATIENCE);
            let (sender, mut answers) = tokio::sync::mpsc::unbounded_channel::<u8>();
            let connection = async {
                while let Some(answer) = answers.recv().await {
                    stream.write_all(&[answer]).await.unwrap();
                }
            };
            // A task for each answer, of which each wakes the connection.
            let answer = |answer| {
                let sender = sender.clone();
                tokio::spawn(async move { sender.send(answer).unwrap() })
            };
            let gathers = AtomicBool::new(gathers);
            let mut connection = Connection::Open(Box::pin(connection));
            let mut turns = pin!(cork.turns(&mut connection, &gathers));
            answer(0).await.unwrap();
            let wait = tokio::time::timeout(Duration::from_millis(50), turns.as_mut());
            assert!(wait.await.is_err());
            (1..9).for_each(|number| drop(answer(number)));
            drop(sender);
            turns.await;
            let held = lock(&cork.held);
            assert_eq!(held.taken(), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
            assert!(held.stream.writes <= writes, "{} writes", held.stream.writes);
        }
    }

    #[tokio::test]
    async fn a_stream_that_breaks_breaks_the_connection() {
        let (near, far) = tokio::io::duplex(1 << 10);
        let (mut stream, cork) = corked(near, PATIENCE);
        drop(far);
        let connection = async {
            loop {
                if let Err(error) = stream.write_all(b"on and on").await {
                    return error.kind();
                }
                tokio::task::yield_now().await;
            }
        };
        let gathers = AtomicBool::new(true);
        let mut connection = Connection::Open(Box::pin(connection));
        let ended = cork.turns(&mut connection, &gathers);
        let ended = tokio::time::timeout(Duration::from_secs(20), ended).await.expect("it is told");
        assert_eq!(ended, io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn whoever_takes_nothing_of_what_is_left_is_given_up_and_whoever_takes_little_is_not() {
        const SHORT: Duration = Duration::from_millis(100);
        // What is kept, and what is too large for that.
        for (takes, bytes) in [(false, 64), (true, 64), (false, 3 * ENOUGH), (true, 3 * ENOUGH)] {
            let (near, mut far) = tokio::io::duplex(8);
            let (mut stream, cork) = corked(near, SHORT);
            // Writes, ends its own part, and waits for what the other end says next.
            let mut connection = Connection::Open(Box::pin(async move {
                stream.write_all(&vec![7; bytes]).await?;
                stream.read_u8().await
            }));
            let reader = async {
                loop {
                    time::sleep(SHORT / 2).await;
                    if takes {
                        far.read_u8().await.unwrap();
                    }
                }
            };
            let ended = async { cork.turns(&mut connection, &AtomicBool::new(false)).await };
            let ended = async {
                tokio::select! { ended = ended => ended, never = reader => never }
            };
            match time::timeout(SHORT * 8, ended).await {
                Ok(ended) => assert!(!takes && ended.unwrap_err().kind() == io::ErrorKind::TimedOut),
                Err(_) => assert!(takes),
            }
        }
    }
}

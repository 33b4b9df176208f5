//! Writes of one turn of a connection, sent together.
//!
//! HTTP/2 writes and flushes an answer frame by frame, of 16 KiB where the client does not ask for more, as few do. Each is a
//! system call, and wakes the client: 49 KiB of hidden states came in four pieces. What is written here is kept until the
//! connection has done all it can, or until it is enough.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is kept at most, and the smallest piece that is not worth to be copied.
const ENOUGH: usize = 64 << 10;
/// Room that a connection which is at rest may keep.
const KEPT: usize = 8 << 10;

/// A stream whose writes wait for the end of the turn, and what ends it.
pub(super) fn corked<S: AsyncWrite + Unpin>(stream: S) -> (Corked<S>, Cork<S>) {
    let held = Arc::new(Mutex::new(Held { stream, written: BytesMut::new() }));
    (Corked(held.clone()), Cork(held))
}

/// See [`corked`]. Flushing it does nothing: who owns the connection ends each of its turns by [`Cork::turns`].
#[derive(Debug)]
pub(super) struct Corked<S>(Arc<Mutex<Held<S>>>);

/// See [`corked`].
#[derive(Debug)]
pub(super) struct Cork<S>(Arc<Mutex<Held<S>>>);

#[derive(Debug)]
struct Held<S> {
    stream: S,
    written: BytesMut,
}

impl<S: AsyncWrite + Unpin> Cork<S> {
    /// Runs `connection`, which writes to this cork's stream, and sends what it has written after each of its turns.
    pub(super) fn turns<C>(&self, connection: C) -> Turns<'_, C, S>
    where
        C: Future + Unpin,
    {
        Turns { connection, ended: None, cork: self }
    }
}

/// See [`Cork::turns`].
#[derive(Debug)]
pub(super) struct Turns<'a, C: Future, S> {
    connection: C,
    /// What the connection ended with, while its last words are sent.
    ended: Option<C::Output>,
    cork: &'a Cork<S>,
}

// The output of a connection is moved, never pinned.
impl<C: Future, S> Unpin for Turns<'_, C, S> where C: Unpin {}

impl<C: Future + Unpin, S: AsyncWrite + Unpin> Future for Turns<'_, C, S> {
    type Output = C::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<C::Output> {
        let this = &mut *self;
        if this.ended.is_none()
            && let Poll::Ready(ended) = Pin::new(&mut this.connection).poll(context)
        {
            this.ended = Some(ended);
        }
        let sent = lock(&this.cork.0).send(context);
        match this.ended.take() {
            // A stream that is broken says so to the connection as well, when it is read or written to.
            None => Poll::Pending,
            Some(ended) if sent.is_ready() => Poll::Ready(ended),
            ended => {
                this.ended = ended;
                Poll::Pending
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> Held<S> {
    /// Sends all that is kept.
    fn send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.written.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while !self.written.is_empty() {
            let sent = ready!(Pin::new(&mut self.stream).poll_write(context, &self.written))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written.advance(sent);
        }
        if self.written.capacity() > KEPT {
            self.written = BytesMut::new();
        }
        Pin::new(&mut self.stream).poll_flush(context)
    }

    /// Whether so many bytes are to be kept: else what is kept already has been sent, and they can follow.
    fn keeps(&mut self, bytes: usize, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.written.len() + bytes <= ENOUGH {
            return Poll::Ready(Ok(true));
        }
        ready!(self.send(context))?;
        Poll::Ready(Ok(bytes < ENOUGH))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Corked<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut lock(&self.0).stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Corked<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut held = lock(&self.0);
        if ready!(held.keeps(bytes.len(), context))? {
            held.written.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut held.stream).poll_write(context, bytes)
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
        Pin::new(&mut held.stream).poll_write_vectored(context, pieces)
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
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

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
        let (mut stream, cork) = corked(Narrow { room, ..Narrow::default() });
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
        cork.turns(Box::pin(connection)).await;
        let held = lock(&cork.0);
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
        let (mut stream, cork) = corked(near);
        let connection = async {
            stream.write_all(b"first").await.unwrap();
            stream.flush().await.unwrap();
            tokio::time::sleep(Duration::from_hours(1)).await;
        };
        let mut said = [0; 5];
        tokio::select! {
            () = cork.turns(Box::pin(connection)) => panic!("it pauses"),
            read = far.read_exact(&mut said) => assert_eq!(read.unwrap(), 5),
        }
        assert_eq!(&said, b"first");
    }
}

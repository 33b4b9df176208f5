//! Connections that do not say what they speak, and would be waited for for ever: which version of HTTP it is is read from
//! the first bytes, before any clock of either runs.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{self, Sleep},
};

/// What a client of HTTP/2 says first (RFC 9113, section 3.4). Whoever says anything else speaks HTTP/1.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A stream whose first words have to be there in time.
#[derive(Debug)]
pub(super) struct Impatient<S> {
    stream: S,
    /// Until when; `None` once they are.
    until: Option<Pin<Box<Sleep>>>,
    /// Bytes of the preface that were read.
    seen: usize,
}

impl<S> Impatient<S> {
    pub(super) fn new(stream: S, patience: Duration) -> Self {
        Self { stream, until: Some(Box::pin(time::sleep(patience))), seen: 0 }
    }

    fn hear(&mut self, said: &[u8]) {
        let expected = &PREFACE[self.seen..];
        let common = said.len().min(expected.len());
        self.seen += common;
        if said[..common] != expected[..common] || self.seen == PREFACE.len() {
            self.until = None;
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(context, buffer);
        let Some(until) = &mut this.until else { return read };
        if read.is_pending() && until.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not say what it speaks")));
        }
        this.hear(&buffer.filled()[before..]);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn who_says_nothing_or_half_a_word_is_given_up_and_others_have_time() {
        const PATIENCE: Duration = Duration::from_millis(20);
        for (words, is_given_up) in [(&b""[..], true), (&PREFACE[..7], true), (PREFACE, false), (b"GET /", false)] {
            let (mut client, server) = tokio::io::duplex(64);
            let mut stream = Impatient::new(server, PATIENCE);
            client.write_all(words).await.unwrap();
            let mut heard = vec![0; words.len()];
            stream.read_exact(&mut heard).await.unwrap();
            // Ten times as long says that it is never; who is given up ends the wait.
            let wait = if is_given_up { Duration::from_mins(1) } else { PATIENCE * 10 };
            match time::timeout(wait, stream.read_u8()).await {
                Ok(more) => assert!(is_given_up && more.unwrap_err().kind() == io::ErrorKind::TimedOut, "{words:?}"),
                Err(_) => assert!(!is_given_up, "{words:?}"),
            }
        }
    }
}

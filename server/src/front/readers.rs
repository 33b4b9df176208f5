//! Whether clients take the answers that they asked for: one who takes nothing for too long is cut off.
//!
//! An answer that nobody reads holds memory, its part of the budget, and a place among the streams of its connection. It waits
//! inside hyper for the client to make room, where nothing can tell it to end but the end of the task that it is in. That
//! is a task of its own for each stream of HTTP/2, so that the others go on, and the connection's for HTTP/1.

use std::{
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use futures::task::AtomicWaker;
use tokio::time;

/// A clock that ticks so often in the time that a reader has: to read it costs nothing.
const TICKS: u64 = 4;
/// Who owes nothing.
const NEVER: u64 = u64::MAX;

tokio::task_local! {
    static OWN: Arc<Reader>;
}

/// All readers of one connection.
#[derive(Clone, Debug)]
pub(super) struct Readers(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    now: AtomicU64,
    tick: Duration,
    all: Mutex<Vec<Weak<Reader>>>,
}

/// Who is to take an answer.
#[derive(Debug)]
pub(super) struct Reader {
    shared: Arc<Shared>,
    /// The last tick by which something has to be taken.
    until: AtomicU64,
    is_cut: AtomicBool,
    task: AtomicWaker,
}

impl Readers {
    /// Those of a new connection, who may rest for `patience`.
    pub(super) fn new(patience: Duration) -> Self {
        Self(Arc::new(Shared { now: AtomicU64::new(0), tick: patience / TICKS as u32, all: Mutex::default() }))
    }

    /// Runs a connection, until it ends or its own reader is cut off.
    pub(super) async fn attend(&self, connection: impl Future<Output = ()>) {
        let own = self.enter();
        tokio::select! {
            () = OWN.scope(own.clone(), connection) => {}
            () = self.watch() => {}
            () = own.cut() => tracing::debug!("a connection was given up: nobody read what it had to say"),
        }
    }

    /// Cuts off who has taken nothing for too long; never ends.
    async fn watch(&self) {
        loop {
            time::sleep(self.0.tick).await;
            let now = self.0.now.fetch_add(1, Ordering::Relaxed) + 1;
            let mut all = self.0.lock();
            all.retain(|reader| reader.strong_count() > 0);
            for reader in all.iter().filter_map(Weak::upgrade).filter(|reader| reader.is_late(now)) {
                reader.is_cut.store(true, Ordering::Release);
                reader.task.wake();
            }
        }
    }

    fn enter(&self) -> Arc<Reader> {
        let (until, is_cut, task) = (AtomicU64::new(NEVER), AtomicBool::new(false), AtomicWaker::new());
        let reader = Arc::new(Reader { shared: self.0.clone(), until, is_cut, task });
        let mut all = self.0.lock();
        if all.len() == all.capacity() {
            all.retain(|reader| reader.strong_count() > 0);
            let kept = all.len();
            all.reserve(kept.max(16));
        }
        all.push(Arc::downgrade(&reader));
        reader
    }
}

impl Shared {
    /// Only this module's few lines run under the lock.
    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Reader>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs the streams of a connection of HTTP/2, each until it ends or its reader is cut off, by which the client is told.
impl<F> hyper::rt::Executor<F> for Readers
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let reader = self.enter();
        tokio::spawn(OWN.scope(reader.clone(), async move {
            tokio::select! {
                biased;
                () = stream => {}
                () = reader.cut() => tracing::debug!("an answer was given up: nobody read it"),
            }
        }));
    }
}

impl Reader {
    /// The one of this task.
    pub(super) fn own() -> Option<Arc<Self>> {
        OWN.try_with(Arc::clone).ok()
    }

    /// There is something to be taken now, by which the reader has as long as any, and `longer`.
    pub(super) fn owes(&self, longer: Duration) {
        let ticks = longer.as_nanos().checked_div(self.shared.tick.as_nanos()).unwrap_or(0);
        let until = self.shared.now.load(Ordering::Relaxed) + TICKS + u64::try_from(ticks).unwrap_or(NEVER / 2);
        self.until.store(until, Ordering::Relaxed);
    }

    /// There is nothing to be taken.
    pub(super) fn rests(&self) {
        self.until.store(NEVER, Ordering::Relaxed);
    }

    fn is_late(&self, now: u64) -> bool {
        now > self.until.load(Ordering::Relaxed)
    }

    /// Until it is cut off.
    async fn cut(&self) {
        poll_fn(|context| {
            self.task.register(context.waker());
            if self.is_cut.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, time::Instant};

    use axum::http::{Request, Response};
    use bytes::Bytes;
    use http_body_util::Full;
    use hyper::{body::Incoming, rt::Executor as _, server::conn::http2};
    use hyper_util::rt::TokioIo;
    use tokio::sync::oneshot;

    use super::*;
    use crate::{budget::Budget, front::going::Going, metrics::Metrics};

    const PATIENCE: Duration = Duration::from_millis(100);

    /// A stream whose reader owes something, as `work` says, and what ends with it.
    fn stream(readers: &Readers, work: impl Fn(&Reader) + Send + 'static) -> oneshot::Receiver<()> {
        let (alive, ended) = oneshot::channel();
        readers.execute(async move {
            let _alive = alive;
            work(&Reader::own().unwrap());
            std::future::pending::<()>().await;
        });
        ended
    }

    #[tokio::test]
    async fn who_takes_nothing_is_cut_off_alone_and_who_owes_nothing_is_not() {
        let readers = Readers::new(PATIENCE);
        let connection = async {
            let begun = Instant::now();
            let mut paid = stream(&readers, |reader| {
                reader.owes(Duration::ZERO);
                reader.rests();
            });
            let large = stream(&readers, |reader| reader.owes(PATIENCE * 4));
            let late = stream(&readers, |reader| reader.owes(Duration::ZERO));
            late.await.unwrap_err();
            assert!(begun.elapsed() >= PATIENCE, "{:?}", begun.elapsed());
            large.await.unwrap_err();
            assert!(begun.elapsed() >= PATIENCE * 5, "{:?}", begun.elapsed());
            assert!(time::timeout(PATIENCE * 3, &mut paid).await.is_err());
        };
        time::timeout(Duration::from_mins(1), readers.attend(connection)).await.unwrap();
    }

    #[tokio::test]
    async fn a_connection_whose_own_reader_takes_nothing_ends() {
        let readers = Readers::new(PATIENCE);
        let connection = async {
            Reader::own().unwrap().owes(Duration::ZERO);
            std::future::pending::<()>().await;
        };
        time::timeout(Duration::from_mins(1), readers.attend(connection)).await.unwrap();
    }

    #[tokio::test]
    async fn a_stream_that_nobody_reads_is_reset_with_all_that_it_holds_and_its_connection_goes_on() {
        let (near, far) = tokio::io::duplex(1 << 16);
        let (readers, budget) = (Readers::new(PATIENCE), Budget::new(1 << 20, Metrics::new().budget()));
        let held = budget.clone();
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            // Less than a piece, and more of them.
            let bytes = request.uri().path().len() << 15;
            let body = Full::new(Bytes::from(vec![7; if bytes == 1 << 15 { 0 } else { bytes }]));
            let held = held.clone();
            async move { Ok::<_, Infallible>(Response::new(Going::new(body, &held, Arc::default(), Reader::own(), false))) }
        });
        let server = http2::Builder::new(readers.clone()).serve_connection(TokioIo::new(near), service);
        tokio::spawn(async move { readers.attend(async { drop(server.await) }).await });
        // It lets no answer come.
        let client = h2::client::Builder::new().initial_window_size(0).handshake::<_, Bytes>(far);
        let (mut client, connection) = client.await.unwrap();
        tokio::spawn(connection);
        let mut ask = |path: &str| client.send_request(Request::get(path).body(()).unwrap(), true).unwrap().0;
        for path in ["/s", "/large"] {
            let mut body = ask(&format!("http://host{path}")).await.unwrap().into_body();
            budget.claim(1 << 20).expect_err("the answer is held");
            let end = time::timeout(Duration::from_mins(1), body.data()).await.expect("it is told");
            assert_eq!(end.unwrap().unwrap_err().reason(), Some(h2::Reason::CANCEL), "{path}");
            drop(budget.claim(1 << 20).expect("nothing is held"));
        }
        assert_eq!(ask("http://host/").await.unwrap().status(), 200, "others are answered");
    }

    #[tokio::test]
    async fn streams_that_have_ended_leave_nothing_behind() {
        let readers = Readers::new(PATIENCE);
        for _ in 0..1000 {
            let (tell, ended) = oneshot::channel();
            readers.execute(async move {
                let _ = tell.send(());
            });
            ended.await.unwrap();
            tokio::task::yield_now().await;
        }
        assert!(readers.0.lock().len() <= 64, "{}", readers.0.lock().len());
    }
}

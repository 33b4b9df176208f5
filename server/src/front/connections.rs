//! Connections of one port, from the handshake to the last answer.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderValue, Response, Version, header},
};
use futures::FutureExt as _;
use http_body_util::Either;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use super::{
    App,
    corked::{Connection, corked},
    drained::Drained,
    going::{Going, PIECE},
    guard,
    impatient::Impatient,
    metered::{Metered, Sent},
    places::Places,
    readers::{Reader, Readers},
    unary::{Answer, Unary},
};
use crate::{
    budget::{Budget, Tally},
    rest,
    security::Tls,
};

/// Longest wait for a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Bytes of a body that are left over when a request is refused, and that are surely read away before its connection is used again, at
/// most.
const LEFT_OVER: u64 = 32 << 10;
/// Longest wait for what shows which version of HTTP a client speaks.
const FIRST_WORDS: Duration = Duration::from_secs(30);
/// How long a kept connection of HTTP/1 stays open when the server ends, for a request that is on its way already: unlike
/// HTTP/2, it cannot say which request was its last.
const LINGER: Duration = Duration::from_millis(500);
/// How long a connection that was told to end, and on which nothing is under way, may take to hear of it: a client that vanished
/// never does.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// How long it is not said again that connections cannot be accepted.
const TOLD: Duration = Duration::from_mins(1);
/// Connections that wait to be taken at most, as tokio asks of the system.
const BACKLOG: usize = 1024;
/// How long a request may rest while it arrives, and an answer while it is sent: what there is of them takes its part of the
/// budget.
const STALL: Duration = Duration::from_mins(1);
/// How long an HTTP/1 connection may be silent. Longer than clients, and load balancers, keep idle ones in their pools, for ten minutes
/// at most.
const SILENCE: Duration = Duration::from_secs(620);
/// An HTTP/2 client that vanished without a word frees its requests after these two.
const KEEPALIVE_INTERVAL: Duration = Duration::from_mins(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Streams of one HTTP/2 connection at a time: gRPC clients put all their calls on one.
const MAX_STREAMS: u32 = 4096;
/// Calls that were taken back before this server has looked at them, on one connection, at most: one more ends the connection, as those who only
/// do that want to keep a server busy. Many users may share a connection, and some of them leave all at once.
const RESETS: usize = 1024;
/// What a stream, and a connection, may send before the server has read it: the tensors of a few pictures in one go, and a bound on
/// what one connection makes the server hold.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Larger frames than the default of 16 KiB: fewer of them per tensor.
const FRAME: u32 = 256 << 10;

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its address.
    pub address: IpAddr,
}

/// A port, what is behind it, and when it closes.
#[derive(Debug)]
pub struct Door {
    /// Where clients connect.
    pub listener: TcpListener,
    /// With which certificate; `None` for plain text.
    pub tls: Option<Tls>,
    /// What answers them.
    pub app: App,
    /// What the bodies of requests are taken from.
    pub budget: Budget,
    /// Bytes of a message at most.
    pub max_message_bytes: usize,
    /// How many connections there may be; `None` where nobody counts them.
    pub places: Option<Places>,
    /// Whether requests carry their [`Peer`], as an `Arc` among their extensions.
    pub tells_peers: bool,
    /// Connections made before this finish what they have begun, and end.
    pub drain: CancellationToken,
    /// No connection is taken after this, and those made since `drain` finish as well.
    pub close: CancellationToken,
}

impl Door {
    /// Serves until it is closed and the last connection has ended. Dropping this ends all of them at once.
    pub async fn serve(self) {
        let Self { listener, tls, app, budget, max_message_bytes, places, tells_peers, drain, close } = self;
        let inside = Arc::new(Inside { app, budget, max_message_bytes });
        let connections = TaskTracker::new();
        // Whoever drops this future wants the port and its connections gone.
        let abort = CancellationToken::new();
        let _abort_on_drop = abort.clone().drop_guard();
        let take = |(stream, address): (TcpStream, SocketAddr), finish: &CancellationToken| {
            let place = places.as_ref().map(Places::take);
            if matches!(place, Some(None)) {
                // Counted, and not logged: it happens as often as clients like.
                return;
            }
            let peer = tells_peers.then(|| Arc::new(Peer { address: address.ip() }));
            let served = connection(stream, tls.clone(), inside.clone(), peer, finish.clone());
            let abort = abort.clone();
            connections.spawn(async move {
                let _place = place;
                tokio::select! {
                    () = served => {}
                    () = abort.cancelled() => {}
                }
            });
        };
        // What tells connections that were made before the drain to end, and those since. A client that hears of it connects
        // anew at once: where that is over, it has to be refused by then, and not to wait in a queue that nobody comes to.
        let (early, late) = (CancellationToken::new(), CancellationToken::new());
        let mut told: Option<Instant> = None;
        loop {
            let finish = if early.is_cancelled() { &late } else { &early };
            tokio::select! {
                () = close.cancelled() => break,
                () = drain.cancelled(), if !early.is_cancelled() => {
                    if close.is_cancelled() {
                        break;
                    }
                    early.cancel();
                }
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => take(accepted, finish),
                    Err(error) => {
                        // Out of file descriptors, most likely: connections that end give some back.
                        if told.is_none_or(|told| told.elapsed() >= TOLD) {
                            told = Some(Instant::now());
                            tracing::warn!(%error, "a connection could not be accepted");
                        }
                        time::sleep(Duration::from_millis(50)).await;
                    }
                },
            }
        }
        // Those who were in time; no more than the system lets wait, since others may come as fast as they are taken. All at
        // once, also where tokio would let other tasks go first, and say that nobody is there.
        for _ in 0..BACKLOG {
            let Some(Ok(accepted)) = tokio::task::unconstrained(listener.accept()).now_or_never() else { break };
            take(accepted, &late);
        }
        drop(listener);
        early.cancel();
        late.cancel();
        connections.close();
        connections.wait().await;
    }
}

/// What is behind a port, for each of its connections.
#[derive(Debug)]
struct Inside {
    app: App,
    budget: Budget,
    max_message_bytes: usize,
}

async fn connection(
    stream: TcpStream,
    tls: Option<Tls>,
    inside: Arc<Inside>,
    peer: Option<Arc<Peer>>,
    finish: CancellationToken,
) {
    // Answers are small and complete: waiting to join them would only delay them.
    let _ = stream.set_nodelay(true);
    let readers = Readers::new(STALL);
    match tls {
        None => readers.attend(exchange(stream, inside, peer, finish, readers.clone())).await,
        Some(tls) => match time::timeout(HANDSHAKE, tls.accept(stream)).await {
            Ok(Ok(stream)) => readers.attend(exchange(stream, inside, peer, finish, readers.clone())).await,
            Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
            Err(_) => tracing::debug!("a TLS handshake took too long"),
        },
    }
}

impl Inside {
    /// Answers a request that is `under_way`, for as long as its answer is.
    async fn answer(
        &self,
        request: Request<Incoming>,
        peer: Option<Arc<Peer>>,
        under_way: Arc<()>,
    ) -> Response<Going<Either<Answer, Body>>> {
        let tally = self.budget.tally();
        let is_http2 = request.version() == Version::HTTP_2;
        let may_be_left =
            !is_http2 && http_body::Body::size_hint(request.body()).upper().is_none_or(|bytes| bytes > LEFT_OVER);
        let mut answer = self.handle(request, peer, tally.clone()).await;
        if may_be_left && !tally.is_whole() {
            // The connection may have to be closed then, of which the client has to hear before it sends another request.
            answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        answer.map(|body| Going::new(body, &self.budget, under_way, Reader::own(), is_http2))
    }

    /// Answers a request. Its body is taken from the budget, and given back with the answer or when its client leaves; a
    /// stream's messages hold themselves.
    async fn handle(
        &self,
        request: Request<Incoming>,
        peer: Option<Arc<Peer>>,
        tally: Tally,
    ) -> Response<Either<Answer, Body>> {
        let (mut head, body) = request.into_parts();
        let is_empty = http_body::Body::is_end_stream(&body);
        // Its clients keep streams on which they may never ask again.
        let asks_for_reflection = head.uri.path().starts_with("/grpc.reflection.");
        let patience = if asks_for_reflection { SILENCE } else { STALL };
        let streams = if asks_for_reflection {
            Some(Sent::Unclaimed)
        } else {
            head.uri.path().ends_with("/ModelStreamInfer").then_some(Sent::Claimed)
        };
        let body = Drained::new(body, &head.headers, streams.is_some());
        let mut body = Metered::new(body, &head.headers, tally.clone(), self.max_message_bytes, patience);
        if let Some(sent) = streams {
            body = body.of_stream(sent);
        }
        if let Some(infer) = &self.app.infer {
            let admit = || guard::admit(infer.admission.as_ref(), &head.headers, peer.as_deref());
            if Unary::takes(&head) {
                return infer.grpc.answer(&head.headers, body, admit()).await.map(Either::Left);
            }
            if let Some(target) = rest::Infer::target(&head) {
                // Boxed, so that a call of gRPC does not carry room for it.
                let answer = Box::pin(infer.rest.answer(target, &head.headers, Body::new(body), tally));
                let pass = admit().inspect_err(|status| infer.service.refused(status.code()));
                return guard::behind(pass, false, answer).await.map(Either::Right);
            }
        }
        let body = if is_empty { Body::empty() } else { Body::new(body) };
        head.extensions.insert(tally.clone());
        if let Some(peer) = peer {
            head.extensions.insert(peer);
        }
        let Ok(answer) = self.app.routes.clone().oneshot(Request::from_parts(head, body)).await;
        answer.map(Either::Right)
    }
}

async fn exchange<S>(
    stream: S,
    inside: Arc<Inside>,
    peer: Option<Arc<Peer>>,
    finish: CancellationToken,
    readers: Readers,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let is_http2 = Arc::new(AtomicBool::new(false));
    let (speaks_http2, ends) = (is_http2.clone(), finish.clone());
    // One here, one in the service, and one for each request until its answer is sent.
    let under_way = Arc::new(());
    let requests = under_way.clone();
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let is_http2 = request.version() == Version::HTTP_2;
        speaks_http2.store(is_http2, Ordering::Relaxed);
        let ends = (!is_http2).then(|| ends.clone());
        let (inside, peer, request_under_way) = (inside.clone(), peer.clone(), requests.clone());
        // Boxed, since hyper and tokio move it half a dozen times, and it has room for every step of a request: that was a tenth
        // of what a small one costs.
        Box::pin(async move {
            let mut answer = inside.answer(request, peer, request_under_way).await;
            if ends.is_some_and(|ends| ends.is_cancelled()) {
                answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(answer)
        })
    });
    let mut builder = auto::Builder::new(readers);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(SILENCE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .max_pending_accept_reset_streams(RESETS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        // What a stream keeps of an answer that its client has room for, and the socket has not.
        .max_send_buf_size(PIECE);
    let (stream, cork) = corked(stream, STALL);
    let connection = builder.serve_connection(TokioIo::new(Impatient::new(stream, FIRST_WORDS)), service);
    let mut connection = Connection::Open(pin!(connection));
    let ended = tokio::select! {
        ended = cork.turns(&mut connection, &is_http2) => ended,
        () = finish.cancelled() => {
            let linger = if is_http2.load(Ordering::Relaxed) { Duration::ZERO } else { LINGER };
            if let Ok(ended) = time::timeout(linger, cork.turns(&mut connection, &is_http2)).await {
                ended
            } else {
                if let Some(connection) = connection.open() {
                    connection.as_mut().graceful_shutdown();
                }
                loop {
                    let before = cork.sent();
                    if let Ok(ended) = time::timeout(LAST_WORDS, cork.turns(&mut connection, &is_http2)).await {
                        break ended;
                    }
                    // The last pieces of answers may still be on their way to a slow reader.
                    if Arc::strong_count(&under_way) == 2 && cork.sent() == before {
                        return;
                    }
                }
            }
        }
    };
    if let Err(error) = ended {
        // Clients leave as they like, and what is no HTTP is the sender's affair.
        tracing::debug!(error, "a connection ended with an error");
    }
}

//! A thousand streams whose connections are cut at random: nobody else notices, and memory stays as it is.

use std::{
    net::Shutdown,
    os::fd::AsFd as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use sensorium_bench::{Better, Report, fuzz::Random};
use sensorium_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use tokio::{net::TcpStream, sync::mpsc, task::JoinSet, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::server::{PATIENCE, Server, one};

const CONNECTIONS: u64 = 100;
const STREAMS_EACH: u64 = 10;

#[derive(Debug, Default)]
struct Counts {
    answered: AtomicUsize,
    killed: AtomicUsize,
    /// Errors on connections that nobody cut.
    errors: AtomicUsize,
}

pub(crate) async fn run(report: &mut Report, server: &Server, duration: Duration) -> Result<()> {
    let counts = Arc::<Counts>::default();
    let stop = Arc::<AtomicBool>::default();
    let mut connections = JoinSet::new();
    for seed in 0..CONNECTIONS {
        let (counts, stop, address) = (counts.clone(), stop.clone(), server.grpc);
        connections.spawn(async move {
            let mut random = Random::new(seed);
            while !stop.load(Ordering::Relaxed) {
                if let Err(error) = connection(address, &mut random, &counts, &stop).await {
                    counts.errors.fetch_add(1, Ordering::Relaxed);
                    eprintln!("streams: {error:#}");
                }
            }
        });
    }
    // The first seconds are for connections and buffers that come once.
    let settle = duration / 6;
    time::sleep(settle).await;
    let mut memory = Vec::new();
    let end = time::Instant::now() + duration.saturating_sub(settle);
    while time::Instant::now() < end {
        memory.push(server.memory()?);
        time::sleep(Duration::from_millis(250)).await;
    }
    stop.store(true, Ordering::Relaxed);
    connections.join_all().await;
    let third = (memory.len() / 3).max(1);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
    let (first, last) = (mean(&memory[..third]), mean(&memory[memory.len() - third..]));
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed) as f64;
    report.row(
        "streams/answered".to_owned(),
        "requests",
        Better::Higher,
        count(&counts.answered),
        ("at-least", 1000.0),
    );
    report.row(
        "streams/connections-cut".to_owned(),
        "connections",
        Better::Higher,
        count(&counts.killed),
        ("at-least", 100.0),
    );
    report.row("streams/errors-of-others".to_owned(), "errors", Better::Lower, count(&counts.errors), ("limit", 0.0));
    report.row("streams/memory-last-third".to_owned(), "MiB", Better::Lower, last, ("first-third", first));
    Ok(())
}

/// One connection until it is cut, or until the end.
async fn connection(
    address: std::net::SocketAddr,
    random: &mut Random,
    counts: &Arc<Counts>,
    stop: &Arc<AtomicBool>,
) -> Result<()> {
    let socket = Arc::<Mutex<Option<std::net::TcpStream>>>::default();
    let kept = socket.clone();
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let kept = kept.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            let twin = std::net::TcpStream::from(stream.as_fd().try_clone_to_owned()?);
            kept.lock().map_err(|_| std::io::Error::other("poisoned"))?.replace(twin);
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect_with_connector(connector).await?;
    let cut = Arc::<AtomicBool>::default();
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS_EACH {
        let random = Random::new(random.number());
        streams.spawn(stream(channel.clone(), random, counts.clone(), stop.clone(), cut.clone()));
    }
    let until = time::Instant::now() + Duration::from_millis(2000 + random.below(18_000) as u64);
    while time::Instant::now() < until && !stop.load(Ordering::Relaxed) {
        time::sleep(Duration::from_millis(50)).await;
    }
    if !stop.load(Ordering::Relaxed) {
        cut.store(true, Ordering::SeqCst);
        counts.killed.fetch_add(1, Ordering::Relaxed);
        if let Some(socket) = socket.lock().ok().and_then(|mut socket| socket.take()) {
            socket.shutdown(Shutdown::Both)?;
        }
    }
    while let Some(ended) = streams.join_next().await {
        if let Err(error) = ended?
            && !cut.load(Ordering::SeqCst)
        {
            return Err(error);
        }
    }
    Ok(())
}

/// One stream that asks, waits for its answer, and rests.
async fn stream(
    channel: Channel,
    mut random: Random,
    counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
    cut: Arc<AtomicBool>,
) -> Result<()> {
    let (requests, stream) = mpsc::channel(1);
    let mut client = GrpcInferenceServiceClient::new(channel);
    let mut answers = client.model_stream_infer(ReceiverStream::new(stream)).await?.into_inner();
    while !stop.load(Ordering::Relaxed) && !cut.load(Ordering::Relaxed) {
        let value = random.below(1000) as f32;
        requests.send(one("twice", value)).await.context("the stream takes nothing more")?;
        let answer =
            time::timeout(PATIENCE, answers.message()).await.context("no answer")??.context("no more answers")?;
        anyhow::ensure!(answer.error_message.is_empty(), "{}", answer.error_message);
        let found = answer.infer_response.and_then(|answer| answer.raw_output_contents.into_iter().next());
        anyhow::ensure!(found.as_deref() == Some(&(value * 2.0).to_le_bytes()[..]), "another's answer");
        counts.answered.fetch_add(1, Ordering::Relaxed);
        time::sleep(Duration::from_millis(250 + random.below(500) as u64)).await;
    }
    Ok(())
}

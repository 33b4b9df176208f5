//! SIGTERM under load: whatever was accepted is answered.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use sensorium_bench::{Better, Report};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time,
};
use tonic::Code;

use crate::server::{PATIENCE, Server, one, one_json, post};

const CLIENTS: usize = 32;

#[derive(Debug, Default)]
struct Counts {
    answered: AtomicUsize,
    /// Told that the server ends, or not let in.
    refused: AtomicUsize,
    failed: AtomicUsize,
}

pub(crate) async fn run(report: &mut Report, repository: &Path, rounds: usize) -> Result<()> {
    let counts = Arc::<Counts>::default();
    for _ in 0..rounds {
        let mut server = Server::start(repository, &[]).await?;
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            clients.spawn(grpc(server.channel().await?, counts.clone()));
            clients.spawn(http(TcpStream::connect(server.http).await?, counts.clone()));
        }
        time::sleep(Duration::from_secs(2)).await;
        server.terminate()?;
        ensure!(server.ended().await?.success(), "the server did not end well");
        time::timeout(PATIENCE, clients.join_all()).await.context("a client waits for ever")?;
    }
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed) as f64;
    eprintln!("drain: {counts:?}");
    report.row("drain/answered".to_owned(), "requests", Better::Higher, count(&counts.answered), ("at-least", 100.0));
    report.row(
        "drain/accepted-and-failed".to_owned(),
        "requests",
        Better::Lower,
        count(&counts.failed),
        ("limit", 0.0),
    );
    Ok(())
}

/// Asks over one connection until it is refused.
async fn grpc(channel: tonic::transport::Channel, counts: Arc<Counts>) {
    let mut client =
        sensorium_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient::new(channel);
    loop {
        match client.model_infer(one("twice", 1.0)).await {
            Ok(_) => counts.answered.fetch_add(1, Ordering::Relaxed),
            Err(status) if status.code() == Code::Unavailable => {
                counts.refused.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Err(status) => {
                eprintln!("drain: {status:?}");
                counts.failed.fetch_add(1, Ordering::Relaxed);
                return;
            }
        };
    }
}

/// Asks over one connection that is kept until the server says that it closes it. One that it closes without a word,
/// with a request on its way, has failed that request.
async fn http(mut stream: TcpStream, counts: Arc<Counts>) {
    let request = post("/v2/models/twice/infer", &one_json(1.0).to_string(), true);
    loop {
        match answer(&mut stream, &request).await {
            Ok((200, closes)) => {
                counts.answered.fetch_add(1, Ordering::Relaxed);
                if closes {
                    return;
                }
            }
            Ok((503, _)) => {
                counts.refused.fetch_add(1, Ordering::Relaxed);
                return;
            }
            other => {
                eprintln!("drain: {other:?}");
                counts.failed.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    }
}

/// The status of the answer, and whether it is the last of the connection.
async fn answer(stream: &mut TcpStream, request: &[u8]) -> Result<(u16, bool)> {
    stream.write_all(request).await?;
    let mut answer = Vec::new();
    let (head, length) = loop {
        ensure!(stream.read_buf(&mut answer).await? > 0, "closed without a word");
        if let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
            break (head, end + 4 + length.context("an answer without a length")?);
        }
    };
    while answer.len() < length {
        ensure!(stream.read_buf(&mut answer).await? > 0, "closed in the middle of an answer");
    }
    Ok((head.get(9..12).context("no status")?.parse()?, head.contains("connection: close")))
}

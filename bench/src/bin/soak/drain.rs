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
use sensorium_bench::{Better, Report, until_refused};
use tokio::{net::TcpStream, task::JoinSet, time};

use crate::server::{PATIENCE, Server, one, one_json, post};

const CLIENTS: usize = 32;

pub(crate) async fn run(report: &mut Report, repository: &Path, rounds: usize) -> Result<()> {
    let answered = Arc::<AtomicUsize>::default();
    let mut failed = 0;
    for _ in 0..rounds {
        let mut server = Server::start(repository, &[]).await?;
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            let (channel, count) = (server.channel().await?, answered.clone());
            clients.spawn(async move { until_refused::grpc(channel, &one("twice", 1.0), &count).await });
            let (stream, count) = (TcpStream::connect(server.http).await?, answered.clone());
            clients.spawn(async move {
                let request = post("/v2/models/twice/infer", &one_json(1.0).to_string(), true);
                until_refused::http(stream, &request, &count).await
            });
        }
        time::sleep(Duration::from_secs(2)).await;
        server.terminate()?;
        ensure!(server.ended().await?.success(), "the server did not end well");
        let ends = time::timeout(PATIENCE, clients.join_all()).await.context("a client waits for ever")?;
        for error in ends.into_iter().filter_map(Result::err) {
            eprintln!("drain: {error:#}");
            failed += 1;
        }
    }
    let answered = answered.load(Ordering::Relaxed) as f64;
    eprintln!("drain: {answered} answered, {failed} accepted and failed");
    report.row("drain/answered".to_owned(), "requests", Better::Higher, answered, ("at-least", 100.0));
    let name = "drain/accepted-and-failed".to_owned();
    report.row(name, "requests", Better::Lower, f64::from(failed), ("limit", 0.0));
    Ok(())
}

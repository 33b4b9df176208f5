//! Wrong requests by the hundred thousand over every port: the server neither ends, nor hangs, nor grows.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use prost::Message as _;
use sensorium_bench::{
    Better, Report,
    attack::{Target, attack},
    fuzz::Random,
};
use tokio::time;

use crate::server::{Server, exchange, get, one, one_json, post};

/// Requests after which a right one is asked.
const BATCH: usize = 1000;
const REST: &str = "/v2/models/twice/infer";

pub(crate) async fn run(report: &mut Report, server: &mut Server, count: usize, seed: u64) -> Result<()> {
    let ports = [server.grpc, server.http, server.metrics];
    let target =
        Target { message: one("twice", 1.0).encode_to_vec(), path: "/v2/models/twice".to_owned(), json: one_json(2.5) };
    let mut hangs = 0;
    let (mut settled, mut files) = (None, 0);
    for batch in 0..count.div_ceil(BATCH) {
        let mut random = Random::new(seed ^ (batch as u64) << 20);
        hangs += attack(&ports, &target, &mut random, BATCH).await?;
        ensure!(server.is_running()?, "the server ended in batch {batch} of seed {seed}");
        answers(server).await.with_context(|| format!("after batch {batch} of seed {seed}"))?;
        // What is paid for once, buffers and threads, is there after a tenth.
        if settled.is_none() && batch >= count / BATCH / 10 {
            settled = Some(server.memory()?);
            files = server.files()?;
        }
    }
    time::sleep(Duration::from_secs(2)).await;
    let (before, after) = (settled.unwrap_or(0.0), server.memory()?);
    report.row("fuzz/requests".to_owned(), "requests", Better::Higher, count as f64, ("wanted", count as f64));
    report.row("fuzz/hangs".to_owned(), "connections", Better::Lower, hangs as f64, ("limit", 0.0));
    report.row("fuzz/panics".to_owned(), "panics", Better::Lower, server.panics() as f64, ("limit", 0.0));
    report.row("fuzz/memory".to_owned(), "MiB", Better::Lower, after, ("after-a-tenth-and-16", before + 16.0));
    report.row(
        "fuzz/open-files".to_owned(),
        "files",
        Better::Lower,
        server.files()? as f64,
        ("after-a-tenth-and-16", files as f64 + 16.0),
    );
    Ok(())
}

/// A right request over each port is answered.
async fn answers(server: &Server) -> Result<()> {
    let answer = server.client().await?.model_infer(one("twice", 3.0)).await?.into_inner();
    ensure!(
        answer.raw_output_contents.first().map(AsRef::as_ref) == Some(&6.0_f32.to_le_bytes()[..]),
        "a wrong answer"
    );
    let body = one_json(3.0).to_string();
    for port in [server.http, server.grpc] {
        let (status, text) = exchange(port, &post(REST, &body, false)).await?;
        ensure!(status == 200, "{}", String::from_utf8_lossy(&text));
    }
    let (status, _) = exchange(server.metrics, &get("/metrics")).await?;
    ensure!(status == 200, "metrics are answered with {status}");
    Ok(())
}

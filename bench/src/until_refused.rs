//! Clients that ask one request after the other until the server does not take any more: what it has taken, it answers.

use std::error::Error as _;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use sensorium_proto::inference::{ModelInferRequest, grpc_inference_service_client::GrpcInferenceServiceClient};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{Code, Status, transport::Channel};

/// Asks over one connection of gRPC, and counts what is `answered`.
///
/// # Errors
/// A request that the server had taken and did not answer.
pub async fn grpc(channel: Channel, request: &ModelInferRequest, answered: &AtomicUsize) -> Result<()> {
    let mut client = GrpcInferenceServiceClient::new(channel);
    loop {
        match client.model_infer(request.clone()).await {
            Ok(_) => answered.fetch_add(1, Ordering::Relaxed),
            Err(status) if status.code() == Code::Unavailable || never_left(&status) => return Ok(()),
            Err(status) => bail!("{status:?}"),
        };
    }
}

/// Whether the client itself gave a request up before the server had it, since the server had said that it takes no more
/// (GOAWAY, RFC 9113, section 6.8). Such a request is safe to send again, which tonic leaves to its users, as it leaves it
/// to them to tell it from others: its code is INTERNAL or CANCELLED.
fn never_left(status: &Status) -> bool {
    let mut error = status.source();
    while let Some(source) = error {
        if source.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled) {
            return true;
        }
        if let Some(refused) = source.downcast_ref::<h2::Error>() {
            let said = refused.reason();
            return refused.is_remote() && refused.is_go_away() && said == Some(h2::Reason::NO_ERROR)
                || said == Some(h2::Reason::REFUSED_STREAM);
        }
        error = source.source();
    }
    false
}

/// Sends the bytes of a request over one connection of HTTP/1 that is kept until the server says that it closes it. One
/// that it closes without a word, with a request on its way, has failed that request.
///
/// # Errors
/// A request that the server had taken and did not answer.
pub async fn http(mut stream: TcpStream, request: &[u8], answered: &AtomicUsize) -> Result<()> {
    loop {
        match answer(&mut stream, request).await? {
            (200, closes) => {
                answered.fetch_add(1, Ordering::Relaxed);
                if closes {
                    return Ok(());
                }
            }
            (503, _) => return Ok(()),
            (status, _) => bail!("answered with {status}"),
        }
    }
}

/// The status of the answer, and whether it is the last of the connection.
async fn answer(stream: &mut TcpStream, request: &[u8]) -> Result<(u16, bool)> {
    stream.write_all(request).await?;
    let mut answer = Vec::new();
    let (head, length) = loop {
        ensure!(stream.read_buf(&mut answer).await? > 0, "closed with a request on its way");
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

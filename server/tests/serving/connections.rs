//! How many connections there may be, and what clients hear that are refused while they still send.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use bytes::Bytes;
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    net::TcpStream,
    time,
};
use tonic::{Code, codegen::http::Request};

use crate::harness::{INFER, Server, eventually, floats, frame, http, input, raw_request};

const OPEN: &str = "sensorium_server_connections";
const REFUSALS: &str = "sensorium_server_connections_refusals_total";

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_closed_at_once_and_counted_and_a_place_that_comes_free_is_used() {
    let server = Server::start(&["--max-connections", "3"]).await;
    let (first, second) =
        (TcpStream::connect(server.http).await.unwrap(), TcpStream::connect(server.http).await.unwrap());
    // Both ports have the same places.
    let _third = TcpStream::connect(server.grpc).await.unwrap();
    eventually("all places are taken", async || server.sample(OPEN).await == Some(3.0)).await;
    for address in [server.http, server.grpc] {
        let mut extra = TcpStream::connect(address).await.unwrap();
        let heard = time::timeout(Duration::from_secs(20), extra.read(&mut [0; 1])).await;
        // The end of it, or a reset.
        let heard = heard.expect("it is closed, not left waiting");
        assert!(matches!(heard, Ok(0) | Err(_)), "{heard:?}");
    }
    assert_eq!(server.sample(REFUSALS).await, Some(2.0));
    assert_eq!(server.sample("sensorium_server_connections_limit").await, Some(3.0));
    // Whoever watches it is not kept out.
    for path in ["/livez", "/readyz"] {
        assert_eq!(server.get(server.metrics, path).await.0, 200, "{path}");
        assert_eq!(server.get(server.http, path).await.0, 0, "{path}");
    }
    drop((first, second));
    eventually("there is a place again", async || server.get(server.http, "/readyz").await.0 == 200).await;
}

/// The same command in a shell that has set a limit of open files, in `ulimit`'s words.
fn with_files(limit: &str, command: &mut Command) {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!(r#"ulimit {limit} && exec "$0" "$@""#));
    shell.arg(command.get_program()).args(command.get_args());
    shell.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.stdin(Stdio::null()).stderr(Stdio::piped());
    *command = shell;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_of_open_files_is_raised_for_the_connections_that_are_wanted() {
    let server = Server::start_with(&["--max-connections", "200"], |command| with_files("-Sn 100", command)).await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.process.id())).unwrap();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().next(), Some("264"), "200, and 64 for everything else");
    let mut connections = Vec::new();
    for _ in 0..200 {
        connections.push(TcpStream::connect(server.http).await.unwrap());
    }
    eventually("all places are taken", async || server.sample(OPEN).await == Some(200.0)).await;
    assert_eq!(server.sample(REFUSALS).await, Some(0.0));
}

#[test]
fn more_connections_than_files_can_be_opened_for_are_refused_at_the_start() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sensorium-server"));
    command.args(["--model-repository", "/nowhere", "--max-connections", "200", "--check"]);
    with_files("-n 100", &mut command);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in ["--max-connections is 200, it must be at most 36", "ulimit -Hn", "or let fewer connect"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

/// Frames of HTTP/2 of one kind (RFC 9113, section 6) among what a client has sent from the start of its connection on.
fn frames(sent: &[u8], kind: u8) -> usize {
    const PREFACE: usize = 24;
    let (mut rest, mut count) = (sent.get(PREFACE..).unwrap_or_default(), 0);
    while let [high, middle, low, own, ..] = *rest {
        count += usize::from(own == kind);
        let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        rest = rest.get(9 + length..).unwrap_or_default();
    }
    count
}

/// Reads on until `sent` has so many frames of a kind.
async fn read_until(far: &mut DuplexStream, sent: &mut Vec<u8>, kind: u8, count: usize) {
    while frames(sent, kind) < count {
        assert!(far.read_buf(sent).await.unwrap() > 0, "the client goes on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_taken_back_at_once_end_no_other_of_their_connection() {
    const CALLS: usize = 200;
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    let server = Server::start(&[]).await;
    let (near, mut far) = tokio::io::duplex(1 << 20);
    let mut client = h2::client::Builder::new();
    client.initial_max_send_streams(2 * CALLS);
    let (mut client, connection) = client.handshake::<_, Bytes>(near).await.unwrap();
    tokio::spawn(connection);
    let mut call = || {
        let request =
            Request::post(format!("http://{}{INFER}", server.grpc)).header("content-type", "application/grpc");
        client.send_request(request.header("te", "trailers").body(()).unwrap(), false).unwrap()
    };
    let (kept, mut body) = call();
    let taken_back: Vec<_> = (0..CALLS).map(|_| call()).collect();
    // All of it reaches the server in one piece, as it does from a client whose own caller has gone.
    let mut sent = Vec::new();
    read_until(&mut far, &mut sent, HEADERS, 1 + CALLS).await;
    drop(taken_back);
    read_until(&mut far, &mut sent, RST_STREAM, CALLS).await;
    let mut stream = TcpStream::connect(server.grpc).await.unwrap();
    stream.write_all(&sent).await.unwrap();
    tokio::spawn(async move { tokio::io::copy_bidirectional(&mut far, &mut stream).await });
    let question =
        raw_request("tiny.image_encoder", vec![(input("pixel_values", "FP32", &[1, 3, 8, 8]), floats(&[0.5; 192]))]);
    body.send_data(frame(&question.encode_to_vec()), true).unwrap();
    let answer = time::timeout(Duration::from_mins(1), kept).await.unwrap().expect("the connection goes on");
    let mut body = answer.into_body();
    let message = body.data().await.expect("an answer, and no status alone").unwrap();
    assert!(message.len() > 16, "{message:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_refused_while_he_still_sends_hears_why_over_both_versions_of_http() {
    const BYTES: usize = 8 << 20;
    const TIMES: usize = 10;
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    std::fs::write(&tokens, "alice 0123456789abcdef0123456789abcdef\n").unwrap();
    let server = Server::start(&["--auth-tokens", tokens.to_str().unwrap()]).await;
    let body = vec![b' '; BYTES];
    let head = format!("POST /v2/models/tiny/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: {BYTES}\r\n\r\n");
    for _ in 0..TIMES {
        // As many clients do: all of it is sent, and only then is anything read.
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&body).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "no other request comes over it: {answer}");
    }
    let mut client = server.inference().await;
    for _ in 0..TIMES {
        let request = raw_request("tiny", vec![(input("image", "UINT8", &[BYTES as i64]), body.clone())]);
        let status = client.model_infer(request).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_beyond_the_limit_is_resource_exhausted_on_a_stream_as_well() {
    let server = Server::start(&["--max-request-bytes", "65536"]).await;
    let request = raw_request("tiny", vec![(input("image", "UINT8", &[100_000]), vec![0; 100_000])]);
    let answers = server.inference().await.model_stream_infer(tokio_stream::iter([request])).await;
    let status = match answers {
        Err(status) => status,
        Ok(answers) => answers.into_inner().message().await.unwrap_err(),
    };
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_say_that_it_is_grpc_is_no_call() {
    let server = Server::start(&[]).await;
    for (address, path) in
        [(server.grpc, INFER), (server.http, INFER), (server.http, "/inference.GRPCInferenceService/ServerLive")]
    {
        let answer = http(address, "POST", path, &[("content-type", "application/json")], b"{}").await.unwrap();
        assert_eq!((answer.status, answer.header("content-type")), (415, Some("application/json")), "{path}");
        let said = answer.json()["error"].as_str().unwrap().to_owned();
        assert!(said.contains("its content-type is application/grpc"), "{said}");
    }
}

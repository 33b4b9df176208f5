//! Graphs that other servers run: how long a call of them may take, and when it is taken back.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use sensorium_engine::fixture;
use sensorium_proto::multimodal::InferResponse;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tonic::{Code, Status};

use crate::harness::{Artifacts, Server, eventually, image_part, parts_request, text_part};

/// A call that was received, and is never answered.
struct Received {
    /// As its header says.
    timeout: Duration,
    traceparent: Option<String>,
    /// Ends when the call is taken back.
    open: oneshot::Receiver<Infallible>,
}

impl Received {
    async fn until_taken_back(self) {
        timeout(Duration::from_secs(5), self.open).await.expect("the call is taken back").unwrap_err();
    }
}

/// Listens like an encoder, and never answers.
async fn silence() -> (SocketAddr, mpsc::UnboundedReceiver<Received>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (calls, received) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let calls = calls.clone();
            let answer = service_fn(move |request: Request<Incoming>| {
                let text = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
                let (held, open) = oneshot::channel();
                let timeout = written(&text("grpc-timeout").expect("every call is limited"));
                let _ = calls.send(Received { timeout, traceparent: text("traceparent"), open });
                async move {
                    let _held = held;
                    std::future::pending::<Result<Response<String>, Infallible>>().await
                }
            });
            tokio::spawn(async move {
                let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer).await;
            });
        }
    });
    (address, received)
}

/// The duration that `grpc-timeout` spells.
fn written(text: &str) -> Duration {
    let (digits, unit) = text.split_at(text.len() - 1);
    let count: u64 = digits.parse().unwrap();
    match unit {
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => panic!("{text}"),
    }
}

/// Asks with a deadline, where there is one.
async fn ask(server: SocketAddr, patience: Option<Duration>) -> Result<InferResponse, Status> {
    use sensorium_proto::multimodal::multimodal_service_client::MultimodalServiceClient;
    let parts = vec![image_part(&fixture::png([200, 30, 30]), ""), text_part(fixture::QUESTION)];
    let mut request = tonic::Request::new(parts_request("vqa", parts));
    if let Some(patience) = patience {
        request.set_timeout(patience);
    }
    let mut client = MultimodalServiceClient::connect(format!("http://{server}")).await.unwrap();
    client.infer(request).await.map(tonic::Response::into_inner)
}

/// The next call whose limit is within these bounds; probes have the longest there is.
async fn next(received: &mut mpsc::UnboundedReceiver<Received>, least: u64, most: u64) -> Received {
    let bounds = Duration::from_secs(least)..=Duration::from_secs(most);
    let wanted = async {
        loop {
            let call = received.recv().await.unwrap();
            assert!(call.timeout <= Duration::from_secs(30), "{:?}", call.timeout);
            if bounds.contains(&call.timeout) {
                return call;
            }
        }
    };
    timeout(Duration::from_secs(20), wanted).await.expect("the encoder is called")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_of_a_requests_time_goes_on_to_the_encoder_and_its_end_takes_the_call_back() {
    let (address, mut received) = silence().await;
    let remote = format!("--remote-graph=image_encoder={address}");
    // A collector that is not there: spans are made all the same.
    let arguments = [&*remote, "--otlp-endpoint=http://127.0.0.1:1"];
    let server = Server::launch(Artifacts::shared().path(), &arguments, |_| {});
    eventually("the models are loaded", async || server.get(server.http, "/v2/models/tiny").await.0 == 200).await;

    let asked = tokio::spawn(ask(server.grpc, Some(Duration::from_secs(20))));
    let call = next(&mut received, 10, 20).await;
    let traceparent = call.traceparent.as_deref().unwrap_or_default();
    assert_eq!((traceparent.len(), traceparent.matches('-').count()), (55, 3), "{traceparent}");
    asked.abort();
    call.until_taken_back().await;

    let asked = tokio::spawn(ask(server.grpc, Some(Duration::from_secs(2))));
    next(&mut received, 0, 2).await.until_taken_back().await;
    let status = asked.await.unwrap().unwrap_err();
    // The client's own clock may be the first.
    assert!([Code::DeadlineExceeded, Code::Cancelled].contains(&status.code()), "{status:?}");

    // Longer than any call may take.
    let asked = tokio::spawn(ask(server.grpc, Some(Duration::from_mins(5))));
    next(&mut received, 25, 30).await;
    asked.abort();
    let asked = tokio::spawn(ask(server.grpc, None));
    next(&mut received, 25, 30).await;
    asked.abort();
}

//! Traces, from a client's `traceparent` to what an OTLP collector is sent.

use std::time::Duration;

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::Span,
};
use sensorium_engine::fixture::{self, QUESTION};
use tokio::{net::TcpListener, sync::mpsc, time};
use tonic::{Request, Response, Status, async_trait, transport::server::TcpIncoming};

use crate::harness::{Server, eventually, tensor_question};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// A collector that hands on the spans that it is sent.
struct Collector(mpsc::UnboundedSender<Span>);

#[async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let scopes = request.into_inner().resource_spans.into_iter().flat_map(|resource| resource.scope_spans);
        scopes.flat_map(|scope| scope.spans).for_each(|span| drop(self.0.send(span)));
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Where a collector listens, and the spans that it is sent.
async fn collector() -> (String, mpsc::UnboundedReceiver<Span>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, spans) = mpsc::unbounded_channel();
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector(sender)));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    (format!("http://{address}"), spans)
}

fn attribute(span: &Span, name: &str) -> Option<String> {
    let found = span.attributes.iter().find(|attribute| attribute.key == name)?;
    match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        Value::IntValue(number) => Some(number.to_string()),
        Value::BoolValue(is_so) => Some(is_so.to_string()),
        value => Some(format!("{value:?}")),
    }
}

/// The next span that `wanted` wants.
async fn next(spans: &mut mpsc::UnboundedReceiver<Span>, wanted: impl Fn(&Span) -> bool) -> Span {
    let found = async {
        loop {
            let span = spans.recv().await.expect("the collector goes on");
            if wanted(&span) {
                return span;
            }
        }
    };
    time::timeout(Duration::from_secs(30), found).await.expect("a span comes within 30 s")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_a_span_of_its_clients_trace_and_batches_link_to_it() {
    let (endpoint, mut spans) = collector().await;
    let server = Server::start(&["--otlp-endpoint", &endpoint]).await;
    let mut request = Request::new(tensor_question(&fixture::png([200, 0, 0]), QUESTION));
    request.get_mut().id = "seven".to_owned();
    request.metadata_mut().insert("traceparent", format!("00-{TRACE}-{PARENT}-01").parse().unwrap());
    server.inference().await.model_infer(request).await.unwrap();

    let mut all = Vec::new();
    let infer = loop {
        let span = next(&mut spans, |_| true).await;
        if span.name == "infer" {
            break span;
        }
        all.push(span);
    };
    assert_eq!(
        (hex::encode(&infer.trace_id), hex::encode(&infer.parent_span_id)),
        (TRACE.to_owned(), PARENT.to_owned())
    );
    assert_eq!(attribute(&infer, "model").as_deref(), Some("tiny"));
    assert_eq!(attribute(&infer, "id").as_deref(), Some("seven"));
    let batch = match all.into_iter().find(|span| span.name == "batch") {
        Some(batch) => batch,
        None => next(&mut spans, |span| span.name == "batch").await,
    };
    assert!(batch.links.iter().any(|link| hex::encode(&link.trace_id) == TRACE), "{batch:?}");
    assert_eq!(attribute(&infer, "rpc.grpc.status_code").as_deref(), Some("0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_says_how_its_request_ended_and_where_its_time_went_and_requests_for_nothing_have_none() {
    let (endpoint, mut spans) = collector().await;
    let server = Server::start(&["--otlp-endpoint", &endpoint]).await;
    let body = r#"{"id": "ID", "inputs": [{"name": "NAME", "shape": [1, 2], "datatype": "INT64", "data": [3, 4]}]}"#;
    let infer = async |model: &str, id: &str, name: &str| {
        let path = format!("/v2/models/{model}/infer");
        server.post(&path, &[], body.replace("ID", id).replace("NAME", name).as_bytes()).await.status
    };
    assert_eq!(infer("nothing", "unseen", "input_ids").await, 404);
    assert_eq!(infer("tiny.text_encoder", "wrong", "other").await, 400);
    assert_eq!(infer("tiny.text_encoder", "right", "input_ids").await, 200);
    let wrong = next(&mut spans, |span| span.name == "infer").await;
    assert_eq!(attribute(&wrong, "id").as_deref(), Some("wrong"), "the first one was for no model");
    assert_eq!(attribute(&wrong, "rpc.grpc.status_code").as_deref(), Some("3"));
    assert!(wrong.status.is_none_or(|status| status.code == 0), "what the caller did wrong is no error of the server");
    let right = next(&mut spans, |span| span.name == "infer").await;
    assert_eq!(attribute(&right, "version").as_deref(), Some("1"));
    assert_eq!(attribute(&right, "cache_hit").as_deref(), Some("false"));
    assert!(attribute(&right, "compute_infer_us").is_some() && attribute(&right, "queue_us").is_some(), "{right:?}");
    assert!(!right.links.is_empty(), "its batch");
    // No row of the table of words.
    let beyond = body.replace("NAME", "input_ids").replace("3, 4", "999999999, 4");
    let failed = server.post("/v2/models/tiny.text_encoder/infer", &[], beyond.as_bytes()).await;
    assert_eq!(failed.status, 500, "{failed:?}");
    let is_error = |span: &Span| span.status.as_ref().is_some_and(|status| status.code == 2);
    let mut names = Vec::new();
    for _ in 0..2 {
        let span = next(&mut spans, is_error).await;
        assert_eq!(attribute(&span, "rpc.grpc.status_code").as_deref(), Some("13"), "{span:?}");
        names.push(span.name);
    }
    names.sort();
    assert_eq!(names, ["batch", "infer"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn which_requests_are_traced_can_be_changed_and_probes_are_not() {
    let (endpoint, mut spans) = collector().await;
    let server = Server::start(&["--otlp-endpoint", &endpoint, "--trace-rate", "1000000"]).await;
    assert!(server.json("/v2").await["extensions"].as_array().unwrap().contains(&"trace".into()));
    let off = server.post("/v2/trace/setting", &[], br#"{"trace_level": ["OFF"]}"#).await;
    assert_eq!(off.status, 200);
    let body =
        r#"{"id": "ID", "inputs": [{"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [3, 4]}]}"#;
    let path = "/v2/models/tiny.text_encoder/infer";
    let infer = async |id: &str| {
        let answer = server.post(path, &[], body.replace("ID", id).as_bytes()).await;
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    };
    infer("unseen").await;
    let on = br#"{"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "trace_count": "1"}"#;
    server.post("/v2/trace/setting", &[], on).await;
    infer("seen").await;
    infer("beyond the count").await;
    let span = next(&mut spans, |span| span.name == "infer").await;
    assert_eq!(attribute(&span, "id").as_deref(), Some("seen"));
    // Nothing else of that name comes in the time in which a batch of spans is sent.
    let more = time::timeout(Duration::from_secs(7), next(&mut spans, |span| span.name == "infer")).await;
    assert!(more.is_err(), "{more:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_takes_no_spans_is_named_in_the_log_once() {
    const LOST: &str = "the collector of traces takes none, and they are lost";
    // Bound, so that nobody else has the port, and not listening.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint = format!("http://{}", socket.local_addr().unwrap());
    let server = Server::start(&["--otlp-endpoint", &endpoint, "--trace-rate", "1"]).await;
    let question = tensor_question(&fixture::png([200, 0, 0]), QUESTION);
    server.inference().await.model_infer(question.clone()).await.unwrap();
    eventually("the log says so", async || !server.said(LOST).is_empty()).await;
    assert_eq!(server.said(LOST)[0]["endpoint"], endpoint);
    // A second batch of spans is as lost as the first.
    server.inference().await.model_infer(question).await.unwrap();
    time::sleep(Duration::from_secs(6)).await;
    assert_eq!(server.said(LOST).len(), 1);
}

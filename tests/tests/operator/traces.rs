//! Traces: from a manifest to the pods that it leads to, all under the uid of the resource.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use sensorium_api::TrainingJob;
use sensorium_tests::{ApiCluster, Kubelet, Operator};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::common::{LIMIT, training};

/// Every span that was sent here.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Told>>>);

/// A span's trace id, and its attributes as text.
type Told = (String, BTreeSet<String>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let spans = request.into_inner().resource_spans.into_iter().flat_map(|it| it.scope_spans);
        let told = spans.flat_map(|it| it.spans).map(|span| {
            let id = hex::encode(&span.trace_id);
            let words = span.attributes.iter().map(|attribute| format!("{:?}", attribute.value)).collect();
            (id, words)
        });
        self.0.lock().map_err(|error| Status::internal(error.to_string()))?.extend(told);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_trace_of_a_job_has_its_uid_and_goes_on_in_its_pods() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let collector = Collector::default();
    let service = tonic::transport::Server::builder().add_service(TraceServiceServer::new(collector.clone()));
    tokio::spawn(service.serve_with_incoming(TcpListenerStream::new(listener)));

    let cluster = ApiCluster::shared()?;
    let namespace = cluster.namespace("traces").await?;
    let flag = format!("--otlp-endpoint={endpoint}");
    let mut operator = Operator::start(&cluster.kubeconfig(), namespace.name(), &[&flag])?;
    operator.wait_until_ready(LIMIT)?;
    namespace.apply(&training("vqa").to_string()).await?;
    let pods: Vec<Pod> = Kubelet::new(&namespace).pods("sensorium.dev/name=vqa", 2, LIMIT).await?;

    let uid = namespace.api::<TrainingJob>().get("vqa").await?.uid().context("an object has a uid")?;
    let trace = uid.replace('-', "");
    let env = pods[0].spec.as_ref().and_then(|spec| spec.containers[0].env.clone()).unwrap_or_default();
    let told = |name: &str| env.iter().find(|variable| variable.name == name).and_then(|it| it.value.clone());
    assert_eq!(told("OTEL_EXPORTER_OTLP_ENDPOINT"), Some(endpoint));
    assert!(told("TRACEPARENT").is_some_and(|parent| parent.contains(&trace)), "{:?}", told("TRACEPARENT"));
    let wrote_job = |spans: &[(String, BTreeSet<String>)]| {
        spans.iter().any(|(id, words)| *id == trace && words.iter().any(|word| word.contains("Job/vqa-worker-1")))
    };
    tokio::time::timeout(LIMIT, async {
        while !wrote_job(&collector.0.lock().unwrap()) {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    })
    .await
    .context("no span says that the job's batch Job was made")
}

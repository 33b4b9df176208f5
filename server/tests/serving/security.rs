//! Who is let in: certificates, tokens, limits for each client.

use std::{path::Path, time::Duration};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use sensorium_proto::inference::{ModelInferRequest, ServerLiveRequest, ServerMetadataRequest, ServerReadyRequest};
use serde_json::json;
use tempfile::TempDir;
use tonic::Code;

use crate::{
    clients::{identities, passes, serve},
    harness::{eventually, http},
};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const REQUEST: &str = r#"{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}"#;

/// The name for which the certificate `named` is, and no other.
pub(crate) const NAME: &str = "vqa.default.svc";

/// `ca.pem`, and certificates with keys for `server` and `client` that it has signed; `named` is one for both, for [`NAME`].
pub(crate) fn certificates() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "an authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(folder.path().join("ca.pem"), authority.pem()).unwrap();
    let (here, server, client) =
        (["localhost", "127.0.0.1"], ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth);
    issue(folder.path(), "server", &here, std::slice::from_ref(&server), &authority);
    issue(folder.path(), "client", &here, std::slice::from_ref(&client), &authority);
    issue(folder.path(), "named", &[NAME], &[server, client], &authority);
    folder
}

fn issue(
    folder: &Path,
    name: &str,
    subjects: &[&str],
    purposes: &[ExtendedKeyUsagePurpose],
    authority: &CertifiedIssuer<'_, KeyPair>,
) {
    let subjects: Vec<String> = subjects.iter().map(|&subject| subject.to_owned()).collect();
    let mut params = CertificateParams::new(subjects).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages = purposes.to_vec();
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
    std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient_makes_every_call_over_mutual_tls() {
    let (folder, models) = (certificates(), identities());
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (certificate, key, authority) = (file("server.pem"), file("server.key"), file("ca.pem"));
    let arguments = ["--tls-cert", &certificate, "--tls-key", &key, "--tls-client-ca", &authority];
    let server = serve(&models, &arguments).await;
    let folder = folder.path().to_str().unwrap();
    for protocol in ["grpc", "http"] {
        passes(&server, "triton_sync.py", &["--protocol", protocol, "--tls", folder]).await;
    }
    // Plain text finds nobody.
    assert!(http(server.http, "GET", "/livez", &[], b"").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_nothing_but_health_is_answered() {
    let (folder, models) = (tempfile::tempdir().unwrap(), identities());
    let tokens = folder.path().join("tokens");
    std::fs::write(&tokens, format!("alice {TOKEN}\n")).unwrap();
    let server = serve(&models, &["--auth-tokens", tokens.to_str().unwrap()]).await;
    for protocol in ["grpc", "http"] {
        passes(&server, "triton_sync.py", &["--protocol", protocol, "--token", TOKEN]).await;
    }
    for path in ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready"] {
        assert_eq!(server.get(server.http, path).await.0, 200, "{path}");
    }
    // Inference has ways of its own through the server, and so is asked for beside something else.
    let path = "/v2/models/identity_fp32/infer";
    for (method, path, body) in [("GET", "/v2", ""), ("POST", path, REQUEST)] {
        let refused = http(server.http, method, path, &[], body.as_bytes()).await.unwrap();
        assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Bearer")), "{path}");
    }
    let refused = async || {
        let refused = r#"sensorium_server_requests_total{model="unknown",code="UNAUTHENTICATED"}"#;
        server.sample(refused).await.map_or(0, |count| count as u64)
    };
    let before = refused().await;
    for path in ["infer", "generate", "generate_stream"].map(|way| format!("/v2/models/identity_fp32/{way}")) {
        assert_eq!(server.post(&path, &[], b"{}").await.status, 401, "{path}");
    }
    assert_eq!(refused().await, before + 3, "each of them is counted");
    let mut client = server.inference().await;
    assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let statuses = [
        client.server_metadata(ServerMetadataRequest {}).await.unwrap_err(),
        client.model_infer(ModelInferRequest::default()).await.unwrap_err(),
    ];
    for status in statuses {
        let challenge = status.metadata().get("www-authenticate").map(|value| value.to_str().unwrap());
        assert_eq!((status.code(), challenge), (Code::Unauthenticated, Some("Bearer")), "{status:?}");
    }

    // A token that is replaced is used without a restart.
    std::fs::write(&tokens, "alice fedcba9876543210fedcba9876543210\n").unwrap();
    let bearer = format!("Bearer {TOKEN}");
    eventually("the old token is refused", async || {
        http(server.http, "GET", "/v2", &[("authorization", &bearer)], b"").await.unwrap().status == 401
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_too_often_is_told_to_wait() {
    let models = identities();
    let server = serve(&models, &["--client-requests-per-second", "5"]).await;
    tokio::time::sleep(Duration::from_millis(1100)).await; // what starting it took of the allowance
    let ask = async || server.post("/v2/models/identity_fp32/infer", &[], REQUEST.as_bytes()).await;
    for _ in 0..5 {
        assert_eq!(ask().await.status, 200);
    }
    // Together, because a slow machine that is asked one by one is never asked too often. Again, should even a round of these
    // take it so long that the allowance has come back meanwhile.
    let mut refused = Vec::new();
    for _ in 0..25 {
        let answers = futures::future::join_all((0..20).map(|_| ask())).await;
        assert!(answers.iter().all(|answer| [200, 429].contains(&answer.status)), "{answers:?}");
        refused.extend(answers.into_iter().filter(|answer| answer.status == 429));
        if !refused.is_empty() {
            break;
        }
    }
    assert!(!refused.is_empty(), "500 requests, 20 at a time, were all let in");
    for answer in refused {
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert!(answer.json()["error"].as_str().unwrap().contains("5 requests per second"));
    }
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(ask().await.json()["outputs"][0]["data"], json!([1.0, 2.0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_one_request_of_its_client() {
    use tokio_stream::wrappers::ReceiverStream;
    let models = identities();
    let server = serve(&models, &["--client-concurrency", "1"]).await;
    let (sender, requests) = tokio::sync::mpsc::channel(1);
    let mut client = server.inference().await;
    let mut answers = client.model_stream_infer(ReceiverStream::new(requests)).await.unwrap().into_inner();
    sender.send(ModelInferRequest { model_name: "elsewhere".to_owned(), ..Default::default() }).await.unwrap();
    assert!(answers.message().await.unwrap().unwrap().error_message.contains("elsewhere"));
    let status = server.inference().await.server_metadata(ServerMetadataRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    drop(sender);
    assert!(answers.message().await.unwrap().is_none());
    drop(answers);
    eventually("the stream's place is free again", async || {
        server.inference().await.server_metadata(ServerMetadataRequest {}).await.is_ok()
    })
    .await;
}

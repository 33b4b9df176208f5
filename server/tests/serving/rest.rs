//! The protocol over HTTP: JSON and binary tensors, every extension, and what wrong requests get.

use std::io::{Read as _, Write as _};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use sensorium_engine::fixture::{self, QUESTION};
use serde_json::{Value, json};

use crate::harness::{HttpAnswer, Server, bytes_tensor, floats, http};

const ENCODER: &str = "/v2/models/tiny.image_encoder/infer";

/// A request to the image encoder: all pixels of one value.
fn pixels(rows: usize, value: f32) -> Value {
    json!({"inputs": [{
        "name": "pixel_values", "shape": [rows, 3, 8, 8], "datatype": "FP32", "data": vec![value; rows * 192],
    }]})
}

/// The same with its pixels behind the JSON.
fn binary(rows: usize, value: f32, outputs: &Value) -> (String, Vec<u8>) {
    let mut request = json!({"id": "b", "outputs": outputs, "inputs": [{
        "name": "pixel_values", "shape": [rows, 3, 8, 8], "datatype": "FP32",
        "parameters": {"binary_data_size": rows * 192 * 4},
    }]});
    if outputs.is_null() {
        request.as_object_mut().unwrap().remove("outputs");
    }
    let json = request.to_string().into_bytes();
    (json.len().to_string(), [json, floats(&vec![value; rows * 192])].concat())
}

fn error(answer: &HttpAnswer) -> String {
    answer.json()["error"].as_str().unwrap_or_else(|| panic!("no error in {answer:?}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_there_is_can_be_read() {
    let server = Server::start(&[]).await;
    assert_eq!(server.json("/v2/health/live").await, json!({"live": true}));
    assert_eq!(server.json("/v2/health/ready").await, json!({"ready": true}));
    assert_eq!(server.json("/v2").await["name"], "sensorium");
    assert_eq!(server.json("/v2/models/tiny/ready").await, json!({"name": "tiny", "ready": true}));
    for path in ["/v2/models/tiny.image_encoder", "/v2/models/tiny.image_encoder/versions/1"] {
        let metadata = server.json(path).await;
        assert_eq!(
            metadata["inputs"],
            json!([{"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]),
            "{path}"
        );
        assert_eq!(metadata["versions"], json!(["1"]));
    }
    let config = server.json("/v2/models/tiny.image_encoder/config").await;
    assert_eq!((&config["name"], &config["max_batch_size"]), (&json!("tiny.image_encoder"), &json!(32)));
    assert_eq!(config["input"][0]["data_type"], "TYPE_FP32");
    let index = server.post("/v2/repository/index", &[], b"{\"ready\": true}").await.json();
    assert!(index.as_array().unwrap().iter().any(|model| model["name"] == "tiny" && model["state"] == "READY"));

    for (path, status) in [
        ("/v2/models/elsewhere", 404),
        ("/v2/models/tiny/versions/9", 404),
        ("/v2/models/elsewhere/ready", 503),
        ("/v2/models/%ff", 400),
        ("/v2/models/tiny/inference", 404),
        ("/v3", 404),
        ("/v2/models/tiny/infer", 405),
    ] {
        let (found, body) = server.get(server.http, path).await;
        assert_eq!(found, status, "{path}: {body}");
        assert!(path.ends_with("ready") || body.contains("\"error\""), "{path}: {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tensors_travel_as_json_and_as_bytes() {
    let server = Server::start(&[]).await;
    let plain = server.post(ENCODER, &[], pixels(2, 0.5).to_string().as_bytes()).await;
    assert_eq!((plain.status, plain.header("content-type")), (200, Some("application/json")));
    let plain = plain.json();
    assert_eq!(plain["outputs"][0]["name"], "image_features");
    assert_eq!(plain["outputs"][0]["shape"], json!([2, 1, 4]));
    let embedding = &plain["outputs"][1]["data"];
    assert_eq!(embedding.as_array().unwrap().len(), 6);

    let outputs = json!([{"name": "image_embedding", "parameters": {"binary_data": true}}, {"name": "image_features"}]);
    let (length, body) = binary(2, 0.5, &outputs);
    let headers = [("inference-header-content-length", length.as_str())];
    let path = "/v2/models/tiny.image_encoder/versions/1/infer";
    let answer = server.post(path, &headers, &body).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/octet-stream")));
    let length: usize = answer.header("inference-header-content-length").unwrap().parse().unwrap();
    let head: Value = serde_json::from_slice(&answer.body[..length]).unwrap();
    assert_eq!((&head["id"], &head["model_version"]), (&json!("b"), &json!("1")));
    assert_eq!(head["outputs"][0]["parameters"], json!({"binary_data_size": 24}));
    assert_eq!(head["outputs"][1]["data"], plain["outputs"][0]["data"]);
    let bytes: Vec<f32> = answer.body[length..].as_chunks().0.iter().copied().map(f32::from_le_bytes).collect();
    let numbers: Vec<f32> = serde_json::from_value(embedding.clone()).unwrap();
    assert_eq!(bytes, numbers);
}

#[tokio::test(flavor = "multi_thread")]
async fn strings_and_whole_questions_are_answered() {
    let server = Server::start(&[]).await;
    let image = bytes_tensor(&[&fixture::png([200, 0, 0])]);
    let request = json!({"inputs": [
        {"name": "text", "shape": [1], "datatype": "BYTES", "data": [QUESTION]},
        {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": image.len()}},
    ]});
    let json = request.to_string().into_bytes();
    let length = json.len().to_string();
    let body = [json, image].concat();
    let headers = [("inference-header-content-length", length.as_str())];
    let answer = server.post("/v2/models/tiny/infer", &headers, &body).await.json();
    assert_eq!(answer["outputs"][0]["data"], json!(["red"]));
    assert!(answer["outputs"][1]["data"][0].as_f64().unwrap() > 0.5);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_compressed_on_the_way_there_and_back() {
    let server = Server::start(&[]).await;
    let mut body = GzEncoder::new(Vec::new(), Compression::fast());
    body.write_all(pixels(1, 0.5).to_string().as_bytes()).unwrap();
    let headers = [("content-encoding", "gzip"), ("accept-encoding", "gzip")];
    let answer = server.post(ENCODER, &headers, &body.finish().unwrap()).await;
    assert_eq!((answer.status, answer.header("content-encoding")), (200, Some("gzip")));
    let mut text = String::new();
    GzDecoder::new(&answer.body[..]).read_to_string(&mut text).unwrap();
    assert!(text.contains("image_embedding"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn classes_are_strings_of_score_and_index() {
    let server = Server::start(&[]).await;
    let mut request = pixels(2, 0.5);
    request["outputs"] = json!([{"name": "image_embedding", "parameters": {"classification": 2}}]);
    let answer = server.post(ENCODER, &[], request.to_string().as_bytes()).await.json();
    let output = &answer["outputs"][0];
    assert_eq!((&output["datatype"], &output["shape"]), (&json!("BYTES"), &json!([2, 2])));
    let classes: Vec<String> = serde_json::from_value(output["data"].clone()).unwrap();
    let score = |class: &str| class.split(':').next().unwrap().parse::<f32>().unwrap();
    assert!(score(&classes[0]) >= score(&classes[1]), "{classes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tensors_travel_through_shared_memory() {
    let server = Server::start(&[]).await;
    let key = format!("sensorium-test-{}", std::process::id());
    let object = std::path::Path::new("/dev/shm").join(&key);
    std::fs::write(&object, [floats(&[0.5; 192]), vec![0; 64]].concat()).unwrap();
    let region = |name: &str| format!("/v2/systemsharedmemory/region/{name}");
    let register = json!({"key": format!("/{key}"), "offset": 0, "byte_size": 192 * 4 + 64}).to_string();
    let answer = server.post(&format!("{}/register", region("all")), &[], register.as_bytes()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let again = server.post(&format!("{}/register", region("all")), &[], register.as_bytes()).await;
    assert_eq!(again.status, 409);
    let status = server.json("/v2/systemsharedmemory/status").await;
    assert_eq!(status, json!([{"name": "all", "key": format!("/{key}"), "offset": 0, "byte_size": 832}]));

    let place = |offset: usize, size: usize| json!({"shared_memory_region": "all", "shared_memory_offset": offset, "shared_memory_byte_size": size});
    let request = json!({
        "inputs": [{"name": "pixel_values", "shape": [1, 3, 8, 8], "datatype": "FP32", "parameters": place(0, 768)}],
        "outputs": [{"name": "image_embedding", "parameters": place(768, 64)}],
    });
    let answer = server.post(ENCODER, &[], request.to_string().as_bytes()).await.json();
    // The C++ client would take an output with parameters for a binary one.
    let output = json!({"name": "image_embedding", "datatype": "FP32", "shape": [1, 3]});
    assert_eq!(answer["outputs"], json!([output]));
    let plain = server.post(ENCODER, &[], pixels(1, 0.5).to_string().as_bytes()).await.json();
    let expected: Vec<f32> = serde_json::from_value(plain["outputs"][1]["data"].clone()).unwrap();
    assert_eq!(std::fs::read(&object).unwrap()[768..780], floats(&expected));

    let too_small = json!({
        "inputs": request["inputs"],
        "outputs": [{"name": "image_features", "parameters": place(768, 8)}],
    });
    let refused = server.post(ENCODER, &[], too_small.to_string().as_bytes()).await;
    assert_eq!(refused.status, 400);
    assert!(error(&refused).contains("has 16 bytes, the request gives it 8"), "{}", error(&refused));

    assert_eq!(server.post(&format!("{}/unregister", region("all")), &[], b"").await.status, 200);
    std::fs::remove_file(&object).unwrap();
    let refused = server.post(ENCODER, &[], request.to_string().as_bytes()).await;
    assert!(error(&refused).contains("no shared memory region"), "{}", error(&refused));
    let (status, _) = server.get(server.http, &format!("{}/status", region("all"))).await;
    assert_eq!(status, 404);
    let path = br#"{"key": "../etc/passwd", "byte_size": 1}"#;
    assert_eq!(server.post(&format!("{}/register", region("evil")), &[], path).await.status, 400);
    assert_eq!(server.json("/v2/cudasharedmemory/status").await, json!([]));
    assert_eq!(server.post("/v2/cudasharedmemory/region/r/register", &[], b"{}").await.status, 501);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_can_be_nothing_but_the_tensor() {
    let server = Server::start(&[]).await;
    let headers = [("inference-header-content-length", "0")];
    let answer = server.post(ENCODER, &headers, &floats(&[0.5; 192])).await;
    // There is no place to ask for the way back, so that it is as the way there.
    let length: usize = answer.header("inference-header-content-length").unwrap().parse().unwrap();
    let head: Value = serde_json::from_slice(&answer.body[..length]).unwrap();
    assert_eq!(head["outputs"][1]["shape"], json!([1, 3]), "{head}");
    assert_eq!(answer.body.len() - length, (4 + 3) * 4);
    let refused = server.post("/v2/models/tiny/infer", &headers, b"x").await;
    assert!(error(&refused).contains("exactly one input"), "{}", error(&refused));
}

#[tokio::test(flavor = "multi_thread")]
async fn generating_takes_plain_fields() {
    let server = Server::start(&[]).await;
    // One row, of the sizes that the model has fixed; its fields may be among the parameters.
    let plain = server.post(ENCODER, &[], pixels(1, 0.5).to_string().as_bytes()).await.json();
    for body in
        [json!({"pixel_values": vec![0.5; 192]}), json!({"parameters": {"pixel_values": vec![0.5; 192], "seed": 1}})]
    {
        let answer = server.post("/v2/models/tiny.image_encoder/generate", &[], body.to_string().as_bytes()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.json()["image_embedding"], plain["outputs"][1]["data"]);
    }
    let body = json!({"pixel_values": vec![0.5; 2 * 192]}).to_string();
    let answer = server.post("/v2/models/tiny.image_encoder/generate", &[], body.as_bytes()).await.json();
    let two = server.post(ENCODER, &[], pixels(2, 0.5).to_string().as_bytes()).await.json();
    assert_eq!(answer["image_embedding"], two["outputs"][1]["data"], "more elements are more rows");
    let body = json!({"pixel_values": vec![0.5; 191]}).to_string();
    let refused = server.post("/v2/models/tiny.image_encoder/generate", &[], body.as_bytes()).await;
    assert_eq!(refused.status, 400, "{refused:?}");
    let body = json!({"input_ids": [[3, 4], [5, 6]]}).to_string();
    let refused = server.post("/v2/models/tiny.text_encoder/generate", &[], body.as_bytes()).await;
    assert!(error(&refused).contains("what is given is one row, as a flat array"), "{refused:?}");
    let body = json!({"id": "g", "input_ids": [3, 4], "temperature": 0.5, "stop": ["."]}).to_string();
    let answer = server.post("/v2/models/tiny.text_encoder/generate", &[], body.as_bytes()).await;
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    let object = answer.json();
    assert_eq!((&object["id"], &object["model_name"]), (&json!("g"), &json!("tiny.text_encoder")));
    let answer = server.post("/v2/models/tiny.text_encoder/generate_stream", &[], body.as_bytes()).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let text = String::from_utf8(answer.body).unwrap();
    let event = text.lines().find_map(|line| line.strip_prefix("data: ")).unwrap_or_else(|| panic!("{text}"));
    assert_eq!(serde_json::from_str::<Value>(event).unwrap(), object);
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_logging_and_the_repository_answer() {
    let server = Server::start(&[]).await;
    for _ in 0..3 {
        server.post(ENCODER, &[], pixels(2, 0.5).to_string().as_bytes()).await;
    }
    let statistics = server.json("/v2/models/tiny.image_encoder/stats").await["model_stats"][0].take();
    assert_eq!(statistics["inference_stats"]["success"]["count"], 3, "{statistics}");
    assert_eq!(statistics["version"], "1");
    assert!(server.json("/v2/models/stats").await["model_stats"].as_array().unwrap().len() >= 4);
    let sample = "nv_inference_request_success{model=\"tiny.image_encoder\",version=\"1\"}";
    assert_eq!(server.sample(sample).await, Some(3.0));

    assert_eq!(server.json("/v2/logging").await["log_verbose_level"], 0);
    let changed = server.post("/v2/logging", &[], br#"{"log_verbose_level": 1}"#).await.json();
    assert_eq!((&changed["log_verbose_level"], &changed["log_info"]), (&json!(1), &json!(true)));
    assert_eq!(server.post("/v2/logging", &[], br#"{"log_colour": true}"#).await.status, 400);
    let changed = server.post("/v2/logging", &[], br#"{"log_info": null, "log_verbose_level": 2}"#).await.json();
    assert_eq!((&changed["log_verbose_level"], &changed["log_info"]), (&json!(2), &json!(true)), "null says nothing");
    // Triton's client leaves this in the headers of its caller after a compressed inference.
    let headers = [("content-encoding", "gzip")];
    assert_eq!(server.post("/v2/logging", &headers, br#"{"log_verbose_level": 0}"#).await.status, 200);
    assert_eq!(server.post("/v2/repository/index", &headers, b"").await.status, 200);
    assert_eq!(server.json("/v2/trace/setting").await["trace_level"], json!(["OFF"]), "nobody takes them");
    let changed = server.post("/v2/models/tiny/trace/setting", &[], br#"{"trace_rate": "7"}"#).await.json();
    assert_eq!(changed["trace_rate"], "7");
    assert_eq!(server.json("/v2/trace/setting").await["trace_rate"], "1");

    let refused = server.post("/v2/repository/models/tiny/load", &[], b"").await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")), "{refused:?}");
    assert!(error(&refused).contains("--model-control-mode=explicit"), "{}", error(&refused));
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_loaded_and_unloaded_by_request() {
    let server = Server::start(&["--model-control-mode", "explicit"]).await;
    assert_eq!(server.post("/v2/repository/models/tiny/unload", &[], b"{}").await.status, 200);
    assert_eq!(server.get(server.http, "/v2/models/tiny/ready").await.0, 503);
    let answer = server.post("/v2/repository/models/tiny/load", &[], b"").await;
    assert_eq!(answer.json(), json!({"model_name": "tiny", "isLoaded": true}));
    assert_eq!(server.get(server.http, "/v2/models/tiny/ready").await.0, 200);
    assert_eq!(server.post("/v2/repository/models/elsewhere/load", &[], b"").await.status, 404);
    // As Triton's C++ client and `base64` write it.
    let base64 = "Y29uZmlndXJhdGlv\nbg==\n";
    let files = json!({"parameters": {"config": "{}", "file:1/model.onnx": base64}}).to_string();
    let refused = server.post("/v2/repository/models/other/load", &[], files.as_bytes()).await;
    assert!(!error(&refused).contains("base64") && error(&refused).contains("cannot be opened"), "{}", error(&refused));
    let body = pixels(1, 0.5).to_string();
    let refused = server.post("/v2/models/tiny/versions/latest/infer", &[], body.as_bytes()).await;
    assert_eq!(refused.status, 400, "{refused:?}");
    assert!(error(&refused).contains("version \"latest\" of model \"tiny\" is no number"), "{}", error(&refused));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_passes_is_a_gateway_timeout() {
    let server = Server::start(&[]).await;
    let answer = server.post(ENCODER, &[("grpc-timeout", "1n")], pixels(1, 0.5).to_string().as_bytes()).await;
    assert_eq!(answer.status, 504, "{answer:?}");
    let sample = "sensorium_server_requests_total{model=\"tiny.image_encoder\",code=\"DEADLINE_EXCEEDED\"}";
    assert_eq!(server.sample(sample).await, Some(1.0));
}

/// As over gRPC: the right status, words that help, and no memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_malformed_bodies_get_their_status_and_leave_no_trace() {
    type Headers = Vec<(&'static str, &'static str)>;
    const LIMIT: usize = 1 << 20;
    let server = Server::start(&["--max-request-bytes", &LIMIT.to_string()]).await;
    let good = pixels(1, 0.5).to_string().into_bytes();
    let bomb = {
        let mut zeros = GzEncoder::new(Vec::new(), Compression::fast());
        zeros.write_all(&vec![b' '; 64 << 20]).unwrap();
        zeros.finish().unwrap()
    };
    let with = |change: &dyn Fn(&mut Value)| {
        let mut request = pixels(1, 0.5);
        change(&mut request["inputs"][0]);
        request.to_string().into_bytes()
    };
    let cases: Vec<(u16, &str, Headers, Vec<u8>)> = vec![
        (400, "an object", vec![], b"".to_vec()),
        (400, "an object", vec![], b"\xff\xfe\x00".to_vec()),
        (400, "nest too deeply", vec![], [&br#"{"x": "#[..], &vec![b'['; LIMIT / 2]].concat()),
        (
            400,
            "nest too deeply",
            vec![],
            [&br#"{"inputs": [{"datatype": "FP32", "data": "#[..], &vec![b'['; LIMIT / 2]].concat(),
        ),
        (
            400,
            "more than",
            vec![],
            format!(r#"{{"inputs": [{}{{}}]}}"#, r#"{"shape":[]},"#.repeat(1 << 16)).into_bytes(),
        ),
        (400, "no `inputs`", vec![], b"{}".to_vec()),
        (400, "has no data", vec![], with(&|input| drop(input.as_object_mut().unwrap().remove("data")))),
        (400, "needs 192", vec![], with(&|input| drop(input["data"].as_array_mut().unwrap().pop()))),
        (400, "a number should be here", vec![], with(&|input| input["data"][7] = json!("7"))),
        (400, "takes FP32", vec![], with(&|input| input["datatype"] = json!("FP64"))),
        (400, "does not have", vec![], with(&|input| input["datatype"] = json!("FLOAT"))),
        (400, "no tensor in memory", vec![], with(&|input| input["shape"] = json!([i64::MAX, i64::MAX]))),
        (400, "is not one of the model's", vec![], with(&|input| input["name"] = json!("x".repeat(1 << 16)))),
        (400, "binary", vec![], with(&|input| input["datatype"] = json!("FP16"))),
        (
            400,
            "need 1000000000000",
            vec![],
            with(&|input| {
                input.as_object_mut().unwrap().remove("data");
                input["parameters"] = json!({"binary_data_size": 1_000_000_000_000_u64});
            }),
        ),
        (400, "Inference-Header-Content-Length", vec![("inference-header-content-length", "-1")], good.clone()),
        (400, "Inference-Header-Content-Length", vec![("inference-header-content-length", "99999999")], good.clone()),
        (400, "", vec![("inference-header-content-length", "17")], good.clone()),
        (413, "limit", vec![], vec![b' '; LIMIT + 1]),
        (413, "limit", vec![("content-encoding", "gzip")], bomb),
        (400, "is no gzip", vec![("content-encoding", "gzip")], good.clone()),
        (415, "gzip, deflate or none", vec![("content-encoding", "br")], good.clone()),
    ];
    let mut settled = 0;
    for n in 0..1000 {
        let (status, words, headers, body) = &cases[n % cases.len()];
        // A server that answers before it has read everything may close on a client that still writes.
        let Ok(answer) = http(server.http, "POST", ENCODER, headers, body).await else {
            assert_eq!(*status, 413, "{n}");
            continue;
        };
        assert_eq!(answer.status, *status, "{n}: {:?}", String::from_utf8_lossy(&answer.body));
        let message = error(&answer);
        assert!(message.contains(words), "{n}: {words:?} is not in {message:?}");
        assert!(message.len() < 1000, "{n}: {} bytes of message", message.len());
        if n % cases.len() == cases.len() - 1 {
            assert_eq!(server.post(ENCODER, &[], &good).await.status, 200, "the next good request succeeds");
            if n / cases.len() == 9 {
                settled = server.memory().0;
            }
        }
    }
    let (after, most) = server.memory();
    assert!(after < settled + (16 << 20), "resident memory went from {settled} to {after} bytes");
    assert!(most < settled + (48 << 20), "resident memory was {most} bytes for a moment, and {settled} later");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_refused_before_all_was_read_hears_that_the_connection_ends() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = Server::start(&[]).await;
    let mut says_close = Vec::new();
    for (path, bytes) in [("/v2/nowhere", 100), ("/v2/nowhere", 200_000), (ENCODER, 200_000)] {
        let mut stream = tokio::net::TcpStream::connect(server.http).await.unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {bytes}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        // What is no request is read whole; what is for nobody is not.
        let _ = stream.write_all(&vec![b' '; bytes]).await;
        let mut answer = vec![0; 4096];
        let length = stream.read(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer[..length]).to_lowercase();
        assert!(answer.starts_with("http/1.1 40"), "{answer}");
        says_close.push(answer.contains("\r\nconnection: close\r\n"));
    }
    assert_eq!(says_close, [false, true, false]);
}

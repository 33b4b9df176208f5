//! Requests with several responses, over gRPC streams and server-sent events.

use std::{fs, time::Duration};

use sensorium_proto::inference::{ModelInferRequest, ModelStreamInferResponse, infer_parameter::ParameterChoice};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Streaming};

use crate::{
    clients::passes,
    counter::{config, counter},
    harness::{Server, eventually, floats, input, output_floats, raw_request},
};

/// More steps than anybody waits for.
const ENDLESS: f32 = 1e9;
const STREAM: &str = "/v2/models/counter/generate_stream";
const RUNS: &str = "nv_inference_exec_count{model=\"counter\",version=\"1\"}";

/// A repository of a counter whose responses have rows of this width, with this in its `sequence_batching`.
fn models(width: i64, sequence: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("counter/1")).unwrap();
    fs::write(folder.path().join("counter/1/model.onnx"), counter(width)).unwrap();
    fs::write(folder.path().join("counter/config.pbtxt"), config(sequence, 1_000_000)).unwrap();
    folder
}

async fn serve(models: &TempDir, more: &[&str]) -> Server {
    Server::start(&[&["--model-repository", models.path().to_str().unwrap()], more].concat()).await
}

fn count(id: &str, steps: f32, base: f32) -> ModelInferRequest {
    let one = |name: &str, value: f32| (input(name, "FP32", &[1, 1]), floats(&[value]));
    let slip = (input("slip", "INT64", &[1, 1]), vec![0; 8]);
    let request = raw_request("counter", vec![one("steps", steps), one("base", base), slip]);
    ModelInferRequest { id: id.to_owned(), ..request }
}

/// A stream with these requests on it; the sender keeps it open.
async fn ask(
    server: &Server,
    requests: Vec<ModelInferRequest>,
) -> (mpsc::Sender<ModelInferRequest>, Streaming<ModelStreamInferResponse>) {
    let (sender, stream) = mpsc::channel(64);
    for request in requests {
        sender.send(request).await.unwrap();
    }
    let answers = server.inference().await.model_stream_infer(ReceiverStream::new(stream)).await.unwrap();
    (sender, answers.into_inner())
}

fn is_last(answer: &ModelStreamInferResponse) -> bool {
    let parameter = &answer.infer_response.as_ref().unwrap().parameters["triton_final_response"];
    matches!(parameter.parameter_choice, Some(ParameterChoice::BoolParam(true)))
}

fn body(steps: f32, base: f32) -> Vec<u8> {
    json!({"id": "s", "steps": steps, "base": base, "slip": 0}).to_string().into_bytes()
}

/// The events of a text of them.
fn events(text: &str) -> Vec<Value> {
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_requests_of_one_stream_take_turns_and_each_gets_its_own_numbers() {
    let models = models(1, "oldest { max_candidate_sequences: 20 }");
    let server = serve(&models, &[]).await;
    let lengths: Vec<usize> = (0..20).map(|index| 30 + index % 3).collect();
    let requests = lengths
        .iter()
        .enumerate()
        .map(|(index, steps)| count(&index.to_string(), *steps as f32, index as f32 * 1000.0));
    let (sender, mut answers) = ask(&server, requests.collect()).await;
    drop(sender);
    let (mut found, mut order) = (vec![Vec::new(); 20], Vec::new());
    while let Some(answer) = answers.message().await.unwrap() {
        assert_eq!(answer.error_message, "");
        let response = answer.infer_response.as_ref().unwrap();
        let index: usize = response.id.parse().unwrap();
        found[index].push(output_floats(response, "y")[0]);
        assert_eq!(is_last(&answer), found[index].len() == lengths[index], "request {index}");
        order.push(index);
    }
    for (index, found) in found.into_iter().enumerate() {
        let expected: Vec<f32> = (1..=lengths[index]).map(|step| (index * 1000 + step) as f32).collect();
        assert_eq!(found, expected, "request {index}");
    }
    let first_end = order.iter().position(|index| *index == order[0]).unwrap();
    let before_any_ended: std::collections::HashSet<_> = order[first_end..600].iter().collect();
    assert_eq!(before_any_ended.len(), 20, "all were under way together");
    let first = "nv_inference_first_response_histogram_ms_count{model=\"counter\",version=\"1\"}";
    assert_eq!(server.sample(first).await, Some(20.0));
    let stats = server.json("/v2/models/counter/stats").await["model_stats"][0].take();
    assert_eq!(stats["inference_stats"]["success"]["count"], 20, "{stats}");
    assert_eq!(stats["response_stats"]["29"]["success"]["count"], 20, "{stats}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient_reads_many_responses_and_cancels_in_the_middle() {
    let models = models(1, "oldest { max_candidate_sequences: 4 }");
    passes(&serve(&models, &[]).await, "triton_decoupled.py", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_step_by_step_and_what_is_wrong_before_the_first_is_a_plain_refusal() {
    let models = models(1, "direct { }");
    let server = serve(&models, &[]).await;
    let answer = server.post(STREAM, &[], &body(3.0, 10.0)).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/event-stream")), "{answer:?}");
    let found = events(&String::from_utf8(answer.body).unwrap());
    let told: Vec<_> = found.iter().map(|event| (&event["y"], &event["triton_final_response"])).collect();
    let told: Vec<_> = told.iter().map(|(y, last)| (y.as_f64().unwrap(), last.as_bool().unwrap())).collect();
    assert_eq!(told, [(11.0, false), (12.0, false), (13.0, true)]);
    assert_eq!((&found[0]["id"], &found[0]["model_name"]), (&json!("s"), &json!("counter")));

    let slips = json!({"steps": 9, "base": 0, "slip": 1}).to_string();
    let answer = server.post(STREAM, &[], slips.as_bytes()).await;
    let found = events(&String::from_utf8(answer.body).unwrap());
    assert_eq!(found.len(), 5, "{found:?}");
    assert!(found[4]["error"].as_str().unwrap().contains("\"counter\" failed"), "{found:?}");

    let refused = server.post(STREAM, &[], br#"{"steps": 3}"#).await;
    assert_eq!(refused.status, 400, "{refused:?}");
    let late = server.post(STREAM, &[("grpc-timeout", "1n")], &body(3.0, 10.0)).await;
    assert_eq!(late.status, 504, "{late:?}");
    for path in ["generate", "infer"] {
        let body = if path == "infer" {
            let tensor =
                |name: &str, datatype: &str| json!({"name": name, "datatype": datatype, "shape": [1, 1], "data": [1]});
            json!({"inputs": [tensor("steps", "FP32"), tensor("base", "FP32"), tensor("slip", "INT64")]}).to_string()
        } else {
            String::from_utf8(body(3.0, 10.0)).unwrap()
        };
        let refused = server.post(&format!("/v2/models/counter/{path}"), &[], body.as_bytes()).await;
        assert_eq!(refused.status, 501, "{path}: {refused:?}");
        let words = refused.json()["error"].take();
        assert!(words.as_str().unwrap().contains("is decoupled: call it with ModelStreamInfer"), "{words}");
    }
    let status = server.inference().await.model_infer(count("u", 1.0, 0.0)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_or_whose_deadline_passes_frees_the_only_place() {
    let models = models(1, "oldest { max_candidate_sequences: 1 }");
    let server = serve(&models, &[]).await;
    // Over gRPC, by cancelling the call.
    let (sender, mut answers) = ask(&server, vec![count("a", ENDLESS, 0.0)]).await;
    for _ in 0..3 {
        assert!(!is_last(&answers.message().await.unwrap().unwrap()));
    }
    drop((sender, answers));
    let answer = server.post(STREAM, &[], &body(1.0, 1.0)).await;
    assert_eq!(events(&String::from_utf8(answer.body).unwrap()).len(), 1);
    // Over HTTP, by closing the connection.
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let endless = body(ENDLESS, 0.0);
    let head = format!("POST {STREAM} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", endless.len());
    stream.write_all(&[head.as_bytes(), &endless].concat()).await.unwrap();
    stream.read_exact(&mut [0; 1000]).await.unwrap();
    drop(stream);
    // Over gRPC, by a deadline; the error comes in its place.
    let mut request = Request::new(tokio_stream::once(count("d", ENDLESS, 0.0)));
    request.set_timeout(Duration::from_millis(300));
    let mut client = server.inference().await;
    let mut answers = client.model_stream_infer(request).await.unwrap().into_inner();
    while let Ok(Some(answer)) = answers.message().await {
        // tonic's client may give up a moment before the server does.
        if !answer.error_message.is_empty() {
            assert!(answer.error_message.contains("deadline") && is_last(&answer), "{answer:?}");
        }
    }
    let answer = server.post(STREAM, &[], &body(2.0, 1.0)).await;
    assert_eq!(events(&String::from_utf8(answer.body).unwrap()).len(), 2);
    let failed = "nv_inference_request_failure{model=\"counter\",version=\"1\",reason=\"CANCELED\"}";
    eventually("all three are counted", async || server.sample(failed).await == Some(3.0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_stops_its_request_and_loses_its_place_when_it_takes_nothing_for_too_long() {
    // 256 KiB of text in each event, so that the sockets are full soon.
    let models = models(64 << 10, "max_sequence_idle_microseconds: 2000000 oldest { max_candidate_sequences: 1 }");
    let server = serve(&models, &[]).await;
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let endless = body(ENDLESS, 0.0);
    let head = format!("POST {STREAM} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", endless.len());
    stream.write_all(&[head.as_bytes(), &endless].concat()).await.unwrap();
    stream.read_exact(&mut [0; 1000]).await.unwrap();
    let runs = async || server.sample(RUNS).await.unwrap() as u64;
    let mut last = 0;
    eventually("the steps stop", async || {
        let now = runs().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        std::mem::replace(&mut last, now) == now
    })
    .await;
    assert!(last < 200, "{last} steps for somebody who reads nothing");
    // The connection is still there, and another request has the place.
    let answer = server.post(STREAM, &[], &body(1.0, 1.0)).await;
    assert_eq!(events(&String::from_utf8(answer.body).unwrap()).len(), 1);
    let (mut rest, mut text) = (vec![0; 1 << 16], String::new());
    while !text.contains("\"error\"") {
        let read = stream.read(&mut rest).await.unwrap();
        assert!(read > 0, "closed without a word");
        let kept = text.len().saturating_sub(1000);
        text = text[kept..].to_owned() + &String::from_utf8_lossy(&rest[..read]);
    }
    assert!(text.contains("nobody took the next response for 2s"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_requests_go_on_and_ends_them_with_words_before_it_cuts_them_off() {
    let models = models(1, "oldest { max_candidate_sequences: 2 }");
    let mut server = serve(&models, &["--drain-seconds", "3"]).await;
    let (sender, mut answers) = ask(&server, vec![count("e", ENDLESS, 0.0)]).await;
    answers.message().await.unwrap().unwrap();
    drop(sender);
    server.terminate();
    let asked = std::time::Instant::now();
    let last = loop {
        let answer = answers.message().await.unwrap().expect("the last response says so");
        if is_last(&answer) {
            break answer;
        }
    };
    assert!(last.error_message.contains("shutting down"), "{}", last.error_message);
    assert!(asked.elapsed() >= Duration::from_secs(2), "it went on for {:?}", asked.elapsed());
    assert!(answers.message().await.unwrap().is_none());
    assert_eq!(server.exit_code().await, Some(0));
}

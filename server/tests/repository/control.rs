//! Loading, reloading and unloading while requests are on their way.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{future, poll};
use sensorium_server::{
    error::InferError,
    repository::{ControlError, ControlMode, LoadParameters},
};

use crate::bench::{Bench, answer, eventually, f32s, index, infer, request, scale, write_artifact};

#[tokio::test]
async fn explicit_mode_loads_what_is_asked_for() {
    let bench = Bench::new();
    bench.write("a", "1/model.onnx", scale(2.0, None)).write("b", "1/model.onnx", scale(3.0, None));
    let registry = bench.open(ControlMode::Explicit, &["a"]).await;
    assert_eq!(registry.names(), ["a"]);
    assert_eq!(index(&registry), ["a 1 READY", "b"], "what is there and not loaded is listed");
    registry.load("b", LoadParameters::default()).await.unwrap();
    assert_eq!(answer(&registry, "b", &[1, 1], &[5.0]).await, [15.0]);
    registry.unload("b", false).await.unwrap();
    assert!(matches!(registry.model("b", "").unwrap_err(), InferError::NotReady { .. }));
    eventually("it is gone", async || index(&registry).contains(&"b 1 UNAVAILABLE unloaded".to_owned())).await;
    registry.load("b", LoadParameters::default()).await.unwrap();
    assert!(registry.ready("b", "1"));
    for name in ["c", "../a", ""] {
        let error = registry.load(name, LoadParameters::default()).await.unwrap_err();
        assert_eq!(error, ControlError::NotFound { name: name.to_owned() });
    }
    assert!(!index(&registry).iter().any(|line| line.starts_with("c ")));
}

#[tokio::test]
async fn other_modes_refuse_to_load() {
    let registry = Bench::new().open_all().await;
    let error = registry.load("a", LoadParameters::default()).await.unwrap_err();
    assert_eq!(error, ControlError::Forbidden { mode: "none" });
}

#[tokio::test]
async fn a_request_can_bring_the_configuration_and_the_files() {
    let bench = Bench::new();
    bench.write("a", "1/model.onnx", scale(2.0, None));
    let registry = bench.open(ControlMode::Explicit, &[]).await;
    let config = Some(r#"{"max_batch_size": 3}"#.to_owned());
    registry.load("a", LoadParameters { config: config.clone(), ..LoadParameters::default() }).await.unwrap();
    assert_eq!(registry.model("a", "").unwrap().config().max_batch_size, 3);
    let files = BTreeMap::from([("7/model.onnx".to_owned(), scale(4.0, None).into())]);
    registry.load("new", LoadParameters { config, files }).await.unwrap();
    assert_eq!(answer(&registry, "new", &[1, 1], &[5.0]).await, [20.0]);
    assert_eq!(registry.versions("new"), ["7"]);
    let files = BTreeMap::from([("../model.onnx".to_owned(), scale(4.0, None).into())]);
    let error = registry.load("bad", LoadParameters { files, ..LoadParameters::default() }).await.unwrap_err();
    assert!(error.to_string().contains("leads out of the model's folder"), "{error}");
}

#[tokio::test]
async fn a_configuration_names_no_files_outside_of_its_model() {
    let bench = Bench::new();
    bench.write("a", "1/model.onnx", scale(2.0, None)).write("other", "secret", "one\ntwo");
    let registry = bench.open(ControlMode::Explicit, &[]).await;
    for config in [
        r#"{"output": [{"name": "y", "label_filename": "/etc/passwd"}]}"#,
        r#"{"output": [{"name": "y", "label_filename": "../other/secret"}]}"#,
        r#"{"default_model_filename": "../../other/secret"}"#,
        r#"{"max_batch_size": 1, "model_warmup": [{"name": "w", "batch_size": 1, "inputs": {"x": {
            "data_type": "TYPE_UINT8", "dims": [1], "input_data_file": "../../other/secret"}}}]}"#,
    ] {
        let parameters = LoadParameters { config: Some(config.to_owned()), ..LoadParameters::default() };
        let error = registry.load("a", parameters).await.unwrap_err();
        assert!(error.to_string().contains("leads out of the model's folder"), "{error}");
    }
}

#[tokio::test]
async fn a_load_goes_on_when_whoever_asked_for_it_leaves() {
    let bench = Bench::new();
    bench.write("a", "1/model.onnx", scale(2.0, None));
    let registry = bench.open(ControlMode::Explicit, &[]).await;
    let load = registry.load("a", LoadParameters::default());
    assert!(tokio::time::timeout(Duration::ZERO, load).await.is_err());
    eventually("the model is loaded", async || registry.ready("a", "")).await;
}

#[tokio::test]
async fn a_load_that_has_not_begun_when_whoever_asked_for_it_leaves_never_begins() {
    let bench = Bench::new();
    for name in ["a", "b", "c"] {
        bench.write(name, "1/model.onnx", scale(2.0, None));
    }
    let registry = bench.open(ControlMode::Explicit, &[]).await;
    let mut first = Box::pin(registry.load("a", LoadParameters::default()));
    assert!(poll!(&mut first).is_pending());
    for _ in 0..100 {
        let behind = Box::pin(registry.load("b", LoadParameters::default()));
        assert!(poll!(behind).is_pending());
    }
    first.await.unwrap();
    registry.load("c", LoadParameters::default()).await.unwrap();
    assert_eq!(index(&registry), ["a 1 READY", "b", "c 1 READY"], "what would have come before c");
}

#[tokio::test]
async fn who_ends_waits_for_the_load_under_way_and_lets_no_other_begin() {
    let bench = Bench::new();
    bench.write("a", "1/model.onnx", scale(2.0, None)).write("b", "1/model.onnx", scale(2.0, None));
    let registry = bench.open(ControlMode::Explicit, &[]).await;
    let mut under_way = Box::pin(registry.load("a", LoadParameters::default()));
    assert!(poll!(&mut under_way).is_pending());
    eventually("it has begun, and may have ended", async || index(&registry)[0] != "a").await;
    let mut behind = Box::pin(registry.load("b", LoadParameters::default()));
    assert!(poll!(&mut behind).is_pending());
    let ((), first, second) = future::join3(registry.stop(), under_way, behind).await;
    first.unwrap();
    let refused = |name: &str| ControlError::Failed { name: name.to_owned(), reason: "this server ends".to_owned() };
    assert_eq!(second.unwrap_err(), refused("b"));
    assert_eq!(registry.load("b", LoadParameters::default()).await.unwrap_err(), refused("b"));
    infer(&registry, "a", request(f32s(&[1, 1], &[5.0]))).await.expect_err("its engine has ended");
}

#[tokio::test]
async fn a_name_that_an_artifact_has_is_free_once_that_is_unloaded() {
    let bench = Bench::new();
    write_artifact(&bench, &["tiny/1"]).await;
    bench.write("tiny.fusion", "1/model.onnx", scale(2.0, None));
    let registry = bench.open(ControlMode::Explicit, &["tiny"]).await;
    let error = registry.load("tiny.fusion", LoadParameters::default()).await.unwrap_err();
    assert!(error.to_string().contains("another model is called \"tiny.fusion\""), "{error}");
    registry.unload("tiny", false).await.unwrap();
    registry.load("tiny.fusion", LoadParameters::default()).await.unwrap();
    assert_eq!(answer(&registry, "tiny.fusion", &[1, 1], &[5.0]).await, [10.0]);
    let error = registry.load("tiny", LoadParameters::default()).await.unwrap_err();
    assert!(error.to_string().contains("another model is called \"tiny.fusion\""), "{error}");
    assert_eq!(answer(&registry, "tiny.fusion", &[1, 1], &[5.0]).await, [10.0], "it is as it was");
}

#[tokio::test]
async fn an_artifact_that_is_no_model_as_a_whole_is_unloaded_by_its_name() {
    let bench = Bench::new();
    write_artifact(&bench, &["tiny/1"]).await;
    let path = bench.path().join("tiny/1/manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    manifest.as_object_mut().unwrap().remove("pipeline");
    std::fs::write(&path, manifest.to_string()).unwrap();
    let registry = bench.open(ControlMode::Explicit, &["tiny"]).await;
    assert!(registry.ready("tiny.fusion", "") && !registry.ready("tiny", ""), "{:?}", index(&registry));
    registry.unload("tiny", false).await.unwrap();
    assert!(registry.names().is_empty(), "{:?}", index(&registry));
}

#[tokio::test]
async fn an_artifact_reads_no_file_but_its_own() {
    let bench = Bench::new();
    write_artifact(&bench, &["tiny/1"]).await;
    let path = bench.path().join("tiny/1/manifest.json");
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for tokenizer in ["/dev/zero", "../../secret", "other.json"] {
        let mut manifest = manifest.clone();
        manifest["pipeline"]["text"]["tokenizer"] = tokenizer.into();
        std::fs::write(&path, manifest.to_string()).unwrap();
        let registry = bench.open_all().await;
        let said = index(&registry).remove(0);
        assert!(said.ends_with(&format!("its tokenizer {tokenizer:?} is none of its files")), "{said}");
    }
}

#[tokio::test]
async fn typed_parts_go_to_the_newest_version_also_where_that_could_not_be_loaded_again() {
    let bench = Bench::new();
    write_artifact(&bench, &["tiny/1", "tiny/2"]).await;
    bench.write("tiny", "config.pbtxt", "version_policy { all { } }");
    let registry = bench.open(ControlMode::Explicit, &["tiny"]).await;
    let before = registry.multimodal("tiny").unwrap();
    let graph = std::fs::read(bench.path().join("tiny/2/graphs/fusion.onnx")).unwrap();
    bench.write("tiny/2", "graphs/fusion.onnx", "damaged");
    registry.load("tiny", LoadParameters::default()).await.unwrap_err();
    assert!(Arc::ptr_eq(&before, &registry.multimodal("tiny").unwrap()));
    bench.write("tiny/2", "graphs/fusion.onnx", graph);
    registry.load("tiny", LoadParameters::default()).await.unwrap();
    assert!(!Arc::ptr_eq(&before, &registry.multimodal("tiny").unwrap()));
}

#[tokio::test]
async fn a_reload_that_fails_leaves_the_model_as_it_was() {
    let bench = Bench::new();
    bench.write("a", "1/model.onnx", scale(2.0, None));
    let registry = bench.open(ControlMode::Explicit, &["a"]).await;
    bench.write("a", "1/model.onnx", "half a mod");
    let error = registry.load("a", LoadParameters::default()).await.unwrap_err();
    assert!(matches!(&error, ControlError::Failed { reason, .. } if reason.contains("cannot be opened")), "{error}");
    assert_eq!(answer(&registry, "a", &[1, 1], &[5.0]).await, [10.0]);
    bench.write("a", "config.pbtxt", "nonsense");
    registry.load("a", LoadParameters::default()).await.unwrap_err();
    let [found] = &index(&registry)[..] else { panic!("there is one version") };
    let known = "a 1 READY it is as it was loaded before; loading it again failed: config.pbtxt";
    assert!(found.starts_with(known), "{found}");
    std::fs::remove_file(bench.path().join("a/config.pbtxt")).unwrap();
    bench.write("a", "1/model.onnx", scale(3.0, None));
    registry.load("a", LoadParameters::default()).await.unwrap();
    assert_eq!(index(&registry), ["a 1 READY"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_while_a_model_is_loaded_again_and_again() {
    let bench = Bench::new();
    bench.write("a", "1/model.onnx", scale(2.0, None));
    let registry = bench.open(ControlMode::Explicit, &["a"]).await;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (registry, stop) = (registry.clone(), stop.clone());
            tokio::spawn(async move {
                let mut answered = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let response = infer(&registry, "a", request(f32s(&[1, 1], &[5.0]))).await;
                    assert_eq!(response.expect("no request fails").outputs[0].tensor, f32s(&[1, 1], &[10.0]));
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    for _ in 0..20 {
        registry.load("a", LoadParameters::default()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
}

#[tokio::test]
async fn a_watched_repository_is_followed() {
    let bench = Bench::new();
    bench.write("a", "1/model.onnx", scale(2.0, None)).write("b", "1/model.onnx", scale(2.0, None));
    let registry = bench.open(ControlMode::Poll(Duration::from_millis(20)), &[]).await;
    bench.write("a", "2/model.onnx", scale(3.0, None)).write("c", "1/model.onnx", scale(4.0, None));
    std::fs::remove_dir_all(bench.path().join("b")).unwrap();
    eventually("the new version is there", async || registry.versions("a") == ["2"]).await;
    eventually("the new model is there", async || registry.ready("c", "")).await;
    eventually("the old one is gone", async || !registry.ready("b", "")).await;
    assert_eq!(answer(&registry, "a", &[1, 1], &[5.0]).await, [15.0]);
}

#[tokio::test]
async fn what_wants_for_a_model_is_tried_again_when_that_is_mended() {
    let bench = Bench::new();
    bench.write("a", "1/model.onnx", b"no graph");
    let ensemble = r#"platform: "ensemble" max_batch_size: 8
        input { name: "x" data_type: TYPE_FP32 dims: -1 } output { name: "y" data_type: TYPE_FP32 dims: -1 }
        ensemble_scheduling { step {
          model_name: "a" input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }"#;
    bench.write("e", "config.pbtxt", ensemble);
    let registry = bench.open(ControlMode::Poll(Duration::from_millis(20)), &[]).await;
    assert!(!registry.ready("a", "") && !registry.ready("e", ""));
    bench.write("a", "1/model.onnx", scale(2.0, None));
    eventually("the ensemble is there", async || registry.ready("e", "")).await;
    assert_eq!(answer(&registry, "e", &[1, 1], &[5.0]).await, [10.0]);
}

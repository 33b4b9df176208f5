//! Models that are made of models.

use std::time::Duration;

use futures::poll;
use sensorium_server::{
    error::InferError,
    repository::{ControlMode, LoadParameters},
};

use crate::{
    bench::{Bench, answer, eventually, f32s, index, infer, request, scale, scale_three},
    counter::{config, counter},
};

/// `sum` is twice and thrice `x`, each by a model, then doubled again: a diamond of steps.
const DIAMOND: &str = r#"
    platform: "ensemble" max_batch_size: 8
    input { name: "x" data_type: TYPE_FP32 dims: -1 }
    output [ { name: "six" data_type: TYPE_FP32 dims: -1 }, { name: "four" data_type: TYPE_FP32 dims: -1 } ]
    ensemble_scheduling { step [
        { model_name: "twice" model_version: -1 input_map { key: "x" value: "thrice_x" } output_map { key: "y" value: "six" } },
        { model_name: "thrice" input_map { key: "x" value: "x" } output_map { key: "y" value: "thrice_x" } },
        { model_name: "twice" input_map { key: "x" value: "twice_x" } output_map { key: "y" value: "four" } },
        { model_name: "twice" input_map { key: "x" value: "x" } output_map { key: "y" value: "twice_x" } }
    ] }"#;

fn models() -> Bench {
    let bench = Bench::new();
    bench.write("twice", "1/model.onnx", scale(2.0, None)).write("thrice", "1/model.onnx", scale(3.0, None));
    bench
}

#[tokio::test]
async fn steps_run_when_their_tensors_are_there_whatever_their_order() {
    let bench = models();
    bench.write("diamond", "config.pbtxt", DIAMOND);
    let registry = bench.open_all().await;
    assert!(registry.ready("diamond", "1"), "{:?}", index(&registry));
    let response = infer(&registry, "diamond", request(f32s(&[1, 2], &[1.0, 5.0]))).await.unwrap();
    let outputs: Vec<_> = response.outputs.into_iter().map(|output| (output.name, output.tensor)).collect();
    assert_eq!(outputs[0], ("six".to_owned(), f32s(&[1, 2], &[6.0, 30.0])));
    assert_eq!(outputs[1], ("four".to_owned(), f32s(&[1, 2], &[4.0, 20.0])));
    let count = |name| registry.statistics(name, "").unwrap().remove(0).execution_count;
    assert_eq!((count("diamond"), count("thrice")), (1, 1));

    let mut four = request(f32s(&[1, 1], &[1.0]));
    four.outputs.push("four".to_owned());
    infer(&registry, "diamond", four).await.unwrap();
    assert_eq!(count("thrice"), 1, "no step runs for an output that nobody wants");
}

#[tokio::test]
async fn loading_an_ensemble_loads_what_it_is_made_of_and_its_models_can_be_replaced() {
    let bench = models();
    bench.write("diamond", "config.pbtxt", DIAMOND);
    let registry = bench.open(ControlMode::Explicit, &["diamond"]).await;
    assert_eq!(registry.names(), ["diamond", "thrice", "twice"]);
    bench.write("thrice", "1/model.onnx", scale(30.0, None));
    registry.load("thrice", LoadParameters::default()).await.unwrap();
    assert_eq!(answer(&registry, "diamond", &[1, 1], &[1.0]).await, [60.0]);
    registry.unload("thrice", false).await.unwrap();
    let error = infer(&registry, "diamond", request(f32s(&[1, 1], &[1.0]))).await.unwrap_err();
    assert!(matches!(&error, InferError::Step { step, .. } if step == "step 2 (thrice)"), "{error}");
    let status = error.into_status("diamond");
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_eq!(status.message(), r#"model "diamond": its step 2 (thrice): model "thrice" is not ready: unloaded"#);
    let failed = registry.statistics("diamond", "").unwrap().remove(0).inference_stats.unwrap().fail.unwrap();
    assert_eq!(failed.count, 1, "where it was asked");
    assert!(!registry.ready("diamond", ""));
    assert_eq!(index(&registry)[0], "diamond 1 UNAVAILABLE it needs model \"thrice\", which is not ready");
    registry.load("diamond", LoadParameters::default()).await.unwrap();
    assert!(registry.ready("diamond", ""));
    registry.unload("diamond", true).await.unwrap();
    assert!(registry.names().is_empty());
}

fn ensemble_of(model: &str) -> String {
    format!(
        r#"platform: "ensemble" max_batch_size: 8
           input {{ name: "x" data_type: TYPE_FP32 dims: -1 }} output {{ name: "y" data_type: TYPE_FP32 dims: -1 }}
           response_cache {{ enable: true }}
           ensemble_scheduling {{ step {{
             model_name: "{model}" input_map {{ key: "x" value: "x" }} output_map {{ key: "y" value: "y" }} }} }}"#
    )
}

#[tokio::test]
async fn no_reload_makes_an_ensemble_part_of_itself() {
    let bench = models();
    bench.write("a", "config.pbtxt", ensemble_of("middle")).write("middle", "config.pbtxt", ensemble_of("twice"));
    let registry = bench.open(ControlMode::Explicit, &["a"]).await;
    assert_eq!(answer(&registry, "a", &[1, 1], &[1.0]).await, [2.0]);
    for (name, of) in [("middle", "a"), ("twice", "a"), ("twice", "middle")] {
        bench.write(name, "config.pbtxt", ensemble_of(of));
        let error = registry.load(name, LoadParameters::default()).await.unwrap_err();
        assert!(error.to_string().contains("it is made of itself"), "{error}");
    }
    assert_eq!(answer(&registry, "a", &[1, 1], &[3.0]).await, [6.0]);
}

#[tokio::test]
async fn what_an_ensemble_said_is_forgotten_with_the_models_that_it_is_made_of() {
    let bench = models();
    bench.write("a", "config.pbtxt", ensemble_of("middle")).write("middle", "config.pbtxt", ensemble_of("twice"));
    let registry = bench.open(ControlMode::Explicit, &["a"]).await;
    let ask = async || infer(&registry, "a", request(f32s(&[1, 1], &[1.0]))).await.unwrap();
    assert!(!ask().await.timings.cache_hit);
    assert!(ask().await.timings.cache_hit);
    bench.write("twice", "1/model.onnx", scale(5.0, None));
    registry.load("twice", LoadParameters::default()).await.unwrap();
    assert_eq!(ask().await.outputs[0].tensor, f32s(&[1, 1], &[5.0]));
}

#[tokio::test]
async fn an_ensemble_of_a_model_with_several_responses_is_refused_when_it_is_loaded() {
    let bench = Bench::new();
    bench.write("loop", "1/model.onnx", counter(1)).write("loop", "config.pbtxt", config("oldest { }", 3));
    let inputs = r#"
        input [
            { name: "steps" data_type: TYPE_FP32 dims: 1 },
            { name: "base" data_type: TYPE_FP32 dims: 1 },
            { name: "slip" data_type: TYPE_INT64 dims: 1 }
        ]"#;
    let map = |name: &str| format!(r#"input_map {{ key: "{name}" value: "{name}" }}"#);
    let maps = ["steps", "base", "slip"].map(map).concat();
    let step = format!(r#"step {{ model_name: "loop" {maps} output_map {{ key: "y" value: "y" }} }}"#);
    let output = r#"output { name: "y" data_type: TYPE_FP32 dims: 1 }"#;
    let ensemble = format!("max_batch_size: 4 {inputs} {output} ensemble_scheduling {{ {step} }}");
    bench.write("e", "config.pbtxt", ensemble);
    let registry = bench.open_all().await;
    assert!(registry.ready("loop", ""), "{:?}", index(&registry));
    let entry = registry.index(false).into_iter().find(|entry| entry.name == "e").unwrap();
    let wanted = "its step 1 (loop) answers a request with several responses (iterative_sequence), and a step gives one; \
                  make it of models that do not iterate";
    assert!(entry.reason.contains(wanted), "{}", entry.reason);
}

#[tokio::test]
async fn steps_that_do_not_fit_together_are_reasons() {
    let step = |model: &str, from: &str, to: &str| {
        format!(
            "step {{ model_name: \"{model}\" input_map {{ key: \"x\" value: \"{from}\" }} output_map {{ key: \"y\" value: \"{to}\" }} }}"
        )
    };
    let wrong_input =
        "step { model_name: \"twice\" input_map { key: \"z\" value: \"x\" } output_map { key: \"y\" value: \"y\" } }";
    for (steps, reason) in [
        (step("twice", "x", "a"), "its output `y` is given by no step"),
        (
            step("twice", "b", "y"),
            "input `x` of its step 1 (twice) needs tensor `b`, which is no input and no step gives; there are x, y",
        ),
        (step("twice", "b", "y") + &step("thrice", "y", "b"), "wait for each other in a circle: twice, thrice"),
        (
            step("twice", "x", "y") + &step("thrice", "x", "y"),
            "its tensor `y` comes from output `y` of step 1 (twice) and from step 2",
        ),
        (step("nobody", "x", "y"), "it needs model \"nobody\""),
        (step("e", "x", "y"), "it is made of itself: e, e"),
        (
            step("three", "x", "y"),
            "input `x` of its step 1 (three) is FP32 [3], but input `x` of the ensemble is FP32 [-1, -1]",
        ),
        (step("whole", "x", "y"), "is INT64 [-1, -1], but"),
        (wrong_input.to_owned(), "maps input `z`, which that model has not; it has x"),
    ] {
        let bench = models();
        let identity = {
            use sensorium_onnx::{DType, Dim, GraphBuilder};
            let mut graph = GraphBuilder::new("whole");
            let shape = [Dim::Symbol("batch"), Dim::Symbol("length")];
            let x = graph.input("x", DType::I64, &shape);
            let y = graph.node("Identity", &[&x], vec![]);
            graph.output("y", &y, DType::I64, &shape);
            graph.finish(20).unwrap().to_bytes()
        };
        bench.write("three", "1/model.onnx", scale_three(1.0)).write("whole", "1/model.onnx", identity);
        let head = "max_batch_size: 4 input { name: \"x\" data_type: TYPE_FP32 dims: -1 } output { name: \"y\" data_type: TYPE_FP32 dims: -1 }";
        bench.write("e", "config.pbtxt", format!("{head} ensemble_scheduling {{ {steps} }}"));
        let registry = bench.open_all().await;
        let entry = registry.index(false).into_iter().find(|entry| entry.name == "e").unwrap();
        assert!(entry.reason.contains(reason), "{}", entry.reason);
        assert!(registry.ready("twice", ""));
    }
}

/// `e`, whose rows have so many numbers, is made of `twice`, of the version with this number or the newest.
fn ensemble_of_rows(length: usize, version: i64) -> String {
    format!(
        r#"platform: "ensemble" max_batch_size: 8
           input {{ name: "x" data_type: TYPE_FP32 dims: {length} }} output {{ name: "y" data_type: TYPE_FP32 dims: {length} }}
           ensemble_scheduling {{ step {{ model_name: "twice" model_version: {version}
             input_map {{ key: "x" value: "x" }} output_map {{ key: "y" value: "y" }} }} }}"#
    )
}

#[tokio::test]
async fn a_request_that_has_come_is_answered_by_the_models_of_that_moment() {
    let bench = models();
    bench.write("diamond", "config.pbtxt", DIAMOND);
    let registry = bench.open(ControlMode::Explicit, &["diamond"]).await;
    let ensemble = registry.model("diamond", "").unwrap();
    let mut before = Box::pin(ensemble.infer(request(f32s(&[1, 1], &[1.0]))));
    assert!(poll!(&mut before).is_pending());
    bench.write("twice", "1/model.onnx", scale(20.0, None));
    registry.load("twice", LoadParameters::default()).await.unwrap();
    let mut unloaded = Box::pin(ensemble.infer(request(f32s(&[1, 1], &[1.0]))));
    assert!(poll!(&mut unloaded).is_pending());
    registry.unload("diamond", true).await.unwrap();
    registry.unload("twice", false).await.unwrap();
    assert!(registry.names().is_empty());
    let outputs = before.await.unwrap().outputs;
    assert_eq!([&outputs[0].tensor, &outputs[1].tensor], [&f32s(&[1, 1], &[6.0]), &f32s(&[1, 1], &[4.0])]);
    let outputs = unloaded.await.unwrap().outputs;
    assert_eq!([&outputs[0].tensor, &outputs[1].tensor], [&f32s(&[1, 1], &[60.0]), &f32s(&[1, 1], &[400.0])]);
    drop(ensemble);
    let gone = "twice 1 UNAVAILABLE unloaded".to_owned();
    eventually("nobody holds them any more", async || index(&registry).contains(&gone)).await;
}

#[tokio::test]
async fn an_ensemble_that_names_a_version_needs_that_one() {
    let bench = Bench::new();
    bench.write("twice", "1/model.onnx", scale(2.0, None)).write("twice", "2/model.onnx", scale(20.0, None));
    bench.write("twice", "config.pbtxt", "version_policy { all { } }").write(
        "e",
        "config.pbtxt",
        ensemble_of_rows(1, 1),
    );
    let registry = bench.open(ControlMode::Explicit, &["e"]).await;
    assert_eq!(answer(&registry, "e", &[1, 1], &[1.0]).await, [2.0]);
    bench.write("twice", "config.pbtxt", "");
    registry.load("twice", LoadParameters::default()).await.unwrap();
    assert!(registry.ready("twice", "") && !registry.ready("e", ""));
    assert_eq!(index(&registry)[0], "e 1 UNAVAILABLE it needs model \"twice\" version 1, which is not ready");
}

#[tokio::test]
async fn an_ensemble_and_its_model_that_change_together_come_together() {
    let bench = Bench::new();
    bench.write("twice", "1/model.onnx", scale(2.0, Some(2))).write("e", "config.pbtxt", ensemble_of_rows(2, -1));
    let registry = bench.open(ControlMode::Poll(Duration::from_millis(20)), &[]).await;
    assert_eq!(answer(&registry, "e", &[1, 2], &[1.0, 2.0]).await, [2.0, 4.0]);
    bench.write("twice", "1/model.onnx", scale(3.0, Some(3))).write("e", "config.pbtxt", ensemble_of_rows(3, -1));
    let asked = async || infer(&registry, "e", request(f32s(&[1, 3], &[1.0, 2.0, 3.0]))).await;
    eventually("both are there", async || asked().await.is_ok()).await;
    assert_eq!(asked().await.unwrap().outputs[0].tensor, f32s(&[1, 3], &[3.0, 6.0, 9.0]));
    assert_eq!(index(&registry), ["e 1 READY", "twice 1 READY"]);
}

#[tokio::test]
async fn an_ensemble_whose_model_takes_something_else_now_says_so_until_it_fits_again() {
    let bench = Bench::new();
    bench.write("twice", "1/model.onnx", scale(2.0, Some(2))).write("e", "config.pbtxt", ensemble_of_rows(2, -1));
    let registry = bench.open(ControlMode::Explicit, &["e"]).await;
    bench.write("twice", "1/model.onnx", scale(2.0, Some(3)));
    registry.load("twice", LoadParameters::default()).await.unwrap();
    let said = &index(&registry)[0];
    let wanted = "e 1 UNAVAILABLE its models do not fit together any more: input `x` of its step 1 (twice) is FP32 [-1, 3], but input `x` of \
                  the ensemble is FP32 [-1, 2]";
    assert_eq!(said, wanted);
    let error = infer(&registry, "e", request(f32s(&[1, 2], &[1.0, 2.0]))).await.unwrap_err();
    assert!(matches!(&error, InferError::NotReady { reason, .. } if reason.contains("do not fit together")), "{error}");
    bench.write("twice", "1/model.onnx", scale(3.0, Some(2)));
    registry.load("twice", LoadParameters::default()).await.unwrap();
    assert_eq!(index(&registry)[0], "e 1 READY");
    assert_eq!(answer(&registry, "e", &[1, 2], &[1.0, 2.0]).await, [3.0, 6.0]);
}

#[tokio::test]
async fn loading_an_ensemble_loads_what_has_changed_below_it() {
    let bench = Bench::new();
    bench.write("twice", "1/model.onnx", scale(2.0, Some(1))).write("e", "config.pbtxt", ensemble_of_rows(1, -1));
    let registry = bench.open(ControlMode::Explicit, &["e"]).await;
    assert_eq!(answer(&registry, "e", &[1, 1], &[1.0]).await, [2.0]);
    let as_it_is = registry.model("twice", "").unwrap();
    registry.load("e", LoadParameters::default()).await.unwrap();
    assert!(std::sync::Arc::ptr_eq(&as_it_is, &registry.model("twice", "").unwrap()), "nothing has changed");
    bench.write("twice", "1/model.onnx", scale(3.0, Some(1)));
    registry.load("e", LoadParameters::default()).await.unwrap();
    assert_eq!(answer(&registry, "e", &[1, 1], &[1.0]).await, [3.0]);
    bench.write("twice", "2/model.onnx", scale(7.0, Some(1)));
    registry.load("e", LoadParameters::default()).await.unwrap();
    assert_eq!(answer(&registry, "e", &[1, 1], &[1.0]).await, [7.0]);
}

#[tokio::test]
async fn what_goes_with_an_ensemble_is_what_nobody_else_needs_or_asked_for() {
    let bench = models();
    for (name, of) in [("outer", "inner"), ("inner", "twice"), ("other", "twice"), ("third", "thrice")] {
        bench.write(name, "config.pbtxt", ensemble_of(of));
    }
    let registry = bench.open(ControlMode::Explicit, &["outer", "other", "third"]).await;
    registry.unload("outer", true).await.unwrap();
    assert_eq!(registry.names(), ["other", "third", "thrice", "twice"], "`twice` is needed by another");
    registry.unload("other", true).await.unwrap();
    assert_eq!(registry.names(), ["third", "thrice"]);
    registry.load("outer", LoadParameters::default()).await.unwrap();
    registry.unload("outer", true).await.unwrap();
    assert_eq!(registry.names(), ["third", "thrice"], "what is below what is below goes, too");
    registry.load("thrice", LoadParameters::default()).await.unwrap();
    registry.unload("third", true).await.unwrap();
    assert_eq!(registry.names(), ["thrice"], "it was asked for by name");
}

#[tokio::test]
async fn an_ensemble_that_changes_before_its_model_does_is_there_when_both_have() {
    let bench = Bench::new();
    bench.write("twice", "1/model.onnx", scale(2.0, Some(2))).write("e", "config.pbtxt", ensemble_of_rows(2, -1));
    let registry = bench.open(ControlMode::Poll(Duration::from_millis(20)), &[]).await;
    assert_eq!(answer(&registry, "e", &[1, 2], &[1.0, 2.0]).await, [2.0, 4.0]);
    bench.write("e", "config.pbtxt", ensemble_of_rows(3, -1));
    let has_failed = async || index(&registry)[0].starts_with("e 1 READY it is as it was loaded before");
    eventually("it does not fit the model that there is", has_failed).await;
    bench.write("twice", "1/model.onnx", scale(3.0, Some(3)));
    let asked = async || infer(&registry, "e", request(f32s(&[1, 3], &[1.0, 2.0, 3.0]))).await;
    eventually("both are there", async || asked().await.is_ok()).await;
    assert_eq!(index(&registry), ["e 1 READY", "twice 1 READY"]);
}

#[tokio::test]
async fn a_broken_version_below_an_ensemble_keeps_it_from_nothing_that_it_does_not_name() {
    let bench = Bench::new();
    bench.write("twice", "1/model.onnx", scale(2.0, None)).write("twice", "2/model.onnx", b"no graph");
    bench.write("twice", "config.pbtxt", "version_policy { all { } }");
    bench.write("e", "config.pbtxt", ensemble_of("twice")).write("pinned", "config.pbtxt", ensemble_of_rows(1, 2));
    let registry = bench.open_all().await;
    assert_eq!(answer(&registry, "e", &[1, 1], &[1.0]).await, [2.0]);
    assert!(!registry.ready("pinned", ""), "{:?}", index(&registry));
}

#[tokio::test]
async fn an_ensemble_that_cannot_be_loaded_again_is_not_ready_on_models_that_it_does_not_fit() {
    let bench = Bench::new();
    bench.write("twice", "1/model.onnx", scale(2.0, Some(2))).write("e", "config.pbtxt", ensemble_of_rows(2, -1));
    let registry = bench.open(ControlMode::Explicit, &["e"]).await;
    bench.write("twice", "1/model.onnx", scale(3.0, Some(3))).write("e", "config.pbtxt", ensemble_of_rows(5, -1));
    registry.load("e", LoadParameters::default()).await.unwrap_err();
    let said = index(&registry).remove(0);
    assert!(said.starts_with("e 1 UNAVAILABLE its models do not fit together any more"), "{said}");
}

#[tokio::test]
async fn who_is_asked_for_by_name_stays_also_where_an_ensemble_has_brought_him() {
    let bench = models();
    bench.write("e", "config.pbtxt", ensemble_of("twice"));
    let registry = bench.open(ControlMode::Explicit, &["e", "twice"]).await;
    registry.unload("e", true).await.unwrap();
    assert_eq!(registry.names(), ["twice"]);
}

#[tokio::test]
async fn a_row_goes_between_models_that_batch_and_others() {
    let step = |model: &str, from: &str, to: &str| {
        format!(
            "step {{ model_name: \"{model}\" input_map {{ key: \"x\" value: \"{from}\" }} output_map {{ key: \"y\" value: \"{to}\" }} }}"
        )
    };
    let ensemble = |rows: usize, steps: &str| {
        format!(
            r#"platform: "ensemble" max_batch_size: {rows}
               input {{ name: "x" data_type: TYPE_FP32 dims: 3 }} output {{ name: "y" data_type: TYPE_FP32 dims: 3 }}
               ensemble_scheduling {{ {steps} }}"#
        )
    };
    let bench = models();
    bench.write("three", "1/model.onnx", scale_three(5.0));
    let all = step("twice", "x", "a") + &step("three", "a", "b") + &step("thrice", "b", "y");
    bench.write("alone", "config.pbtxt", ensemble(0, &all)).write("rows", "config.pbtxt", ensemble(1, &all));
    let registry = bench.open_all().await;
    assert!(registry.ready("alone", "") && registry.ready("rows", ""), "{:?}", index(&registry));
    let response = infer(&registry, "alone", request(f32s(&[3], &[1.0, 2.0, 3.0]))).await.unwrap();
    assert_eq!(response.outputs[0].tensor, f32s(&[3], &[30.0, 60.0, 90.0]));
    let response = infer(&registry, "rows", request(f32s(&[1, 3], &[1.0, 2.0, 3.0]))).await.unwrap();
    assert_eq!(response.outputs[0].tensor, f32s(&[1, 3], &[30.0, 60.0, 90.0]));
}

#[tokio::test]
async fn an_ensemble_of_several_rows_may_have_a_step_that_takes_one_and_says_so_to_who_sends_two() {
    let bench = models();
    bench.write("one", "1/model.onnx", scale(5.0, None)).write(
        "one",
        "config.pbtxt",
        r#"max_batch_size: 0 input { name: "x" data_type: TYPE_FP32 dims: [1, -1] } output { name: "y" data_type: TYPE_FP32 dims: [1, -1] }"#,
    );
    bench.write("rows", "config.pbtxt", ensemble_of("one"));
    let registry = bench.open_all().await;
    assert!(registry.ready("rows", ""), "{:?}", index(&registry));
    let response = infer(&registry, "rows", request(f32s(&[1, 2], &[1.0, 2.0]))).await.unwrap();
    assert_eq!(response.outputs[0].tensor, f32s(&[1, 2], &[5.0, 10.0]));
    let error = infer(&registry, "rows", request(f32s(&[2, 1], &[1.0, 2.0]))).await.unwrap_err();
    assert!(error.to_string().contains("step 1 (one)"), "{error}");
}

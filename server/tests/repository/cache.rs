//! Answers that are known already.

use sensorium_server::{
    model::{Parameter, Request},
    repository::{ControlMode, LoadParameters},
};

use crate::bench::{Bench, answer, f32s, infer, request, scale};

#[tokio::test]
async fn an_equal_request_is_answered_without_the_engine_and_counted_as_a_hit() {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", scale(2.0, None)).write("m", "config.pbtxt", "response_cache { enable: true }");
    bench.write("plain", "1/model.onnx", scale(2.0, None));
    let registry = bench.open(ControlMode::Explicit, &["m", "plain"]).await;
    let ask = |value: f32| request(f32s(&[1, 1], &[value]));
    let other = Request { parameters: [("p".to_owned(), Parameter::Int(1))].into(), ..ask(1.0) };
    let named = Request { id: "7".to_owned(), priority: 1, ..ask(1.0) };
    let mut hits = Vec::new();
    for request in [ask(1.0), ask(1.0), named, ask(2.0), other] {
        hits.push(infer(&registry, "m", request).await.unwrap().timings.cache_hit);
    }
    assert_eq!(hits, [false, true, true, false, false], "name and priority are not what an answer depends on");
    let report = registry.statistics("m", "").unwrap().remove(0);
    assert_eq!((report.inference_count, report.execution_count), (3, 3));
    let stats = report.inference_stats.unwrap();
    let counts = [stats.success, stats.cache_hit, stats.cache_miss, stats.queue, stats.compute_infer];
    assert_eq!(counts.map(|sum| sum.unwrap().count), [5, 2, 3, 5, 3], "as in Triton, a hit is in the queue's count");

    for _ in 0..2 {
        answer(&registry, "plain", &[1, 1], &[1.0]).await;
    }
    assert_eq!(registry.statistics("plain", "").unwrap()[0].execution_count, 2, "nobody asked for it to be cached");

    bench.write("m", "1/model.onnx", scale(5.0, None));
    registry.load("m", LoadParameters::default()).await.unwrap();
    assert_eq!(answer(&registry, "m", &[1, 1], &[1.0]).await, [5.0], "what an older model said is forgotten");
}

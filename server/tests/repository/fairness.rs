//! Models that share a machine.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use sensorium_onnx::{DType as OnnxDType, Dim, GraphBuilder};

use crate::bench::{Bench, answer, f32s, infer, request, scale};

/// `y = x * w * w * ... * w`, over matrices that take some milliseconds.
fn heavy() -> Vec<u8> {
    const WIDTH: i64 = 512;
    let mut graph = GraphBuilder::new("heavy");
    let dims = [Dim::Symbol("batch"), Dim::Fixed(WIDTH), Dim::Fixed(WIDTH)];
    let mut x = graph.input("x", OnnxDType::F32, &dims);
    let weights = graph.initializer_f32("w", &[WIDTH, WIDTH], vec![1.0 / WIDTH as f32; (WIDTH * WIDTH) as usize]);
    for _ in 0..6 {
        x = graph.node("MatMul", &[&x, &weights], vec![]);
    }
    graph.output("y", &x, OnnxDType::F32, &dims);
    graph.finish(20).unwrap().to_bytes()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heavy_model_that_always_has_work_does_not_starve_a_light_one() {
    const ASKED: u64 = 20;
    let bench = Bench::new();
    bench.write("heavy", "1/model.onnx", heavy()).write("heavy", "config.pbtxt", "max_batch_size: 1");
    bench.write("light", "1/model.onnx", scale(2.0, None));
    let registry = bench.open_all().await;
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (registry, stop) = (registry.clone(), stop.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let x = f32s(&[1, 512, 512], &[1.0; 512 * 512]);
                    infer(&registry, "heavy", request(x)).await.unwrap();
                }
            })
        })
        .collect();
    let runs = || registry.statistics("heavy", "").unwrap()[0].execution_count;
    crate::bench::eventually("the heavy model runs", async || runs() > 0).await;
    let before = runs();
    for value in 0..ASKED {
        assert_eq!(answer(&registry, "light", &[1, 1], &[value as f32]).await, [value as f32 * 2.0]);
    }
    // Counted in runs, not in time: each light request meets one, and may come late for the next.
    let met = runs() - before;
    assert!(met <= 3 * ASKED, "{met} runs of the heavy model for {ASKED} of the light one");
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
}

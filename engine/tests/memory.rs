//! Memory of a long-running engine. Alone in its process, because it watches the process's memory.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use sensorium_engine::{Engine, OnnxRuntime, Options};
use sensorium_modality::Tensor;
use sensorium_onnx::{DType, Dim, GraphBuilder};

/// Memory this process has now, in KiB.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn memory_stays_flat_over_runs_of_ever_new_shapes() {
    const SIZES: [Dim<'_>; 3] = [Dim::Symbol("a"), Dim::Symbol("b"), Dim::Symbol("c")];
    let mut graph = GraphBuilder::new("chain");
    let (mut x, mut y) = (graph.input("x", DType::F32, &SIZES), graph.scalar_f32(1.0));
    for _ in 0..30 {
        (x, y) = (graph.node("Add", &[&x, &y], vec![]), x);
    }
    graph.output("y", &x, DType::F32, &SIZES);
    let bytes = graph.finish(20).unwrap().to_bytes();
    let mut engine = OnnxRuntime::open_bytes("chain", &bytes, Options::default()).unwrap();
    let mut run = |shape: [usize; 3]| {
        let x = Tensor::from_vec(shape, vec![0.5_f32; shape.iter().product()]).unwrap();
        engine.run(vec![("x".to_owned(), x)], &[]).unwrap();
    };
    for _ in 0..100 {
        run([24; 3]);
    }
    let before = memory();
    for step in 0..24 * 24 * 24 {
        run([1 + step % 24, 1 + step / 24 % 24, 1 + step / 24 / 24]);
    }
    let grown = memory().saturating_sub(before);
    assert!(grown < 4 * 1024, "{grown} KiB"); // a leak of 300 bytes per run
}

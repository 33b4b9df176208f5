//! What INT8 costs and gains on this machine: error and speed of a small Transformer in every representation, against f32.
//!
//! `cargo run --release -p sensorium-compress --example int8 [WIDTH [TOKENS [LAYERS]]]`

use std::time::{Duration, Instant};

use sensorium_api::CalibrationMethod;
use sensorium_compress::{ActivationType, Calibrator, Representation, WeightRange, plan_graph, rewrite};
use sensorium_engine::{Engine, GraphRunner, OnnxRuntime, Options};
use sensorium_modality::Tensor;
use sensorium_onnx::{Attribute, DType, Dim, GraphBuilder, Model};

const HEADS: i64 = 4;

/// Normally distributed numbers (the sum of twelve uniform ones), by seed.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        let mut sum = -6.0;
        for _ in 0..12 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            sum += (self.0 >> 40) as f32 / (1 << 24) as f32;
        }
        sum
    }

    fn vec(&mut self, len: i64, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.next() * scale).collect()
    }
}

struct Writer {
    graph: GraphBuilder,
    noise: Noise,
}

impl Writer {
    fn linear(&mut self, x: &str, name: &str, from: i64, to: i64) -> String {
        let weight = self.noise.vec(from * to, 1.0 / (from as f32).sqrt());
        let weight = self.graph.initializer_f32(&format!("{name}.weight"), &[from, to], weight);
        let bias = self.noise.vec(to, 0.1);
        let bias = self.graph.initializer_f32(&format!("{name}.bias"), &[to], bias);
        let product = self.graph.node("MatMul", &[x, &weight], vec![]);
        self.graph.node("Add", &[&product, &bias], vec![])
    }

    fn norm(&mut self, x: &str, name: &str, width: i64) -> String {
        let gain = self.graph.initializer_f32(&format!("{name}.gain"), &[width], vec![1.0; width as usize]);
        self.graph.node("LayerNormalization", &[x, &gain], vec![])
    }

    fn heads(&mut self, x: &str, width: i64, perm: &[i64]) -> String {
        let shape = self.graph.vector_i64(&[0, 0, HEADS, width / HEADS]);
        let split = self.graph.node("Reshape", &[x, &shape], vec![]);
        self.graph.node("Transpose", &[&split], vec![Attribute::ints("perm", perm)])
    }

    fn layer(&mut self, x: &str, name: &str, width: i64) -> String {
        let norm = self.norm(x, &format!("{name}.norm1"), width);
        let [q, k, v] = ["q", "k", "v"].map(|part| self.linear(&norm, &format!("{name}.{part}"), width, width));
        let (q, v) = (self.heads(&q, width, &[0, 2, 1, 3]), self.heads(&v, width, &[0, 2, 1, 3]));
        let k = self.heads(&k, width, &[0, 2, 3, 1]);
        let scale = self.graph.scalar_f32(1.0 / ((width / HEADS) as f32).sqrt());
        let q = self.graph.node("Mul", &[&q, &scale], vec![]);
        let scores = self.graph.node("MatMul", &[&q, &k], vec![]);
        let weights = self.graph.node("Softmax", &[&scores], vec![]);
        let mixed = self.graph.node("MatMul", &[&weights, &v], vec![]);
        let mixed = self.graph.node("Transpose", &[&mixed], vec![Attribute::ints("perm", &[0, 2, 1, 3])]);
        let shape = self.graph.vector_i64(&[0, 0, width]);
        let mixed = self.graph.node("Reshape", &[&mixed, &shape], vec![]);
        let out = self.linear(&mixed, &format!("{name}.out"), width, width);
        let x = self.graph.node("Add", &[x, &out], vec![]);
        let norm = self.norm(&x, &format!("{name}.norm2"), width);
        let up = self.linear(&norm, &format!("{name}.up"), width, 2 * width);
        let up = self.graph.node("Gelu", &[&up], vec![Attribute::string("approximate", "tanh")]);
        let down = self.linear(&up, &format!("{name}.down"), 2 * width, width);
        self.graph.node("Add", &[&x, &down], vec![])
    }
}

fn transformer(width: i64, layers: i64) -> anyhow::Result<Model> {
    let mut writer = Writer { graph: GraphBuilder::new("transformer"), noise: Noise(7) };
    let dims = [Dim::Symbol("batch"), Dim::Symbol("length"), Dim::Fixed(width)];
    let mut x = writer.graph.input("x", DType::F32, &dims);
    for layer in 0..layers {
        x = writer.layer(&x, &format!("blocks.{layer}"), width);
    }
    writer.graph.output("y", &x, DType::F32, &dims);
    Ok(writer.graph.finish(20)?)
}

fn open(model: &Model) -> anyhow::Result<OnnxRuntime> {
    Ok(OnnxRuntime::open_bytes("transformer", &model.to_bytes(), Options::default())?)
}

fn run(engine: &mut OnnxRuntime, input: &Tensor) -> anyhow::Result<(Vec<f32>, Duration)> {
    let inputs = vec![("x".to_owned(), input.clone())];
    let start = Instant::now();
    let outputs = engine.run(inputs, &[])?;
    let elapsed = start.elapsed();
    Ok((outputs[0].1.as_slice::<f32>()?.to_vec(), elapsed))
}

fn main() -> anyhow::Result<()> {
    let args: Vec<i64> = std::env::args().skip(1).map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    let arg = |index: usize, default: i64| args.get(index).copied().unwrap_or(default);
    let (width, tokens, layers) = (arg(0, 64), arg(1, 27), arg(2, 4));
    let model = transformer(width, layers)?;
    let mut noise = Noise(8);
    let mut input = |batch: i64| {
        let shape = [batch, tokens, width].map(|size| size as usize);
        Tensor::from_vec(shape, noise.vec(batch * tokens * width, 1.0))
    };

    let plan = plan_graph(&model, |_| false);
    let calibrator = Calibrator::open([("g", &model, &plan)], CalibrationMethod::Minmax)?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    for _ in 0..8 {
        runtime.block_on(calibrator.run("g", vec![("x".to_owned(), input(16)?)]))?;
    }
    calibrator.check()?;

    println!("{layers} layers, width {width}, {tokens} tokens, one thread; f32 is {} bytes", model.to_bytes().len());
    println!("{:26} {:>8} {:>12} {:>12} {:>12}", "representation", "bytes", "rms error", "speed b=1", "speed b=16");
    let (single, batch) = (input(1)?, input(16)?);
    for activations in [ActivationType::AsymmetricU8, ActivationType::SymmetricI8] {
        for weights in [WeightRange::SevenBit, WeightRange::Full] {
            let ranges = &calibrator.ranges(activations)["g"];
            let int8 = rewrite(&model, &plan, ranges, Representation { activations, weights })?;
            let (mut slow, mut fast) = (open(&model)?, open(&int8)?);
            let mut speeds = Vec::new();
            for input in [&single, &batch] {
                let mut ratios = Vec::new();
                for _ in 0..200 {
                    let before = run(&mut slow, input)?.1;
                    ratios.push(before.as_secs_f64() / run(&mut fast, input)?.1.as_secs_f64());
                }
                ratios.sort_by(f64::total_cmp);
                speeds.push(ratios[ratios.len() / 2]);
            }
            let (expected, found) = (run(&mut slow, &batch)?.0, run(&mut fast, &batch)?.0);
            let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>();
            let error = square(&mut expected.iter().zip(&found).map(|(a, b)| a - b));
            let error = (error / square(&mut expected.iter().copied())).sqrt();
            let name = format!("{activations:?} {weights:?}");
            let bytes = int8.to_bytes().len();
            println!("{name:26} {bytes:>8} {error:>12.5} {:>12.2} {:>12.2}", speeds[0], speeds[1]);
        }
    }
    Ok(())
}

//! Quantised graphs, run by the engine that will serve them, against the f32 graphs they were made from.

#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "a test fails by panicking, and equal means equal")]

use std::collections::BTreeMap;

use sensorium_api::CalibrationMethod;
use sensorium_compress::{
    ActivationType, Affine, Calibrator, CompressError, GraphPlan, Range, Representation, Target, WeightRange,
    plan_graph, rewrite,
};
use sensorium_engine::{Engine, GraphRunner, OnnxRuntime, Options};
use sensorium_modality::Tensor;
use sensorium_onnx::{Attribute, DType, Dim, GraphBuilder, Model};

const REPRESENTATIONS: [Representation; 3] = [
    Representation { activations: ActivationType::AsymmetricU8, weights: WeightRange::SevenBit },
    Representation { activations: ActivationType::SymmetricI8, weights: WeightRange::SevenBit },
    Representation { activations: ActivationType::AsymmetricU8, weights: WeightRange::Full },
];

/// Uniform numbers in -1..1 that only depend on the seed.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

fn run(model: &Model, input: &Tensor) -> Vec<f32> {
    let mut engine = OnnxRuntime::open_bytes("test", &model.to_bytes(), Options::default()).unwrap();
    let outputs = engine.run(vec![("x".to_owned(), input.clone())], &[]).unwrap();
    outputs[0].1.as_slice::<f32>().unwrap().to_vec()
}

/// The graph quantised after calibration with `input` alone, and the ranges that this gave.
fn quantized(model: &Model, input: &Tensor, representation: Representation) -> (Model, BTreeMap<String, Range>) {
    let plan = plan_graph(model, |_| false);
    let calibrator = Calibrator::open([("g", model, &plan)], CalibrationMethod::Minmax).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(calibrator.run("g", vec![("x".to_owned(), input.clone())])).unwrap();
    calibrator.check().unwrap();
    let ranges = calibrator.ranges(representation.activations).remove("g").unwrap();
    (rewrite(model, &plan, &ranges, representation).unwrap(), ranges)
}

fn matmul(rows: i64, inner: i64, columns: i64, weight: &[f32]) -> Model {
    let mut graph = GraphBuilder::new("g");
    let x = graph.input("x", DType::F32, &[Dim::Fixed(rows), Dim::Fixed(inner)]);
    let w = graph.initializer_f32("w", &[inner, columns], weight);
    let y = graph.node("MatMul", &[&x, &w], vec![]);
    graph.output("y", &y, DType::F32, &[Dim::Fixed(rows), Dim::Fixed(columns)]);
    graph.finish(20).unwrap()
}

/// `Conv` 3x3 with padding 1 on 6x6 pixels, and a `Relu`.
fn conv(channels: i64, filters: i64, weight: &[f32], bias: &[f32]) -> Model {
    let mut graph = GraphBuilder::new("g");
    let x = graph.input("x", DType::F32, &[Dim::Fixed(1), Dim::Fixed(channels), Dim::Fixed(6), Dim::Fixed(6)]);
    let w = graph.initializer_f32("w", &[filters, channels, 3, 3], weight);
    let b = graph.initializer_f32("b", &[filters], bias);
    let y = graph.node("Conv", &[&x, &w, &b], vec![Attribute::ints("pads", &[1; 4])]);
    let y = graph.node("Relu", &[&y], vec![]);
    graph.output("y", &y, DType::F32, &[Dim::Fixed(1), Dim::Fixed(filters), Dim::Fixed(6), Dim::Fixed(6)]);
    graph.finish(20).unwrap()
}

/// The most by which a product over `inner` pairs can be off when each factor is off by half a step: the first order terms
/// with the largest magnitudes, and the product of both errors.
fn product_bound(inner: usize, x: Affine, x_max: f32, w: Affine, w_max: f32) -> f32 {
    inner as f32 * (x.scale * w_max + x_max * w.scale + x.scale * w.scale) / 2.0
}

#[test]
fn products_agree_with_f32_within_half_a_step_of_each_factor() {
    let mut noise = Noise(1);
    for (rows, inner, columns) in [(1, 1, 1), (3, 64, 13), (27, 64, 128), (5, 130, 64), (2, 7, 3)] {
        let weight = noise.vec(inner * columns);
        let input = Tensor::from_vec([rows, inner], noise.vec(rows * inner)).unwrap();
        let model = matmul(rows as i64, inner as i64, columns as i64, &weight);
        let expected = run(&model, &input);
        for representation in REPRESENTATIONS {
            if representation.weights == WeightRange::Full {
                continue; // saturates on CPUs without VNNI
            }
            let (int8, ranges) = quantized(&model, &input, representation);
            let x = Affine::activation(ranges["x"], representation.activations);
            let w = Affine::weight(1.0, 0.0, representation.weights);
            let bound = product_bound(inner, x, 1.0, w, 1.0);
            for (found, expected) in run(&int8, &input).iter().zip(&expected) {
                assert!((found - expected).abs() <= bound, "{found} is not {expected} +- {bound}, {representation:?}");
            }
        }
    }
}

#[test]
fn seven_bit_weights_keep_the_largest_sums_exact() {
    // All activations and weights at their largest magnitude: what saturates in 16 bits on CPUs without VNNI.
    let (rows, inner, columns) = (4, 256, 64);
    let model = matmul(rows, inner, columns, &vec![1.0; (inner * columns) as usize]);
    let input = Tensor::from_vec([4, 256], vec![1.0_f32; 4 * 256]).unwrap();
    for representation in REPRESENTATIONS.iter().filter(|it| it.weights == WeightRange::SevenBit) {
        let (int8, _) = quantized(&model, &input, *representation);
        for found in run(&int8, &input) {
            assert!((found - 256.0).abs() < 0.01, "{found}, {representation:?}");
        }
    }
}

#[test]
fn convolutions_agree_with_f32_within_half_a_step_of_each_factor_and_of_the_result() {
    let mut noise = Noise(2);
    for (channels, filters) in [(1, 1), (3, 24), (8, 16)] {
        let (weight, bias) = (noise.vec(filters * channels * 9), noise.vec(filters));
        let input = Tensor::from_vec([1, channels, 6, 6], noise.vec(channels * 36)).unwrap();
        let model = conv(channels as i64, filters as i64, &weight, &bias);
        let expected = run(&model, &input);
        for representation in REPRESENTATIONS.iter().filter(|it| it.weights == WeightRange::SevenBit) {
            let (int8, ranges) = quantized(&model, &input, *representation);
            let affine = |value: &str| Affine::activation(ranges[value], representation.activations);
            let product = model.graph().node[0].output[0].clone();
            let w = Affine::weight(1.0, 0.0, representation.weights);
            let bound = product_bound(channels * 9, affine("x"), 1.0, w, 1.0) + affine(&product).scale;
            for (found, expected) in run(&int8, &input).iter().zip(&expected) {
                assert!((found - expected).abs() <= bound, "{found} is not {expected} +- {bound}, {representation:?}");
            }
        }
    }
}

#[test]
fn a_dead_filter_keeps_its_bias() {
    // Filter 0 has no weights, filter 1 almost none: a scale from the weights alone could not hold their biases.
    let mut weight = vec![0.0; 3 * 9];
    weight[9..18].fill(1e-12);
    weight[18..].fill(0.5);
    let model = conv(1, 3, &weight, &[0.75, 1.5, 0.25]);
    let input = Tensor::from_vec([1, 1, 6, 6_usize], Noise(3).vec(36)).unwrap();
    let expected = run(&model, &input);
    for representation in REPRESENTATIONS {
        let (int8, ranges) = quantized(&model, &input, representation);
        let product = &model.graph().node[0].output[0];
        let step = Affine::activation(ranges[product], representation.activations).scale;
        for (found, expected) in run(&int8, &input)[..72].iter().zip(&expected) {
            assert!((found - expected).abs() <= step, "{found} is not {expected} +- {step}");
        }
    }
}

#[test]
fn a_constant_activation_stays_what_it_is() {
    for constant in [0.0, 2.5, -2.5] {
        let model = matmul(2, 4, 4, &[0.5; 16]);
        let input = Tensor::from_vec([2, 4_usize], vec![constant; 8]).unwrap();
        for representation in REPRESENTATIONS.iter().filter(|it| it.weights == WeightRange::SevenBit) {
            let (int8, _) = quantized(&model, &input, *representation);
            for found in run(&int8, &input) {
                assert!((found - 2.0 * constant).abs() < 1e-4, "{found} is not {}", 2.0 * constant);
            }
        }
    }
}

#[test]
fn a_table_is_looked_up_in_int8_and_within_half_a_step() {
    let table = Noise(4).vec(40 * 32);
    let mut graph = GraphBuilder::new("g");
    let ids = graph.input("x", DType::I64, &[Dim::Symbol("n")]);
    let w = graph.initializer_f32("w", &[40, 32], &table);
    let y = graph.node("Gather", &[&w, &ids], vec![]);
    graph.output("y", &y, DType::F32, &[Dim::Symbol("n"), Dim::Fixed(32)]);
    let model = graph.finish(20).unwrap();
    let input = Tensor::from_vec([40_usize], (0..40_i64).collect()).unwrap();
    let plan = plan_graph(&model, |_| false);
    let int8 = rewrite(&model, &plan, &BTreeMap::new(), REPRESENTATIONS[0]).unwrap();
    assert_eq!(int8.initializer("w").unwrap().dtype(), Some(DType::I8));
    for (found, expected) in run(&int8, &input).iter().zip(&table) {
        assert!((found - expected).abs() <= 0.5 / 127.0 + 1e-6, "{found} is not {expected}");
    }
}

/// A LayerNorm read by three products, as before query, key and value, and by a residual sum.
fn three_readers() -> Model {
    let mut noise = Noise(5);
    let mut graph = GraphBuilder::new("g");
    let dims = [Dim::Symbol("batch"), Dim::Fixed(8)];
    let x = graph.input("x", DType::F32, &dims);
    let gain = graph.initializer_f32("norm.gain", &[8], [1.0; 8]);
    let norm = graph.node("LayerNormalization", &[&x, &gain], vec![]);
    let products: Vec<String> = ["q", "k", "v"]
        .into_iter()
        .map(|name| {
            let weight = graph.initializer_f32(name, &[8, 8], noise.vec(64));
            graph.node("MatMul", &[&norm, &weight], vec![])
        })
        .collect();
    let scores = graph.node("Mul", &[&products[0], &products[1]], vec![]);
    let sum = graph.node("Add", &[&scores, &products[2]], vec![]);
    let y = graph.node("Add", &[&sum, &norm], vec![]);
    graph.output("y", &y, DType::F32, &dims);
    graph.finish(20).unwrap()
}

fn count(model: &Model, op_type: &str) -> usize {
    model.graph().node.iter().filter(|node| node.is(op_type)).count()
}

#[test]
fn readers_share_one_quantised_value_and_sums_keep_the_f32_one() {
    let model = three_readers();
    let input = Tensor::from_vec([5, 8_usize], Noise(6).vec(40)).unwrap();
    let (int8, _) = quantized(&model, &input, REPRESENTATIONS[0]);
    assert_eq!(count(&int8, "QuantizeLinear"), 1);
    assert_eq!(count(&int8, "DequantizeLinear"), 1 + 3);
    let norm = &model.graph().node[0].output[0];
    let sum = int8.graph().node.last().unwrap();
    assert!(sum.is("Add") && sum.input.contains(norm), "{sum:?}");
    for (found, expected) in run(&int8, &input).iter().zip(run(&model, &input)) {
        assert!((found - expected).abs() < 0.1, "{found} is not {expected}");
    }
}

#[test]
fn no_f32_weight_is_left_behind_and_scalars_are_stored_once() {
    let model = three_readers();
    let input = Tensor::from_vec([5, 8_usize], Noise(6).vec(40)).unwrap();
    let (int8, _) = quantized(&model, &input, REPRESENTATIONS[0]);
    for name in ["q", "k", "v"] {
        assert_eq!(int8.initializer(name).unwrap().dtype(), Some(DType::I8));
    }
    // The gain, three weights with their scales, one scale and one zero point.
    assert_eq!(int8.graph().initializer.len(), 1 + 3 + 3 + 2);
}

#[test]
fn the_same_graph_and_ranges_give_the_same_bytes() {
    let model = three_readers();
    let input = Tensor::from_vec([5, 8_usize], Noise(6).vec(40)).unwrap();
    for representation in REPRESENTATIONS {
        let twice = [0, 1].map(|_| quantized(&model, &input, representation).0.to_bytes());
        assert_eq!(twice[0], twice[1]);
    }
}

#[test]
fn a_quantised_graph_leaves_nothing_to_quantise() {
    let model = three_readers();
    let input = Tensor::from_vec([5, 8_usize], Noise(6).vec(40)).unwrap();
    let (int8, _) = quantized(&model, &input, REPRESENTATIONS[0]);
    assert_eq!(plan_graph(&int8, |_| false), GraphPlan::default());
}

#[test]
fn a_missing_range_is_an_error_that_names_the_activation() {
    let model = matmul(1, 2, 2, &[1.0; 4]);
    let plan = plan_graph(&model, |_| false);
    match rewrite(&model, &plan, &BTreeMap::new(), REPRESENTATIONS[0]) {
        Err(CompressError::NoRange { value, .. }) => assert_eq!(value, "x"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_weight_that_is_not_finite_is_refused_by_name() {
    let model = matmul(1, 2, 2, &[1.0, f32::NAN, 1.0, 1.0]);
    let ranges = [("x".to_owned(), Range { low: 0.0, high: 1.0 })].into();
    match rewrite(&model, &plan_graph(&model, |_| false), &ranges, REPRESENTATIONS[0]) {
        Err(CompressError::NotFinite { value, .. }) => assert_eq!(value, "w"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_activation_that_is_not_finite_is_refused_by_name() {
    let model = matmul(1, 2, 2, &[1.0; 4]);
    let plan = plan_graph(&model, |_| false);
    let calibrator = Calibrator::open([("g", &model, &plan)], CalibrationMethod::Minmax).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let input = Tensor::from_vec([1, 2_usize], vec![1.0, f32::INFINITY]).unwrap();
    runtime.block_on(calibrator.run("g", vec![("x".to_owned(), input)])).unwrap();
    match calibrator.check() {
        Err(CompressError::NotFinite { graph, value, .. }) => assert_eq!((graph.as_str(), value.as_str()), ("g", "x")),
        other => panic!("{other:?}"),
    }
}

/// What a plan does with a graph made by `write`, by weight.
fn planned(write: impl FnOnce(&mut GraphBuilder, &str) -> String) -> Vec<Target> {
    let mut graph = GraphBuilder::new("g");
    let dims = [Dim::Fixed(4), Dim::Fixed(4)];
    let x = graph.input("x", DType::F32, &dims);
    let y = write(&mut graph, &x);
    graph.output("y", &y, DType::F32, &dims);
    plan_graph(&graph.finish(20).unwrap(), |weight| weight == "excluded").targets.into_values().collect()
}

#[test]
fn a_plan_takes_products_with_constants_and_leaves_the_rest() {
    let product = |graph: &mut GraphBuilder, x: &str, name: &str| {
        let w = graph.initializer_f32(name, &[4, 4], [1.0; 16]);
        graph.node("MatMul", &[x, &w], vec![])
    };
    let weights = |targets: Vec<Target>| targets.iter().map(|target| target.weight().to_owned()).collect::<Vec<_>>();
    assert_eq!(weights(planned(|graph, x| product(graph, x, "w"))), ["w"]);
    assert!(planned(|graph, x| product(graph, x, "excluded")).is_empty());
    assert!(planned(|graph, x| graph.node("MatMul", &[x, x], vec![])).is_empty(), "two activations");
    let twice = planned(|graph, x| {
        let h = product(graph, x, "w");
        graph.node("MatMul", &[&h, "w"], vec![])
    });
    assert_eq!(weights(twice), ["w", "w"], "a weight that two products share");
    let otherwise = planned(|graph, x| {
        let h = product(graph, x, "w");
        graph.node("Add", &[&h, "w"], vec![])
    });
    assert!(otherwise.is_empty(), "a weight that a sum reads too");
}

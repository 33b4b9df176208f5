//! Requests of unequal length in one batch without padding.

use futures::future::join_all;
use sensorium_engine::{DType, RawTensor};
use sensorium_onnx::{Attribute, DType as OnnxDType, Dim, GraphBuilder};
use sensorium_server::{model::Response, repository::Registry};

use crate::bench::{Bench, f32s, infer, request, scale};

const BATCH: Dim<'static> = Dim::Symbol("batch");
const TOTAL: Dim<'static> = Dim::Symbol("total");

/// Sums of the requests that lie one behind the other in `x`, from where each begins in `ends`; and `x` twice as large.
fn segment_sums() -> Vec<u8> {
    let mut graph = GraphBuilder::new("segment_sums");
    let x = graph.input("x", OnnxDType::F32, &[TOTAL]);
    let ends = graph.input("ends", OnnxDType::I32, &[Dim::Symbol("ends")]);
    let axis = graph.scalar_i64(0);
    let running = graph.node("CumSum", &[&x, &axis], vec![]);
    let zero = graph.initializer_f32("zero", &[1], [0.0]);
    let running = graph.node("Concat", &[&zero, &running], vec![Attribute::int("axis", 0)]);
    let [first, second, last, none] = [0, 1, -1, i64::MAX].map(|at| graph.vector_i64(&[at]));
    let from = graph.node("Slice", &[&ends, &first, &last, &first], vec![]);
    let to = graph.node("Slice", &[&ends, &second, &none, &first], vec![]);
    let [from, to] = [from, to].map(|ends| graph.node("Gather", &[&running, &ends], vec![]));
    let sums = graph.node("Sub", &[&to, &from], vec![]);
    let sums = graph.node("Unsqueeze", &[&sums, &second], vec![]);
    graph.output("sum", &sums, OnnxDType::F32, &[BATCH, Dim::Fixed(1)]);
    let two = graph.scalar_f32(2.0);
    let doubled = graph.node("Mul", &[&x, &two], vec![]);
    graph.output("doubled", &doubled, OnnxDType::F32, &[TOTAL]);
    graph.finish(20).unwrap().to_bytes()
}

const SEGMENT_SUMS: &str = r#"
    max_batch_size: 8
    input { name: "x" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }
    output { name: "sum" dims: 1 }
    output { name: "doubled" dims: -1 }
    batch_input { kind: BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO target_name: "ends" data_type: TYPE_INT32 source_input: "x" }
    batch_output { target_name: "doubled" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "x" }
"#;

async fn serve(model: Vec<u8>, config: &str) -> Registry {
    let bench = Bench::new();
    bench.write("m", "1/model.onnx", model).write("m", "config.pbtxt", config);
    let registry = bench.open_all().await;
    assert!(registry.ready("m", ""), "{:?}", registry.index(false));
    registry
}

/// Answers to requests of one row of so many numbers each: 0, 1, 2, ...
async fn ask(registry: &Registry, lengths: &[i64]) -> Vec<Response> {
    let one = |length: &i64| {
        let values: Vec<f32> = (0..*length).map(|value| value as f32).collect();
        infer(registry, "m", request(f32s(&[1, *length], &values)))
    };
    join_all(lengths.iter().map(one)).await.into_iter().map(Result::unwrap).collect()
}

fn output(response: &Response, name: &str) -> RawTensor {
    response.outputs.iter().find(|output| output.name == name).unwrap().tensor.clone()
}

/// Sizes of the batches that ran, with how many of each.
fn batches(registry: &Registry) -> Vec<(u64, u64)> {
    let statistics = registry.statistics("m", "").unwrap().remove(0);
    statistics.batch_stats.iter().map(|batch| (batch.batch_size, batch.compute_infer.unwrap().count)).collect()
}

#[tokio::test]
async fn each_request_gets_its_own_segment_of_a_ragged_batch() {
    let batching = "dynamic_batching { preferred_batch_size: 3 max_queue_delay_microseconds: 20000000 }";
    let registry = serve(segment_sums(), &format!("{SEGMENT_SUMS}\n{batching}")).await;
    for lengths in [[1, 4, 2], [7, 1, 1], [3, 3, 3]] {
        for (response, length) in ask(&registry, &lengths).await.iter().zip(lengths) {
            let sum = (length * (length - 1) / 2) as f32;
            assert_eq!(output(response, "sum"), f32s(&[1, 1], &[sum]));
            let doubled: Vec<f32> = (0..length).map(|value| value as f32 * 2.0).collect();
            assert_eq!(output(response, "doubled"), f32s(&[1, length], &doubled));
        }
    }
    assert_eq!(batches(&registry), [(3, 3)]);
    let metadata = registry.model("m", "").unwrap();
    assert_eq!(metadata.inputs().len(), 1, "what the server makes is no input of clients");
    assert_eq!(metadata.inputs()[0].shape, [None, None], "clients send a batch axis as always");
}

#[tokio::test]
async fn every_kind_of_batch_input_says_what_tritons_says() {
    let mut graph = GraphBuilder::new("kinds");
    graph.input("x", OnnxDType::F32, &[TOTAL]);
    let axis = |name| [Dim::Symbol(name)];
    let mut made = |name| graph.input(name, OnnxDType::I64, &axis(name));
    let [count, sums, starts, longest, flat] = ["count", "sums", "starts", "longest", "flat"].map(&mut made);
    let shape = graph.input("shape", OnnxDType::I64, &[Dim::Symbol("rows"), Dim::Fixed(1)]);
    let [first, last, none] = [0, -1, 0].map(|at| graph.vector_i64(&[at]));
    let starts = graph.node("Slice", &[&starts, &first, &last, &first], vec![]);
    let longest = graph.node("Size", &[&longest], vec![]);
    let nothing = graph.node("Mul", &[&count, &none], vec![]);
    let longest = graph.node("Add", &[&nothing, &longest], vec![]);
    let shape = graph.node("Identity", &[&shape], vec![]);
    for (name, value) in [("c", count), ("s", sums), ("b", starts), ("l", longest), ("f", flat)] {
        let value = graph.node("Identity", &[&value], vec![]);
        graph.output(name, &value, OnnxDType::I64, &[BATCH]);
    }
    graph.output("i", &shape, OnnxDType::I64, &[BATCH, Dim::Fixed(1)]);
    let model = graph.finish(20).unwrap().to_bytes();
    let made = [
        ("ELEMENT_COUNT", "count"),
        ("ACCUMULATED_ELEMENT_COUNT", "sums"),
        ("ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", "starts"),
        ("MAX_ELEMENT_COUNT_AS_SHAPE", "longest"),
        ("ITEM_SHAPE", "shape"),
        ("ITEM_SHAPE_FLATTEN", "flat"),
    ]
    .map(|(kind, name)| format!("batch_input {{ kind: BATCH_{kind} target_name: \"{name}\" source_input: \"x\" }}\n"));
    let config = format!(
        "max_batch_size: 8 input {{ name: \"x\" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }}\n{}\
         dynamic_batching {{ preferred_batch_size: 2 max_queue_delay_microseconds: 20000000 }}",
        made.concat()
    );
    let registry = serve(model, &config).await;
    let answers = ask(&registry, &[3, 2]).await;
    for (name, values) in [("c", [3_i64, 2]), ("s", [3, 5]), ("b", [0, 3]), ("l", [3, 3]), ("f", [3, 2])] {
        for (answer, value) in answers.iter().zip(values) {
            assert_eq!(
                output(answer, name),
                RawTensor::from_vec(DType::Int64, vec![1, 1], vec![value]).unwrap(),
                "{name}"
            );
        }
    }
    assert_eq!(output(&answers[1], "i"), RawTensor::from_vec(DType::Int64, vec![1, 1], vec![2_i64]).unwrap());
    assert_eq!(batches(&registry), [(2, 1)]);
}

#[tokio::test]
async fn short_requests_fill_a_batch_that_long_ones_would_not() {
    let bound = r#"parameters { key: "max_batch_elements" value { string_value: "8" } }
                   dynamic_batching { max_queue_delay_microseconds: 50000 }"#;
    let padded =
        format!(r#"max_batch_size: 8 parameters {{ key: "padding" value {{ string_value: "x=0" }} }} {bound}"#);
    for (model, config) in [(segment_sums(), format!("{SEGMENT_SUMS}\n{bound}")), (scale(2.0, None), padded)] {
        let registry = serve(model, &config).await;
        ask(&registry, &[2, 2, 2, 2, 5, 5]).await;
        assert_eq!(batches(&registry), [(1, 2), (4, 1)]);
    }
}

#[tokio::test]
async fn options_that_contradict_the_file_are_reasons() {
    let ragged =
        |more: &str| format!("max_batch_size: 8 input {{ name: \"x\" dims: -1 allow_ragged_batch: true }} {more}");
    let made = |more: &str| ragged(&format!("batch_input {{ target_name: \"ends\" {more} }}"));
    for (config, reason) in [
        (ragged(""), "its file has input `ends`, which its configuration leaves out"),
        (made(""), "its batch_input has 0 source_inputs, it must have one"),
        (made("source_input: \"z\""), "source_input `z`, which is no input of its configuration"),
        (
            made("source_input: \"x\" data_type: TYPE_FP32"),
            "is TYPE_FP32 in its configuration and TYPE_INT32 in its file",
        ),
        (made("source_input: \"x\" kind: BATCH_ITEM_SHAPE"), "has 1 axes in its file, its kind has 2"),
        (
            SEGMENT_SUMS.replace("dims: -1 allow", "dims: [ -1, 2 ] reshape { shape: -1 } allow"),
            "ragged and has a reshape",
        ),
        (
            SEGMENT_SUMS.replace("max_batch_size: 8", "max_batch_size: 0").replace("dims: 1 }", "dims: [ -1, 1 ] }"),
            "which needs max_batch_size",
        ),
        (
            SEGMENT_SUMS.replace("BATCH_SCATTER_WITH_INPUT_SHAPE source_input: \"x\"", "0 source_input: \"sum\""),
            "its batch_output has source_input `sum`, which is no input of its configuration",
        ),
    ] {
        let bench = Bench::new();
        bench.write("m", "1/model.onnx", segment_sums()).write("m", "config.pbtxt", &config);
        let index = bench.open_all().await.index(false);
        assert!(index[0].reason.contains(reason), "{config}: {index:?}");
    }
}

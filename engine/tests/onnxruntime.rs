//! One graph in onnxruntime: right numbers, and refusals that name what was wrong.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::num::NonZeroUsize;
use std::path::Path;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use prost::Message as _;
use sensorium_engine::{
    DType as WireType, Device, Engine, EngineError, OnnxRuntime, Optimization, Options, RawTensor, Waiters,
};
use sensorium_modality::{Element, Tensor, TensorData};
use sensorium_onnx::{Attribute, DType, Dim, GraphBuilder, Model, proto::StringStringEntryProto};

const BATCH: Dim<'static> = Dim::Symbol("batch");

/// `y = x * [[1, 2], [3, 4], [5, 6]] + [10, 20]`, and `z = x + x`.
fn linear() -> Model {
    let mut graph = GraphBuilder::new("linear");
    let x = graph.input("x", DType::F32, &[BATCH, Dim::Fixed(3)]);
    let weight = graph.initializer_f32("weight", &[3, 2], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let bias = graph.initializer_f32("bias", &[2], [10.0, 20.0]);
    let product = graph.node("MatMul", &[&x, &weight], vec![]);
    let y = graph.node("Add", &[&product, &bias], vec![]);
    let z = graph.node("Add", &[&x, &x], vec![]);
    graph.output("y", &y, DType::F32, &[BATCH, Dim::Fixed(2)]);
    graph.output("z", &z, DType::F32, &[BATCH, Dim::Fixed(3)]);
    graph.finish(20).unwrap()
}

/// Two inputs that share both sizes.
fn pair() -> Model {
    let mut graph = GraphBuilder::new("pair");
    let a = graph.input("a", DType::F32, &[BATCH, Dim::Symbol("length")]);
    let b = graph.input("b", DType::F32, &[BATCH, Dim::Symbol("length")]);
    let sum = graph.node("Add", &[&a, &b], vec![]);
    graph.output("sum", &sum, DType::F32, &[BATCH, Dim::Symbol("length")]);
    graph.finish(20).unwrap()
}

fn open(model: &Model) -> OnnxRuntime {
    OnnxRuntime::open_bytes("test graph", &model.to_bytes(), Options::default()).unwrap()
}

fn f32s(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_vec(shape, values.to_vec()).unwrap()
}

fn run(engine: &mut OnnxRuntime, inputs: &[(&str, Tensor)]) -> Result<Vec<(String, Tensor)>, EngineError> {
    engine.run(inputs.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect(), &[])
}

#[test]
fn known_weights_give_known_numbers() {
    let outputs = run(&mut open(&linear()), &[("x", f32s(&[2, 3], &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]))]).unwrap();
    assert_eq!(outputs[0], ("y".to_owned(), f32s(&[2, 2], &[11.0, 22.0, 19.0, 32.0])));
    assert_eq!(outputs[1], ("z".to_owned(), f32s(&[2, 3], &[2.0, 0.0, 0.0, 2.0, 2.0, 2.0])));
}

#[test]
fn only_the_outputs_asked_for_come_back_in_that_order() {
    let mut engine = open(&linear());
    let inputs = || vec![("x".to_owned(), f32s(&[1, 3], &[1.0; 3]))];
    let names = |wanted: &[&str], engine: &mut OnnxRuntime| {
        let wanted: Vec<String> = wanted.iter().map(|&name| name.to_owned()).collect();
        engine.run(inputs(), &wanted).map(|outputs| outputs.into_iter().map(|(name, _)| name).collect::<Vec<_>>())
    };
    assert_eq!(names(&["z"], &mut engine).unwrap(), ["z"]);
    assert_eq!(names(&["z", "y"], &mut engine).unwrap(), ["z", "y"]);
    let error = names(&["w"], &mut engine).unwrap_err();
    assert!(error.is_callers_fault());
    assert_eq!(error.to_string(), "there is no output `w`, only y, z");
}

#[test]
fn the_signature_is_the_graphs() {
    let engine = open(&linear());
    let signature = engine.signature();
    assert_eq!(signature.inputs().len(), 1);
    assert_eq!((signature.inputs()[0].name.as_str(), &signature.inputs()[0].shape), ("x", &vec![None, Some(3)]));
    assert_eq!(signature.outputs().iter().map(|output| output.name.as_str()).collect::<Vec<_>>(), ["y", "z"]);
}

#[test]
fn wrong_inputs_are_refused_with_what_came_and_what_was_wanted() {
    let mut engine = open(&linear());
    let good = f32s(&[1, 3], &[0.0; 3]);
    for (inputs, message) in [
        (vec![], "input `x` is missing, it must be FP32[batch, 3]"),
        (
            vec![("x", good.clone()), ("w", good.clone())],
            "input `w` is not one of the graph's inputs or comes twice; they are x",
        ),
        (
            vec![("x", good.clone()), ("x", good.clone())],
            "input `x` is not one of the graph's inputs or comes twice; they are x",
        ),
        (vec![("x", f32s(&[1, 4], &[0.0; 4]))], "input `x` is FP32[1, 4], it must be FP32[batch, 3]"),
        (vec![("x", f32s(&[3], &[0.0; 3]))], "input `x` is FP32[3], it must be FP32[batch, 3]"),
        (
            vec![("x", Tensor::from_vec([1, 3], vec![0_i64; 3]).unwrap())],
            "input `x` is INT64[1, 3], it must be FP32[batch, 3]",
        ),
    ] {
        let error = run(&mut engine, &inputs).unwrap_err();
        assert_eq!(error.to_string(), message);
        assert!(error.is_callers_fault());
    }
    run(&mut engine, &[("x", good)]).expect("a refusal leaves the engine as it was");
}

#[test]
fn names_of_sizes_are_hints_and_explain_a_run_that_fails() {
    let mut engine = open(&pair());
    let (two, one) = (f32s(&[2, 1], &[1.0, 2.0]), f32s(&[1, 1], &[10.0]));
    let outputs = run(&mut engine, &[("a", two), ("b", one)]).unwrap();
    assert_eq!(outputs[0].1, f32s(&[2, 1], &[11.0, 12.0]), "as the engine does it, `batch` or not");
    let error = run(&mut engine, &[("a", f32s(&[1, 2], &[0.0; 2])), ("b", f32s(&[1, 3], &[0.0; 3]))]).unwrap_err();
    assert_eq!(error.to_string(), "inputs `a` and `b` share the size `length`, but it is 2 and 3");
    assert!(error.is_callers_fault());
}

#[test]
fn nothing_of_a_size_is_an_input_like_any_other() {
    let outputs = run(&mut open(&linear()), &[("x", f32s(&[0, 3], &[]))]).unwrap();
    assert_eq!(outputs[0].1.shape()[0], 0);
}

/// The memory of a request, or that which batches are put together in, is used again once its answer is sent.
#[test]
fn an_input_that_is_an_output_is_a_copy() {
    let mut graph = GraphBuilder::new("through");
    let x = graph.input("x", DType::F32, &[BATCH, Dim::Fixed(3)]);
    let y = graph.node("Neg", &[&x], vec![]);
    graph.output("x", &x, DType::F32, &[BATCH, Dim::Fixed(3)]);
    graph.output("y", &y, DType::F32, &[BATCH, Dim::Fixed(3)]);
    let mut engine = open(&graph.finish(20).unwrap());
    for odd in [0, 1] {
        let elements: Vec<u8> = [0; 4].into_iter().chain((0..6_u8).flat_map(|n| f32::from(n).to_le_bytes())).collect();
        let shifted: Vec<u8> = vec![0; odd].into_iter().chain(elements).collect();
        let data = Bytes::from(shifted).slice(4 + odd..);
        let memory = data.as_ptr_range();
        let input = RawTensor::new(WireType::Fp32, vec![2, 3], data).unwrap();
        let outputs = engine.run_raw(std::slice::from_ref(&input), &[0, 1]).unwrap();
        assert_eq!(outputs[0], input, "{odd}");
        assert!(!memory.contains(&outputs[0].data().as_ptr()), "{odd}");
    }
}

#[test]
fn inputs_may_come_in_any_order() {
    let (a, b) = (f32s(&[1, 2], &[1.0, 2.0]), f32s(&[1, 2], &[10.0, 20.0]));
    let outputs = run(&mut open(&pair()), &[("b", b), ("a", a)]).unwrap();
    assert_eq!(outputs[0].1, f32s(&[1, 2], &[11.0, 22.0]));
}

#[test]
fn the_smallest_integer_by_minus_one_is_itself_and_the_process_goes_on() {
    fn check<E: Element + From<i8> + Copy>(dtype: DType, smallest: E, threads: usize) {
        let mut graph = GraphBuilder::new("ratio");
        let a = graph.input("a", dtype, &[BATCH]);
        let b = graph.input("b", dtype, &[BATCH]);
        let quotient = graph.node("Div", &[&a, &b], vec![]);
        graph.output("quotient", &quotient, dtype, &[BATCH]);
        let options = Options { threads: threads.try_into().unwrap(), ..Options::default() };
        let model = graph.finish(20).unwrap();
        let mut engine = OnnxRuntime::open_bytes("ratio", &model.to_bytes(), options).unwrap();
        // So many that threads share them.
        let all = |value: i8| vec![E::from(value); 100_000];
        let tensor = |values: Vec<E>| Tensor::from_vec([values.len()], values).unwrap();
        let (mut dividend, mut divisor, mut quotient) = (all(7), all(2), all(3));
        for index in (0..divisor.len()).step_by(100) {
            (dividend[index], divisor[index], quotient[index]) = (smallest, E::from(-1), smallest);
        }
        let found = run(&mut engine, &[("a", tensor(dividend)), ("b", tensor(divisor))]).unwrap();
        assert_eq!(found, [("quotient".to_owned(), tensor(quotient))], "{dtype}");
    }
    for threads in [1, 2] {
        check(DType::I64, i64::MIN, threads);
        check(DType::I32, i32::MIN, threads);
    }
}

#[test]
fn a_failure_while_running_is_not_the_callers() {
    let mut graph = GraphBuilder::new("reshape");
    let x = graph.input("x", DType::F32, &[BATCH, Dim::Fixed(3)]);
    let shape = graph.vector_i64(&[2, 3]);
    let y = graph.node("Reshape", &[&x, &shape], vec![]);
    graph.output("y", &y, DType::F32, &[Dim::Fixed(2), Dim::Fixed(3)]);
    let mut engine = open(&graph.finish(20).unwrap());
    let error = run(&mut engine, &[("x", f32s(&[1, 3], &[0.0; 3]))]).unwrap_err();
    assert!(matches!(error, EngineError::Run { .. }) && !error.is_callers_fault(), "{error:?}");
    run(&mut engine, &[("x", f32s(&[2, 3], &[0.0; 6]))]).expect("the engine works on");
}

#[test]
fn a_long_run_is_cut_short_when_nobody_waits_for_it_any_more() {
    let mut graph = GraphBuilder::new("deep");
    let x = graph.input("x", DType::F32, &[BATCH, Dim::Fixed(512)]);
    let weight = graph.initializer_f32("weight", &[512, 512], vec![0.001; 512 * 512]);
    let y = (0..40).fold(x, |x, _| graph.node("MatMul", &[&x, &weight], vec![]));
    graph.output("y", &y, DType::F32, &[BATCH, Dim::Fixed(512)]);
    let mut engine = open(&graph.finish(20).unwrap());
    let rows = |rows: usize| [RawTensor::from(f32s(&[rows, 512], &vec![1.0; rows * 512]))];
    let started = Instant::now();
    engine.run_raw(&rows(8192), &[0]).unwrap();
    let whole = started.elapsed();
    assert!(whole > Duration::from_millis(200), "too quick to try: {whole:?}");

    // The second look finds nobody.
    let mut looks = 0;
    let poll_gone = &mut |_: &mut Context<'_>| {
        looks += 1;
        if looks < 2 { Poll::Pending } else { Poll::Ready(()) }
    };
    let found = engine.run_for(&rows(8192), &[0], Waiters { deadline: None, poll_gone });
    assert!(matches!(found, Err(EngineError::CutShort)), "{found:?}");
    assert_eq!(looks, 2);
    let deadline = Some(Instant::now());
    let waiters = Waiters { deadline, poll_gone: &mut |_| Poll::Pending };
    let found = engine.run_for(&rows(8192), &[0], waiters);
    assert!(matches!(found, Err(EngineError::CutShort)), "{found:?}");

    // Who waits for long enough gets the answer, of the same engine.
    let deadline = Some(Instant::now() + Duration::from_hours(1));
    let waiters = Waiters { deadline, poll_gone: &mut |_| Poll::Pending };
    assert_eq!(engine.run_for(&rows(1), &[0], waiters).unwrap()[0].shape(), [1, 512]);

    // That was quick, and says nothing of the next.
    let waiters = Waiters { deadline: Some(Instant::now()), poll_gone: &mut |_| Poll::Pending };
    let found = engine.run_for(&rows(8192), &[0], waiters);
    assert!(matches!(found, Err(EngineError::CutShort)), "{found:?}");
}

#[test]
fn a_file_that_is_no_graph_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let whole = linear().to_bytes();
    for (name, bytes) in
        [("garbage.onnx", &b"not a graph"[..]), ("half.onnx", &whole[..whole.len() / 2]), ("empty.onnx", b"")]
    {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = OnnxRuntime::open(&path, Options::default()).unwrap_err();
        assert!(matches!(error, EngineError::Open { .. }) && error.to_string().contains(name), "{error}");
    }
    let error = OnnxRuntime::open(Path::new("/nowhere/fusion.onnx"), Options::default()).unwrap_err();
    assert!(matches!(error, EngineError::Open { .. }) && error.to_string().contains("/nowhere/fusion.onnx"), "{error}");
}

/// A table whose rows are in the file `table.bin` of `folder`, and a graph that looks them up.
fn table_beside(folder: &Path) -> std::path::PathBuf {
    let mut graph = GraphBuilder::new("table");
    let ids = graph.input("ids", DType::I64, &[BATCH]);
    let table = graph.initializer_f32("table", &[1000, 4], (0..4000_i16).map(f32::from).collect::<Vec<_>>());
    let rows = graph.node("Gather", &[&table, &ids], vec![]);
    graph.output("rows", &rows, DType::F32, &[BATCH, Dim::Fixed(4)]);
    let mut model = graph.finish(20).unwrap().into_proto();
    let table = &mut model.graph.as_mut().unwrap().initializer[0];
    std::fs::write(folder.join("table.bin"), std::mem::take(&mut table.raw_data)).unwrap();
    let location = StringStringEntryProto { key: "location".to_owned(), value: "table.bin".to_owned() };
    (table.external_data, table.data_location) = (vec![location.encode_to_vec()], 1);
    let path = folder.join("model.onnx");
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    path
}

#[test]
fn weights_in_a_file_of_their_own_stay_what_they_were_when_it_is_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let mut engine = OnnxRuntime::open(&table_beside(folder.path()), Options::default()).unwrap();
    let last = RawTensor::from_vec(WireType::Int64, vec![1], vec![999_i64]).unwrap();
    let wanted = [3996.0, 3997.0, 3998.0, 3999.0];
    let mut look_up = || engine.run_raw(std::slice::from_ref(&last), &[0]).unwrap()[0].numbers::<f32>().to_vec();
    assert_eq!(look_up(), wanted);
    std::fs::write(folder.path().join("table.bin"), vec![0; 16_000]).unwrap();
    assert_eq!(look_up(), wanted);
    std::fs::write(folder.path().join("table.bin"), b"").unwrap();
    assert_eq!(look_up(), wanted, "a file that is mapped would have ended the process");
}

#[test]
fn a_file_of_weights_that_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = table_beside(folder.path());
    std::fs::rename(folder.path().join("table.bin"), folder.path().join("other.bin")).unwrap();
    let error = OnnxRuntime::open(&path, Options::default()).unwrap_err().to_string();
    assert!(error.contains("table.bin") && error.contains("No such file"), "{error}");
}

#[test]
fn what_is_no_graph_is_told_for_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    for (bytes, what) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"[..], "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"PK\x03\x04....", "model.pt"),
        (b"", "empty"),
        (b"something else", "cut off"),
    ] {
        let path = folder.path().join("model.onnx");
        std::fs::write(&path, bytes).unwrap();
        let error = OnnxRuntime::open(&path, Options::default()).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    }
}

#[test]
fn an_unknown_operator_says_so_at_open() {
    let mut graph = GraphBuilder::new("strange");
    let x = graph.input("x", DType::F32, &[Dim::Fixed(1)]);
    let y = graph.node("Frobnicate", &[&x], vec![]);
    graph.output("y", &y, DType::F32, &[Dim::Fixed(1)]);
    let bytes = graph.finish(20).unwrap().to_bytes();
    let error = OnnxRuntime::open_bytes("strange", &bytes, Options::default()).unwrap_err();
    assert!(error.to_string().contains("Frobnicate"), "{error}");
}

#[test]
fn an_element_type_that_typed_tensors_lack_travels_raw() {
    let mut graph = GraphBuilder::new("half");
    let x = graph.input("x", DType::F16, &[Dim::Fixed(2)]);
    let y = graph.node("Add", &[&x, &x], vec![]);
    graph.output("y", &y, DType::F16, &[Dim::Fixed(2)]);
    let bytes = graph.finish(20).unwrap().to_bytes();
    let mut engine = OnnxRuntime::open_bytes("half", &bytes, Options::default()).unwrap();
    // 1.0 and -2.0; and once more at an odd address.
    let bytes = Bytes::from_static(&[9, 0x00, 0x3c, 0x00, 0xc0]);
    let x = RawTensor::new(WireType::Fp16, vec![2], bytes.slice(1..)).unwrap();
    let y = engine.run_raw(&[x], &[0]).unwrap().remove(0);
    assert_eq!((y.dtype(), y.data().as_ref()), (WireType::Fp16, &[0x00, 0x40, 0x00, 0xc4][..]), "2.0 and -4.0");
}

fn identity(dtype: DType) -> OnnxRuntime {
    let mut graph = GraphBuilder::new("identity");
    let x = graph.input("x", dtype, &[BATCH]);
    graph.output("y", &x, dtype, &[BATCH]);
    open(&graph.finish(20).unwrap())
}

#[test]
fn every_element_type_passes_through_unchanged() {
    fn check<E: Element>(dtype: DType, values: Vec<E>) {
        let tensor = Tensor::from_vec([values.len()], values).unwrap();
        assert_eq!(run(&mut identity(dtype), &[("x", tensor.clone())]).unwrap()[0].1, tensor);
    }
    check(DType::F32, vec![f32::MIN, -0.0, f32::INFINITY]);
    check(DType::F64, vec![f64::MAX, 0.5]);
    check(DType::I64, vec![i64::MIN, -1, i64::MAX]);
    check(DType::I32, vec![i32::MIN, i32::MAX]);
    check(DType::I8, vec![i8::MIN, 0, i8::MAX]);
    check(DType::U8, vec![0_u8, 255]);
    check(DType::Bool, vec![true, false]);
}

#[test]
fn strings_pass_through_and_must_be_utf8() {
    let mut proto = {
        let mut graph = GraphBuilder::new("strings");
        let x = graph.input("x", DType::F32, &[BATCH]);
        graph.output("y", &x, DType::F32, &[BATCH]);
        graph.finish(20).unwrap().into_proto()
    };
    let graph = proto.graph.as_mut().unwrap();
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        const STRING: i32 = 8;
        value.r#type.as_mut().unwrap().tensor_type.as_mut().unwrap().elem_type = STRING;
    }
    let mut engine = open(&Model::try_from(proto).unwrap());
    let texts = Tensor::from_bytes(["what?", "", "é"]);
    assert_eq!(run(&mut engine, &[("x", texts.clone())]).unwrap()[0].1, texts);
    let error = run(&mut engine, &[("x", Tensor::from_bytes([b"ok".to_vec(), vec![0xff]]))]).unwrap_err();
    assert_eq!(error.to_string(), "input `x` has bytes that are not UTF-8, or a zero, in element 1");
}

#[test]
fn more_threads_give_the_same_numbers() {
    let mut graph = GraphBuilder::new("wide");
    let x = graph.input("x", DType::F32, &[BATCH, Dim::Fixed(256)]);
    let values: Vec<f32> = (0..256 * 256).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    let weight = graph.initializer_f32("weight", &[256, 256], values);
    let y = graph.node("MatMul", &[&x, &weight], vec![]);
    let y = graph.node("Softmax", &[&y], vec![Attribute::int("axis", -1)]);
    graph.output("y", &y, DType::F32, &[BATCH, Dim::Fixed(256)]);
    let bytes = graph.finish(20).unwrap().to_bytes();
    let inputs = f32s(&[64, 256], &(0..64 * 256).map(|i| (i % 17) as f32 / 17.0).collect::<Vec<_>>());
    let [one, two] = [1, 2].map(|threads| {
        let options = Options { threads: NonZeroUsize::new(threads).unwrap(), ..Options::default() };
        let mut engine = OnnxRuntime::open_bytes("wide", &bytes, options).unwrap();
        run(&mut engine, &[("x", inputs.clone())]).unwrap()[0].1.clone()
    });
    let difference = one.as_slice::<f32>().unwrap().iter().zip(two.as_slice::<f32>().unwrap());
    assert!(difference.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) <= 1e-6);
}

#[test]
fn every_setting_gives_the_same_numbers() {
    let settings = [
        Options { arena: false, ..Options::default() },
        Options { shrink_arena: true, memory_pattern: false, ..Options::default() },
        Options { inter_threads: NonZeroUsize::new(2), optimization: Optimization::Basic, ..Options::default() },
        Options { optimization: Optimization::Extended, ..Options::default() },
    ];
    for options in settings {
        let mut engine = OnnxRuntime::open_bytes("linear", &linear().to_bytes(), options).unwrap();
        let outputs = run(&mut engine, &[("x", f32s(&[1, 3], &[1.0; 3]))]).unwrap();
        assert_eq!(outputs[0].1, f32s(&[1, 2], &[19.0, 32.0]), "{options:?}");
    }
}

#[test]
fn a_device_that_is_not_there_is_an_error_and_not_a_slow_run() {
    for device in [Device::Cuda(77), Device::TensorRt(77)] {
        let options = Options { device, ..Options::default() };
        let error = OnnxRuntime::open_bytes("linear", &linear().to_bytes(), options).unwrap_err();
        assert!(matches!(error, EngineError::Setup { .. } | EngineError::Open { .. }), "{error:?}");
    }
}

#[test]
fn engines_run_at_the_same_time_on_threads_of_their_own() {
    let bytes = linear().to_bytes();
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let mut engine = OnnxRuntime::open_bytes("linear", &bytes, Options::default()).unwrap();
            scope.spawn(move || {
                for step in 0..200 {
                    let x = (seed * 1000 + step) as f32;
                    let outputs = run(&mut engine, &[("x", f32s(&[1, 3], &[x, 0.0, 0.0]))]).unwrap();
                    assert_eq!(outputs[0].1, f32s(&[1, 2], &[x + 10.0, 2.0 * x + 20.0]));
                }
            });
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_row_of_a_batch_equals_the_row_alone(rows in prop::collection::vec(prop::array::uniform3(-100.0_f32..100.0), 1..9)) {
        let mut engine = open(&linear());
        let batch = f32s(&[rows.len(), 3], rows.as_flattened());
        let together = run(&mut engine, &[("x", batch)]).unwrap();
        for (index, row) in rows.iter().enumerate() {
            let alone = run(&mut engine, &[("x", f32s(&[1, 3], row))]).unwrap();
            for ((_, together), (_, alone)) in together.iter().zip(&alone) {
                let (TensorData::F32(a), TensorData::F32(b)) =
                    (together.rows(index..index + 1).unwrap().into_parts().1, alone.clone().into_parts().1)
                else { panic!("f32 came in") };
                for (a, b) in a.iter().zip(&b) {
                    prop_assert!((a - b).abs() <= 1e-4, "{a} is not {b}");
                }
            }
        }
    }
}

/// What needs a GPU: `make test-gpu`, on a machine that has one, with `SENSORIUM_ONNXRUNTIME` naming a library that can use it.
mod gpu {
    use super::*;

    #[test]
    #[ignore = "needs a GPU"]
    fn a_graph_gives_there_what_it_gives_on_the_processor_with_every_setting() {
        let device = Device::Cuda(0);
        for options in [
            Options { device, ..Options::default() },
            Options { device, arena: false, ..Options::default() },
            Options { device, shrink_arena: true, memory_pattern: false, ..Options::default() },
        ] {
            let mut engine = OnnxRuntime::open_bytes("linear", &linear().to_bytes(), options).unwrap();
            for rows in [1, 3, 32, 3] {
                let outputs = run(&mut engine, &[("x", f32s(&[rows, 3], &vec![1.0; rows * 3]))]).unwrap();
                assert_eq!(outputs[0].1, f32s(&[rows, 2], &[19.0, 32.0].repeat(rows)), "{options:?}");
            }
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn engines_run_there_side_by_side_on_threads_of_their_own() {
        let options = Options { device: Device::Cuda(0), ..Options::default() };
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let mut engine = OnnxRuntime::open_bytes("linear", &linear().to_bytes(), options).unwrap();
                scope.spawn(move || {
                    for step in 0..200 {
                        let x = (seed * 1000 + step) as f32;
                        let outputs = run(&mut engine, &[("x", f32s(&[1, 3], &[x, 0.0, 0.0]))]).unwrap();
                        assert_eq!(outputs[0].1, f32s(&[1, 2], &[x + 10.0, 2.0 * x + 20.0]));
                    }
                });
            }
        });
    }
}

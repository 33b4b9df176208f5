//! Rules of the graph builder, the check and the file format.

#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "a test fails by panicking, and equal means equal")]

use sensorium_onnx::proto::{AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto};
use sensorium_onnx::{Attribute, DType, Dim, GraphBuilder, Model, OnnxError, TensorProto, ValueInfoProto};

const BATCH_BY_TWO: [Dim<'static>; 2] = [Dim::Symbol("batch"), Dim::Fixed(2)];

/// y = (x * 2) + (x * 2)
fn doubled_sum() -> GraphBuilder {
    let mut graph = GraphBuilder::new("sum");
    let x = graph.input("x", DType::F32, &BATCH_BY_TWO);
    let two = graph.scalar_f32(2.0);
    let left = graph.node("Mul", &[&x, &two], vec![]);
    let two = graph.scalar_f32(2.0);
    let right = graph.node("Mul", &[&x, &two], vec![]);
    let y = graph.node("Add", &[&left, &right], vec![]);
    graph.output("y", &y, DType::F32, &BATCH_BY_TWO);
    graph
}

fn node(op_type: &str, input: &[&str], output: &[&str]) -> NodeProto {
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    NodeProto { op_type: op_type.to_owned(), input: names(input), output: names(output), ..NodeProto::default() }
}

fn model(graph: GraphProto) -> ModelProto {
    ModelProto {
        ir_version: 9,
        graph: Some(graph),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 20 }],
        ..ModelProto::default()
    }
}

fn graph(node: Vec<NodeProto>) -> GraphProto {
    GraphProto {
        name: "g".to_owned(),
        node,
        input: vec![ValueInfoProto::tensor("x", DType::F32, &[Dim::Fixed(1)])],
        output: vec![ValueInfoProto::tensor("y", DType::F32, &[Dim::Fixed(1)])],
        ..GraphProto::default()
    }
}

fn rule(graph: GraphProto) -> String {
    match Model::try_from(model(graph)) {
        Err(OnnxError::Invalid { rule, .. }) => rule,
        other => panic!("expected an invalid graph, got {other:?}"),
    }
}

fn unsupported(model: ModelProto) -> String {
    match Model::try_from(model) {
        Err(OnnxError::Unsupported { what, .. }) => what,
        other => panic!("expected an unsupported graph, got {other:?}"),
    }
}

#[test]
fn a_model_survives_its_own_bytes() {
    let model = doubled_sum().finish(20).unwrap();
    let bytes = model.to_bytes();
    let again = Model::from_bytes(&bytes).unwrap();
    assert_eq!(again, model);
    assert_eq!(again.to_bytes(), bytes);
    assert_eq!(again.opset(), 20);
}

#[test]
fn the_encoding_is_the_one_of_the_specification() {
    // ModelProto { ir_version: 9, producer_name: "sensorium", graph { .. }, opset_import { version: 20 } }, by hand.
    let mut builder = GraphBuilder::new("g");
    let x = builder.input("x", DType::F32, &[Dim::Symbol("n"), Dim::Fixed(3)]);
    let y = builder.node("Flatten", &[&x], vec![Attribute::int("axis", 0)]);
    builder.output("y", &y, DType::F32, &[]);
    let flatten = [
        b"\x0a\x01x\x12\x01y\x22\x07Flatten".as_slice(),
        // attribute: name = axis, i = 0 (kept although it is the default), type = INT
        b"\x2a\x0b\x0a\x04axis\x18\x00\xa0\x01\x02",
    ]
    .concat();
    let x_type = b"\x0a\x01x\x12\x0f\x0a\x0d\x08\x01\x12\x09\x0a\x03\x12\x01n\x0a\x02\x08\x03".as_slice();
    let y_type = b"\x0a\x01y\x12\x06\x0a\x04\x08\x01\x12\x00".as_slice();
    let field = |tag: u8, body: &[u8]| [&[tag, body.len() as u8], body].concat();
    let graph = [field(0x0a, &flatten), field(0x12, b"g"), field(0x5a, x_type), field(0x62, y_type)].concat();
    let expected =
        [b"\x08\x09".to_vec(), field(0x12, b"sensorium"), field(0x3a, &graph), field(0x42, b"\x10\x14")].concat();
    assert_eq!(builder.finish(20).unwrap().to_bytes(), expected);
}

#[test]
fn equal_constants_are_stored_once() {
    let model = doubled_sum().finish(20).unwrap();
    assert_eq!(model.graph().initializer.len(), 1);
    let mut builder = GraphBuilder::new("g");
    let whole = builder.vector_i64(&[1]);
    assert_ne!(whole, builder.scalar_i64(1), "a scalar and a vector of one are different constants");
    assert_eq!(whole, builder.vector_i64(&[1]));
}

#[test]
fn fresh_names_keep_away_from_names_in_use() {
    let mut builder = GraphBuilder::new("g");
    let x = builder.input("_0", DType::F32, &[]);
    let y = builder.node("Relu", &[&x], vec![]);
    assert_ne!(y, "_0");
    builder.output("y", &y, DType::F32, &[]);
    builder.finish(20).unwrap();
}

#[test]
fn an_output_renames_its_value_everywhere() {
    let mut builder = GraphBuilder::new("g");
    let x = builder.input("x", DType::F32, &[]);
    let hidden = builder.node("Relu", &[&x], vec![]);
    builder.output("hidden", &hidden, DType::F32, &[]);
    let y = builder.node("Neg", &[&hidden], vec![]);
    builder.output("y", &y, DType::F32, &[]);
    let model = builder.finish(20).unwrap();
    assert_eq!(model.graph().node, [node("Relu", &["x"], &["hidden"]), node("Neg", &["hidden"], &["y"])]);
}

#[test]
fn a_value_may_be_two_outputs_and_an_input_may_be_one() {
    let mut builder = GraphBuilder::new("g");
    let x = builder.input("x", DType::F32, &[]);
    let y = builder.node("Relu", &[&x], vec![]);
    for (name, value) in [("a", &y), ("b", &y), ("c", &x)] {
        builder.output(name, value, DType::F32, &[]);
    }
    let model = builder.finish(20).unwrap();
    let expected = [node("Relu", &["x"], &["a"]), node("Identity", &["a"], &["b"]), node("Identity", &["x"], &["c"])];
    assert_eq!(model.graph().node, expected);
}

#[test]
fn tensors_give_back_what_was_put_in() {
    assert_eq!(TensorProto::from_f32("t", &[2], &[1.5, f32::MIN]).f32s().unwrap(), [1.5, f32::MIN]);
    assert_eq!(TensorProto::from_i64("t", &[2], &[-1, i64::MAX]).i64s().unwrap(), [-1, i64::MAX]);
    assert_eq!(TensorProto::from_i32("t", &[1, 1], &[i32::MIN]).i32s().unwrap(), [i32::MIN]);
    assert_eq!(TensorProto::from_i8("t", &[2], &[-128, 127]).i8s().unwrap(), [-128, 127]);
    assert_eq!(TensorProto::from_u8("t", &[], &[255]).u8s().unwrap(), [255]);
    assert_eq!(TensorProto::from_bool("t", &[2], &[true, false]).raw_data, [1, 0]);
}

#[test]
fn elements_in_typed_fields_are_read_as_well() {
    let typed = TensorProto {
        dims: vec![2],
        data_type: DType::F32.code(),
        float_data: vec![1.0, 2.0],
        ..TensorProto::default()
    };
    assert_eq!(typed.f32s().unwrap(), [1.0, 2.0]);
    let narrow =
        TensorProto { dims: vec![1], data_type: DType::I8.code(), int32_data: vec![-3], ..TensorProto::default() };
    assert_eq!(narrow.i8s().unwrap(), [-3]);
}

#[test]
fn a_tensor_read_as_another_type_is_an_error_that_names_both() {
    let error = TensorProto::from_i8("w", &[1], &[1]).f32s().unwrap_err();
    assert_eq!(error.to_string(), "tensor \"w\" holds i8, asked for f32");
}

#[test]
fn a_tensor_that_does_not_fill_its_shape_is_refused() {
    let mut builder = doubled_sum();
    builder.initializer_f32("short", &[2, 3], [0.0; 5]);
    match builder.finish(20) {
        Err(OnnxError::WrongLength { name, expected: 6, found: 5, .. }) => assert_eq!(name, "short"),
        other => panic!("{other:?}"),
    }
    let ragged = TensorProto { raw_data: vec![0; 7], ..TensorProto::from_f32("ragged", &[1], &[0.0]) };
    let refused =
        Model::try_from(model(GraphProto { initializer: vec![ragged], ..graph(vec![node("Relu", &["x"], &["y"])]) }));
    assert!(matches!(refused, Err(OnnxError::WrongLength { .. })), "{refused:?}");
}

#[test]
fn graphs_that_break_the_format_are_refused_by_rule() {
    let relu = || node("Relu", &["x"], &["y"]);
    assert_eq!(rule(graph(vec![node("Relu", &["z"], &["y"])])), "Relu reads \"z\", which nothing before it makes");
    assert_eq!(
        rule(graph(vec![node("Neg", &["h"], &["y"]), node("Relu", &["x"], &["h"])])),
        "Neg reads \"h\", which nothing before it makes"
    );
    assert_eq!(rule(graph(vec![relu(), relu()])), "\"y\" is defined twice, again by Relu");
    assert_eq!(rule(graph(vec![node("Relu", &["x"], &["z"])])), "output \"y\" is made by no node");
    assert_eq!(rule(GraphProto { output: vec![], ..graph(vec![relu()]) }), "there is no output");
    let shadow = TensorProto::from_f32("w", &[1], &[0.0]);
    assert_eq!(
        rule(GraphProto { initializer: vec![shadow.clone(), shadow], ..graph(vec![relu()]) }),
        "\"w\" is defined twice, again by initializer"
    );
    let negative = TensorProto { dims: vec![-1], ..TensorProto::from_f32("w", &[1], &[0.0]) };
    assert_eq!(
        rule(GraphProto { initializer: vec![negative], ..graph(vec![relu()]) }),
        "tensor \"w\" has the shape [-1]"
    );
}

#[test]
fn what_a_rewrite_would_lose_is_refused_by_name() {
    let relu = || node("Relu", &["x"], &["y"]);
    let with_functions = ModelProto { functions: vec![vec![]], ..model(graph(vec![relu()])) };
    assert_eq!(unsupported(with_functions), "model-local functions");
    let sparse = GraphProto { sparse_initializer: vec![vec![]], ..graph(vec![relu()]) };
    assert_eq!(unsupported(model(sparse)), "sparse initializers");
    let branch =
        AttributeProto { name: "then_branch".to_owned(), r#type: 5, g: Some(vec![]), ..AttributeProto::default() };
    let control = NodeProto { attribute: vec![branch], ..node("If", &["x"], &["y"]) };
    assert_eq!(unsupported(model(graph(vec![control]))), "control flow (If with subgraph \"then_branch\")");
    let elsewhere = TensorProto { data_location: 1, ..TensorProto::from_f32("w", &[0], &[]) };
    let external = GraphProto { initializer: vec![elsewhere], ..graph(vec![relu()]) };
    assert_eq!(unsupported(model(external)), "external data for \"w\"");
}

#[test]
fn bytes_that_are_no_model_are_an_error() {
    assert!(matches!(Model::from_bytes(b"\xff\xff\xff"), Err(OnnxError::Decode(_))));
    assert!(matches!(Model::from_bytes(b""), Err(OnnxError::Invalid { .. })));
}

#[test]
fn extra_outputs_show_values_inside_a_graph() {
    let model = doubled_sum().finish(20).unwrap();
    let inside = model.graph().node[0].output[0].clone();
    let opened = model.with_outputs(&[&inside]).unwrap();
    let names: Vec<&str> = opened.outputs().iter().map(|output| output.name.as_str()).collect();
    assert_eq!(names, ["y", &inside]);
    assert_eq!(opened.outputs()[1].shape(), None);
    assert!(matches!(model.with_outputs(&["nowhere"]), Err(OnnxError::Invalid { .. })));
}

#[test]
fn inputs_leave_out_what_an_initializer_fills() {
    let mut graph = graph(vec![node("Add", &["x", "w"], &["y"])]);
    graph.input.push(ValueInfoProto::tensor("w", DType::F32, &[Dim::Fixed(1)]));
    graph.initializer.push(TensorProto::from_f32("w", &[1], &[1.0]));
    let model = Model::try_from(model(graph)).unwrap();
    let inputs: Vec<_> = model.inputs().map(|input| (input.name.as_str(), input.dtype(), input.shape())).collect();
    assert_eq!(inputs, [("x", Some(DType::F32), Some(vec![Some(1)]))]);
}

#[test]
fn saving_replaces_the_file_whole_and_leaves_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("g.onnx");
    std::fs::write(&path, b"old").unwrap();
    let model = doubled_sum().finish(20).unwrap();
    model.save(&path).unwrap();
    assert_eq!(Model::load(&path).unwrap(), model);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_save_that_fails_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("missing").join("g.onnx");
    match doubled_sum().finish(20).unwrap().save(&path) {
        Err(OnnxError::Write { path: named, .. }) => assert_eq!(named, path),
        other => panic!("{other:?}"),
    }
}

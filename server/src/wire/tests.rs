//! What is accepted, what is refused, and what the refusal says.

use proptest::prelude::*;
use sensorium_artifact::{DType, TensorSpec};
use sensorium_modality::{Tensor, TensorData};
use sensorium_proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
    infer_parameter::ParameterChoice,
    model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
};

use super::{InvalidRequest, decode, encode};
use crate::scheduler::Work;

fn spec(name: &str, dtype: DType, shape: &[Option<u64>]) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

fn input(name: &str, datatype: &str, shape: &[i64]) -> InferInputTensor {
    InferInputTensor {
        name: name.to_owned(),
        datatype: datatype.to_owned(),
        shape: shape.to_vec(),
        ..Default::default()
    }
}

fn raw(inputs: Vec<InferInputTensor>, contents: &[&[u8]]) -> ModelInferRequest {
    let raw_input_contents = contents.iter().map(|bytes| bytes.to_vec().into()).collect();
    ModelInferRequest { inputs, raw_input_contents, ..Default::default() }
}

fn typed(mut tensor: InferInputTensor, contents: InferTensorContents) -> ModelInferRequest {
    tensor.contents = Some(contents);
    ModelInferRequest { inputs: vec![tensor], ..Default::default() }
}

/// Decodes for a model with one input `x` and outputs `y` and `z`.
fn decode_x(request: ModelInferRequest, dtype: DType, shape: &[Option<u64>]) -> Result<Work, InvalidRequest> {
    let outputs = [spec("y", DType::Fp32, &[None]), spec("z", DType::Fp32, &[None])];
    decode(request, &[spec("x", dtype, shape)], &outputs, 100)
}

fn parameter(name: &str, value: ParameterChoice) -> (String, InferParameter) {
    (name.to_owned(), InferParameter { parameter_choice: Some(value) })
}

#[test]
fn inputs_come_in_the_order_of_the_signature_whatever_the_order_of_the_request() {
    let specs = [spec("a", DType::Int64, &[None, Some(1)]), spec("b", DType::Bytes, &[None])];
    let request = raw(
        vec![input("b", "BYTES", &[2]), input("a", "INT64", &[2, 1])],
        &[b"\x02\0\0\0hi\0\0\0\0", &[7, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]],
    );
    let work = decode(request, &specs, &[spec("y", DType::Fp32, &[None])], 2).unwrap();
    assert_eq!(work.rows, 2);
    assert_eq!(work.outputs, ["y"]);
    assert_eq!(work.inputs[0], ("a".to_owned(), Tensor::from_vec([2, 1], vec![7_i64, -1]).unwrap()));
    assert_eq!(work.inputs[1], ("b".to_owned(), Tensor::from_bytes([b"hi".to_vec(), vec![]])));
}

#[test]
fn typed_contents_are_read_from_the_field_of_their_datatype() {
    let cases = [
        (
            DType::Bool,
            "BOOL",
            InferTensorContents { bool_contents: vec![true, false], ..Default::default() },
            TensorData::Bool(vec![true, false]),
        ),
        (
            DType::Int8,
            "INT8",
            InferTensorContents { int_contents: vec![-128, 127], ..Default::default() },
            TensorData::I8(vec![-128, 127]),
        ),
        (
            DType::Int32,
            "INT32",
            InferTensorContents { int_contents: vec![-1, 1], ..Default::default() },
            TensorData::I32(vec![-1, 1]),
        ),
        (
            DType::Int64,
            "INT64",
            InferTensorContents { int64_contents: vec![-1, 1], ..Default::default() },
            TensorData::I64(vec![-1, 1]),
        ),
        (
            DType::Uint8,
            "UINT8",
            InferTensorContents { uint_contents: vec![0, 255], ..Default::default() },
            TensorData::U8(vec![0, 255]),
        ),
        (
            DType::Fp32,
            "FP32",
            InferTensorContents { fp32_contents: vec![0.5, 2.0], ..Default::default() },
            TensorData::F32(vec![0.5, 2.0]),
        ),
        (
            DType::Fp64,
            "FP64",
            InferTensorContents { fp64_contents: vec![0.5, 2.0], ..Default::default() },
            TensorData::F64(vec![0.5, 2.0]),
        ),
        (
            DType::Bytes,
            "BYTES",
            InferTensorContents { bytes_contents: vec!["a".into(), "".into()], ..Default::default() },
            TensorData::Bytes(vec![b"a".to_vec(), vec![]]),
        ),
    ];
    for (dtype, name, contents, expected) in cases {
        let work = decode_x(typed(input("x", name, &[2]), contents), dtype, &[None]).unwrap();
        assert_eq!(work.inputs[0].1.data(), &expected, "{name}");
    }
}

#[test]
fn typed_contents_that_do_not_fit_are_refused() {
    let fp32 = |count: usize| InferTensorContents { fp32_contents: vec![0.0; count], ..Default::default() };
    let x = || input("x", "FP32", &[2]);
    let error = decode_x(typed(x(), fp32(3)), DType::Fp32, &[None]).unwrap_err();
    assert!(matches!(error, InvalidRequest::ElementCount { found: 3, expected: 2, .. }), "{error}");
    let error = decode_x(typed(x(), InferTensorContents::default()), DType::Fp32, &[None]).unwrap_err();
    assert!(matches!(error, InvalidRequest::NoContents { field: "fp32_contents", .. }), "{error}");
    let both = InferTensorContents { int_contents: vec![1], ..fp32(2) };
    let error = decode_x(typed(x(), both), DType::Fp32, &[None]).unwrap_err();
    assert!(
        matches!(error, InvalidRequest::WrongField { found: "int_contents", expected: "fp32_contents", .. }),
        "{error}"
    );
    let wide = InferTensorContents { int_contents: vec![1, 128], ..Default::default() };
    let error = decode_x(typed(input("x", "INT8", &[2]), wide), DType::Int8, &[None]).unwrap_err();
    assert!(matches!(error, InvalidRequest::OutOfRange { element: 1, value: 128, .. }), "{error}");
}

#[test]
fn contents_beside_raw_contents_are_refused_even_when_they_are_empty() {
    let mut x = input("x", "FP32", &[1]);
    x.contents = Some(InferTensorContents::default());
    let error = decode_x(raw(vec![x], &[&[0; 4]]), DType::Fp32, &[None]).unwrap_err();
    assert_eq!(error, InvalidRequest::BothForms { input: "x".to_owned() });
}

#[test]
fn half_precision_is_refused_by_a_model_that_takes_floats() {
    for name in ["FP16", "BF16"] {
        let error = decode_x(raw(vec![input("x", name, &[2])], &[&[0; 4]]), DType::Fp32, &[None]).unwrap_err();
        assert_eq!(error.to_string(), format!("input \"x\" has datatype {name:?}, the model takes FP32"));
    }
}

#[test]
fn shapes_are_held_against_the_model_before_data_is_looked_at() {
    let shape = [None, Some(3)];
    for wrong in [&[1][..], &[1, 3, 1], &[1, 4], &[0, 3], &[-1, 3], &[i64::MIN, 3]] {
        let error = decode_x(raw(vec![input("x", "FP32", wrong)], &[&[]]), DType::Fp32, &shape).unwrap_err();
        let InvalidRequest::Shape { found, expected, .. } = &error else { panic!("{error}") };
        assert_eq!((found.as_slice(), expected.as_str()), (wrong, "[-1, 3]"));
    }
    for overflow in [[i64::MAX, i64::MAX], [1 << 33, 1 << 33], [1 << 61, 1]] {
        let error = decode_x(raw(vec![input("x", "FP32", &overflow)], &[&[]]), DType::Fp32, &[None, None]).unwrap_err();
        assert!(matches!(error, InvalidRequest::ShapeOverflow { .. }), "{error}");
    }
}

#[test]
fn a_shape_that_claims_what_did_not_come_allocates_nothing() {
    // A terabyte of floats, and as many strings: this test would not survive reserving them.
    let error = decode_x(raw(vec![input("x", "FP32", &[1 << 38])], &[&[0; 16]]), DType::Fp32, &[None]).unwrap_err();
    assert!(matches!(error, InvalidRequest::RawLength { found: 16, expected: 1_099_511_627_776, .. }), "{error}");
    let error =
        decode_x(raw(vec![input("x", "BYTES", &[1 << 40])], &[b"\x01\0\0\0a"]), DType::Bytes, &[None]).unwrap_err();
    assert!(
        matches!(error, InvalidRequest::BytesTruncated { element: 1, offset: 5, needed: 4, available: 0, .. }),
        "{error}"
    );
    let error = decode_x(raw(vec![input("x", "BYTES", &[1])], &[b"\0\0\0\x40abc"]), DType::Bytes, &[None]).unwrap_err();
    assert!(matches!(error, InvalidRequest::BytesTruncated { needed: 1_073_741_824, available: 3, .. }), "{error}");
}

#[test]
fn bytes_after_the_last_string_are_refused() {
    let error = decode_x(raw(vec![input("x", "BYTES", &[1])], &[b"\x01\0\0\0abc"]), DType::Bytes, &[None]).unwrap_err();
    assert_eq!(error, InvalidRequest::BytesTrailing { input: "x".to_owned(), extra: 2, elements: 1 });
}

#[test]
fn inputs_have_to_be_the_models_each_once() {
    let x = || input("x", "FP32", &[1]);
    let four: &[u8] = &[0; 4];
    let error = decode_x(raw(vec![input("w", "FP32", &[1])], &[four]), DType::Fp32, &[None]).unwrap_err();
    assert_eq!(error.to_string(), "input \"w\" is not one of the model's: x");
    let error = decode_x(raw(vec![x(), x()], &[four, four]), DType::Fp32, &[None]).unwrap_err();
    assert_eq!(error, InvalidRequest::DuplicateInput { input: "x".to_owned() });
    let error = decode_x(raw(vec![], &[]), DType::Fp32, &[None]).unwrap_err();
    assert_eq!(error.to_string(), "input \"x\" is missing; it is FP32 [-1]");
    let error = decode_x(raw(vec![x()], &[four, four]), DType::Fp32, &[None]).unwrap_err();
    assert_eq!(error, InvalidRequest::RawCount { found: 2, expected: 1 });
}

#[test]
fn inputs_have_to_agree_on_the_batch_and_the_batch_has_to_fit() {
    let specs = [spec("a", DType::Uint8, &[None]), spec("b", DType::Uint8, &[None])];
    let request = |a: i64, b: i64| {
        let bytes = |rows: i64| vec![0; usize::try_from(rows).unwrap()];
        raw(vec![input("a", "UINT8", &[a]), input("b", "UINT8", &[b])], &[&bytes(a), &bytes(b)])
    };
    let error = decode(request(2, 3), &specs, &[], 10).unwrap_err();
    assert!(matches!(error, InvalidRequest::UnequalRows { rows: 3, other_rows: 2, .. }), "{error}");
    assert_eq!(
        decode(request(11, 11), &specs, &[], 10).unwrap_err(),
        InvalidRequest::TooManyRows { rows: 11, max: 10 }
    );
}

#[test]
fn outputs_are_returned_in_the_order_asked_for() {
    let request = |names: &[&str]| {
        let outputs =
            names.iter().map(|name| InferRequestedOutputTensor { name: (*name).to_owned(), ..Default::default() });
        ModelInferRequest { outputs: outputs.collect(), ..raw(vec![input("x", "UINT8", &[1])], &[&[1]]) }
    };
    let decode = |names: &[&str]| decode_x(request(names), DType::Uint8, &[None]);
    assert_eq!(decode(&[]).unwrap().outputs, ["y", "z"]);
    assert_eq!(decode(&["z", "y"]).unwrap().outputs, ["z", "y"]);
    assert!(matches!(decode(&["w"]).unwrap_err(), InvalidRequest::UnknownOutput { .. }));
    assert!(matches!(decode(&["y", "y"]).unwrap_err(), InvalidRequest::DuplicateOutput { .. }));
}

#[test]
fn parameters_that_would_change_the_answer_are_refused_and_the_others_ignored() {
    let with = |parameter| ModelInferRequest {
        parameters: [parameter].into(),
        ..raw(vec![input("x", "UINT8", &[1])], &[&[1]])
    };
    let decode = |parameter| decode_x(with(parameter), DType::Uint8, &[None]);
    for accepted in [
        parameter("triton_enable_empty_final_response", ParameterChoice::BoolParam(true)),
        parameter("sequence_id", ParameterChoice::Int64Param(0)),
        parameter("priority", ParameterChoice::Uint64Param(3)),
        parameter("my_own", ParameterChoice::StringParam("x".to_owned())),
    ] {
        decode(accepted).unwrap();
    }
    for refused in [
        parameter("triton_enable_empty_final_response", ParameterChoice::Int64Param(1)),
        parameter("triton_other", ParameterChoice::BoolParam(true)),
        parameter("sequence_id", ParameterChoice::StringParam("a".to_owned())),
    ] {
        assert!(matches!(decode(refused).unwrap_err(), InvalidRequest::Parameter { .. }));
    }
    let mut request = with(parameter("priority", ParameterChoice::Uint64Param(1)));
    request.inputs[0].parameters =
        [parameter("shared_memory_region", ParameterChoice::StringParam("r".to_owned()))].into();
    let error = decode_x(request, DType::Uint8, &[None]).unwrap_err();
    assert!(error.to_string().starts_with("input \"x\" has parameter \"shared_memory_region\""), "{error}");
}

#[test]
fn a_megabyte_of_name_does_not_come_back_in_the_message() {
    let name = "é".repeat(1 << 19);
    let error = decode_x(raw(vec![input(&name, "FP32", &[1])], &[&[0; 4]]), DType::Fp32, &[None]).unwrap_err();
    assert!(error.to_string().len() < 300);
    let error = decode_x(raw(vec![input("x", &name, &[1])], &[&[0; 4]]), DType::Fp32, &[None]).unwrap_err();
    assert!(error.to_string().len() < 300);
    let error = decode_x(raw(vec![input("x", "FP32", &[1; 1 << 16])], &[&[0; 4]]), DType::Fp32, &[None]).unwrap_err();
    assert!(error.to_string().len() < 300);
}

/// The response as a request, as a client that feeds one model's outputs to another sends it.
fn as_request(response: ModelInferResponse) -> ModelInferRequest {
    let inputs = response.outputs.into_iter().map(|output| InferInputTensor {
        name: output.name,
        datatype: output.datatype,
        shape: output.shape,
        ..Default::default()
    });
    ModelInferRequest {
        inputs: inputs.collect(),
        raw_input_contents: response.raw_output_contents,
        ..Default::default()
    }
}

fn any_data(elements: usize) -> impl Strategy<Value = (DType, TensorData)> {
    use prop::collection::vec;
    prop_oneof![
        vec(any::<i32>().prop_map(|value| value as f32), elements)
            .prop_map(|data| (DType::Fp32, TensorData::F32(data))),
        vec(any::<i32>().prop_map(f64::from), elements).prop_map(|data| (DType::Fp64, TensorData::F64(data))),
        vec(any::<i64>(), elements).prop_map(|data| (DType::Int64, TensorData::I64(data))),
        vec(any::<i32>(), elements).prop_map(|data| (DType::Int32, TensorData::I32(data))),
        vec(any::<i8>(), elements).prop_map(|data| (DType::Int8, TensorData::I8(data))),
        vec(any::<u8>(), elements).prop_map(|data| (DType::Uint8, TensorData::U8(data))),
        vec(any::<bool>(), elements).prop_map(|data| (DType::Bool, TensorData::Bool(data))),
        vec(vec(any::<u8>(), 0..5), elements).prop_map(|data| (DType::Bytes, TensorData::Bytes(data))),
    ]
}

proptest! {
    #[test]
    fn what_is_encoded_decodes_to_the_same_tensor(
        (shape, (dtype, data)) in prop::collection::vec(1_usize..4, 1..4)
            .prop_flat_map(|shape| { let elements = shape.iter().product(); (Just(shape), any_data(elements)) })
    ) {
        let tensor = Tensor::new(shape.clone(), data).unwrap();
        let request = as_request(encode("m".to_owned(), "1".to_owned(), String::new(), vec![("x".to_owned(), tensor.clone())]));
        let work = decode_x(request, dtype, &vec![None; shape.len()]).unwrap();
        prop_assert_eq!(&work.inputs[0].1, &tensor);
    }

    #[test]
    fn no_bytes_make_the_string_reader_panic_or_accept_what_it_cannot_write_back(raw_bytes in prop::collection::vec(0_u8..4, 0..40), elements in 1_i64..6) {
        let request = raw(vec![input("x", "BYTES", &[elements])], &[&raw_bytes]);
        if let Ok(work) = decode_x(request, DType::Bytes, &[None]) {
            let response = encode(String::new(), String::new(), String::new(), work.inputs);
            prop_assert_eq!(&response.raw_output_contents[0][..], &raw_bytes[..]);
        }
    }
}

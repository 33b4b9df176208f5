//! What is accepted, what is refused, and what the refusal says.

use std::time::Duration;

use proptest::prelude::*;
use sensorium_artifact::DType;
use sensorium_engine::{RawTensor, RawTensorError};
use sensorium_proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest,
    infer_parameter::ParameterChoice,
    model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
};

use super::{Decoded, Form, InvalidRequest};
use crate::{
    budget::Budget,
    metrics::Metrics,
    model::{Parameter, Sequence, SequenceId},
    shared_memory::{Region, Registration, SharedMemory},
};

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
    tensor.contents = Some(contents.into());
    ModelInferRequest { inputs: vec![tensor], ..Default::default() }
}

fn budget() -> Budget {
    Budget::new(1 << 20, Metrics::new().budget())
}

fn decode(request: ModelInferRequest) -> Result<Decoded, InvalidRequest> {
    super::decode(request, &SharedMemory::new(true, budget()))
}

/// The one input of a request.
fn tensor(request: ModelInferRequest) -> Result<RawTensor, InvalidRequest> {
    decode(request).map(|mut decoded| decoded.request.inputs.remove(0).tensor)
}

fn parameter(name: &str, value: ParameterChoice) -> (String, InferParameter) {
    (name.to_owned(), InferParameter { parameter_choice: Some(value) })
}

fn text(text: &str) -> ParameterChoice {
    ParameterChoice::StringParam(text.to_owned())
}

#[test]
fn raw_contents_are_the_messages_own_bytes() {
    let request =
        raw(vec![input("b", "BYTES", &[2]), input("a", "FP16", &[2, 1])], &[b"\x02\0\0\0hi\0\0\0\0", &[7, 0, 0, 60]]);
    let sent = request.raw_input_contents.clone();
    let inputs = decode(request).unwrap().request.inputs;
    assert_eq!([inputs[0].name.as_str(), inputs[1].name.as_str()], ["b", "a"]);
    assert_eq!((inputs[1].tensor.dtype(), inputs[1].tensor.shape()), (DType::Fp16, &[2, 1][..]));
    assert_eq!(inputs[0].tensor.strings().collect::<Vec<_>>(), [&b"hi"[..], b""]);
    for (sent, input) in sent.iter().zip(&inputs) {
        assert_eq!(sent.as_ptr(), input.tensor.data().as_ptr());
    }
}

#[test]
fn typed_contents_are_read_from_the_field_of_their_datatype() {
    let contents = InferTensorContents::default;
    let cases = [
        ("BOOL", InferTensorContents { bool_contents: vec![true, false], ..contents() }, vec![1, 0]),
        ("INT8", InferTensorContents { int_contents: vec![-128, 127], ..contents() }, vec![128, 127]),
        ("INT16", InferTensorContents { int_contents: vec![-2, 258], ..contents() }, vec![254, 255, 2, 1]),
        (
            "INT32",
            InferTensorContents { int_contents: vec![-1, 1], ..contents() },
            [-1_i32, 1].map(i32::to_le_bytes).concat(),
        ),
        (
            "INT64",
            InferTensorContents { int64_contents: vec![-1, 1], ..contents() },
            [-1_i64, 1].map(i64::to_le_bytes).concat(),
        ),
        ("UINT8", InferTensorContents { uint_contents: vec![0, 255], ..contents() }, vec![0, 255]),
        ("UINT16", InferTensorContents { uint_contents: vec![0, 65535], ..contents() }, vec![0, 0, 255, 255]),
        (
            "UINT32",
            InferTensorContents { uint_contents: vec![0, 7], ..contents() },
            [0_u32, 7].map(u32::to_le_bytes).concat(),
        ),
        (
            "UINT64",
            InferTensorContents { uint64_contents: vec![0, 7], ..contents() },
            [0_u64, 7].map(u64::to_le_bytes).concat(),
        ),
        (
            "FP32",
            InferTensorContents { fp32_contents: vec![0.5, 2.0], ..contents() },
            [0.5_f32, 2.0].map(f32::to_le_bytes).concat(),
        ),
        (
            "FP64",
            InferTensorContents { fp64_contents: vec![0.5, 2.0], ..contents() },
            [0.5_f64, 2.0].map(f64::to_le_bytes).concat(),
        ),
        (
            "BYTES",
            InferTensorContents { bytes_contents: vec!["a".into(), "".into()], ..contents() },
            b"\x01\0\0\0a\0\0\0\0".to_vec(),
        ),
    ];
    for (name, contents, expected) in cases {
        assert_eq!(tensor(typed(input("x", name, &[2]), contents)).unwrap().data()[..], expected, "{name}");
    }
}

#[test]
fn typed_contents_that_do_not_fit_are_refused() {
    let fp32 = |count: usize| InferTensorContents { fp32_contents: vec![0.0; count], ..Default::default() };
    let x = || input("x", "FP32", &[2]);
    let error = tensor(typed(x(), fp32(3))).unwrap_err();
    assert!(matches!(error, InvalidRequest::ElementCount { found: 3, expected: 2, .. }), "{error}");
    let error = tensor(typed(x(), InferTensorContents::default())).unwrap_err();
    assert!(matches!(error, InvalidRequest::NoContents { field: "fp32_contents", .. }), "{error}");
    let error = tensor(typed(input("x", "BF16", &[1]), fp32(1))).unwrap_err();
    assert!(matches!(error, InvalidRequest::WrongField { expected: "raw_input_contents", .. }), "{error}");
    let both = InferTensorContents { int_contents: vec![1], ..fp32(2) };
    let error = tensor(typed(x(), both)).unwrap_err();
    assert!(
        matches!(error, InvalidRequest::WrongField { found: "int_contents", expected: "fp32_contents", .. }),
        "{error}"
    );
    let wide = InferTensorContents { int_contents: vec![1, 128], ..Default::default() };
    let error = tensor(typed(input("x", "INT8", &[2]), wide)).unwrap_err();
    assert!(matches!(error, InvalidRequest::OutOfRange { element: 1, value: 128, .. }), "{error}");
    let error = decode(ModelInferRequest { inputs: vec![x()], ..Default::default() }).unwrap_err();
    assert!(matches!(error, InvalidRequest::NoContents { .. }), "{error}");
}

#[test]
fn contents_beside_raw_contents_are_refused_even_when_they_are_empty() {
    let mut x = input("x", "FP32", &[1]);
    x.contents = Some(Box::default());
    assert_eq!(tensor(raw(vec![x], &[&[0; 4]])).unwrap_err(), InvalidRequest::BothForms { input: "x".to_owned() });
}

#[test]
fn raw_contents_pair_up_with_the_inputs_that_are_not_in_shared_memory() {
    let error = decode(raw(vec![input("x", "INT8", &[1])], &[&[1], &[2]])).unwrap_err();
    assert_eq!(error, InvalidRequest::RawCount { found: 2, expected: 1 });
    let mut shared = input("s", "INT8", &[1]);
    shared.parameters = [
        parameter("shared_memory_region", text("r")),
        parameter("shared_memory_byte_size", ParameterChoice::Int64Param(1)),
    ]
    .into();
    let error = decode(raw(vec![shared.clone(), input("x", "INT8", &[1])], &[&[1]])).unwrap_err();
    assert!(error.to_string().contains("no shared memory region \"r\""), "{error}");
    shared.parameters.remove("shared_memory_byte_size");
    let error = decode(raw(vec![shared], &[])).unwrap_err();
    assert!(error.to_string().contains("shared_memory_byte_size"), "{error}");
}

#[test]
fn a_shape_that_claims_what_did_not_come_allocates_nothing() {
    // A terabyte of floats, and as many strings: this test would not survive reserving them.
    let source = |request| match tensor(request).unwrap_err() {
        InvalidRequest::Tensor { source, .. } => source,
        error => panic!("{error}"),
    };
    let found = source(raw(vec![input("x", "FP32", &[1 << 38])], &[&[0; 16]]));
    assert!(matches!(found, RawTensorError::Length { found: 16, expected: 1_099_511_627_776, .. }), "{found}");
    let found = source(raw(vec![input("x", "BYTES", &[1 << 40])], &[b"\x01\0\0\0a"]));
    assert!(matches!(found, RawTensorError::Truncated { element: 1, .. }), "{found}");
    let found = source(raw(vec![input("x", "BYTES", &[1])], &[b"\x01\0\0\0abc"]));
    assert!(matches!(found, RawTensorError::Trailing { extra: 2, .. }), "{found}");
    for overflow in [[i64::MAX, i64::MAX], [1 << 33, 1 << 33]] {
        let found = source(raw(vec![input("x", "FP32", &overflow)], &[&[0; 4]]));
        assert!(matches!(found, RawTensorError::Shape { .. }), "{overflow:?}: {found}");
    }
}

#[test]
fn a_request_leaves_no_size_and_no_datatype_open() {
    let said = |request| tensor(request).unwrap_err().to_string();
    let found = said(raw(vec![input("x", "FP32", &[-1, 4])], &[&[0; 16]]));
    assert_eq!(found, "input \"x\" has shape [-1, 4]; in a request every size is written, and at least 0");
    assert_eq!(said(raw(vec![input("x", "", &[1])], &[&[0; 4]])), "input \"x\" has no datatype");
    let found = said(raw(vec![input("x", "FLOAT32", &[1])], &[&[0; 4]]));
    assert!(found.ends_with("which the protocol does not have; it has FP32, INT64, BYTES, ..."), "{found}");
}

#[test]
fn parameters_of_the_protocol_are_taken_and_the_others_are_the_models() {
    let parameters = [
        parameter("sequence_id", ParameterChoice::Int64Param(7)),
        parameter("sequence_start", ParameterChoice::BoolParam(true)),
        parameter("priority", ParameterChoice::Uint64Param(3)),
        parameter("timeout", ParameterChoice::Int64Param(1500)),
        parameter("triton_enable_empty_final_response", ParameterChoice::BoolParam(true)),
        parameter("mine", ParameterChoice::DoubleParam(0.5)),
    ];
    let message = ModelInferRequest { id: "i".to_owned(), parameters: parameters.into(), ..Default::default() };
    let Decoded { request, .. } = decode(message).unwrap();
    assert_eq!(request.sequence, Some(Sequence { id: SequenceId::Number(7), start: true, end: false }));
    assert_eq!((request.priority, request.timeout), (3, Some(Duration::from_micros(1500))));
    assert_eq!(request.parameters, [("mine".to_owned(), Parameter::Double(0.5))].into());

    let sequence = |id| {
        let message = ModelInferRequest { parameters: [parameter("sequence_id", id)].into(), ..Default::default() };
        decode(message).unwrap().request.sequence.map(|sequence| sequence.id)
    };
    assert_eq!(sequence(text("s")), Some(SequenceId::Text("s".to_owned())));
    assert_eq!(
        sequence(ParameterChoice::Int64Param(-2)),
        Some(SequenceId::Number(u64::MAX - 1)),
        "as Triton's client sends it"
    );
    assert_eq!((sequence(text("")), sequence(ParameterChoice::Int64Param(0))), (None, None), "part of no sequence");
}

#[test]
fn parameters_that_mean_nothing_are_refused() {
    for (name, value) in [
        ("triton_enable_empty_final_response", ParameterChoice::Int64Param(1)),
        ("triton_other", ParameterChoice::BoolParam(true)),
        ("sequence_id", ParameterChoice::BoolParam(true)),
        ("sequence_end", ParameterChoice::Int64Param(1)),
        ("priority", ParameterChoice::Int64Param(-1)),
        ("timeout", text("1")),
    ] {
        let message = ModelInferRequest { parameters: [parameter(name, value)].into(), ..Default::default() };
        let error = decode(message).unwrap_err();
        assert!(matches!(&error, InvalidRequest::Parameter { name: found, .. } if found == name), "{error}");
    }
}

#[test]
fn outputs_can_be_asked_for_in_other_forms() {
    let output = |name: &str, parameters: Vec<(String, InferParameter)>| InferRequestedOutputTensor {
        name: name.to_owned(),
        parameters: parameters.into_iter().collect(),
    };
    let region = vec![
        parameter("shared_memory_region", text("r")),
        parameter("shared_memory_byte_size", ParameterChoice::Int64Param(8)),
        parameter("shared_memory_offset", ParameterChoice::Int64Param(4)),
    ];
    let classes = |count| parameter("classification", ParameterChoice::Int64Param(count));
    let message = ModelInferRequest {
        outputs: vec![output("z", vec![classes(2)]), output("y", region.clone()), output("x", vec![classes(0)])],
        ..Default::default()
    };
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("object"), [0; 12]).unwrap();
    let memory = SharedMemory::in_folder(folder.path(), budget());
    let register = |byte_size| {
        let (name, key) = ("r".to_owned(), "object".to_owned());
        memory.unregister(None);
        memory.register(Registration { name, key, offset: 0, byte_size }).unwrap();
    };
    // Before the model runs: one that keeps state would have it, and its client an error.
    let error = super::decode(message.clone(), &memory).unwrap_err();
    assert!(error.to_string().contains("no shared memory region \"r\""), "{error}");
    register(11);
    let error = super::decode(message.clone(), &memory).unwrap_err();
    assert!(error.to_string().contains("bytes 4 to 4 + 8 are not inside region \"r\", which has 11 bytes"), "{error}");
    register(12);
    let Decoded { request, reply } = super::decode(message, &memory).unwrap();
    assert_eq!(request.outputs, ["z", "y", "x"]);
    let [(z, Form::Classes(2)), (y, Form::Shared(held))] = &reply.outputs[..] else { panic!("{reply:?}") };
    assert_eq!((z.as_str(), y.as_str()), ("z", "y"));
    assert_eq!(*held.region(), Region { name: "r".to_owned(), offset: 4, byte_size: 8 });

    let both =
        ModelInferRequest { outputs: vec![output("z", [region, vec![classes(1)]].concat())], ..Default::default() };
    assert!(matches!(decode(both), Err(InvalidRequest::Parameter { .. })));
}

#[test]
fn a_megabyte_of_name_does_not_come_back_in_the_message() {
    let name = "é".repeat(1 << 19);
    for request in [
        raw(vec![input(&name, "FP32", &[1])], &[&[0; 3]]),
        raw(vec![input("x", &name, &[1])], &[&[0; 4]]),
        raw(vec![input("x", "FP32", &[1; 1 << 16])], &[&[0; 4]]),
    ] {
        assert!(tensor(request).unwrap_err().to_string().len() < 500);
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_string_reader_panic_or_change_what_it_accepts(bytes in prop::collection::vec(0_u8..4, 0..40), elements in 1_i64..6) {
        if let Ok(tensor) = tensor(raw(vec![input("x", "BYTES", &[elements])], &[&bytes])) {
            let strings: Vec<_> = tensor.strings().collect();
            let again = RawTensor::from_strings(vec![elements], &strings).unwrap();
            prop_assert_eq!(&again.data()[..], &bytes[..]);
        }
    }
}

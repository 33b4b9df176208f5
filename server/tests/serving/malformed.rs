//! A thousand requests that are wrong, each in its own way: the right status, words that help, and no memory.

use std::io::Write as _;

use bytes::Bytes;
use flate2::{Compression, Crc, write::GzEncoder};
use prost::Message as _;
use sensorium_engine::fixture::{self, QUESTION};
use sensorium_proto::{
    inference::{
        InferParameter, InferTensorContents, ModelInferRequest,
        infer_parameter::ParameterChoice,
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    },
    multimodal::{InferRequest, Part},
};
use tonic::Code;

use crate::harness::{
    INFER, MULTIMODAL, Server, bytes_tensor, floats, frame, image_part, input, parts_request, post, raw_request,
    refusal, tensor_question, text_part,
};

const REQUESTS: usize = 1000;
const MAX_REQUEST_BYTES: usize = 1 << 20;
const GIGABYTE: i64 = 1 << 30;

/// One way to be wrong.
struct Case {
    name: &'static str,
    code: Code,
    /// What the message must say.
    words: &'static str,
    path: &'static str,
    encoding: Option<&'static str>,
    /// The body; the number varies it.
    body: Box<dyn Fn(usize) -> Bytes>,
}

fn case(
    name: &'static str,
    code: Code,
    words: &'static str,
    path: &'static str,
    body: impl Fn(usize) -> Bytes + 'static,
) -> Case {
    Case { name, code, words, path, encoding: None, body: Box::new(body) }
}

/// An inference that is an INVALID_ARGUMENT.
fn invalid(name: &'static str, words: &'static str, request: impl Fn(usize) -> ModelInferRequest + 'static) -> Case {
    case(name, Code::InvalidArgument, words, INFER, move |n| frame(&request(n).encode_to_vec()))
}

/// A multimodal request that is an INVALID_ARGUMENT.
fn invalid_parts(name: &'static str, words: &'static str, request: impl Fn(usize) -> InferRequest + 'static) -> Case {
    case(name, Code::InvalidArgument, words, MULTIMODAL, move |n| frame(&request(n).encode_to_vec()))
}

/// A good request to the image encoder, for others to spoil.
fn pixels() -> ModelInferRequest {
    raw_request("tiny.image_encoder", vec![(input("pixel_values", "FP32", &[1, 3, 8, 8]), floats(&[0.5; 192]))])
}

/// The same with another tensor.
fn tensor(datatype: &str, shape: &[i64], contents: &[u8]) -> ModelInferRequest {
    raw_request("tiny.image_encoder", vec![(input("pixel_values", datatype, shape), contents.to_vec())])
}

fn ids(shape: &[i64], contents: &[u8]) -> ModelInferRequest {
    raw_request("tiny.text_encoder", vec![(input("input_ids", "INT64", shape), contents.to_vec())])
}

/// The request, spoiled.
fn spoiled(mut request: ModelInferRequest, spoil: impl FnOnce(&mut ModelInferRequest)) -> ModelInferRequest {
    spoil(&mut request);
    request
}

/// A column of images for the whole model, as raw contents of any kind.
fn images(shape: &[i64], contents: &[u8]) -> ModelInferRequest {
    let text = (input("text", "BYTES", &[1]), bytes_tensor(&[QUESTION.as_bytes()]));
    raw_request("tiny", vec![(input("image", "BYTES", shape), contents.to_vec()), text])
}

fn parameter(name: &str, value: ParameterChoice) -> std::collections::HashMap<String, InferParameter> {
    [(name.to_owned(), InferParameter { parameter_choice: Some(value) })].into()
}

fn wrong_tensors() -> Vec<Case> {
    vec![
        invalid("truncated tensor", "which has 768", |n| tensor("FP32", &[1, 3, 8, 8], &vec![0; 767 - n % 700])),
        invalid("tensor with more data", "which has 768", |n| tensor("FP32", &[1, 3, 8, 8], &vec![0; 769 + n % 700])),
        invalid("no data", "which has 768", |_| tensor("FP32", &[1, 3, 8, 8], &[])),
        invalid("another rank", "[-1, 3, 8, 8]", |n| tensor("FP32", &vec![1; [1, 2, 3, 5, 9][n % 5]], &[0; 4])),
        invalid("a thousand dimensions", "32 at most", |n| tensor("FP32", &vec![1; 1000 + n], &[0; 4])),
        invalid("another size", "[-1, 3, 8, 8]", |n| tensor("FP32", &[1, 3, 9 + n as i64, 8], &vec![0; (9 + n) * 96])),
        invalid("negative size", "at least 0", |n| tensor("FP32", &[-1 - n as i64, 3, 8, 8], &[0; 4])),
        invalid("no rows", "[-1, 3, 8, 8]", |_| tensor("FP32", &[0, 3, 8, 8], &[])),
        invalid("overflowing shape", "no tensor in memory", |n| ids(&[i64::MAX - n as i64, i64::MAX], &[0; 8])),
        invalid("overflowing bytes", "no tensor in memory", |_| ids(&[1 << 61, 1], &[0; 8])),
        invalid("shape of a gigabyte", "8 bytes came", |n| ids(&[1, GIGABYTE + n as i64], &[0; 8])),
        invalid("too many rows", "at most 32", |_| ids(&[33, 1], &[0; 33 * 8])),
        invalid("another datatype", "takes FP32", |n| {
            let (datatype, size) = [("FP16", 2), ("BF16", 2), ("FP64", 8), ("INT32", 4), ("UINT16", 2)][n % 5];
            tensor(datatype, &[1, 3, 8, 8], &vec![0; 192 * size])
        }),
        invalid("a datatype that is none", "which the protocol does not have", |n| {
            tensor(["float32", "\u{0}", "TYPE_FP32"][n % 3], &[1, 3, 8, 8], &[0; 384])
        }),
        invalid("no datatype", "has no datatype", |_| tensor("", &[1, 3, 8, 8], &[0; 768])),
        invalid("a megabyte of datatype", "which the protocol does not have", |n| {
            tensor(&"x".repeat((1 << 19) + n), &[1, 3, 8, 8], &[0; 4])
        }),
        invalid("unknown input", "not one of the model's: pixel_values", |n| {
            spoiled(pixels(), |request| request.inputs[0].name = format!("input{n}"))
        }),
        invalid("missing input", "is missing; it is FP32 [-1, 3, 8, 8]", |_| raw_request("tiny.image_encoder", vec![])),
        invalid("input twice", "given twice", |_| {
            spoiled(pixels(), |request| {
                request.inputs.push(request.inputs[0].clone());
                request.raw_input_contents.push(request.raw_input_contents[0].clone());
            })
        }),
        invalid("thousands of inputs", "not one of the model's", |n| {
            let inputs = vec![(input("", "INT8", &[0]), vec![]); 1000 + n];
            raw_request("tiny.image_encoder", inputs)
        }),
        invalid("both forms of contents", "use one of the two", |n| {
            spoiled(pixels(), |request| {
                let fp32_contents = vec![0.5; n % 2 * 192];
                request.inputs[0].contents = Some(InferTensorContents { fp32_contents, ..Default::default() }.into());
            })
        }),
        invalid("raw contents without an input", "one per input", |n| {
            spoiled(pixels(), |request| request.raw_input_contents.resize(2 + n % 9, Bytes::new()))
        }),
        invalid("typed contents too short", "needs 192", |n| {
            typed(InferTensorContents { fp32_contents: vec![0.0; 1 + n % 191], ..Default::default() })
        }),
        invalid("typed contents of another type", "belongs into contents.fp32_contents", |_| {
            typed(InferTensorContents { int64_contents: vec![0; 192], ..Default::default() })
        }),
        invalid("no contents at all", "has no data", |_| typed(InferTensorContents::default())),
        invalid("unknown output", "logits", |n| with_output("tiny.fusion", &format!("output{n}"))),
        invalid("inputs that disagree on a shared size", "length", |n| fusion(2, 3 + n as i64 % 5)),
        invalid("inputs that disagree on the batch", "same number", |_| {
            spoiled(fusion(2, 2), |request| {
                request.inputs[2].shape[0] = 2;
                request.raw_input_contents[2] = floats(&[0.0; 8]).into();
            })
        }),
        invalid("shared memory without a size", "shared_memory_byte_size", |_| {
            spoiled(pixels(), |request| {
                request.inputs[0].parameters =
                    parameter("shared_memory_region", ParameterChoice::StringParam("r".to_owned()));
                request.raw_input_contents.clear();
            })
        }),
        invalid("shared memory and raw contents", "for 0 inputs", |_| {
            spoiled(pixels(), |request| {
                request.inputs[0].parameters =
                    parameter("shared_memory_region", ParameterChoice::StringParam("r".to_owned()));
            })
        }),
        invalid("a sequence that is none", "sequence_id", |n| {
            spoiled(pixels(), |request| {
                request.parameters = parameter("sequence_id", ParameterChoice::DoubleParam(0.5 + n as f64));
            })
        }),
        invalid("a reserved parameter", "triton_secret", |_| {
            spoiled(pixels(), |request| {
                request.parameters = parameter("triton_secret", ParameterChoice::BoolParam(true));
            })
        }),
    ]
}

fn typed(contents: InferTensorContents) -> ModelInferRequest {
    spoiled(pixels(), |request| {
        request.raw_input_contents.clear();
        request.inputs[0].contents = Some(contents.into());
    })
}

fn with_output(model: &str, output: &str) -> ModelInferRequest {
    spoiled(fusion(1, 1), |request| {
        model.clone_into(&mut request.model_name);
        request.outputs = vec![InferRequestedOutputTensor { name: output.to_owned(), ..Default::default() }];
    })
}

/// A request to the fusion graph: features of one length, a mask of another.
fn fusion(length: i64, mask: i64) -> ModelInferRequest {
    let tensor = |name: &str, shape: &[i64]| -> (InferInputTensor, Vec<u8>) {
        let elements: i64 = shape.iter().product();
        (input(name, "FP32", shape), floats(&vec![0.0; elements.try_into().unwrap()]))
    };
    raw_request(
        "tiny.fusion",
        vec![
            tensor("text_features", &[1, length, 4]),
            tensor("text_mask", &[1, mask]),
            tensor("image_features", &[1, 1, 4]),
        ],
    )
}

fn wrong_models() -> Vec<Case> {
    let not_found = |name, words, request: fn(usize) -> ModelInferRequest| {
        case(name, Code::NotFound, words, INFER, move |n| frame(&request(n).encode_to_vec()))
    };
    vec![
        not_found("unknown model", "it has tiny, tiny.fusion", |n| {
            spoiled(pixels(), |request| request.model_name = format!("model{n}"))
        }),
        not_found("no model", "there is no model \"\"", |_| ModelInferRequest::default()),
        not_found("a megabyte of model", "xxx...", |n| {
            spoiled(pixels(), |request| request.model_name = "x".repeat((1 << 19) + n))
        }),
        not_found("unknown version", "no version", |n| {
            spoiled(pixels(), |request| request.model_version = (2 + n).to_string())
        }),
        case("unknown multimodal model", Code::NotFound, "it has tiny", MULTIMODAL, |n| {
            frame(&InferRequest { model: format!("model{n}"), ..Default::default() }.encode_to_vec())
        }),
    ]
}

fn wrong_strings_and_images() -> Vec<Case> {
    let texts = |text: &[u8]| {
        let image = (input("image", "BYTES", &[1]), bytes_tensor(&[&fixture::png([1, 2, 3])]));
        raw_request("tiny", vec![image, (input("text", "BYTES", &[1]), bytes_tensor(&[text]))])
    };
    vec![
        invalid("string of a claimed gigabyte", "needs 1073741824 bytes", |n| {
            images(&[1], &[&0x4000_0000_u32.to_le_bytes()[..], &vec![0; n % 100]].concat())
        }),
        invalid("a thousand million strings", "element 1 of 107374", |n| {
            images(&[GIGABYTE + n as i64], &bytes_tensor(&[b"a"]))
        }),
        invalid("half a length", "needs 4 bytes", |n| images(&[1], &vec![0; n % 4])),
        invalid("bytes after the last string", "follow after the last", |n| {
            images(&[1], &[bytes_tensor(&[b"a"]), vec![0; 1 + n]].concat())
        }),
        invalid("no image at all", "row 0 of input \"image\"", |_| images(&[1], &bytes_tensor(&[b""]))),
        invalid("image of noise", "neither PNG, JPEG nor WebP", |n| {
            images(&[1], &bytes_tensor(&[&[(n % 100) as u8; 64]]))
        }),
        invalid("truncated image", "cannot be decoded", |n| {
            let mut png = fixture::png([1, 2, 3]);
            png.truncate(9 + n % (png.len() - 21)); // past the signature, short of the last chunk
            images(&[1], &bytes_tensor(&[&png]))
        }),
        invalid("damaged image", "cannot be decoded", |n| {
            let mut png = fixture::png([1, 2, 3]);
            png[16 + n % 17] ^= 0x55; // the header chunk, which has a checksum
            images(&[1], &bytes_tensor(&[&png]))
        }),
        invalid("decompression bomb", "pixels, the limit is", |n| {
            images(&[1], &bytes_tensor(&[&bomb(20_000 + n as u32, 20_000)]))
        }),
        invalid("text that is not UTF-8", "not UTF-8", move |n| texts(&[b'a', 0x80 | (n % 64) as u8])),
        invalid("text without words", "no words", move |n| texts(&vec![b' '; n % 50])),
        invalid("text of too many words", "tokens, the limit is 8", move |n| {
            texts("what ".repeat(9 + n % 50).as_bytes())
        }),
    ]
}

/// A PNG of a few bytes that claims to be of this size.
fn bomb(width: u32, height: u32) -> Vec<u8> {
    fn chunk(kind: [u8; 4], data: &[u8]) -> Vec<u8> {
        let mut crc = Crc::new();
        crc.update(&kind);
        crc.update(data);
        [&u32::try_from(data.len()).unwrap().to_be_bytes()[..], &kind, data, &crc.sum().to_be_bytes()].concat()
    }
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    let mut zeros = flate2::write::ZlibEncoder::new(Vec::new(), Compression::fast());
    zeros.write_all(&vec![0; 1 << 20]).unwrap();
    let parts = [chunk(*b"IHDR", &header), chunk(*b"IDAT", &zeros.finish().unwrap()), chunk(*b"IEND", &[])];
    [&b"\x89PNG\r\n\x1a\n"[..], &parts.concat()].concat()
}

fn wrong_parts() -> Vec<Case> {
    let image = || image_part(&fixture::png([9, 9, 9]), "");
    vec![
        invalid_parts("unknown task", "it has vqa, embed", |n| parts_request(&format!("task{n}"), vec![])),
        invalid_parts("no parts", "needs one image part", |_| parts_request("vqa", vec![])),
        invalid_parts("no text", "needs one text part", move |_| parts_request("vqa", vec![image()])),
        invalid_parts("two images", "part 2 is one more", move |_| {
            parts_request("vqa", vec![image(), text_part("a"), image()])
        }),
        invalid_parts("an empty part", "part 1 is empty", move |_| {
            parts_request("vqa", vec![image(), Part { content: None }])
        }),
        invalid_parts("nothing to embed", "takes 1 to 32", |_| parts_request("embed", vec![])),
        invalid_parts("too much to embed", "takes 1 to 32", |n| parts_request("embed", vec![text_part("red"); 33 + n])),
        invalid_parts("a media type that is none", "use image/png", move |n| {
            let media_type = ["image/gif", "text/plain", "png"][n % 3];
            parts_request("vqa", vec![image_part(&fixture::png([9, 9, 9]), media_type), text_part("a")])
        }),
        invalid_parts("a media type of another file", "those of image/png", |_| {
            parts_request("vqa", vec![image_part(&fixture::png([9, 9, 9]), "image/jpeg"), text_part("a")])
        }),
        invalid_parts("a bomb as a part", "pixels, the limit is", |n| {
            parts_request("vqa", vec![image_part(&bomb(30_000, 30_000 + n as u32), "image/png"), text_part("a")])
        }),
        invalid_parts("a JPEG with nothing behind its signature", "cannot be decoded", |n| {
            let jpeg = [&b"\xff\xd8\xff"[..], &vec![0; n % 200]].concat();
            parts_request("vqa", vec![image_part(&jpeg, "image/jpeg"), text_part("a")])
        }),
    ]
}

fn wrong_messages() -> Vec<Case> {
    let too_large = |name, path, body: fn(usize) -> Bytes| case(name, Code::ResourceExhausted, "limit", path, body);
    let internal = |name, words, path, body: fn(usize) -> Bytes| case(name, Code::Internal, words, path, body);
    let gigabyte_frame = |_| Bytes::from_static(b"\0\x40\0\0\0hello");
    let bomb = gzip_bomb();
    vec![
        too_large("frame of a claimed gigabyte", INFER, gigabyte_frame),
        too_large("multimodal frame of a claimed gigabyte", MULTIMODAL, gigabyte_frame),
        too_large("flood of empty inputs", INFER, |n| frame(&[0x2a, 0].repeat((1 << 18) + n))),
        too_large("flood of empty parts", MULTIMODAL, |n| frame(&[0x1a, 0].repeat((1 << 18) + n))),
        too_large("message over the limit", INFER, |n| frame(&vec![0; MAX_REQUEST_BYTES + 1 + n])),
        Case {
            encoding: Some("gzip"),
            ..case("gzip bomb", Code::ResourceExhausted, "limit", INFER, move |_| bomb.clone())
        },
        internal("field of a claimed gigabyte", "Protobuf", INFER, |_| {
            // Field 7, raw_input_contents, of 2^30 bytes, and then five.
            frame(b"\x3a\x80\x80\x80\x80\x04hello")
        }),
        internal("noise", "Protobuf", INFER, |n| frame(&[0xff, n as u8, 0xff, 0xff])),
        internal("noise as parts", "Protobuf", MULTIMODAL, |n| frame(&[0xff, n as u8, 0xff, 0xff])),
        internal("half a frame", "Unexpected EOF", INFER, |n| Bytes::from(vec![0, 0, 0, 1, (n % 200) as u8, 1, 2, 3])),
        internal("compressed without saying how", "grpc-encoding", INFER, |_| Bytes::from_static(b"\x01\0\0\0\x01a")),
        Case {
            encoding: Some("zebra"),
            ..case("unknown compression", Code::Unimplemented, "zebra", INFER, |_| frame(&pixels().encode_to_vec()))
        },
    ]
}

/// A frame of compressed zeros that is 256 MiB unpacked.
fn gzip_bomb() -> Bytes {
    let mut zeros = GzEncoder::new(Vec::new(), Compression::fast());
    let megabyte = vec![0; 1 << 20];
    for _ in 0..256 {
        zeros.write_all(&megabyte).unwrap();
    }
    let mut body = frame(&zeros.finish().unwrap()).to_vec();
    body[0] = 1; // compressed
    body.into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_malformed_requests_get_their_status_and_leave_no_trace() {
    let limit = MAX_REQUEST_BYTES.to_string();
    let server = Server::start(&["--max-request-bytes", &limit]).await;
    let cases: Vec<Case> =
        [wrong_tensors(), wrong_models(), wrong_strings_and_images(), wrong_parts(), wrong_messages()]
            .into_iter()
            .flatten()
            .collect();
    let mut channel = server.channel().await;
    let mut settled = None;
    for n in 0..REQUESTS {
        let Case { name, code, words, path, encoding, body } = &cases[n % cases.len()];
        let body = axum::body::Body::from(body(n / cases.len()));
        let response =
            post(&mut channel, path, *encoding, body).await.unwrap_or_else(|error| panic!("{name}, {n}: {error:?}"));
        let status = refusal(&response);
        assert_eq!(status.code(), *code, "{name}, {n}: {status:?}");
        assert!(status.message().contains(words), "{name}, {n}: {words:?} is not in {:?}", status.message());
        assert!(status.message().len() < 1000, "{name}, {n}: {} bytes of message", status.message().len());
        if n % cases.len() == cases.len() - 1 {
            let request = tensor_question(&fixture::png([200, 0, 0]), QUESTION);
            let response = server.inference().await.model_infer(request).await.expect("the next good request succeeds");
            assert_eq!(response.into_inner().raw_output_contents[0], bytes_tensor(&[b"red"]));
            // Code that ran for the first time, buffers and arenas of the allocator are paid for by the third round.
            if n / cases.len() == 2 {
                settled = Some(server.memory());
            }
        }
    }
    let ((before, _), (after, most)) = (settled.unwrap(), server.memory());
    let allowed = 16 << 20;
    assert!(after < before + allowed, "resident memory went from {before} to {after} bytes");
    assert!(most < before + 2 * allowed, "resident memory was {most} bytes for a moment, and {before} before");
}

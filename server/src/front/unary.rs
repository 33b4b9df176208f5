//! `ModelInfer` over gRPC, which is most of what a server is asked, without what calls in general need.
//!
//! tonic collects a message in one buffer, and engines want a tensor where it does not lie there: a picture would be copied
//! twice on its way in, and once on its way out. Here its bytes go from the connection to where the engine reads them, and
//! the answer's from where the engine wrote them. What is compressed, and every other method, is tonic's.

use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use axum::http::{HeaderMap, HeaderValue, Method, Response, Version, header, request};
use bytes::{BufMut as _, Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use prost::{
    Message as _,
    encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint, encoded_len_varint, key_len},
};
use sensorium_proto::{
    codec,
    inference::{ModelInferRequest, ModelInferResponse},
};
use tokio::time;
use tonic::Status;

use super::{guard, metered::HEAD};
use crate::{
    aligned::Aligned,
    blocking::in_place,
    security::Pass,
    service::{Call, Service},
};

const METHOD: &str = "/inference.GRPCInferenceService/ModelInfer";
const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/grpc");
const GRPC_STATUS: &str = "grpc-status";
const OK: HeaderValue = HeaderValue::from_static("0");

/// The numbers of the fields with the bytes of tensors.
const RAW_INPUT_CONTENTS: u32 = 7;
const RAW_OUTPUT_CONTENTS: u32 = 6;
/// An output of fewer bytes is copied into the message: a piece of its own would cost more.
const SMALL: usize = 4 << 10;

/// Answers calls of `ModelInfer`.
#[derive(Debug)]
pub(super) struct Unary {
    service: Service,
    /// Bytes of a message at most.
    max: usize,
}

impl Unary {
    pub(super) fn new(service: Service, max: usize) -> Self {
        Self { service, max }
    }

    /// Whether this is for here.
    pub(super) fn takes(head: &request::Parts) -> bool {
        let headers = &head.headers;
        let is_grpc = || {
            let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
            matches!(kind, Some(b"application/grpc" | b"application/grpc+proto"))
        };
        head.version == Version::HTTP_2
            && head.uri.path() == METHOD
            && head.method == Method::POST
            && is_grpc()
            && !headers.contains_key("grpc-encoding")
    }

    /// Answers a call with these headers and this body, or says why there is no pass for it.
    pub(super) async fn answer<B>(
        &self,
        headers: &HeaderMap,
        mut body: B,
        pass: Result<Option<Pass>, Status>,
    ) -> Response<Answer>
    where
        B: Body<Data = Bytes, Error = Box<dyn std::error::Error + Send + Sync>> + Unpin,
    {
        let call = Call::new(headers);
        let read = async {
            let pass = pass?;
            let message = message(&mut body, self.max);
            let message = match call.deadline {
                None => message.await,
                Some(deadline) => time::timeout_at(deadline.into(), message).await.map_err(|_| too_late())?,
            };
            let message = message?;
            // What is about to be decoded may take more memory than it has taken to arrive.
            codec::check::<ModelInferRequest>(&message)?;
            let growth = codec::growth(&message);
            let grown = self.service.claim(growth)?;
            Ok::<_, Status>((in_place(growth, || codec::decode_checked(message))?, grown, pass))
        };
        let answer = async {
            let read = read.await.inspect_err(|status| self.service.refused(status.code()));
            let (request, _grown, pass) = read?;
            let response = self.service.infer(request, &call).await?;
            Ok::<_, Status>(Answer { pieces: encode(response)?, trailers: Some(well()), _pass: pass })
        };
        match answer.await {
            Ok(answer) => {
                let mut response = Response::new(answer);
                response.headers_mut().insert(header::CONTENT_TYPE, CONTENT_TYPE);
                response
            }
            Err(status) => {
                let code = status.code();
                let mut response = status.into_http();
                guard::challenge(code, response.headers_mut());
                response
            }
        }
    }
}

fn too_late() -> Status {
    Status::deadline_exceeded("the deadline passed before the whole request was there")
}

fn well() -> HeaderMap {
    HeaderMap::from_iter([(header::HeaderName::from_static(GRPC_STATUS), OK)])
}

/// The one message of a call.
async fn message<B>(body: &mut B, max: usize) -> Result<Bytes, Status>
where
    B: Body<Data = Bytes, Error = Box<dyn std::error::Error + Send + Sync>> + Unpin,
{
    let mut arriving = Arriving::default();
    while let Some(frame) = body.frame().await {
        // Trailers of a request mean nothing.
        if let Ok(piece) = frame.map_err(Status::from_error)?.into_data() {
            arriving.push(piece, max)?;
        }
    }
    arriving.end()
}

/// A message that arrives.
#[derive(Debug, Default)]
struct Arriving {
    /// A flag, which is 1 for a compressed message, and the length.
    head: [u8; HEAD],
    filled: usize,
    /// There from the first byte behind the head.
    message: Option<Aligned>,
}

impl Arriving {
    fn push(&mut self, mut piece: Bytes, max: usize) -> Result<(), Status> {
        if self.filled < HEAD {
            let part = piece.split_to(piece.len().min(HEAD - self.filled));
            self.head[self.filled..self.filled + part.len()].copy_from_slice(&part);
            self.filled += part.len();
            if self.filled == HEAD {
                self.begin(max)?;
            }
        }
        if piece.is_empty() {
            return Ok(());
        }
        let length = self.length();
        let message = self.message.get_or_insert_with(|| Aligned::new(length, largest_tensor(&piece)));
        if piece.len() > length - message.len() {
            return Err(Status::internal("the call has more than its one message"));
        }
        message.put(piece);
        Ok(())
    }

    /// Bytes of the message, once the head is there.
    fn length(&self) -> usize {
        let [_, length @ ..] = self.head;
        u32::from_be_bytes(length) as usize
    }

    fn begin(&self, max: usize) -> Result<(), Status> {
        match self.head[0] {
            0 => {}
            1 => return Err(Status::internal("the message says that it is compressed, and grpc-encoding not how")),
            flag => return Err(Status::internal(format!("a message begins with {flag}, which is no flag of gRPC"))),
        }
        let length = self.length();
        if length > max {
            return Err(Status::resource_exhausted(format!(
                "the message has {length} bytes, more than {max}, the limit of this server"
            )));
        }
        Ok(())
    }

    fn end(self) -> Result<Bytes, Status> {
        if self.filled == 0 {
            return Err(Status::internal("the call has no message"));
        }
        let length = self.length();
        let message = self.message.map(Aligned::freeze).unwrap_or_default();
        if self.filled < HEAD || message.len() < length {
            return Err(Status::internal("Unexpected EOF: the call ends in the middle of its message"));
        }
        Ok(message)
    }
}

/// Where in `start`, the beginning of a request, the largest tensor begins of those that do.
fn largest_tensor(start: &[u8]) -> usize {
    let (mut rest, mut found) = (start, (0, 0));
    while !rest.is_empty()
        && let Ok((field, wire_type)) = decode_key(&mut rest)
    {
        let length = match wire_type {
            WireType::Varint if decode_varint(&mut rest).is_ok() => 0,
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::LengthDelimited => decode_varint(&mut rest).unwrap_or(0),
            // What has groups, or is no protobuf, has no tensors.
            _ => break,
        };
        if field == RAW_INPUT_CONTENTS {
            found = found.max((length, start.len() - rest.len()));
        }
        let Some(after) = usize::try_from(length).ok().and_then(|length| rest.get(length..)) else { break };
        rest = after;
    }
    found.1
}

/// A message with its head, in pieces: large outputs are what they were.
fn encode(mut response: ModelInferResponse) -> Result<VecDeque<Bytes>, Status> {
    let outputs = std::mem::take(&mut response.raw_output_contents);
    let around = |output: &Bytes| key_len(RAW_OUTPUT_CONTENTS) + encoded_len_varint(output.len() as u64);
    let mut length = response.encoded_len();
    let mut own = HEAD + length;
    for output in &outputs {
        length += around(output) + output.len();
        own += around(output) + if output.len() < SMALL { output.len() } else { 0 };
    }
    let length = u32::try_from(length)
        .map_err(|_| Status::resource_exhausted("the answer has more than 4 GiB; ask for less"))?;

    let mut pieces = VecDeque::with_capacity(1);
    let mut piece = BytesMut::with_capacity(own);
    piece.put_u8(0);
    piece.put_u32(length);
    response.encode_raw(&mut piece);
    for output in outputs {
        encode_key(RAW_OUTPUT_CONTENTS, WireType::LengthDelimited, &mut piece);
        encode_varint(output.len() as u64, &mut piece);
        if output.len() < SMALL {
            piece.put(output);
        } else {
            pieces.extend([piece.split().freeze(), output]);
        }
    }
    if !piece.is_empty() {
        pieces.push_back(piece.freeze());
    }
    Ok(pieces)
}

/// The body of an answer: a message, and that all is well. One without either is that of a status in its headers.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pieces: VecDeque<Bytes>,
    trailers: Option<HeaderMap>,
    /// Held until the answer is sent or given up.
    _pass: Option<Pass>,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = match self.pieces.pop_front() {
            Some(piece) => Some(Frame::data(piece)),
            None => self.trailers.take().map(Frame::trailers),
        };
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.pieces.iter().map(|piece| piece.len() as u64).sum())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sensorium_proto::inference::{model_infer_request::InferInputTensor, model_infer_response::InferOutputTensor};
    use tonic::Code;

    use super::*;

    fn framed(message: &[u8]) -> Vec<u8> {
        [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat()
    }

    /// Sends `sent` in pieces of these sizes, and the rest in one.
    fn arrive(sent: &[u8], sizes: &[usize]) -> Result<Bytes, Status> {
        let (mut arriving, mut rest) = (Arriving::default(), Bytes::copy_from_slice(sent));
        for size in sizes {
            let piece = rest.split_to(rest.len().min(*size));
            arriving.push(piece, 10_000)?;
        }
        arriving.push(rest, 10_000)?;
        arriving.end()
    }

    fn request(tensors: &[usize]) -> ModelInferRequest {
        ModelInferRequest {
            model_name: "m".to_owned(),
            inputs: tensors.iter().map(|_| InferInputTensor { name: "x".to_owned(), ..Default::default() }).collect(),
            raw_input_contents: tensors.iter().map(|size| vec![7; *size].into()).collect(),
            ..Default::default()
        }
    }

    proptest! {
        #[test]
        fn a_message_is_the_same_in_whatever_pieces_it_comes(
            tensors in proptest::collection::vec(0..2000_usize, 0..4),
            sizes in proptest::collection::vec(0..700_usize, 0..8),
        ) {
            let request = request(&tensors);
            let message = arrive(&framed(&request.encode_to_vec()), &sizes).unwrap();
            prop_assert_eq!(codec::decode::<ModelInferRequest>(message).unwrap(), request);
        }

        #[test]
        fn an_answer_is_what_protobuf_makes_of_it(outputs in proptest::collection::vec(0..3 * SMALL, 0..4)) {
            let response = ModelInferResponse {
                id: "1".to_owned(),
                outputs: vec![InferOutputTensor { shape: vec![2, 3], ..Default::default() }],
                raw_output_contents: outputs.iter().map(|size| vec![7; *size].into()).collect(),
                ..Default::default()
            };
            let pieces: Vec<Bytes> = encode(response.clone()).unwrap().into();
            prop_assert_eq!(pieces.concat(), framed(&response.encode_to_vec()));
        }
    }

    #[test]
    fn the_largest_tensor_lies_as_engines_want_it() {
        for tensors in [&[5000][..], &[3, 5000], &[5000, 3], &[3, 700, 5000, 9]] {
            let message = arrive(&framed(&request(tensors).encode_to_vec()), &[2000]).unwrap();
            let largest = codec::decode::<ModelInferRequest>(message).unwrap().raw_input_contents;
            let largest = largest.iter().max_by_key(|tensor| tensor.len()).unwrap();
            assert_eq!(largest.as_ptr().addr() % 64, 0, "{tensors:?}");
        }
        for noise in [&[][..], &[0xff; 20], &[0x3a], &[0x3a, 0xff, 0xff], &[0x0b, 0x3a, 1, 1]] {
            assert!(largest_tensor(noise) <= noise.len());
        }
    }

    #[test]
    fn large_outputs_are_not_copied() {
        let output = Bytes::from(vec![7; SMALL]);
        let raw_output_contents = vec![output.clone(), vec![8; 3].into()];
        let pieces = encode(ModelInferResponse { raw_output_contents, ..Default::default() }).unwrap();
        assert_eq!(pieces.iter().map(Bytes::len).collect::<Vec<_>>(), [HEAD + 3, SMALL, 5]);
        assert_eq!(pieces[1].as_ptr(), output.as_ptr());
    }

    #[test]
    fn a_call_that_is_not_one_message_is_refused() {
        let message = framed(&request(&[100]).encode_to_vec());
        for (sent, code, words) in [
            (&[][..], Code::Internal, "no message"),
            (&message[..3], Code::Internal, "in the middle"),
            (&message[..message.len() - 1], Code::Internal, "in the middle"),
            (&[&message[..], &message[..]].concat(), Code::Internal, "more than its one message"),
            (&[1, 0, 0, 0, 0], Code::Internal, "compressed"),
            (&[9, 0, 0, 0, 0], Code::Internal, "no flag"),
            (&[0, 0, 0, 0x27, 0x11], Code::ResourceExhausted, "has 10001 bytes, more than 10000, the limit"),
        ] {
            let status = arrive(sent, &[]).unwrap_err();
            assert_eq!(status.code(), code, "{status:?}");
            assert!(status.message().contains(words), "{status:?}");
        }
        assert_eq!(arrive(&framed(&[]), &[]).unwrap(), Bytes::new());
    }
}

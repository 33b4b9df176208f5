//! The codec of every call: protobuf, with a bound on how much larger a message may get by being decoded.
//!
//! A limit on the bytes of a message does not bound what it decodes to: an empty tensor is two bytes on the wire and
//! hundreds in memory, so that 64 MiB of them would be gigabytes. Before anything is decoded, this codec walks over the
//! message and counts its fields, which takes no memory.

use std::{any::TypeId, marker::PhantomData};

use prost::{
    Message,
    bytes::{Buf as _, Bytes},
    encoding::{WireType, decode_key, decode_varint},
};
use tonic::{
    Status,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use crate::inference::ModelInferRequest;

/// Fields of a message at most: far more than a request has, whose tensors are one field each, and about 25 MB at the
/// most that a field can become.
pub const MAX_FIELDS: u32 = 1 << 16;

/// Where an answer is written to before anything is known about its size; tensors make it grow once, to what they need.
/// The default of 8 KiB for each answer is more than most of them have.
const FIRST_BUFFER: usize = 512;
/// Bytes that a stream of answers collects before it sends them: the default.
const YIELD_THRESHOLD: usize = 32 << 10;

/// In this protocol what nests in bulk is field 5: the tensors of a request or response, and in a tensor its contents.
/// There, too, fields are counted. In other messages field 5 is nothing that this could misread: what does not parse is
/// left to the decoder. A request has field 6 as well, the outputs that it asks for; in a response that is the bytes of a tensor.
const NESTS: &[u32] = &[5];
const NESTS_OF_REQUEST: &[u32] = &[5, 6];
const DEPTH: u32 = 2;

/// Encodes `T` and decodes `U`, as generated code wants it.
#[derive(Debug)]
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BoundedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(FIRST_BUFFER, YIELD_THRESHOLD))
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(ProstCodec::<T, U>::raw_decoder(BufferSettings::default()))
    }
}

/// Decodes messages of at most [`MAX_FIELDS`] fields.
#[derive(Debug)]
pub struct BoundedDecoder<U>(ProstDecoder<U>);

impl<U: Message + Default + 'static> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // A message arrives in one piece: the transport collects it before it asks for decoding.
        check::<U>(message.chunk())?;
        self.0.decode(message)
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}

/// Decodes a message of at most [`MAX_FIELDS`] fields, whose tensors share `message`.
///
/// # Errors
/// RESOURCE_EXHAUSTED for more fields, INTERNAL for what is no such message.
pub fn decode<M: Message + Default + 'static>(message: Bytes) -> Result<M, Status> {
    check::<M>(&message)?;
    M::decode(message).map_err(|error| Status::internal(error.to_string()))
}

fn check<M: 'static>(message: &[u8]) -> Result<(), Status> {
    let is_request = TypeId::of::<M>() == TypeId::of::<ModelInferRequest>();
    if spend(message, if is_request { NESTS_OF_REQUEST } else { NESTS }, DEPTH, &mut { MAX_FIELDS }) {
        return Ok(());
    }
    Err(Status::resource_exhausted(format!(
        "the message has more fields than the limit of {MAX_FIELDS}; send the elements of a tensor packed, or in raw_input_contents"
    )))
}

/// Bytes by which the elements of a request's tensors may grow when they are decoded: a whole number in a packed field of
/// `InferTensorContents` is a byte at least on the wire, and four or eight in memory.
pub fn growth(request: &[u8]) -> usize {
    let contents = fields(request).filter(|(field, _)| *field == 5).flat_map(|(_, input)| fields(input));
    let numbers = contents.filter(|(field, _)| *field == 5).flat_map(|(_, contents)| fields(contents));
    let growth = |(field, packed): (u32, &[u8])| match field {
        2 | 4 => packed.len().saturating_mul(3),
        3 | 5 => packed.len().saturating_mul(7),
        _ => 0,
    };
    numbers.map(growth).fold(0, usize::saturating_add)
}

/// The fields of a message that have a length, with their content, up to what is no protobuf.
fn fields(mut message: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    std::iter::from_fn(move || {
        while !message.is_empty() {
            let (field, wire_type) = decode_key(&mut message).ok()?;
            let skipped = match wire_type {
                WireType::Varint => {
                    decode_varint(&mut message).ok()?;
                    0
                }
                WireType::StartGroup | WireType::EndGroup => 0,
                WireType::SixtyFourBit => 8,
                WireType::ThirtyTwoBit => 4,
                WireType::LengthDelimited => {
                    let length = usize::try_from(decode_varint(&mut message).ok()?).ok()?;
                    let (content, rest) = message.split_at_checked(length)?;
                    message = rest;
                    return Some((field, content));
                }
            };
            message = message.split_at_checked(skipped)?.1;
        }
        None
    })
}

/// Takes one off `budget` for each field, also of the fields `nests`; `false` when it does not suffice. Stops without complaint at what is no
/// protobuf.
fn spend(mut message: &[u8], nests: &[u32], depth: u32, budget: &mut u32) -> bool {
    while !message.is_empty() {
        let Some(rest) = budget.checked_sub(1) else { return false };
        *budget = rest;
        let Ok((field, wire_type)) = decode_key(&mut message) else { return true };
        let length = match wire_type {
            WireType::Varint if decode_varint(&mut message).is_err() => return true,
            // The fields inside a group are counted as if they stood beside it.
            WireType::Varint | WireType::StartGroup | WireType::EndGroup => 0,
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::LengthDelimited => match decode_varint(&mut message) {
                Ok(length) => length,
                Err(_) => return true,
            },
        };
        let Some((content, after)) = usize::try_from(length).ok().and_then(|length| message.split_at_checked(length))
        else {
            return true;
        };
        let goes_in = wire_type == WireType::LengthDelimited && nests.contains(&field) && depth > 0;
        if goes_in && !spend(content, nests, depth - 1, budget) {
            return false;
        }
        message = after;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::{
        InferParameter, InferTensorContents, ModelInferResponse,
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    };

    fn counted(message: &[u8]) -> Option<u32> {
        let mut budget = MAX_FIELDS;
        spend(message, NESTS_OF_REQUEST, DEPTH, &mut budget).then_some(MAX_FIELDS - budget)
    }

    fn request(contents: InferTensorContents) -> Vec<u8> {
        let input = InferInputTensor {
            name: "x".to_owned(),
            shape: vec![2, 3],
            contents: Some(contents.into()),
            ..Default::default()
        };
        ModelInferRequest { model_name: "m".to_owned(), inputs: vec![input], ..Default::default() }.encode_to_vec()
    }

    #[test]
    fn a_packed_tensor_of_any_size_is_one_field() {
        let contents = InferTensorContents { fp32_contents: vec![1.5; 1 << 20], ..Default::default() };
        // model_name, inputs, and in those name, shape, contents, and in those the elements.
        assert_eq!(counted(&request(contents)), Some(6));
    }

    #[test]
    fn whole_numbers_grow_and_floats_and_bytes_do_not() {
        let int64 = InferTensorContents { int64_contents: vec![1; 1000], ..Default::default() };
        assert_eq!(growth(&request(int64)), 7000);
        let int32 = InferTensorContents { int_contents: vec![1; 1000], ..Default::default() };
        assert_eq!(growth(&request(int32)), 3000);
        let fp32 = InferTensorContents { fp32_contents: vec![1.0; 1000], ..Default::default() };
        assert_eq!(growth(&request(fp32)), 0);
        let raw = ModelInferRequest { raw_input_contents: vec![vec![0x2a; 1000].into()], ..Default::default() };
        assert_eq!(growth(&raw.encode_to_vec()), 0);
        assert_eq!(growth(&[0x2a, 200, 1]), 0, "it is cut off");
    }

    #[test]
    fn strings_are_a_field_each_wherever_they_nest() {
        let strings = |count| InferTensorContents { bytes_contents: vec!["a".into(); count], ..Default::default() };
        assert_eq!(counted(&request(strings(1000))), Some(1005));
        assert_eq!(counted(&request(strings(MAX_FIELDS as usize))), None);
    }

    #[test]
    fn a_flood_of_empty_tensors_is_too_much() {
        assert_eq!(counted(&[0x2a, 0].repeat(MAX_FIELDS as usize)), Some(MAX_FIELDS));
        assert_eq!(counted(&[0x2a, 0].repeat(MAX_FIELDS as usize + 1)), None);
    }

    #[test]
    fn parameters_of_outputs_are_fields_and_the_bytes_of_an_answer_are_none() {
        let parameter = |index: u32| (index.to_string(), InferParameter::default());
        let parameters = (0..MAX_FIELDS).map(parameter).collect();
        let outputs = vec![InferRequestedOutputTensor { name: "y".to_owned(), parameters }];
        let flood = ModelInferRequest { outputs, ..Default::default() };
        assert!(decode::<ModelInferRequest>(flood.encode_to_vec().into()).is_err());
        // Sixteen-bit tens, which look like empty fields.
        let tens = vec![[10, 0].repeat(MAX_FIELDS as usize + 1).into()];
        let answer = ModelInferResponse { raw_output_contents: tens, ..Default::default() };
        assert_eq!(decode::<ModelInferResponse>(answer.encode_to_vec().into()).unwrap(), answer);
    }

    #[test]
    fn groups_and_unknown_fields_hide_nothing() {
        // A group of field 100 with the flood in it, and one behind a varint of field 9 and a fixed64 of field 8.
        for start in [&[0xa3_u8, 0x06][..], &[0x48, 0x01, 0x41, 0, 0, 0, 0, 0, 0, 0, 0]] {
            let flood = [start, &[0x2a, 0].repeat(MAX_FIELDS as usize)].concat();
            assert_eq!(counted(&flood), None);
        }
    }

    #[test]
    fn what_is_no_protobuf_is_left_to_the_decoder() {
        for message in [&[0xff, 0xff][..], &[0x2a, 0x7f, 1], &[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], &[0x48]] {
            assert!(counted(message).is_some(), "{message:?}");
        }
    }
}

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

use crate::inference::{
    LogSettingsRequest, ModelInferRequest, TraceSettingRequest, model_infer_request::InferInputTensor,
};

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
/// Settings are a map (field 1, or in it 2) to lists of texts.
const NESTS_OF_SETTINGS: &[u32] = &[1, 2];
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
    decode_checked(message)
}

/// As [`decode`], of a message that [`check`] has nothing against.
///
/// # Errors
/// INTERNAL.
pub fn decode_checked<M: Message + Default>(message: Bytes) -> Result<M, Status> {
    M::decode(message).map_err(|error| Status::internal(error.to_string()))
}

/// That a message has at most [`MAX_FIELDS`] fields: the time of whatever reads it is bounded by that.
///
/// # Errors
/// RESOURCE_EXHAUSTED.
pub fn check<M: 'static>(message: &[u8]) -> Result<(), Status> {
    let kind = TypeId::of::<M>();
    let nests = if kind == TypeId::of::<ModelInferRequest>() {
        NESTS_OF_REQUEST
    } else if kind == TypeId::of::<TraceSettingRequest>() || kind == TypeId::of::<LogSettingsRequest>() {
        NESTS_OF_SETTINGS
    } else {
        NESTS
    };
    if spend(message, nests, DEPTH, &mut { MAX_FIELDS }) {
        return Ok(());
    }
    Err(Status::resource_exhausted(format!(
        "the message has more fields than the limit of {MAX_FIELDS}; send the elements of a tensor packed, or in raw_input_contents"
    )))
}

/// Sizes of a shape that are not worth to be counted.
const SIZES: usize = 64;

/// Bytes by which a request's tensors may grow when they are decoded: a whole number in a packed field, of
/// `InferTensorContents` or a shape, is a byte at least on the wire, and four or eight in memory. Of a message that [`check`] has nothing
/// against.
pub fn growth(request: &[u8]) -> usize {
    let of_contents = |(field, packed): (u32, &[u8])| match field {
        2 | 4 => packed.len().saturating_mul(3),
        3 | 5 => packed.len().saturating_mul(7),
        _ => 0,
    };
    let of_input = |(field, content): (u32, &[u8])| match field {
        3 if content.len() > SIZES => content.len().saturating_mul(7),
        5 => fields(content).map(of_contents).fold(0, usize::saturating_add),
        _ => 0,
    };
    let inputs = fields(request).filter(|(field, _)| *field == 5).flat_map(|(_, input)| fields(input));
    inputs.map(of_input).fold(0, usize::saturating_add)
}

/// As [`growth`], of a request that is decoded already.
pub fn grown(request: &ModelInferRequest) -> usize {
    let of_input = |input: &InferInputTensor| {
        let contents = input.contents.as_deref();
        let fours = contents.map_or(0, |contents| contents.int_contents.len() + contents.uint_contents.len());
        let eights = contents.map_or(0, |contents| contents.int64_contents.len() + contents.uint64_contents.len());
        let sizes = if input.shape.len() > SIZES { input.shape.len() } else { 0 };
        fours * 3 + (eights + sizes) * 7
    };
    request.inputs.iter().map(of_input).sum()
}

/// The number of a field and its content.
type Field<'a> = (u32, &'a [u8]);

/// All fields of a message with their content, which is empty for those that have no length. The fields inside a group are
/// as if they stood beside it. What is no protobuf is the last field, of number 0, which no field has.
fn fields(mut message: &[u8]) -> impl Iterator<Item = Field<'_>> {
    std::iter::from_fn(move || {
        if message.is_empty() {
            return None;
        }
        let (field, rest) = split_field(message).unwrap_or_default();
        message = rest;
        Some(field)
    })
}

/// The first field, and what follows it.
fn split_field(mut message: &[u8]) -> Option<(Field<'_>, &[u8])> {
    let (field, wire_type) = decode_key(&mut message).ok()?;
    let mut varint = || decode_varint(&mut message).ok();
    let (has_content, length) = match wire_type {
        WireType::LengthDelimited => (true, usize::try_from(varint()?).ok()?),
        WireType::Varint => (false, varint().map(|_| 0)?),
        WireType::StartGroup | WireType::EndGroup => (false, 0),
        WireType::SixtyFourBit => (false, 8),
        WireType::ThirtyTwoBit => (false, 4),
    };
    let (content, rest) = message.split_at_checked(length)?;
    Some(((field, if has_content { content } else { &[] }), rest))
}

/// Takes one off `budget` for each field, also of the fields `nests`; `false` when it does not suffice. What is no protobuf
/// is left to the decoder.
fn spend(message: &[u8], nests: &[u32], depth: u32, budget: &mut u32) -> bool {
    fields(message).all(|(field, content)| {
        let Some(rest) = budget.checked_sub(1) else { return false };
        *budget = rest;
        depth == 0 || !nests.contains(&field) || spend(content, nests, depth - 1, budget)
    })
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
        let long = InferInputTensor { shape: vec![1; 1000], ..Default::default() };
        let long = ModelInferRequest { inputs: vec![long], ..Default::default() };
        assert_eq!((growth(&long.encode_to_vec()), grown(&long)), (7000, 7000));
        let raw = ModelInferRequest { raw_input_contents: vec![vec![0x2a; 1000].into()], ..Default::default() };
        assert_eq!(growth(&raw.encode_to_vec()), 0);
        assert_eq!(growth(&[0x2a, 200, 1]), 0, "it is cut off");
    }

    #[test]
    fn what_has_grown_is_at_most_what_was_foreseen() {
        let contents = [
            InferTensorContents { int64_contents: vec![1; 1000], ..Default::default() },
            InferTensorContents { uint_contents: vec![u32::MAX; 10], ..Default::default() },
            InferTensorContents { fp32_contents: vec![1.0; 1000], ..Default::default() },
        ];
        for (contents, wanted) in contents.into_iter().zip([7000, 30, 0]) {
            let message = request(contents);
            let found = grown(&ModelInferRequest::decode(&*message).unwrap());
            assert_eq!(found, wanted);
            assert!(growth(&message) >= found);
        }
    }

    #[test]
    fn settings_of_many_texts_are_too_much() {
        // One map entry with a list of empty texts.
        let list = [0x0a, 0].repeat(MAX_FIELDS as usize);
        let settings = delimited(1, &delimited(2, &list));
        assert!(decode::<TraceSettingRequest>(settings.clone().into()).is_err());
        assert!(decode::<LogSettingsRequest>(settings.into()).is_err());
        let few = delimited(1, &delimited(2, &[0x0a, 0].repeat(9)));
        assert!(decode::<TraceSettingRequest>(few.into()).is_ok());
    }

    /// A field with a length.
    fn delimited(field: u32, content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        prost::encoding::encode_key(field, WireType::LengthDelimited, &mut bytes);
        prost::encoding::encode_varint(content.len() as u64, &mut bytes);
        bytes.extend_from_slice(content);
        bytes
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

//! The elements of a tensor between JSON and the raw bytes that the rest of the server handles.

use std::io::Write as _;

use bytes::Bytes;
use sensorium_artifact::DType;

use super::{
    Refusal,
    json::{JsonError, Reader},
};
pub(super) use crate::wire::datatype as dtype;
use crate::{
    budget::{Spent, Tally},
    wire::excerpt,
};

/// Appends one element, read from JSON, to raw ones.
type ReadElement = fn(&mut Reader<'_>, &mut Vec<u8>) -> Result<(), JsonError>;

/// Why elements are not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ReadError {
    /// They are not the JSON that they should be.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// They take more than there is room for.
    #[error(transparent)]
    Spent(#[from] Spent),
}

impl From<ReadError> for Refusal {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Json(error) => error.into(),
            ReadError::Spent(spent) => spent.into(),
        }
    }
}

/// Growth for what is made of a body of JSON, whose own bytes are taken: a number of two characters may have eight bytes.
#[derive(Debug)]
pub(super) struct Growth {
    /// Holds it until the request is done; `None` where nobody counts.
    tally: Option<Tally>,
    /// Bytes that were made so far,
    made: usize,
    /// of so many bytes of the text,
    read: usize,
    /// and how many of them were taken beside those of the text.
    taken: usize,
}

impl Growth {
    pub(super) fn new(tally: Option<Tally>) -> Self {
        Self { tally, made: 0, read: 0, taken: 0 }
    }

    /// So many bytes more were made of what stands before `reader`.
    fn take(&mut self, bytes: usize, reader: &Reader<'_>) -> Result<(), Spent> {
        self.made += bytes;
        self.read = self.read.max(reader.position());
        let more = self.made.saturating_sub(self.read + self.taken);
        if let Some(tally) = self.tally.as_ref().filter(|_| more > 0) {
            tally.take(more)?;
            self.taken += more;
        }
        Ok(())
    }
}

/// Elements that are read, one after the other.
struct Elements<'a> {
    raw: Vec<u8>,
    count: usize,
    /// Bytes of `raw` that were taken from the growth.
    taken: usize,
    element: ReadElement,
    growth: &'a mut Growth,
}

impl<'a> Elements<'a> {
    fn new(reader: &Reader<'_>, dtype: DType, growth: &'a mut Growth) -> Result<Self, JsonError> {
        Ok(Self { raw: Vec::new(), count: 0, taken: 0, element: read_element(reader, dtype)?, growth })
    }

    fn read(&mut self, reader: &mut Reader<'_>) -> Result<(), ReadError> {
        self.count += 1;
        (self.element)(reader, &mut self.raw)?;
        let has = self.raw.capacity();
        if has > self.taken {
            self.growth.take(has - self.taken, reader)?;
            self.taken = has;
        }
        Ok(())
    }

    fn finish(self) -> (Bytes, usize) {
        (self.raw.into(), self.count)
    }
}

/// Reads an array, flat or nested, as raw elements, and counts them. What it allocates grows with the text, never with a
/// claim, and is taken from `growth` as it does.
///
/// # Errors
/// [`ReadError`] at the first element that is none of its type, or that there is no room for.
pub(super) fn read(reader: &mut Reader<'_>, dtype: DType, growth: &mut Growth) -> Result<(Bytes, usize), ReadError> {
    let mut elements = Elements::new(reader, dtype, growth)?;
    reader.flattened(|reader| elements.read(reader))?;
    Ok(elements.finish())
}

/// As [`read`], of one row: a flat array, or one element without brackets.
///
/// # Errors
/// As [`read`].
pub(super) fn read_row(
    reader: &mut Reader<'_>,
    dtype: DType,
    growth: &mut Growth,
) -> Result<(Bytes, usize), ReadError> {
    let mut elements = Elements::new(reader, dtype, growth)?;
    if reader.peek() != b'[' {
        elements.read(reader)?;
        return Ok(elements.finish());
    }
    reader.array(|reader| match reader.peek() {
        b'[' => Err(reader.error("a single element should be here: what is given is one row, as a flat array").into()),
        _ => elements.read(reader),
    })?;
    Ok(elements.finish())
}

fn read_element(reader: &Reader<'_>, dtype: DType) -> Result<ReadElement, JsonError> {
    macro_rules! number {
        ($type:ty, $name:literal) => {
            |reader, raw| {
                let at = reader.clone();
                let written = reader.number()?;
                let number: $type =
                    written.parse().map_err(|_| at.error(format!("{} is no {}", excerpt(written), $name)))?;
                raw.extend_from_slice(&number.to_le_bytes());
                Ok(())
            }
        };
    }
    // Infinity is a value where it is written as one; a number that is larger than its type is none.
    macro_rules! float {
        ($type:ty, $name:literal) => {
            |reader, raw| {
                let at = reader.clone();
                let written = reader.number()?;
                let number = written.parse::<$type>().ok();
                let number = number
                    .filter(|number| number.is_finite() || !written.ends_with(|last: char| last.is_ascii_digit()));
                let number = number.ok_or_else(|| at.error(format!("{} is no {}", excerpt(written), $name)))?;
                raw.extend_from_slice(&number.to_le_bytes());
                Ok(())
            }
        };
    }
    Ok(match dtype {
        DType::Uint8 => number!(u8, "UINT8"),
        DType::Uint16 => number!(u16, "UINT16"),
        DType::Uint32 => number!(u32, "UINT32"),
        DType::Uint64 => number!(u64, "UINT64"),
        DType::Int8 => number!(i8, "INT8"),
        DType::Int16 => number!(i16, "INT16"),
        DType::Int32 => number!(i32, "INT32"),
        DType::Int64 => number!(i64, "INT64"),
        DType::Fp32 => float!(f32, "FP32"),
        DType::Fp64 => float!(f64, "FP64"),
        DType::Bool => |reader, raw| {
            raw.push(u8::from(reader.bool()?));
            Ok(())
        },
        DType::Bytes => |reader, raw| {
            let string = reader.string()?;
            // A string of 4 GiB does not fit into a request.
            raw.extend_from_slice(&(string.len() as u32).to_le_bytes());
            raw.extend_from_slice(string.as_bytes());
            Ok(())
        },
        DType::Fp16 | DType::Bf16 => {
            return Err(reader.error("FP16 and BF16 have no form in JSON; send them as binary tensor data"));
        }
    })
}

/// Appends the elements of `raw` as a flat array.
///
/// # Errors
/// Why elements of this type, or these strings, have no form in JSON.
pub(super) fn write(out: &mut Vec<u8>, dtype: DType, raw: &[u8]) -> Result<(), &'static str> {
    macro_rules! numbers {
        ($type:ty) => {
            each(out, raw.as_chunks().0, |out, &bytes| {
                // Writing into memory does not fail.
                let _ = write!(out, "{}", <$type>::from_le_bytes(bytes));
            })
        };
    }
    macro_rules! floats {
        ($type:ty) => {
            each(out, raw.as_chunks().0, |out, &bytes| {
                float(out, <$type>::from_le_bytes(bytes).into(), |out| {
                    let _ = write!(out, "{:?}", <$type>::from_le_bytes(bytes));
                })
            })
        };
    }
    match dtype {
        DType::Bool => each(out, raw, |out, byte| out.extend_from_slice(if *byte == 0 { b"false" } else { b"true" })),
        DType::Uint8 => numbers!(u8),
        DType::Uint16 => numbers!(u16),
        DType::Uint32 => numbers!(u32),
        DType::Uint64 => numbers!(u64),
        DType::Int8 => numbers!(i8),
        DType::Int16 => numbers!(i16),
        DType::Int32 => numbers!(i32),
        DType::Int64 => numbers!(i64),
        DType::Fp32 => floats!(f32),
        DType::Fp64 => floats!(f64),
        DType::Bytes => return strings(out, raw),
        DType::Fp16 | DType::Bf16 => {
            return Err("FP16 and BF16 have no form in JSON; ask for binary_data");
        }
    }
    Ok(())
}

fn each<T>(out: &mut Vec<u8>, elements: &[T], mut write: impl FnMut(&mut Vec<u8>, &T)) {
    out.push(b'[');
    for (index, element) in elements.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write(out, element);
    }
    out.push(b']');
}

/// A float with the names that JSON lacks.
fn float(out: &mut Vec<u8>, value: f64, finite: impl FnOnce(&mut Vec<u8>)) {
    match value {
        _ if value.is_nan() => out.extend_from_slice(b"NaN"),
        f64::INFINITY => out.extend_from_slice(b"Infinity"),
        f64::NEG_INFINITY => out.extend_from_slice(b"-Infinity"),
        _ => finite(out),
    }
}

fn strings(out: &mut Vec<u8>, raw: &[u8]) -> Result<(), &'static str> {
    let mut rest = raw;
    out.push(b'[');
    while let Some((length, after)) = rest.split_first_chunk() {
        let Some((string, after)) = after.split_at_checked(u32::from_le_bytes(*length) as usize) else { break };
        let string = str::from_utf8(string)
            .map_err(|_| "strings that are not UTF-8 have no form in JSON; ask for binary_data")?;
        if rest.len() < raw.len() {
            out.push(b',');
        }
        let _ = serde_json::to_writer(&mut *out, string); // into memory
        rest = after;
    }
    out.push(b']');
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{budget::Budget, metrics::Metrics};

    const NUMBERS: [DType; 10] = [
        DType::Uint8,
        DType::Uint16,
        DType::Uint32,
        DType::Uint64,
        DType::Int8,
        DType::Int16,
        DType::Int32,
        DType::Int64,
        DType::Fp32,
        DType::Fp64,
    ];

    fn there_and_back(dtype: DType, raw: &[u8]) -> Bytes {
        let mut text = Vec::new();
        write(&mut text, dtype, raw).unwrap();
        let mut reader = Reader::new(&text);
        let (back, _) = read(&mut reader, dtype, &mut Growth::new(None)).unwrap();
        reader.end().unwrap();
        back
    }

    fn refused(dtype: DType, text: &str) -> String {
        read(&mut Reader::new(text.as_bytes()), dtype, &mut Growth::new(None)).unwrap_err().to_string()
    }

    #[test]
    fn what_grows_when_it_is_read_is_taken_and_refused_where_there_is_no_room() {
        let text = format!("[{}0]", "0,".repeat(999));
        let budget = Budget::new(10_000, Metrics::new().budget());
        let held = || budget.claim(10_000).map_or_else(|spent| spent.held, |_| 0);
        let tally = budget.tally();
        let mut growth = Growth::new(Some(tally.clone()));
        read(&mut Reader::new(text.as_bytes()), DType::Int8, &mut growth).unwrap();
        assert!(held() < 16, "hardly more than the text");
        let (raw, _) = read(&mut Reader::new(text.as_bytes()), DType::Int64, &mut growth).unwrap();
        let grown = held();
        assert!((raw.len() - text.len()..2 * raw.len() + text.len()).contains(&grown), "{grown}");
        let error = read(&mut Reader::new(text.as_bytes()), DType::Fp64, &mut growth).unwrap_err();
        assert!(matches!(error, ReadError::Spent(_)), "{error}");
        drop((growth, tally));
        assert_eq!(held(), 0, "it is there until the request is done");
    }

    #[test]
    fn elements_beyond_their_type_are_refused_where_they_stand() {
        assert!(refused(DType::Uint8, "[1, 256]").contains("at byte 4: 256 is no UINT8"));
        assert!(refused(DType::Int64, "[1.5]").contains("1.5 is no INT64"));
        assert!(refused(DType::Int32, "[NaN]").contains("NaN is no INT32"));
        assert!(refused(DType::Int32, &format!("[{}]", "9".repeat(1 << 20))).len() < 200);
        assert!(refused(DType::Bool, "[1]").contains("`true` or `false`"));
        assert!(refused(DType::Bytes, "[1]").contains("a string should be here"));
        assert!(refused(DType::Fp32, "[\"1\"]").contains("a number should be here"));
        assert!(refused(DType::Fp16, "[1]").contains("binary"));
    }

    #[test]
    fn floats_keep_what_json_has_no_words_for() {
        let floats = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-45, f32::MAX, 1.0];
        let raw: Vec<u8> = floats.iter().flat_map(|float| float.to_le_bytes()).collect();
        let mut text = Vec::new();
        write(&mut text, DType::Fp32, &raw).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), "[NaN,Infinity,-Infinity,-0.0,1e-45,3.4028235e38,1.0]");
        assert_eq!(there_and_back(DType::Fp32, &raw), raw);
    }

    #[test]
    fn what_json_cannot_hold_is_said() {
        let mut out = Vec::new();
        assert!(write(&mut out, DType::Bytes, &[1, 0, 0, 0, 0xff]).unwrap_err().contains("UTF-8"));
        assert!(write(&mut out, DType::Bf16, &[0, 0]).unwrap_err().contains("BF16"));
    }

    proptest! {
        #[test]
        fn numbers_come_back_to_the_bit(raw in prop::collection::vec(any::<[u8; 8]>(), 0..16), kind in 0..NUMBERS.len()) {
            let mut raw = raw.concat();
            if kind >= 8 {
                // Not-a-numbers come back as the one that has a name.
                let width = if NUMBERS[kind] == DType::Fp32 { 4 } else { 8 };
                for float in raw.chunks_mut(width) {
                    float[width - 1] &= 0xbf;
                }
            }
            prop_assert_eq!(there_and_back(NUMBERS[kind], &raw), raw);
        }

        #[test]
        fn strings_come_back(strings: Vec<String>) {
            let raw: Vec<u8> =
                strings.iter().flat_map(|s| [&(s.len() as u32).to_le_bytes(), s.as_bytes()].concat()).collect();
            prop_assert_eq!(there_and_back(DType::Bytes, &raw), raw);
        }
    }
}

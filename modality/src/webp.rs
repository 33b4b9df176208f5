//! What a WebP hides from the check of its header. The container announces one size and each frame inside its own, and
//! the decoder makes room for a frame, or for metadata, before it compares them.

use std::ops::Range;

use crate::error::{ModalityError, Unit};
use crate::image::ImageLimits;

/// Refuses a WebP with a lossy frame beyond the pixel limit, or with EXIF data that claims to be longer than the file.
///
/// Every place where such a chunk could start is looked at, instead of following the chunks as a decoder does: whatever
/// path the decoder takes, it cannot meet a chunk that was not seen here. But for the words of metadata, which may be about EXIF.
pub(crate) fn inspect(bytes: &[u8], limits: &ImageLimits) -> Result<(), ModalityError> {
    let words = metadata(bytes);
    let is_word = |position: &usize| words.iter().any(|words| words.contains(position));
    let starts = bytes.iter().enumerate().filter(|(_, byte)| matches!(byte, b'V' | b'E')).map(|(position, _)| position);
    for position in starts.filter(|position| !is_word(position)) {
        match &bytes[position..] {
            // Name, size of the chunk, frame tag, start code, width and height of 14 bits each.
            [b'V', b'P', b'8', b' ', _, _, _, _, _, _, _, 0x9d, 0x01, 0x2a, w0, w1, h0, h1, ..] => {
                let side = |low, high| u64::from(u16::from_le_bytes([low, high]) & 0x3fff);
                let pixels = side(*w0, *w1) * side(*h0, *h1);
                if pixels > limits.max_pixels {
                    let (got, limit) = (pixels, limits.max_pixels);
                    return Err(ModalityError::TooLarge { modality: "image", unit: Unit::Pixels, got, limit });
                }
            }
            [b'E', b'X', b'I', b'F', a, b, c, d, rest @ ..] => {
                let claimed = u32::from_le_bytes([*a, *b, *c, *d]);
                if claimed as usize > rest.len() {
                    let reason = format!("its EXIF data claims {claimed} bytes, there are {}", rest.len());
                    return Err(ModalityError::BrokenImage { format: "WebP", reason });
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Where whole chunks of XMP and colour profiles are, which no decoder looks into.
fn metadata(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    // The name of the container, its size, and what it contains.
    let mut at = 12;
    while let Some([name @ .., a, b, c, d]) = bytes.get(at..).and_then(<[u8]>::first_chunk::<8>) {
        let start = at + 8;
        let Some(end) = start.checked_add(u32::from_le_bytes([*a, *b, *c, *d]) as usize) else { break };
        if end > bytes.len() {
            break;
        }
        if matches!(name, b"XMP " | b"ICCP") {
            found.push(start..end);
        }
        // An odd chunk is filled up.
        at = end + end % 2;
    }
    found
}

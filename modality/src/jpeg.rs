//! What the decoder of JPEG does not say: that a file was cut off. It makes up what is missing.

use crate::error::ModalityError;

/// The markers that matter here (ITU-T T.81, table B.1).
const END_OF_IMAGE: u8 = 0xd9;
const START_OF_IMAGE: u8 = 0xd8;

/// Refuses a JPEG that ends before its end marker. What comes behind that is left alone.
///
/// # Errors
/// [`ModalityError::BrokenImage`].
pub(crate) fn check_end(bytes: &[u8]) -> Result<(), ModalityError> {
    let truncated = || ModalityError::BrokenImage {
        format: "JPEG",
        reason: format!("it is cut off: its {} bytes have no end marker", bytes.len()),
    };
    let mut rest = bytes;
    loop {
        // Data of a scan, in which each 0xff that is no marker has a 0 behind it, and fill bytes.
        let at =
            rest.windows(2).position(|pair| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff)).ok_or_else(truncated)?;
        let marker = rest[at + 1];
        rest = &rest[at + 2..];
        match marker {
            END_OF_IMAGE => return Ok(()),
            // Those without a segment: restarts, the start, and one for arithmetic coding.
            START_OF_IMAGE | 0xd0..=0xd7 | 0x01 => {}
            _ => {
                let length = rest.first_chunk().map(|length| usize::from(u16::from_be_bytes(*length)));
                rest = length.and_then(|length| rest.get(length..)).ok_or_else(truncated)?;
            }
        }
    }
}

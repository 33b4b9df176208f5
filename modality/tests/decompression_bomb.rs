//! A bomb is refused from its header. Alone in its process, because it watches the process's memory.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use sensorium_modality::{
    ImageConfig, ImageLimits, ImageProcessor, Modality as _, ModalityError, Resize, RgbImage, Unit, decode_image,
};

/// Largest memory this process ever used, in KiB.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1))))
}

fn chunk(kind: [u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [&kind[..], data].concat();
    [&(data.len() as u32).to_be_bytes(), body.as_slice(), &crc32(&body).to_be_bytes()].concat()
}

/// A whole PNG header of 8-bit RGB, and the start of its pixels.
fn png(width: u32, height: u32) -> Vec<u8> {
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    let zeros = b"\x78\x9c\xed\xc1\x01\x01\x00\x00\x00\x80";
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(*b"IHDR", &header), chunk(*b"IDAT", zeros), chunk(*b"IEND", b"")].concat()
}

fn riff(chunks: &[(&[u8; 4], &[u8])]) -> Vec<u8> {
    let mut body = b"WEBP".to_vec();
    for (name, data) in chunks {
        body.extend([&name[..], &(data.len() as u32).to_le_bytes(), data].concat());
        body.extend(&[0][..data.len() % 2]);
    }
    [b"RIFF", &(body.len() as u32).to_le_bytes()[..], &body].concat()
}

/// A lossless WebP whose header announces 16383 x 16383.
fn lossless_webp() -> Vec<u8> {
    let bits: u32 = 0x3ffe | (0x3ffe << 14);
    riff(&[(b"VP8L", &[&[0x2f][..], &bits.to_le_bytes(), &[0; 7]].concat())])
}

/// Extended header of a canvas of one pixel.
const CANVAS: &[u8] = &[0; 10];

/// A lossy frame of 16383 x 16383 pixels, all of whose bits are zero.
fn lossy_frame() -> Vec<u8> {
    [&[0x10, 0x02, 0, 0x9d, 0x01, 0x2a, 0xff, 0x3f, 0xff, 0x3f][..], &[0; 64]].concat()
}

/// Such a frame in a container that announces one pixel.
fn hidden_frame() -> Vec<u8> {
    riff(&[(b"VP8X", CANVAS), (b"VP8 ", &lossy_frame())])
}

/// The same as the first frame of an animation.
fn hidden_animation_frame() -> Vec<u8> {
    let frame = [&[0; 16][..], b"VP8 ", &(lossy_frame().len() as u32).to_le_bytes(), &lossy_frame()].concat();
    riff(&[(b"VP8X", &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0]), (b"ANIM", &[0; 6]), (b"ANMF", &frame)])
}

#[test]
fn a_bomb_is_refused_from_its_header_with_little_memory() {
    let limits = ImageLimits::default();
    decode_image(&png(4, 4), &limits).unwrap_err(); // decoders' own tables are there from now on
    let before = peak_memory();
    for bytes in [png(50_000, 50_000), lossless_webp(), hidden_frame(), hidden_animation_frame()] {
        let error = decode_image(&bytes, &limits).unwrap_err();
        assert!(matches!(error, ModalityError::TooLarge { unit: Unit::Pixels, limit: 32_000_000, .. }), "{error:?}");
    }
    // One line of this one is beyond the limit, so its decoder does not even start.
    let error = decode_image(&png(u32::MAX >> 1, 1), &limits).unwrap_err();
    assert!(error.to_string().ends_with("needs more than the limit of 268435456 bytes"), "{error}");
    let grown = peak_memory() - before;
    assert!(grown < 4 * 1024, "{grown} KiB");
    // Within all limits, and 9 GiB if it were resized from top to bottom first.
    let image = RgbImage::from_pixel(2_500_000, 1, image::Rgb([7; 3]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    let config = ImageConfig { size: 224, mean: [0.5; 3], std: [0.5; 3], resize: Resize::Exact };
    let before = peak_memory();
    let (processor, bytes) = (ImageProcessor::new(config).unwrap(), bytes.into_inner());
    let expected = processor.open(&bytes).unwrap().memory();
    processor.process(&bytes).unwrap();
    let grown = (peak_memory() - before) * 1024;
    assert!(grown <= expected + (4 << 20) && expected < 128 << 20, "{grown} bytes of {expected}");
}

#[test]
fn metadata_that_claims_more_than_there_is_is_refused() {
    let mut bytes = riff(&[(b"VP8X", &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0]), (b"VP8 ", &[0; 10]), (b"EXIF", b"II*\0")]);
    let size = bytes.len() - 8;
    bytes[size..size + 4].copy_from_slice(&4_000_000_000_u32.to_le_bytes());
    let error = decode_image(&bytes, &ImageLimits::default()).unwrap_err();
    assert!(error.to_string().ends_with("its EXIF data claims 4000000000 bytes, there are 4"), "{error}");
}

#[test]
fn a_header_that_promises_more_than_there_is_costs_no_more_than_the_limit() {
    let limits = ImageLimits { max_pixels: u64::MAX, max_decoded_bytes: 1 << 20, ..ImageLimits::default() };
    let error = decode_image(&png(50_000, 50_000), &limits).unwrap_err();
    assert!(matches!(error, ModalityError::TooLarge { unit: Unit::DecodedBytes, .. }), "{error:?}");
}

//! What images become, and what is refused before it costs anything.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Cursor;

use image::codecs::jpeg::JpegEncoder;
use image::{DynamicImage, ImageFormat, Rgb};
use proptest::prelude::*;
use sensorium_modality::{
    CostUnit, ImageConfig, ImageLimits, ImageProcessor, Modality, ModalityError, Resize, RgbImage, Unit, decode_image,
    flip_horizontal,
};

fn config(size: u32) -> ImageConfig {
    ImageConfig { size, mean: [0.5; 3], std: [0.5; 3], resize: Resize::Exact }
}

/// Every pixel tells where it is.
fn gradient(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([(x * 3 % 256) as u8, (y * 5 % 256) as u8, ((x + y) % 256) as u8]))
}

fn encode(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

#[test]
fn png_and_webp_are_decoded_to_the_pixel_and_jpeg_nearly() {
    let image = gradient(31, 17);
    for format in [ImageFormat::Png, ImageFormat::WebP] {
        assert_eq!(decode_image(&encode(&image, format), &ImageLimits::default()).unwrap(), image);
    }
    let decoded = decode_image(&encode(&image, ImageFormat::Jpeg), &ImageLimits::default()).unwrap();
    let mean_difference =
        decoded.iter().zip(image.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / image.len() as f64;
    assert!(mean_difference < 8.0, "{mean_difference}");
}

#[test]
fn interleaved_pixels_are_the_planar_ones_in_another_order() {
    let processor = ImageProcessor::new(config(8)).unwrap();
    let image = gradient(8, 8);
    let planar = processor.normalize(&image).unwrap();
    let planar = planar.as_slice::<f32>().unwrap();
    let mut interleaved = vec![7.0];
    processor.normalize_interleaved(&image, &mut interleaved);
    let expected = (0..64).flat_map(|pixel| (0..3).map(move |channel| planar[channel * 64 + pixel]));
    assert_eq!(interleaved, [7.0].into_iter().chain(expected).collect::<Vec<_>>());
}

#[test]
fn an_image_of_the_models_size_is_normalised_and_nothing_else() {
    let image = gradient(8, 8);
    let tensor = ImageProcessor::new(config(8)).unwrap().process(&encode(&image, ImageFormat::Png)).unwrap();
    assert_eq!(tensor.shape(), [3, 8, 8]);
    let values = tensor.as_slice::<f32>().unwrap();
    for (x, y, pixel) in image.enumerate_pixels() {
        for channel in 0..3 {
            let found = values[channel * 64 + (y * 8 + x) as usize];
            let wanted = f32::from(pixel.0[channel]) / 127.5 - 1.0;
            assert!((found - wanted).abs() <= 1e-7, "{found} is not {wanted}");
        }
    }
}

#[test]
fn each_channel_has_its_own_mean_and_deviation() {
    let config = ImageConfig { mean: [0.0, 0.5, 1.0], std: [1.0, 0.5, 0.25], ..config(1) };
    let image = RgbImage::from_pixel(1, 1, Rgb([255, 255, 0]));
    let tensor = ImageProcessor::new(config).unwrap().normalize(&image).unwrap();
    assert_eq!(tensor.as_slice::<f32>().unwrap(), [1.0, 1.0, -4.0]);
}

#[test]
fn another_size_is_resampled_over_the_whole_image() {
    let mut image = RgbImage::from_pixel(40, 20, Rgb([0, 0, 0]));
    for (x, _, pixel) in image.enumerate_pixels_mut() {
        *pixel = if x < 20 { Rgb([255, 0, 0]) } else { Rgb([0, 0, 255]) };
    }
    let resized = ImageProcessor::new(config(10)).unwrap().resize(image);
    assert_eq!(resized.dimensions(), (10, 10));
    assert_eq!((resized.get_pixel(0, 9), resized.get_pixel(9, 0)), (&Rgb([255, 0, 0]), &Rgb([0, 0, 255])));
}

#[test]
fn transparency_is_dropped_and_grey_becomes_colour() {
    let limits = ImageLimits::default();
    let mut bytes = Cursor::new(Vec::new());
    let transparent = image::RgbaImage::from_pixel(2, 2, image::Rgba([9, 8, 7, 0]));
    transparent.write_to(&mut bytes, ImageFormat::Png).unwrap();
    assert_eq!(decode_image(bytes.get_ref(), &limits).unwrap().get_pixel(0, 0), &Rgb([9, 8, 7]));
    let mut bytes = Cursor::new(Vec::new());
    DynamicImage::new_luma16(2, 2).write_to(&mut bytes, ImageFormat::Png).unwrap();
    assert_eq!(decode_image(bytes.get_ref(), &limits).unwrap().get_pixel(1, 1), &Rgb([0, 0, 0]));
}

#[test]
fn a_photo_taken_sideways_is_turned_upright() {
    // An EXIF block with one entry: orientation (0x0112), a short, 6: rotate by 90 degrees to view.
    let exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0".to_vec();
    let mut bytes = Vec::new();
    let mut encoder = JpegEncoder::new(&mut bytes);
    image::ImageEncoder::set_exif_metadata(&mut encoder, exif).unwrap();
    encoder.encode_image(&gradient(32, 16)).unwrap();
    let decoded = decode_image(&bytes, &ImageLimits::default()).unwrap();
    assert_eq!(decoded.dimensions(), (16, 32));
}

#[test]
fn flipping_twice_changes_nothing_and_once_swaps_the_sides() {
    let image = gradient(7, 3);
    let mut flipped = image.clone();
    flip_horizontal(&mut flipped);
    assert_eq!(flipped.get_pixel(0, 2), image.get_pixel(6, 2));
    flip_horizontal(&mut flipped);
    assert_eq!(flipped, image);
}

#[test]
fn the_format_is_told_by_content_and_others_are_refused() {
    let gif = b"GIF89a\x01\0\x01\0\0\0\0;";
    for (bytes, found) in
        [(&gif[..], "image/gif"), (b"hello", "[68, 65, 6c, 6c, 6f]"), (b"", "[]"), (b"BM\0\0\0\0", "image/bmp")]
    {
        let error = decode_image(bytes, &ImageLimits::default()).unwrap_err();
        assert!(matches!(error, ModalityError::UnsupportedFormat { .. }), "{error:?}");
        assert!(error.to_string().contains(found), "{error}");
    }
}

#[test]
fn too_many_bytes_are_refused_unread() {
    let limits = ImageLimits { max_bytes: 10, ..ImageLimits::default() };
    let error = decode_image(&[0; 11], &limits).unwrap_err();
    assert_eq!(error.to_string(), "the image has 11 bytes, the limit is 10");
}

#[test]
fn pixels_are_counted_in_the_header_for_every_format() {
    let limits = ImageLimits { max_pixels: 99, ..ImageLimits::default() };
    let processor = ImageProcessor::new(config(4)).unwrap().with_limits(limits);
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP] {
        let bytes = encode(&gradient(10, 10), format);
        for error in [processor.process(&bytes).unwrap_err(), processor.open(&bytes).unwrap_err()] {
            assert!(
                matches!(error, ModalityError::TooLarge { unit: Unit::Pixels, got: 100, limit: 99, .. }),
                "{error:?}"
            );
        }
    }
}

#[test]
fn memory_for_decoded_pixels_has_its_own_limit() {
    let limits = ImageLimits { max_decoded_bytes: 299, ..ImageLimits::default() };
    let error = decode_image(&encode(&gradient(10, 10), ImageFormat::Png), &limits).unwrap_err();
    assert!(
        matches!(error, ModalityError::TooLarge { unit: Unit::DecodedBytes, got: 300, limit: 299, .. }),
        "{error:?}"
    );
}

#[test]
fn a_truncated_image_is_broken_and_says_which_kind() {
    let formats = [(ImageFormat::Png, "PNG"), (ImageFormat::WebP, "WebP"), (ImageFormat::Jpeg, "JPEG")];
    for ((format, name), whole) in formats.into_iter().flat_map(|format| [(format, 0.5), (format, 0.98)]) {
        let bytes = encode(&gradient(60, 60), format);
        let cut = (bytes.len() as f64 * whole) as usize;
        let error = decode_image(&bytes[..cut], &ImageLimits::default()).unwrap_err();
        assert!(matches!(error, ModalityError::BrokenImage { format, .. } if format == name), "{error:?}");
        assert!(error.is_callers_fault());
    }
}

#[test]
fn a_jpeg_is_whole_with_a_thumbnail_before_it_and_whatever_behind_it_and_not_by_the_end_of_the_thumbnail() {
    let whole = encode(&gradient(60, 60), ImageFormat::Jpeg);
    // A segment of metadata that has a whole picture in it, behind the start of the image.
    let thumbnail = encode(&gradient(8, 8), ImageFormat::Jpeg);
    let segment = [&[0xff, 0xe1][..], &(thumbnail.len() as u16 + 2).to_be_bytes(), &thumbnail].concat();
    let with = [&whole[..2], &segment, &whole[2..]].concat();
    let more = [&with[..], b"and a trailer"].concat();
    for bytes in [&whole, &with, &more] {
        assert_eq!(decode_image(bytes, &ImageLimits::default()).unwrap().dimensions(), (60, 60));
    }
    let error = decode_image(&with[..with.len() - 2], &ImageLimits::default()).unwrap_err();
    let said = format!("it is cut off: its {} bytes have no end marker", with.len() - 2);
    assert!(error.to_string().ends_with(&said), "{error}");
}

#[test]
fn words_of_metadata_are_no_chunks_of_a_webp() {
    let whole = encode(&gradient(9, 9), ImageFormat::WebP);
    let chunk = |name: &[u8; 4], data: &[u8]| {
        [&name[..], &(data.len() as u32).to_le_bytes(), data, &[0][..data.len() % 2]].concat()
    };
    // Its canvas, which is one less on either side, and that there is XMP.
    let canvas = chunk(b"VP8X", &[4, 0, 0, 0, 8, 0, 0, 8, 0, 0]);
    let words = chunk(b"XMP ", b"<x>keeps the EXIF orientation</x>");
    let body = [b"WEBP".to_vec(), canvas, whole[12..].to_vec(), words].concat();
    let bytes = [b"RIFF".to_vec(), (body.len() as u32).to_le_bytes().to_vec(), body].concat();
    assert_eq!(decode_image(&bytes, &ImageLimits::default()).unwrap(), gradient(9, 9));
}

#[test]
fn a_strip_is_resized_as_the_one_that_stands() {
    let limits = ImageLimits { max_decoded_bytes: 64 << 10, ..ImageLimits::default() };
    let processor = ImageProcessor::new(config(8)).unwrap().with_limits(limits);
    // 8 x 16 bytes for each column, of which the first strip has too many.
    let strip = gradient(600, 3);
    let standing = RgbImage::from_fn(3, 600, |x, y| *strip.get_pixel(y, x));
    let turned = processor.resize(standing);
    let lying = processor.resize(strip.clone());
    // Sums of floats in another order, and nothing else.
    let are_near = |a: &Rgb<u8>, b: &Rgb<u8>| a.0.iter().zip(b.0).all(|(a, b)| a.abs_diff(b) <= 1);
    assert!(lying.enumerate_pixels().all(|(x, y, pixel)| are_near(pixel, turned.get_pixel(y, x))));
    let plain = ImageProcessor::new(config(8)).unwrap().resize(strip);
    assert!(lying.pixels().zip(plain.pixels()).all(|(a, b)| are_near(a, b)));
}

#[test]
fn the_cost_of_an_image_is_its_pixels_as_it_arrived() {
    let (processor, bytes) = (ImageProcessor::new(config(4)).unwrap(), encode(&gradient(30, 20), ImageFormat::Jpeg));
    let cost = processor.open(&bytes).unwrap().cost();
    assert_eq!((cost.unit, cost.amount), (CostUnit::Pixels, 600));
}

#[test]
fn settings_that_cannot_normalise_are_refused_by_name() {
    let refused = |config| ImageProcessor::new(config).unwrap_err().to_string();
    assert_eq!(refused(config(0)), "image.size is 0, it must be 1 to 4096 pixels");
    assert_eq!(
        refused(ImageConfig { std: [1.0, 0.0, 1.0], ..config(4) }),
        "image.std is 0, it must be a positive number per channel"
    );
    assert!(refused(ImageConfig { mean: [f32::NAN; 3], ..config(4) }).starts_with("image.mean is NaN"));
}

fn any_format() -> impl Strategy<Value = ImageFormat> {
    prop::sample::select(vec![ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_bytes_decode_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        if let Err(error) = decode_image(&bytes, &ImageLimits::default()) {
            prop_assert!(error.is_callers_fault(), "{error}");
        }
    }

    #[test]
    fn a_damaged_image_decodes_or_is_refused(
        format in any_format(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = encode(&gradient(24, 24), format);
        for (position, byte) in damage {
            let position = position.index(bytes.len());
            bytes[position] = byte;
        }
        let limits = ImageLimits { max_pixels: 10_000, ..ImageLimits::default() };
        for bytes in [&bytes[..], &bytes[..cut.index(bytes.len())]] {
            match decode_image(bytes, &limits) {
                Ok(image) => prop_assert!(u64::from(image.width()) * u64::from(image.height()) <= limits.max_pixels),
                Err(error) => prop_assert!(error.is_callers_fault(), "{error}"),
            }
        }
    }

    #[test]
    fn every_image_becomes_a_row_of_one_shape_with_values_in_range(width in 1_u32..50, height in 1_u32..50, size in 1_u32..20) {
        let bytes = encode(&gradient(width, height), ImageFormat::Png);
        let tensor = ImageProcessor::new(config(size)).unwrap().process(&bytes).unwrap();
        prop_assert_eq!(tensor.shape(), [3, size as usize, size as usize]);
        prop_assert!(tensor.as_slice::<f32>().unwrap().iter().all(|value| (-1.0..=1.0).contains(value)));
    }
}

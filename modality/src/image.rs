use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::imageops::{self, FilterType};
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};
use serde::{Deserialize, Serialize};

pub use image::RgbImage;

use crate::error::{ModalityError, Unit};
use crate::jpeg;
use crate::modality::{Cost, CostUnit, Modality, Opened};
use crate::tensor::Tensor;
use crate::webp;

/// Image preparation that is part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ImageConfig {
    /// Height and width of the model's input, in pixels.
    pub size: u32,
    /// Subtracted from each channel (red, green, blue) once it is scaled to `0..=1`.
    pub mean: [f32; 3],
    /// Divides each channel after that; positive.
    pub std: [f32; 3],
    /// How an image of another size becomes `size` x `size`.
    pub resize: Resize,
}

/// How an image is brought to the model's size. One that has it already is left as it is, to the bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Resize {
    /// Height and width are scaled independently, so that the whole image stays visible; bilinear.
    #[default]
    Exact,
}

/// What is accepted from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageLimits {
    /// Bytes of the encoded image.
    pub max_bytes: u64,
    /// Width times height, read from the header before anything is decoded. This is what bounds memory: decoders take
    /// up to 12 bytes for a pixel on their way.
    pub max_pixels: u64,
    /// Bytes of the decoded pixels as the header describes them, depth and transparency included, and at most what a
    /// decoder may allocate where it knows such a limit.
    pub max_decoded_bytes: u64,
}

impl Default for ImageLimits {
    /// 16 MiB encoded, 32 megapixels, 256 MiB decoded: any camera picture passes.
    fn default() -> Self {
        Self { max_bytes: 16 << 20, max_pixels: 32_000_000, max_decoded_bytes: 256 << 20 }
    }
}

/// Decodes a PNG, JPEG or WebP, told apart by content alone, to 8-bit RGB; the first frame of an animation. Turns it
/// upright as its EXIF orientation says, and drops transparency without blending.
///
/// # Errors
/// A limit that the bytes or the header exceed (nothing is decoded then), another format, or broken content.
pub fn decode_image(bytes: &[u8], limits: &ImageLimits) -> Result<RgbImage, ModalityError> {
    open(bytes, limits)?.decode()
}

/// Mirrors left and right in place: an augmentation of training.
pub fn flip_horizontal(image: &mut RgbImage) {
    imageops::flip_horizontal_in_place(image);
}

/// An image whose header was read and is within the limits.
struct Undecoded<'a, D> {
    bytes: &'a [u8],
    format: Format,
    limits: ImageLimits,
    decoder: D,
    /// Width and height that the header announces, in pixels.
    dimensions: (u32, u32),
}

impl<D: ImageDecoder> Undecoded<'_, D> {
    fn decode(self) -> Result<RgbImage, ModalityError> {
        let Self { bytes, format, limits, mut decoder, .. } = self;
        let broken = |error| broken(format, &limits, &error);
        guarded(format, || {
            if format == Format::Jpeg {
                jpeg::check_end(bytes)?;
            }
            let orientation = decoder.orientation().map_err(broken)?;
            let mut image = DynamicImage::from_decoder(decoder).map_err(broken)?;
            image.apply_orientation(orientation);
            Ok(image.into_rgb8())
        })
    }
}

fn sniff(bytes: &[u8], limits: &ImageLimits) -> Result<Format, ModalityError> {
    if bytes.len() as u64 > limits.max_bytes {
        return Err(too_large(Unit::Bytes, bytes.len() as u64, limits.max_bytes));
    }
    match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => Ok(Format::Png),
        Ok(ImageFormat::Jpeg) => Ok(Format::Jpeg),
        Ok(ImageFormat::WebP) => Ok(Format::WebP),
        Ok(other) => {
            Err(ModalityError::UnsupportedFormat { found: format!("the signature of {}", other.to_mime_type()) })
        }
        Err(_) => Err(ModalityError::UnsupportedFormat { found: format!("{:02x?}", &bytes[..bytes.len().min(8)]) }),
    }
}

/// Reads the header and holds it against the limits.
fn open<'a>(
    bytes: &'a [u8],
    limits: &ImageLimits,
) -> Result<Undecoded<'a, impl ImageDecoder + use<'a>>, ModalityError> {
    let format = sniff(bytes, limits)?;
    guarded(format, || {
        if format == Format::WebP {
            webp::inspect(bytes, limits)?;
        }
        let mut reader = ImageReader::with_format(Cursor::new(bytes), format.codec());
        let mut decoder_limits = image::Limits::no_limits();
        decoder_limits.max_alloc = Some(limits.max_decoded_bytes);
        reader.limits(decoder_limits);
        let decoder = reader.into_decoder().map_err(|error| broken(format, limits, &error))?;
        let dimensions @ (width, height) = decoder.dimensions();
        let pixels = u64::from(width) * u64::from(height);
        if pixels > limits.max_pixels {
            return Err(too_large(Unit::Pixels, pixels, limits.max_pixels));
        }
        if decoder.total_bytes() > limits.max_decoded_bytes {
            return Err(too_large(Unit::DecodedBytes, decoder.total_bytes(), limits.max_decoded_bytes));
        }
        Ok(Undecoded { bytes, format, limits: *limits, decoder, dimensions })
    })
}

/// Decoders are other people's code run on strangers' bytes: a panic in one is that image's error, nobody else's. What it worked
/// on is not looked at again.
fn guarded<T>(format: Format, decode: impl FnOnce() -> Result<T, ModalityError>) -> Result<T, ModalityError> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|_| {
        Err(ModalityError::BrokenImage { format: format.name(), reason: "the decoder gave up on it".to_owned() })
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Png,
    Jpeg,
    WebP,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Png => "PNG",
            Self::Jpeg => "JPEG",
            Self::WebP => "WebP",
        }
    }

    fn codec(self) -> ImageFormat {
        match self {
            Self::Png => ImageFormat::Png,
            Self::Jpeg => ImageFormat::Jpeg,
            Self::WebP => ImageFormat::WebP,
        }
    }
}

fn broken(format: Format, limits: &ImageLimits, error: &ImageError) -> ModalityError {
    let reason = match error {
        // Met on the way: the header alone did not show it.
        ImageError::Limits(_) => format!("its decoder needs more than the limit of {} bytes", limits.max_decoded_bytes),
        _ => error.to_string(),
    };
    ModalityError::BrokenImage { format: format.name(), reason }
}

fn too_large(unit: Unit, got: u64, limit: u64) -> ModalityError {
    ModalityError::TooLarge { modality: "image", unit, got, limit }
}

/// Bytes that decoding takes for a pixel at most: 16 bits of four channels, once more where it is turned upright, and what comes of it.
const DECODING: u64 = 20;

/// Turns encoded images into a model's pixel rows.
#[derive(Clone, Debug)]
pub struct ImageProcessor {
    config: ImageConfig,
    limits: ImageLimits,
    /// The normalised value of each byte, per channel: one rounding, done once, for trainer and server alike.
    table: Box<[[f32; 256]; 3]>,
}

impl ImageProcessor {
    /// # Errors
    /// A size of zero or beyond 4096, or a `mean` or `std` that cannot normalise.
    pub fn new(config: ImageConfig) -> Result<Self, ModalityError> {
        if !(1..=4096).contains(&config.size) {
            return Err(bad_config("image.size", &config.size, "1 to 4096 pixels"));
        }
        if let Some(mean) = config.mean.iter().find(|mean| !mean.is_finite()) {
            return Err(bad_config("image.mean", mean, "a finite number per channel"));
        }
        if let Some(std) = config.std.iter().find(|std| !std.is_normal() || std.is_sign_negative()) {
            return Err(bad_config("image.std", std, "a positive number per channel"));
        }
        let mut table = Box::new([[0.0; 256]; 3]);
        for (channel, values) in table.iter_mut().enumerate() {
            let (mean, std) = (f64::from(config.mean[channel]), f64::from(config.std[channel]));
            for (byte, value) in values.iter_mut().enumerate() {
                *value = ((byte as f64 / 255.0 - mean) / std) as f32;
            }
        }
        Ok(Self { config, limits: ImageLimits::default(), table })
    }

    /// Replaces the limits on what is accepted.
    #[must_use]
    pub fn with_limits(self, limits: ImageLimits) -> Self {
        Self { limits, ..self }
    }

    /// The settings in use.
    pub fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// Brings an image to the model's size.
    pub fn resize(&self, image: RgbImage) -> RgbImage {
        let (size, (width, height)) = (self.config.size, image.dimensions());
        if (width, height) == (size, size) {
            return image;
        }
        let resize = |image: &RgbImage| imageops::resize(image, size, size, FilterType::Triangle);
        match self.config.resize {
            Resize::Exact if self.lies(width, height) => imageops::rotate270(&resize(&imageops::rotate90(&image))),
            Resize::Exact => resize(&image),
        }
    }

    /// Whether an image is a strip that has to stand up to be resized. All columns are brought to the new height first, which makes
    /// four floats for each column and each new row: gigabytes of a strip whose width alone has all the pixels that there may be.
    fn lies(&self, width: u32, height: u32) -> bool {
        width > height && self.resizing(width) > self.limits.max_decoded_bytes
    }

    /// Bytes between the two halves of resizing so many columns.
    fn resizing(&self, columns: u32) -> u64 {
        u64::from(columns) * u64::from(self.config.size) * 4 * size_of::<f32>() as u64
    }

    /// Pixels to f32 `[3, height, width]`, each channel as `(x / 255 - mean) / std`.
    ///
    /// # Errors
    /// None for an image that [`ImageProcessor::resize`] returned.
    pub fn normalize(&self, image: &RgbImage) -> Result<Tensor, ModalityError> {
        let (width, height) = (image.width() as usize, image.height() as usize);
        let mut values = Vec::with_capacity(3 * width * height);
        for (channel, table) in self.table.iter().enumerate() {
            values.extend(image.pixels().map(|pixel| table[usize::from(pixel.0[channel])]));
        }
        Ok(Tensor::from_vec([3, height, width], values)?)
    }

    /// The same numbers as [`ImageProcessor::normalize`] gives, added to `into` pixel by pixel, `[height, width, 3]`: the
    /// order in which libtorch convolves fastest.
    pub fn normalize_interleaved(&self, image: &RgbImage, into: &mut Vec<f32>) {
        let [red, green, blue] = &*self.table;
        let (pixels, _) = image.as_raw().as_chunks::<3>();
        let start = into.len();
        into.resize(start + 3 * pixels.len(), 0.0);
        let (rows, _) = into[start..].as_chunks_mut::<3>();
        for (values, &[r, g, b]) in rows.iter_mut().zip(pixels) {
            *values = [red[usize::from(r)], green[usize::from(g)], blue[usize::from(b)]];
        }
    }
}

impl Modality for ImageProcessor {
    fn name(&self) -> &'static str {
        "image"
    }

    fn input_name(&self) -> &'static str {
        "pixel_values"
    }

    /// Reads the header, which has the pixels that it costs. Makes f32 `[3, size, size]`: decoded, resized, normalised.
    fn open<'a>(&'a self, item: &'a [u8]) -> Result<Opened<'a>, ModalityError> {
        let image = open(item, &self.limits)?;
        let (width, height) = image.dimensions;
        let pixels = u64::from(width) * u64::from(height);
        // It may lie on its side until it is turned upright.
        let columns = |width, height| if self.lies(width, height) { height } else { width };
        let columns = columns(width, height).max(columns(height, width));
        let memory = pixels * DECODING + self.resizing(columns);
        let cost = Cost { unit: CostUnit::Pixels, amount: pixels };
        Ok(Opened::new(cost, memory, move || self.normalize(&self.resize(image.decode()?))))
    }
}

fn bad_config(field: &'static str, value: &dyn ToString, wanted: &'static str) -> ModalityError {
    ModalityError::BadConfig { field, value: value.to_string(), wanted }
}

//! From a picture to the bytes of a file.

use std::{borrow::Cow, fmt, path::Path};

use image::{
    ExtendedColorType, ImageEncoder, ImageError,
    codecs::{jpeg::JpegEncoder, webp::WebPEncoder},
};

use super::{
    metadata::{self, EditRecord},
    picture::Picture,
    sizes::Size,
};
use crate::error::{Error, PictureError, Result};

/// JPEG quality that is used where none is given.
pub const JPEG_QUALITY: u8 = 95;
const FORMATS: &str = "png, jpg, jpeg or webp";

/// A format that pictures are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Lossless; keeps alpha, the ICC profile and the record of the edit.
    Png,
    /// Lossy, quality 95; keeps the ICC profile; transparent parts come out over white.
    Jpeg,
    /// Lossless; keeps alpha and the ICC profile.
    WebP,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Png => "PNG",
            Self::Jpeg => "JPEG",
            Self::WebP => "WebP",
        })
    }
}

impl Format {
    /// The format that a file's extension stands for.
    ///
    /// # Errors
    /// No extension, or one that no format has; the message lists the formats.
    pub fn from_path(path: &Path) -> Result<Self> {
        let extension = path.extension().map(|extension| extension.to_string_lossy());
        let reason = match &extension {
            Some(extension) => match Self::from_name(extension) {
                Ok(format) => return Ok(format),
                Err(_) => format!("unknown extension .{extension}"),
            },
            None => "the name has no extension that says the format".to_owned(),
        };
        let hint =
            format!("end the name in .{}", FORMATS.replace(", ", ", .").replace(" or ", " or ."));
        Err(PictureError::Write { path: path.to_owned(), reason, hint }.into())
    }

    /// The format with this name, in any case: `png`, `jpg`, `jpeg` or `webp`.
    ///
    /// # Errors
    /// Another name.
    pub fn from_name(name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "png" => Ok(Self::Png),
            "jpg" | "jpeg" => Ok(Self::Jpeg),
            "webp" => Ok(Self::WebP),
            _ => Err(Error::field("format", name, FORMATS)),
        }
    }

    /// The longest side that a file of this format can have, in pixels.
    #[must_use]
    pub fn side_px_max(self) -> u32 {
        match self {
            Self::Png => i32::MAX.unsigned_abs(),
            Self::Jpeg => 65_535,
            Self::WebP => 16_383,
        }
    }
}

/// The bytes of a file, and what could not be kept in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The file.
    pub bytes: Vec<u8>,
    /// What the format does not keep, for a person.
    pub notes: Vec<String>,
}

/// Encodes a picture; alpha is put back if it has the picture's size.
///
/// ```
/// use pentimento::pixels::{Format, Limits, Picture, encode_to_vec};
///
/// let picture = Picture::from_rgb(image::RgbImage::from_pixel(4, 3, image::Rgb([9, 8, 7])));
/// let file = encode_to_vec(&picture, Format::Png, None)?;
/// let again = Picture::decode(&file.bytes, "again.png", &Limits::default())?;
/// assert_eq!(again.rgb, picture.rgb);
/// # Ok::<(), pentimento::Error>(())
/// ```
///
/// # Errors
/// A picture that is larger than the format allows.
pub fn encode_to_vec(
    picture: &Picture,
    format: Format,
    record: Option<&EditRecord>,
) -> Result<Encoded> {
    let size = picture.size();
    let allowed = 1..=format.side_px_max();
    if !allowed.contains(&size.width) || !allowed.contains(&size.height) {
        let expected = format!("sides of 1 to {} px in a {format} file", format.side_px_max());
        return Err(Error::field("output size", size, expected));
    }
    let mut notes = Vec::new();
    if picture.alpha.as_ref().is_some_and(|alpha| Size::of(alpha) != size) {
        notes.push("the alpha channel has another size than the picture and is dropped".to_owned());
    }
    let rgba = if format == Format::Jpeg { None } else { picture.to_rgba() };
    if format == Format::Jpeg && picture.alpha.is_some() {
        notes.push("JPEG has no transparency: transparent parts are white".to_owned());
    }
    if format != Format::Png && record.is_some() {
        notes.push(format!("the record of the edit is kept in PNG only, not in {format}"));
    }
    let (samples, colour) = match &rgba {
        Some(rgba) => (rgba.as_raw(), ExtendedColorType::Rgba8),
        None => (picture.rgb.as_raw(), ExtendedColorType::Rgb8),
    };
    let samples = Samples { samples, size, colour, icc: picture.icc.as_deref() };
    let bytes = match format {
        Format::Png => png(&samples, record).map_err(|error| failed(format, &error))?,
        Format::Jpeg => {
            let mut bytes = Vec::new();
            samples
                .encode(JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY))
                .map_err(|error| failed(format, &error))?;
            bytes
        }
        Format::WebP => {
            let mut bytes = Vec::new();
            samples
                .encode(WebPEncoder::new_lossless(&mut bytes))
                .map_err(|error| failed(format, &error))?;
            bytes
        }
    };
    Ok(Encoded { bytes, notes })
}

struct Samples<'a> {
    samples: &'a [u8],
    size: Size,
    colour: ExtendedColorType,
    icc: Option<&'a [u8]>,
}

impl Samples<'_> {
    fn encode(&self, mut encoder: impl ImageEncoder) -> Result<(), ImageError> {
        if let Some(icc) = self.icc {
            encoder.set_icc_profile(icc.to_owned()).map_err(ImageError::Unsupported)?;
        }
        encoder.write_image(self.samples, self.size.width, self.size.height, self.colour)
    }
}

/// The image crate's encoder writes no text, so the png crate is used itself.
fn png(samples: &Samples<'_>, record: Option<&EditRecord>) -> Result<Vec<u8>, png::EncodingError> {
    let mut info = png::Info::with_size(samples.size.width, samples.size.height);
    info.bit_depth = png::BitDepth::Eight;
    info.color_type = match samples.colour {
        ExtendedColorType::Rgba8 => png::ColorType::Rgba,
        _ => png::ColorType::Rgb,
    };
    info.icc_profile = samples.icc.map(|icc| Cow::Owned(icc.to_owned()));
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::with_info(&mut bytes, info)?;
    if let Some(record) = record {
        metadata::add_text(&mut encoder, record, samples.size)?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(samples.samples)?;
    writer.finish()?;
    Ok(bytes)
}

fn failed(format: Format, error: &dyn fmt::Display) -> Error {
    Error::field("output", format!("the {format} encoder said: {error}"), "another format")
}

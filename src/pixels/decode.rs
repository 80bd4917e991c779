//! From the bytes of a file to an upright 8-bit RGB picture.

use std::io::Cursor;

use image::{
    AnimationDecoder, DynamicImage, ExtendedColorType, ImageBuffer, ImageDecoder, ImageError,
    ImageFormat, ImageResult, Pixel,
    codecs::{gif::GifDecoder, png::PngDecoder, webp::WebPDecoder},
    error::DecodingError,
    metadata::Orientation,
};

use super::{
    claims,
    limits::Limits,
    picture::{Picture, over_white},
    probe::{self, not_decoded},
    sizes::Size,
};
use crate::error::Result;

type Source<'a> = Cursor<&'a [u8]>;

/// Where an ICC profile names its colour space, and the name of RGB there.
const ICC_SPACE: std::ops::Range<usize> = 16..20;
const ICC_RGB: &[u8] = b"RGB ";

/// A decoder that has read the header and passed the limits.
pub(super) struct Opened<'a> {
    decoder: Box<dyn ImageDecoder + 'a>,
    pub(super) format: ImageFormat,
    /// Stored size, before the orientation is applied.
    pub(super) stored: Size,
    pub(super) colour: ExtendedColorType,
    pub(super) orientation: Orientation,
    pub(super) icc: Option<Vec<u8>>,
    /// Whether there are more frames or pages than the first.
    pub(super) several: bool,
    is_cmyk: bool,
    /// Whether the file ends before the picture does.
    is_cut: bool,
}

/// Decodes `bytes`; the rules are those of the module's page.
pub(super) fn decode(bytes: &[u8], name: &str, limits: &Limits) -> Result<Picture> {
    let opened = open(bytes, name, limits)?;
    let mut notes = notes_on(&opened);
    let icc = opened.icc.filter(|profile| profile.get(ICC_SPACE) == Some(ICC_RGB));
    let mut picture = DynamicImage::from_decoder(opened.decoder)
        .map_err(|error| described(name, opened.format, &error))?;
    picture.apply_orientation(opened.orientation);
    let has_alpha = picture.color().has_alpha();
    let (rgb, alpha) = if has_alpha {
        over_white(&in_8_bits(picture).into_rgba8())
    } else {
        (in_8_bits(picture).into_rgb8(), None)
    };
    if alpha.is_some() {
        notes.push("transparent parts are shown to the model over white".to_owned());
    }
    Ok(Picture { rgb, alpha, icc, name: name.to_owned(), notes })
}

/// Reads the header and checks every limit; no pixel is decoded.
pub(super) fn open<'a>(bytes: &'a [u8], name: &str, limits: &Limits) -> Result<Opened<'a>> {
    limits.check_bytes(name, bytes.len() as u64)?;
    let format = probe::picture_format(name, bytes)?;
    let failed = |error: ImageError| described(name, format, &error);
    if let Some((tag, count)) = claims::tiff_beyond_the_file(bytes) {
        let found = format!("tag {tag} has {count} values in a file of {} bytes", bytes.len());
        return Err(not_decoded(name, &found, "the file is damaged; save or download it again"));
    }
    let mut decoder = decoder(bytes, format, limits).map_err(failed)?;
    let (width, height) = decoder.dimensions();
    let stored = Size { width, height };
    if stored.pixels() == 0 {
        return Err(not_decoded(name, &format!("the picture is {stored}"), "save it again"));
    }
    limits.check_size(name, stored, decoder.total_bytes())?;
    decoder.set_limits(strict(limits)).map_err(failed)?;
    // Metadata that is damaged does not make a picture unusable.
    let (mut orientation, mut icc) = (Orientation::NoTransforms, None);
    if claims::webp_chunks_fit(bytes) {
        orientation = decoder.orientation().unwrap_or(orientation);
        icc = decoder.icc_profile().ok().flatten();
    }
    let colour = decoder.original_color_type();
    let several = has_several(bytes, format, limits).map_err(failed)?;
    let is_cmyk = match format {
        ImageFormat::Jpeg => jpeg_channels(bytes) == Some(4),
        _ => matches!(colour, ExtendedColorType::Cmyk8 | ExtendedColorType::Cmyk16),
    };
    let is_cut = format == ImageFormat::Jpeg && jpeg_is_cut(bytes);
    Ok(Opened { decoder, format, stored, colour, orientation, icc, several, is_cmyk, is_cut })
}

fn decoder<'a>(
    bytes: &'a [u8],
    format: ImageFormat,
    limits: &Limits,
) -> ImageResult<Box<dyn ImageDecoder + 'a>> {
    if format == ImageFormat::Png {
        return Ok(Box::new(png_decoder(bytes, limits)?));
    }
    let mut reader = image::ImageReader::with_format(Cursor::new(bytes), format);
    reader.no_limits();
    Ok(Box::new(reader.into_decoder()?))
}

/// Limits what a compressed chunk before the pixels, such as a colour profile, may unpack to.
fn png_decoder<'a>(bytes: &'a [u8], limits: &Limits) -> ImageResult<PngDecoder<Source<'a>>> {
    let mut chunks = image::Limits::no_limits();
    chunks.max_alloc = Some(limits.memory_bytes_max);
    PngDecoder::with_limits(Cursor::new(bytes), chunks)
}

fn strict(limits: &Limits) -> image::Limits {
    let mut strict = image::Limits::no_limits();
    strict.max_image_width = Some(limits.side_px_max);
    strict.max_image_height = Some(limits.side_px_max);
    strict.max_alloc = Some(limits.memory_bytes_max);
    strict
}

/// Whether a file holds more than one frame or page; an animation without frames is an error.
fn has_several(bytes: &[u8], format: ImageFormat, limits: &Limits) -> ImageResult<bool> {
    let source: Source<'_> = Cursor::new(bytes);
    match format {
        ImageFormat::Png => png_decoder(bytes, limits)?.is_apng(),
        ImageFormat::WebP => Ok(WebPDecoder::new(source)?.has_animation()),
        ImageFormat::Gif => {
            let mut decoder = GifDecoder::new(source)?;
            decoder.set_limits(strict(limits))?;
            let mut frames = decoder.into_frames();
            if frames.next().transpose()?.is_none() {
                let none = DecodingError::new(format.into(), "the file holds no frame");
                return Err(ImageError::Decoding(none));
            }
            // A second frame that is damaged is still one that is not used.
            Ok(frames.next().is_some())
        }
        ImageFormat::Tiff => Ok(claims::tiff_has_second_page(bytes).unwrap_or(false)),
        _ => Ok(false),
    }
}

/// The number of channels in a JPEG file's frame header; its decoder tells only what it returns.
fn jpeg_channels(bytes: &[u8]) -> Option<u8> {
    let mut rest = bytes.get(2..)?;
    loop {
        let [0xff, marker, high, low] = *rest.first_chunk::<4>()? else { return None };
        let is_frame = matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc);
        if is_frame {
            return rest.get(9).copied();
        }
        rest = rest.get(2 + usize::from(u16::from_be_bytes([high, low]))..)?;
    }
}

/// Whether a JPEG file ends before its picture does: no end mark after the first scan begins. A
/// preview in the metadata has marks of its own, so whole segments are passed by. Its decoder fills
/// what is missing with grey and says nothing.
fn jpeg_is_cut(bytes: &[u8]) -> bool {
    const SCAN: u8 = 0xda;
    let scan = || {
        let mut rest = bytes.get(2..)?;
        loop {
            let [0xff, marker, high, low] = *rest.first_chunk::<4>()? else { return None };
            rest = rest.get(2 + usize::from(u16::from_be_bytes([high, low]))..)?;
            if marker == SCAN {
                return Some(rest);
            }
        }
    };
    scan().is_some_and(|data| !data.windows(2).any(|pair| pair == [0xff, 0xd9]))
}

fn notes_on(opened: &Opened<'_>) -> Vec<String> {
    let mut notes = Vec::new();
    if opened.is_cut {
        notes.push(
            "the file ends before the picture does: what is missing is grey; download it again"
                .to_owned(),
        );
    }
    if opened.several {
        let part = if opened.format == ImageFormat::Tiff { "page" } else { "frame" };
        notes.push(format!("the file has several {part}s; the first {part} is used"));
    }
    if bits_per_channel(opened.colour) > 8 {
        notes.push("reduced from more than 8 bits per channel to 8".to_owned());
    }
    if opened.is_cmyk {
        notes.push("converted from CMYK without a colour profile".to_owned());
    }
    if opened.icc.as_ref().is_some_and(|profile| profile.get(ICC_SPACE) != Some(ICC_RGB)) {
        notes.push("its colour profile is not one for RGB and is dropped".to_owned());
    }
    notes
}

/// Bits that one channel has in the file.
fn bits_per_channel(colour: ExtendedColorType) -> u16 {
    colour.bits_per_pixel().checked_div(u16::from(colour.channel_count())).unwrap_or(8)
}

/// The high byte of 16 bits, as Pillow takes it; floats are clamped to 0..1 and rounded.
fn in_8_bits(picture: DynamicImage) -> DynamicImage {
    match picture {
        DynamicImage::ImageLuma16(wide) => DynamicImage::ImageLuma8(high_bytes(&wide)),
        DynamicImage::ImageLumaA16(wide) => DynamicImage::ImageLumaA8(high_bytes(&wide)),
        DynamicImage::ImageRgb16(wide) => DynamicImage::ImageRgb8(high_bytes(&wide)),
        DynamicImage::ImageRgba16(wide) => DynamicImage::ImageRgba8(high_bytes(&wide)),
        other => other,
    }
}

fn high_bytes<From, To>(wide: &ImageBuffer<From, Vec<u16>>) -> ImageBuffer<To, Vec<u8>>
where
    From: Pixel<Subpixel = u16>,
    To: Pixel<Subpixel = u8>,
{
    let mut narrow = ImageBuffer::new(wide.width(), wide.height());
    for (byte, value) in narrow.iter_mut().zip(wide.iter()) {
        *byte = value.to_be_bytes()[0];
    }
    narrow
}

/// What the decoder said, with the way out.
fn described(name: &str, format: ImageFormat, error: &ImageError) -> crate::Error {
    let kind = format.to_mime_type();
    let hint = match error {
        ImageError::Limits(_) => "scale the picture down first",
        ImageError::Unsupported(_) => "save it as an 8-bit RGB PNG or JPEG first",
        _ => "the file is damaged or cut off; save or download it again",
    };
    not_decoded(name, &format!("{kind}: {error}"), hint)
}

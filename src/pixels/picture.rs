//! A picture in memory: colours for the model, and what is kept aside for the output.

use std::{fmt, io::Read, path::Path};

use image::{GrayImage, Luma, Rgb, RgbImage, RgbaImage};

use super::{decode, limits::Limits, sizes::Size};
use crate::error::{PictureError, Result};

/// A decoded picture, upright, in 8-bit RGB.
///
/// ```
/// use pentimento::pixels::{Limits, Picture};
///
/// let bytes = b"P6 2 1 255 \xff\x00\x00\x00\x00\xff";
/// let picture = Picture::decode(bytes, "two.ppm", &Limits::default())?;
/// assert_eq!(picture.rgb.dimensions(), (2, 1));
/// assert!(picture.notes.is_empty());
/// # Ok::<(), pentimento::Error>(())
/// ```
#[derive(Clone, PartialEq)]
pub struct Picture {
    /// The colours that models see: composited over white where the file is transparent.
    pub rgb: RgbImage,
    /// The file's alpha channel, unless it is opaque everywhere.
    pub alpha: Option<GrayImage>,
    /// The file's ICC profile, if it is one for RGB.
    pub icc: Option<Vec<u8>>,
    /// The file, or how the picture came in; for messages.
    pub name: String,
    /// What was done to the picture that a person may want to know.
    pub notes: Vec<String>,
}

impl Picture {
    /// Reads and decodes a file.
    ///
    /// # Errors
    /// A file that cannot be read, is over a limit, or is no picture.
    pub fn open(path: impl AsRef<Path>, limits: &Limits) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read_file(path, limits)?;
        Self::decode(&bytes, &path.display().to_string(), limits)
    }

    /// Decodes the bytes of a file; `name` is for messages.
    ///
    /// # Errors
    /// Bytes that are over a limit or are no picture.
    pub fn decode(bytes: &[u8], name: &str, limits: &Limits) -> Result<Self> {
        decode::decode(bytes, name, limits)
    }

    /// A picture that is in memory already.
    #[must_use]
    pub fn from_rgb(rgb: RgbImage) -> Self {
        Self { rgb, alpha: None, icc: None, name: "picture".to_owned(), notes: Vec::new() }
    }

    /// A picture with an alpha channel: composited over white, alpha kept aside.
    #[must_use]
    pub fn from_rgba(rgba: &RgbaImage) -> Self {
        let (rgb, alpha) = over_white(rgba);
        Self { alpha, ..Self::from_rgb(rgb) }
    }

    /// Width and height.
    #[must_use]
    pub fn size(&self) -> Size {
        Size::of(&self.rgb)
    }

    /// Colours with the alpha channel put back, if there is one of the picture's size: the colour
    /// which over white gives the picture's colour, as near as 8 bits allow.
    #[must_use]
    pub fn to_rgba(&self) -> Option<RgbaImage> {
        let alpha = self.alpha.as_ref().filter(|alpha| Size::of(*alpha) == self.size())?;
        let mut rgba = RgbaImage::new(self.rgb.width(), self.rgb.height());
        for ((out, Rgb(rgb)), Luma([alpha])) in
            rgba.pixels_mut().zip(self.rgb.pixels()).zip(alpha.pixels())
        {
            let [r, g, b] = rgb.map(|shown| under_white(shown, *alpha));
            out.0 = [r, g, b, *alpha];
        }
        Some(rgba)
    }
}

impl fmt::Debug for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Picture")
            .field("name", &self.name)
            .field("size", &self.size())
            .field("alpha", &self.alpha.is_some())
            .field("icc_bytes", &self.icc.as_ref().map(Vec::len))
            .field("notes", &self.notes)
            .finish()
    }
}

/// Splits into colours over white and alpha; alpha is `None` when it is 255 everywhere.
pub(super) fn over_white(rgba: &RgbaImage) -> (RgbImage, Option<GrayImage>) {
    let mut rgb = RgbImage::new(rgba.width(), rgba.height());
    let mut alpha = GrayImage::new(rgba.width(), rgba.height());
    let mut opaque = true;
    for ((from, colour), mask) in rgba.pixels().zip(rgb.pixels_mut()).zip(alpha.pixels_mut()) {
        let [r, g, b, a] = from.0;
        colour.0 = [r, g, b].map(|stored| {
            divided(u32::from(stored) * u32::from(a) + 255 * u32::from(255 - a), 255)
        });
        mask.0 = [a];
        opaque &= a == 255;
    }
    (rgb, (!opaque).then_some(alpha))
}

/// The inverse of [`over_white`] for one value; what is wholly transparent keeps what is shown.
fn under_white(shown: u8, alpha: u8) -> u8 {
    if alpha == 0 {
        return shown;
    }
    let white = 255 * u32::from(255 - alpha);
    divided((255 * u32::from(shown)).saturating_sub(white), u32::from(alpha))
}

/// Rounded, at most 255.
fn divided(value: u32, by: u32) -> u8 {
    let half = by.checked_div(2).unwrap_or(0);
    let quotient = (value + half).checked_div(by).unwrap_or(0);
    u8::try_from(quotient).unwrap_or(u8::MAX)
}

/// Reads a file under `bytes_max`, also one whose size is not known beforehand, such as a pipe.
///
/// # Errors
/// A file that is missing or larger than the limit, or a folder.
pub fn read_file(path: &Path, limits: &Limits) -> Result<Vec<u8>> {
    let name = path.display().to_string();
    let failed = |reason: String, hint: &str| PictureError::Read {
        name: name.clone(),
        reason,
        hint: hint.to_owned(),
    };
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => failed("no such file".to_owned(), "check the path"),
        _ => failed(error.to_string(), "check the path and its permissions"),
    })?;
    if metadata.is_dir() {
        return Err(failed("this is a folder".to_owned(), "name a picture in it").into());
    }
    limits.check_bytes(&name, metadata.len())?;
    let unreadable = |error: std::io::Error| failed(error.to_string(), "check its permissions");
    let file = fs_err::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(limits.bytes_max.saturating_add(1)).read_to_end(&mut bytes).map_err(unreadable)?;
    limits.check_bytes(&name, bytes.len() as u64)?;
    Ok(bytes)
}

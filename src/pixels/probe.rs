//! What a file really is, told from its first bytes.

use image::ImageFormat;

use crate::error::{PictureError, Result};

/// The formats that are decoded, for messages.
pub(super) const DECODED: &str = "PNG, JPEG, WebP, GIF, BMP, TIFF, PNM or QOI";

const CONVERT: &str = "convert it to PNG or JPEG first";
const HTML: (&str, &str) = ("an HTML page", "download the picture itself, not the page it is on");

/// Files that are often given where a picture should be: bytes, offset, what it is, what to do.
const LOOK_ALIKES: &[(&[u8], usize, (&str, &str))] = &[
    (
        b"version https://git-lfs",
        0,
        (
            "a Git LFS pointer, not the picture itself",
            "run `git lfs pull` in the folder it came from",
        ),
    ),
    (b"<!DOCTYPE", 0, HTML),
    (b"<!doctype", 0, HTML),
    (b"<html", 0, HTML),
    (b"<HTML", 0, HTML),
    (b"<svg", 0, ("an SVG drawing", "render it to PNG first")),
    (b"<?xml", 0, ("an XML file", "render it to PNG first if it is an SVG drawing")),
    (b"%PDF", 0, ("a PDF document", "export the page as PNG first")),
    (b"ftypavif", 4, ("an AVIF picture, which is not supported", CONVERT)),
    (b"ftypavis", 4, ("an AVIF animation, which is not supported", CONVERT)),
    (b"ftyphei", 4, ("a HEIC picture, which is not supported", CONVERT)),
    (b"ftyphev", 4, ("a HEIC picture, which is not supported", CONVERT)),
    (b"ftypmif1", 4, ("a HEIF picture, which is not supported", CONVERT)),
    (b"ftypmsf1", 4, ("a HEIF picture, which is not supported", CONVERT)),
    (
        b"ftypcrx ",
        4,
        ("a camera's raw file, which is not supported", "export it as TIFF or JPEG first"),
    ),
    (b"ftyp", 4, ("a video", "save the frame you want to edit as PNG first")),
    (b"\xff\x0a", 0, ("a JPEG XL picture, which is not supported", CONVERT)),
    (b"\0\0\0\x0cJXL ", 0, ("a JPEG XL picture, which is not supported", CONVERT)),
    (b"\0\0\0\x0cjP  ", 0, ("a JPEG 2000 picture, which is not supported", CONVERT)),
    (b"8BPS", 0, ("a Photoshop document, which is not supported", "export it as PNG first")),
    (
        b"FUJIFILMCCD-RAW",
        0,
        ("a camera's raw file, which is not supported", "export it as TIFF or JPEG first"),
    ),
    (
        b"IIU\0",
        0,
        ("a camera's raw file, which is not supported", "export it as TIFF or JPEG first"),
    ),
    (
        b"CR\x02\0",
        8,
        ("a camera's raw file, which is not supported", "export it as TIFF or JPEG first"),
    ),
    (
        b"IIRO",
        0,
        ("a camera's raw file, which is not supported", "export it as TIFF or JPEG first"),
    ),
    (b"\x1a\x45\xdf\xa3", 0, ("a video", "save the frame you want to edit as PNG first")),
    (b"\x1f\x8b", 0, ("a gzip archive", "unpack it first")),
    (b"PK\x03\x04", 0, ("a zip archive", "unpack it first")),
    (b"GGUF", 0, ("a model file", "the picture comes after -i, the model after --model")),
];

/// The format of a picture.
///
/// # Errors
/// [`PictureError::Decode`] that says what the bytes are instead.
pub(super) fn picture_format(name: &str, bytes: &[u8]) -> Result<ImageFormat> {
    if bytes.is_empty() {
        return Err(not_decoded(name, "the file is empty", "save or download it again"));
    }
    let start = bytes.trim_ascii_start();
    for (magic, offset, (found, hint)) in LOOK_ALIKES {
        let place = if *offset == 0 && magic.starts_with(b"<") { start } else { bytes };
        if place.get(*offset..).is_some_and(|rest| rest.starts_with(magic)) {
            return Err(not_decoded(name, &format!("this is {found}"), hint));
        }
    }
    if let Ok(format) = image::guess_format(bytes)
        && format.reading_enabled()
    {
        return Ok(format);
    }
    let sample = &bytes[..bytes.len().min(512)];
    let is_text = std::str::from_utf8(sample).is_ok_and(|text| !text.contains('\0'));
    let found = if is_text { "this is a text file" } else { "the format is not known" };
    Err(not_decoded(name, found, &format!("give a picture as {DECODED}")))
}

/// The error for bytes that cannot be decoded.
pub(super) fn not_decoded(name: &str, reason: &str, hint: &str) -> crate::Error {
    let (name, reason, hint) = (name.to_owned(), reason.to_owned(), hint.to_owned());
    PictureError::Decode { name, reason, hint }.into()
}

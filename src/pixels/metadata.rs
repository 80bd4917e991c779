//! The record of an edit inside a PNG file, and what other programs left there.
//!
//! Two text chunks are written: `parameters`, one text in the form that AUTOMATIC1111's web UI
//! introduced and most viewers show, and `pentimento`, an [`EditRecord`] as JSON. Text that
//! Latin-1 cannot hold goes into an `iTXt` chunk.

use std::{collections::BTreeMap, fmt::Write as _, io};

use image::ImageFormat;

use super::{decode, limits::Limits, probe::not_decoded, sizes::Size};
use crate::error::Result;

/// The version of [`EditRecord`] that this crate writes.
pub const RECORD_VERSION: u32 = 1;
/// Keyword of the chunk that holds an [`EditRecord`].
pub const RECORD_KEYWORD: &str = "pentimento";
/// Keyword of the chunk that other programs read.
pub const PARAMETERS_KEYWORD: &str = "parameters";

const TEXT_CHUNKS_MAX: usize = 1024;
/// What one compressed text may unpack to, in bytes.
const TEXT_BYTES_MAX: usize = 4 << 20;
const PNG_SIGNATURE_BYTES: usize = 8;
const IHDR_BYTES: usize = 12 + 13;

/// How a picture came about.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct EditRecord {
    /// [`RECORD_VERSION`] of the writer; fields may be added within a version.
    pub version: u32,
    /// The program and its version.
    pub program: String,
    /// What was asked.
    pub prompt: String,
    /// What was asked to stay away, if anything was given.
    pub negative_prompt: Option<String>,
    /// The seed used.
    pub seed: u64,
    /// The generator that the seed was given to: `cpu` or `cuda`.
    pub rng: String,
    /// Denoising steps.
    pub steps: usize,
    /// The sampler's name.
    pub sampler: String,
    /// Classifier-free guidance scale.
    pub cfg_scale: f64,
    /// How the request was carried out, for example `direct`.
    pub strategy: String,
    /// The plan's sub-requests, in their order; none where the prompt went to the editor as it was.
    #[serde(default)]
    pub sub_requests: Vec<String>,
    /// The model.
    pub model: ModelRecord,
    /// LoRA files that changed the model.
    #[serde(default)]
    pub loras: Vec<LoraRecord>,
    /// The size that the model worked at.
    pub working_size: Size,
    /// The sizes of the input pictures, in their order.
    pub input_sizes: Vec<Size>,
    /// Milliseconds per stage.
    pub timings_ms: BTreeMap<String, u64>,
}

/// Which model made a picture.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ModelRecord {
    /// Name, such as the folder's.
    pub name: String,
    /// Pipeline class.
    pub class: String,
    /// SHA-256 of its files, in hexadecimal digits.
    pub digest: Option<String>,
}

/// A LoRA file that changed the model.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LoraRecord {
    /// The file's name without its ending.
    pub name: String,
    /// What its changes were multiplied by.
    pub strength: f64,
    /// Matrices that it changes.
    pub modules: usize,
}

impl EditRecord {
    /// The name and version of this crate, for [`EditRecord::program`].
    #[must_use]
    pub fn this_program() -> String {
        format!("pentimento {}", env!("CARGO_PKG_VERSION"))
    }

    /// The text of the `parameters` chunk for a picture of `size`.
    ///
    /// A prompt may contain anything, so only the JSON record can be read back without doubt.
    #[must_use]
    pub fn parameters(&self, size: Size) -> String {
        let mut text = self.prompt.clone();
        if let Some(negative) = self.negative_prompt.as_deref().filter(|text| !text.is_empty()) {
            text.push_str("\nNegative prompt: ");
            text.push_str(negative);
        }
        let mut fields = vec![
            ("Steps", self.steps.to_string()),
            ("Sampler", self.sampler.clone()),
            ("CFG scale", self.cfg_scale.to_string()),
            ("Seed", self.seed.to_string()),
            ("Size", size.to_string()),
        ];
        if let Some(digest) = &self.model.digest {
            fields.push(("Model hash", digest.chars().take(10).collect()));
        }
        fields.push(("Model", self.model.name.clone()));
        fields.push(("Version", self.program.clone()));
        for (at, (key, value)) in fields.into_iter().enumerate() {
            let before = if at == 0 { "\n" } else { ", " };
            // Writing to a string cannot fail.
            write!(text, "{before}{key}: {}", quoted(value)).unwrap_or_default();
        }
        text.replace('\0', "\u{fffd}") // a text chunk ends at NUL
    }
}

/// A value that would break the line is written as a JSON string, as the web UI does.
fn quoted(value: String) -> String {
    if value.contains([',', '\n', ':']) {
        serde_json::Value::String(value).to_string()
    } else {
        value
    }
}

/// Adds both chunks.
pub(super) fn add_text<W: io::Write>(
    encoder: &mut png::Encoder<'_, W>,
    record: &EditRecord,
    size: Size,
) -> Result<(), png::EncodingError> {
    let json = serde_json::to_string(record).map_err(io::Error::from)?;
    let parameters = record.parameters(size);
    if parameters.chars().all(|c| u32::from(c) <= 0xff) {
        encoder.add_text_chunk(PARAMETERS_KEYWORD.to_owned(), parameters)?;
    } else {
        encoder.add_itxt_chunk(PARAMETERS_KEYWORD.to_owned(), parameters)?;
    }
    encoder.add_itxt_chunk(RECORD_KEYWORD.to_owned(), json)
}

/// What a picture's file says about itself; no pixel is decoded for it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct PictureInfo {
    /// MIME type.
    pub format: &'static str,
    /// Stored size, before the orientation is applied.
    pub size: Size,
    /// The orientation as an EXIF value, 1 to 8; 1 is upright.
    pub orientation: u8,
    /// Whether there are more frames or pages than the first.
    pub several_frames: bool,
    /// Size of the ICC profile, if there is one.
    pub icc_bytes: Option<usize>,
    /// All text chunks of a PNG file.
    pub texts: Vec<TextEntry>,
    /// The record of the edit, if this crate wrote one.
    pub record: Option<EditRecord>,
    /// What could not be read.
    pub notes: Vec<String>,
}

/// One text chunk.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TextEntry {
    /// What the text is.
    pub keyword: String,
    /// The text.
    pub text: String,
}

/// Reads what the file of a picture says about itself.
///
/// # Errors
/// Bytes that are over a limit or are no picture. Texts that cannot be read are notes.
pub fn read_metadata(bytes: &[u8], name: &str, limits: &Limits) -> Result<PictureInfo> {
    let opened = decode::open(bytes, name, limits)?;
    let mut info = PictureInfo {
        format: opened.format.to_mime_type(),
        size: opened.stored,
        orientation: opened.orientation.to_exif(),
        several_frames: opened.several,
        icc_bytes: opened.icc.as_ref().map(Vec::len),
        texts: Vec::new(),
        record: None,
        notes: Vec::new(),
    };
    if opened.format != ImageFormat::Png {
        return Ok(info);
    }
    read_texts(bytes, &mut info)
        .map_err(|error| not_decoded(name, &error.to_string(), "save or download it again"))?;
    let record = info.texts.iter().find(|entry| entry.keyword == RECORD_KEYWORD);
    match record.map(|entry| serde_json::from_str::<EditRecord>(&entry.text)) {
        Some(Ok(record)) if record.version == RECORD_VERSION => info.record = Some(record),
        Some(Ok(record)) => {
            info.notes
                .push(format!("the record has version {}, which is not known", record.version));
        }
        Some(Err(error)) => info.notes.push(format!("the record cannot be read: {error}")),
        None => {}
    }
    Ok(info)
}

/// Hands the text chunks to the png crate inside a picture of one pixel, so that those after the
/// pixels are read without unpacking the pixels.
fn read_texts(bytes: &[u8], info: &mut PictureInfo) -> Result<(), png::DecodingError> {
    let (chunks, complete) = text_chunks(bytes);
    if !complete {
        let note = format!("only the first {TEXT_CHUNKS_MAX} text chunks are read");
        info.notes.push(note);
    }
    let mut file = Vec::new();
    let mut writer = png::Encoder::new(&mut file, 1, 1).write_header().map_err(io::Error::from)?;
    writer.write_image_data(&[0]).map_err(io::Error::from)?;
    writer.finish().map_err(io::Error::from)?;
    let at = PNG_SIGNATURE_BYTES + IHDR_BYTES;
    file.splice(at..at, chunks.concat());
    let reader = png::Decoder::new(io::Cursor::new(file)).read_info()?;
    let found = reader.info();
    let mut add = |keyword: &str, text: Result<String, png::DecodingError>| match text {
        Ok(text) => info.texts.push(TextEntry { keyword: keyword.to_owned(), text }),
        Err(error) => info.notes.push(format!("text {keyword} cannot be read: {error}")),
    };
    for chunk in &found.uncompressed_latin1_text {
        add(&chunk.keyword, Ok(chunk.text.clone()));
    }
    for chunk in &found.compressed_latin1_text {
        let mut chunk = chunk.clone();
        let unpacked = chunk.decompress_text_with_limit(TEXT_BYTES_MAX);
        add(&chunk.keyword, unpacked.and_then(|()| chunk.get_text()));
    }
    for chunk in &found.utf8_text {
        let mut chunk = chunk.clone();
        let unpacked = chunk.decompress_text_with_limit(TEXT_BYTES_MAX);
        add(&chunk.keyword, unpacked.and_then(|()| chunk.get_text()));
    }
    Ok(())
}

/// The text chunks of a PNG file as they stand there, and whether these are all.
fn text_chunks(bytes: &[u8]) -> (Vec<&[u8]>, bool) {
    let mut chunks = Vec::new();
    let mut rest = bytes.get(PNG_SIGNATURE_BYTES..).unwrap_or_default();
    while let (Some(length), Some(kind)) = (rest.first_chunk::<4>(), rest.get(4..8)) {
        let end = usize::try_from(u32::from_be_bytes(*length)).ok().and_then(|n| n.checked_add(12));
        let Some((chunk, after)) = end.and_then(|end| rest.split_at_checked(end)) else { break };
        if matches!(kind, b"tEXt" | b"zTXt" | b"iTXt") {
            if chunks.len() == TEXT_CHUNKS_MAX {
                return (chunks, false);
            }
            chunks.push(chunk);
        }
        rest = after;
    }
    (chunks, true)
}

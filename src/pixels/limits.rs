//! Limits that hold before any pixel is decoded.

use super::sizes::Size;
use crate::error::{PictureError, Result};

/// What a picture may cost; every field is checked before pixels are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest file, in bytes.
    pub bytes_max: u64,
    /// Longest side, in pixels.
    pub side_px_max: u32,
    /// Most pixels.
    pub pixels_max: u64,
    /// Most memory that decoding may take, in bytes, estimated from the file's header.
    pub memory_bytes_max: u64,
}

impl Default for Limits {
    /// 256 MiB, 16,384 px, 100 megapixels, 2 GiB.
    fn default() -> Self {
        Self {
            bytes_max: 256 << 20,
            side_px_max: 16_384,
            pixels_max: 100_000_000,
            memory_bytes_max: 2 << 30,
        }
    }
}

impl Limits {
    /// # Errors
    /// [`PictureError::Limit`] for a file of more than `bytes_max`.
    pub(super) fn check_bytes(&self, name: &str, found: u64) -> Result<()> {
        let hint = "give a smaller picture, or raise the limit where the engine is embedded";
        check(name, "the file's size in bytes", found, self.bytes_max, hint)
    }

    /// # Errors
    /// [`PictureError::Limit`] for a side, an area or an amount of memory that is too large.
    pub(super) fn check_size(&self, name: &str, size: Size, decoded_bytes: u64) -> Result<()> {
        let hint = "scale the picture down first";
        let side = u64::from(size.width.max(size.height));
        check(name, "the longest side in pixels", side, self.side_px_max.into(), hint)?;
        check(name, "the number of pixels", size.pixels(), self.pixels_max, hint)?;
        // What the decoder returns, once more for its own buffers, the RGB copy and alpha.
        let memory =
            decoded_bytes.saturating_mul(2).saturating_add(size.pixels().saturating_mul(4));
        check(name, "the memory for decoding in bytes", memory, self.memory_bytes_max, hint)
    }
}

fn check(name: &str, what: &'static str, found: u64, limit: u64, hint: &str) -> Result<()> {
    if found <= limit {
        return Ok(());
    }
    let (name, hint) = (name.to_owned(), hint.to_owned());
    Err(PictureError::Limit { name, what, found, limit, hint }.into())
}

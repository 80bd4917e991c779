//! The one place that maps files into memory.

use std::{ops::Deref, path::Path};

use crate::error::Result;

/// The bytes of a file: mapped from disk, or part of the program.
#[derive(Debug)]
pub(super) enum Bytes {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
}

impl Bytes {
    pub(super) fn map(path: &Path) -> Result<Self> {
        let file = fs_err::File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Self::Static(&[])); // an empty file cannot be mapped
        }
        // SAFETY: the map is read-only and private to this process. Model files are not changed
        // while they are in use; a file that is truncated by another program while mapped ends
        // the process with a bus error, as in every program that maps its weights.
        #[expect(unsafe_code, reason = "mapping a file has no safe form")]
        let map = unsafe { memmap2::Mmap::map(file.file())? };
        Ok(Self::Mapped(map))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

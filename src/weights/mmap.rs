//! The one place that maps files into memory.

use std::{
    ops::{Deref, Range},
    path::Path,
};

use crate::error::{ModelError, Result};

/// The bytes of a file: mapped from disk, or part of the program.
#[derive(Debug)]
pub(super) enum Bytes {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
}

impl Bytes {
    pub(super) fn map(path: &Path) -> Result<Self> {
        // Looked at first: opening a named pipe waits for whoever writes into it.
        let metadata = std::fs::metadata(path).map_err(|error| absent(path, &error))?;
        if !metadata.is_file() {
            return Err(no_file(path, metadata.is_dir()));
        }
        let file = fs_err::File::open(path).map_err(|error| absent(path, &error))?;
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

    /// Tells the system that `range` is about to be read from its first byte to its last, and what
    /// follows it after that.
    #[cfg(unix)]
    pub(super) fn will_read(&self, range: &Range<usize>) {
        /// What is read ahead from a disk while a tensor is worked on.
        const AHEAD_BYTES: usize = 64 << 20;
        let Self::Mapped(map) = self else { return };
        let ahead = (map.len() - range.start).min(range.len() + AHEAD_BYTES);
        // Hints: a system that does not take them reads page by page.
        let _refused = map.advise_range(memmap2::Advice::WillNeed, range.start, ahead);
        #[cfg(target_os = "linux")]
        let _refused = map.advise_range(memmap2::Advice::PopulateRead, range.start, range.len());
    }

    /// Tells the system that `range` was read. Whole pages of it no longer count as this process's;
    /// they stay in the system's cache, and are found there when they are read again.
    #[cfg(unix)]
    pub(super) fn was_read(&self, range: &Range<usize>) {
        const PAGE: usize = 4096;
        let Self::Mapped(map) = self else { return };
        let start = range.start.next_multiple_of(PAGE);
        let end = range.end - range.end % PAGE;
        if start >= end {
            return;
        }
        #[expect(
            unsafe_code,
            reason = "for other maps than this one it could drop what was written"
        )]
        // SAFETY: nothing is written to this map, so a page that is dropped and found again holds
        // the same bytes of the file.
        let _refused = unsafe {
            map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
        };
    }

    #[cfg(not(unix))]
    pub(super) fn will_read(&self, _: &Range<usize>) {}

    #[cfg(not(unix))]
    pub(super) fn was_read(&self, _: &Range<usize>) {}
}

/// A file that cannot be opened.
fn absent(path: &Path, error: &std::io::Error) -> crate::Error {
    use std::io::ErrorKind;
    let (what, hint) = match error.kind() {
        ErrorKind::NotFound if path.is_symlink() => {
            ("a link to a file that is not there".to_owned(), "download the file again")
        }
        ErrorKind::NotFound => ("there is no such file".to_owned(), "check the path"),
        _ => (error.to_string(), "check the path and its permissions"),
    };
    ModelError::Missing { path: path.display().to_string(), what, hint: hint.to_owned() }.into()
}

/// Something that is there and is no file.
fn no_file(path: &Path, is_folder: bool) -> crate::Error {
    let (found, hint) = match is_folder {
        true => ("a folder", "name a weight file in it; a model's folder goes to --model"),
        false => ("a pipe or a device", "files are mapped, so save it as one first"),
    };
    ModelError::Corrupt {
        path: path.display().to_string(),
        found: found.to_owned(),
        expected: "a weight file".to_owned(),
        hint: hint.to_owned(),
    }
    .into()
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

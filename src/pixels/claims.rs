//! What TIFF and WebP files claim about themselves, looked at before a decoder makes room for it.

/// Where a TIFF file's directory is, and how its numbers are written.
struct Head<'a> {
    bytes: &'a [u8],
    little: bool,
    /// BigTIFF: counts and offsets of eight bytes.
    big: bool,
}

/// The entries of a directory: their places, and the place behind them.
struct Directory {
    entries: std::iter::StepBy<std::ops::Range<usize>>,
    end: usize,
}

impl<'a> Head<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let little = bytes.starts_with(b"II");
        if !little && !bytes.starts_with(b"MM") {
            return None;
        }
        let head = Self { bytes, little, big: false };
        match head.number(2, 2)? {
            42 => Some(head),
            43 => Some(Self { big: true, ..head }),
            _ => None,
        }
    }

    /// A number of `width` bytes, at most eight.
    fn number(&self, at: usize, width: usize) -> Option<u64> {
        let raw = self.bytes.get(at..at.checked_add(width)?)?;
        let join = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        Some(if self.little { raw.iter().rev().fold(0, join) } else { raw.iter().fold(0, join) })
    }

    fn directory(&self) -> Option<Directory> {
        let [offset_at, offset, count, entry] =
            if self.big { [8, 8, 8, 20] } else { [4, 4, 2, 12] };
        let start = usize::try_from(self.number(offset_at, offset)?).ok()?;
        let entries = usize::try_from(self.number(start, count)?).ok()?;
        let begin = start.checked_add(count)?;
        let end = begin.checked_add(entries.checked_mul(entry)?)?;
        Some(Directory { entries: (begin..end).step_by(entry), end })
    }
}

/// Whether a TIFF file has a second page: the offset of the next directory is 0 at the end.
pub(super) fn tiff_has_second_page(bytes: &[u8]) -> Option<bool> {
    let head = Head::read(bytes)?;
    Some(head.number(head.directory()?.end, if head.big { 8 } else { 4 })? != 0)
}

/// Tag and number of values of a TIFF entry that says more than the file can hold.
pub(super) fn tiff_beyond_the_file(bytes: &[u8]) -> Option<(u64, u64)> {
    let head = Head::read(bytes)?;
    let claims = head.directory()?.entries.map_while(|at| {
        let count = head.number(at + 4, if head.big { 8 } else { 4 })?;
        let width = match head.number(at + 2, 2)? {
            3 | 8 => 2,
            4 | 9 | 11 | 13 => 4,
            5 | 10 | 12 | 16..=18 => 8,
            _ => 1,
        };
        Some((head.number(at, 2)?, count, width))
    });
    let fits = |count: u64, width| count.saturating_mul(width) <= bytes.len() as u64;
    claims
        .into_iter()
        .find(|(_, count, width)| !fits(*count, *width))
        .map(|(tag, count, _)| (tag, count))
}

/// Whether all chunks of a WebP file lie in it; what is no WebP file has none.
pub(super) fn webp_chunks_fit(bytes: &[u8]) -> bool {
    if !bytes.starts_with(b"RIFF") || bytes.get(8..12) != Some(b"WEBP") {
        return true;
    }
    let mut rest = bytes.get(12..).unwrap_or_default();
    while let Some(size) = rest.get(4..8).and_then(|raw| raw.first_chunk::<4>()) {
        let size = u32::from_le_bytes(*size) as usize;
        let Some(after) = size.checked_add(8).and_then(|end| rest.get(end..)) else { return false };
        // Chunks of an odd size are followed by a byte that does not count.
        rest = after.get(size % 2..).unwrap_or_default();
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of one directory with one entry, and the offset of the next.
    fn file(big: bool, count: u64, next: u64) -> Vec<u8> {
        let mut bytes = b"MM".to_vec();
        if big {
            bytes.extend([0, 43, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 1]);
            bytes.extend([1, 0, 0, 4]);
            bytes.extend(count.to_be_bytes());
            bytes.extend([0; 8]);
            bytes.extend(next.to_be_bytes());
        } else {
            bytes.extend([0, 42, 0, 0, 0, 8, 0, 1, 1, 0, 0, 4]);
            bytes.extend(&count.to_be_bytes()[4..]);
            bytes.extend([0; 4]);
            bytes.extend(&next.to_be_bytes()[4..]);
        }
        bytes
    }

    #[test]
    fn directories_are_read_in_both_forms() {
        for big in [false, true] {
            assert_eq!(tiff_has_second_page(&file(big, 1, 0)), Some(false));
            assert_eq!(tiff_has_second_page(&file(big, 1, 8)), Some(true));
            assert_eq!(tiff_beyond_the_file(&file(big, 2, 0)), None);
            assert_eq!(tiff_beyond_the_file(&file(big, 4_194_305, 0)), Some((256, 4_194_305)));
            let whole = file(big, 1, 0);
            for length in 0..whole.len() {
                assert_ne!(tiff_has_second_page(&whole[..length]), Some(true), "{length}");
                std::hint::black_box(tiff_beyond_the_file(&whole[..length]));
            }
        }
        assert_eq!(tiff_beyond_the_file(&file(true, u64::MAX, 0)), Some((256, u64::MAX)));
        assert_eq!(tiff_has_second_page(b"II+"), None);
    }

    #[test]
    fn chunks_of_webp_files_lie_in_them() {
        let file = |size: u8| {
            [b"RIFF....WEBPVP8 ", &[3, 0, 0, 0, 1, 2, 3, 0][..], b"EXIF", &[size, 0, 0, 0], b"ab"]
                .concat()
        };
        assert!(webp_chunks_fit(&file(2)) && webp_chunks_fit(&file(1)) && webp_chunks_fit(b"RIFF"));
        assert!(!webp_chunks_fit(&file(3)) && !webp_chunks_fit(&file(255)));
    }
}

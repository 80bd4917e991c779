//! Reads numbers and strings from bytes that may say anything.

use std::ops::Range;

/// A place in a file; every step is checked against the file's end.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// What a step ran into, for the error that names file and place.
#[derive(Debug)]
pub(super) struct Fault {
    /// What the file holds.
    pub(super) found: String,
    /// What it should hold.
    pub(super) expected: String,
}

pub(super) type Step<T> = Result<T, Fault>;

pub(super) fn fault<T>(found: impl Into<String>, expected: impl Into<String>) -> Step<T> {
    Err(Fault { found: found.into(), expected: expected.into() })
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// The next `count` bytes' place.
    pub(super) fn skip(&mut self, count: usize) -> Step<Range<usize>> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            return fault(
                format!("the end of the file, {} bytes, at byte {}", self.bytes.len(), self.at),
                format!("{count} more bytes"),
            );
        };
        let range = self.at..end;
        self.at = end;
        Ok(range)
    }

    /// Leaves out the next `count` bytes, which must be there.
    pub(super) fn pass(&mut self, count: usize) -> Step<()> {
        self.skip(count).map(|_| ())
    }

    pub(super) fn take<const N: usize>(&mut self) -> Step<[u8; N]> {
        let range = self.skip(N)?;
        let mut taken = [0; N];
        taken.copy_from_slice(&self.bytes[range]);
        Ok(taken)
    }

    pub(super) fn u32(&mut self) -> Step<u32> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    pub(super) fn u64(&mut self) -> Step<u64> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    /// A number of things of which there may be at most `max`.
    pub(super) fn count(&mut self, what: &str, max: usize) -> Step<usize> {
        let found = self.u64()?;
        match usize::try_from(found).ok().filter(|count| *count <= max) {
            Some(count) => Ok(count),
            None => fault(format!("{found} {what}"), format!("at most {max}")),
        }
    }

    /// A string of at most `max` bytes.
    pub(super) fn string(&mut self, max: usize) -> Step<&'a str> {
        let length = self.count("bytes in a string", max)?;
        let range = self.skip(length)?;
        let bytes = &self.bytes[range];
        std::str::from_utf8(bytes).or_else(|error| fault(error.to_string(), "UTF-8 text"))
    }
}

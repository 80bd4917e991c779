//! Large buffers that the system may back with large pages.

use std::mem::{self, MaybeUninit};

use rayon::prelude::*;

/// `len` zeros. Large buffers ask for large pages, so that first touching them costs fewer faults.
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    let buffer = vec![0.0; len];
    advise(buffer.as_ptr().addr(), size_of_val(buffer.as_slice()));
    buffer
}

/// A buffer of `len` elements that is written piece by piece of `piece_len` on all threads: each piece
/// by `write(index, piece)`, and what that leaves is `value`.
///
/// Each thread first touches what it writes, so that the system clears pages on all of them. Large
/// pages are cleared faster, and weights that are streamed once for each token are found in them with
/// fewer look-ups of addresses; they must be asked for before the first is written.
pub(crate) fn par_written<T: Copy + Send + Sync>(
    value: T,
    len: usize,
    piece_len: usize,
    write: impl Fn(usize, &mut Fresh<'_, T>) + Sync,
) -> Vec<T> {
    let mut buffer: Vec<T> = Vec::with_capacity(len);
    advise(buffer.as_ptr().addr(), len * size_of::<T>());
    let pieces = buffer.spare_capacity_mut()[..len].par_chunks_mut(piece_len.max(1));
    pieces.enumerate().for_each(|(index, rest)| {
        let mut piece = Fresh { rest, value };
        write(index, &mut piece);
        piece.next(usize::MAX);
    });
    #[expect(unsafe_code, reason = "memory is first written by the thread that fills it")]
    // SAFETY: the capacity is at least `len`; the pieces cover the first `len` elements, and each was
    // asked for its last element above, so that all of them were written.
    unsafe {
        buffer.set_len(len);
    }
    buffer
}

/// The part of a buffer that was not written yet.
pub(crate) struct Fresh<'a, T> {
    rest: &'a mut [MaybeUninit<T>],
    value: T,
}

impl<'a, T: Copy> Fresh<'a, T> {
    /// The next `len` elements, or as many as are left; each is the buffer's value.
    pub(crate) fn next(&mut self, len: usize) -> &'a mut [T] {
        let rest = mem::take(&mut self.rest);
        let (next, rest) = rest.split_at_mut(len.min(rest.len()));
        self.rest = rest;
        next.iter_mut().for_each(|x| _ = x.write(self.value));
        #[expect(unsafe_code, reason = "memory is first written by the thread that fills it")]
        // SAFETY: each of these elements was written one line above.
        unsafe {
            next.assume_init_mut()
        }
    }

    /// Elements that are left.
    pub(crate) fn len(&self) -> usize {
        self.rest.len()
    }
}

/// Asks for large pages for `bytes` bytes of an allocation that starts at `start`.
#[cfg(target_os = "linux")]
fn advise(start: usize, bytes: usize) {
    const PAGE: usize = 4096;
    const WORTHWHILE_BYTES: usize = 8 << 20;
    if bytes < WORTHWHILE_BYTES {
        return;
    }
    let skipped = start.next_multiple_of(PAGE) - start;
    let page = std::ptr::without_provenance_mut::<libc::c_void>(start + skipped);
    #[expect(unsafe_code, reason = "a hint to the system's memory manager")]
    // SAFETY: both callers own the allocation that the range lies in, and MADV_HUGEPAGE never changes
    // what is stored there. A refusal leaves small pages, which is as correct.
    let _refused = unsafe { libc::madvise(page, bytes - skipped, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise(_start: usize, _bytes: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_written() {
        for (len, piece_len) in [(0, 3), (1, 3), (7, 3), (9, 3), (5, 0), (1000, 64)] {
            // Each piece is left as it is from its second element on.
            let buffer = par_written(7, len, piece_len, |index, piece| {
                let left = piece.len();
                assert!(left >= 1 && left <= piece_len.max(1));
                piece.next(1)[0] = index;
                assert_eq!(piece.len(), left - 1);
            });
            let piece_len = piece_len.max(1);
            let expected =
                |i: usize| if i.is_multiple_of(piece_len) { i.div_euclid(piece_len) } else { 7 };
            assert_eq!(buffer, (0..len).map(expected).collect::<Vec<_>>(), "{len} {piece_len}");
        }
    }
}

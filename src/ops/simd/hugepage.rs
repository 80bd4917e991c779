//! Large buffers that the system may back with large pages.

/// `len` zeros. Large buffers ask for large pages, so that first touching them costs fewer faults.
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    let buffer = vec![0.0; len];
    advise(buffer.as_ptr().addr(), size_of_val(buffer.as_slice()));
    buffer
}

/// `len` copies of `value`. Weights that are streamed once for each token are found with fewer
/// look-ups of addresses on large pages, which must be asked for before the first is written.
pub(crate) fn filled<T: Clone>(value: T, len: usize) -> Vec<T> {
    let mut buffer: Vec<T> = Vec::with_capacity(len);
    advise(buffer.as_ptr().addr(), len * size_of::<T>());
    buffer.resize(len, value);
    buffer
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

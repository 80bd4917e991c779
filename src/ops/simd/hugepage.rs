//! Large zeroed buffers that the system may back with large pages.

/// `len` zeros. Large buffers ask for large pages, so that first touching them costs fewer faults.
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    let buffer = vec![0.0; len];
    advise(&buffer);
    buffer
}

#[cfg(target_os = "linux")]
fn advise(buffer: &[f32]) {
    const PAGE: usize = 4096;
    const WORTHWHILE_BYTES: usize = 8 << 20;
    let bytes = size_of_val(buffer);
    if bytes < WORTHWHILE_BYTES {
        return;
    }
    let start = buffer.as_ptr().addr().next_multiple_of(PAGE);
    let skipped = start - buffer.as_ptr().addr();
    let page = buffer.as_ptr().wrapping_byte_add(skipped);
    #[expect(unsafe_code, reason = "a hint to the system's memory manager")]
    // SAFETY: the range is inside the buffer, and MADV_HUGEPAGE never changes what is stored there.
    // A refusal leaves small pages, which is as correct.
    let _refused =
        unsafe { libc::madvise(page.cast_mut().cast(), bytes - skipped, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise(_buffer: &[f32]) {}

//! Asking for memory ahead of its use, where the processor does not foresee it.

/// Bytes of a cache line.
#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;

/// Asks for what is needed at once, in the first-level cache.
pub(crate) fn into_first_level<T>(x: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        lines::<{ std::arch::x86_64::_MM_HINT_T0 }, T>(x);
        // An unaligned row ends in a line of its own.
        lines::<{ std::arch::x86_64::_MM_HINT_T0 }, T>(&x[x.len().saturating_sub(1)..]);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// Asks for what is needed soon, in the second-level cache.
pub(crate) fn into_second_level<T>(x: &[T]) {
    #[cfg(target_arch = "x86_64")]
    lines::<{ std::arch::x86_64::_MM_HINT_T1 }, T>(x);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn lines<const HINT: i32, T>(x: &[T]) {
    for line in x.chunks(const { LINE_BYTES.div_euclid(size_of::<T>()) }) {
        #[expect(unsafe_code, reason = "an instruction that every x86-64 processor has")]
        // SAFETY: the pointer is that of a slice; nothing is read.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<HINT>(line.as_ptr().cast());
        }
    }
}

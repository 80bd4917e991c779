//! Registers of AVX-512 that are loaded, stored, and seen as another type.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_storeu_ps,
    _mm512_storeu_si512,
};

use super::{LANES, Pair};

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store_bits(out: &mut [Pair; LANES], pairs: __m512i) {
    #[expect(unsafe_code, reason = "an unaligned store")]
    // SAFETY: the array has room for the 64 bytes that are written.
    unsafe {
        _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load(x: &[f32; LANES]) -> __m512 {
    #[expect(unsafe_code, reason = "an unaligned load")]
    // SAFETY: the array holds the 64 bytes that are read.
    unsafe {
        _mm512_loadu_ps(x.as_ptr())
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store(out: &mut [f32; LANES], x: __m512) {
    #[expect(unsafe_code, reason = "an unaligned store")]
    // SAFETY: the array has room for the 64 bytes that are written.
    unsafe {
        _mm512_storeu_ps(out.as_mut_ptr(), x);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_pairs(x: &[Pair; LANES]) -> __m512bh {
    #[expect(unsafe_code, reason = "an unaligned load")]
    // SAFETY: the array holds the 64 bytes that are read.
    pairs(unsafe { _mm512_loadu_si512(x.as_ptr().cast()) })
}

/// The same register, seen as integers.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn bits(x: __m512bh) -> __m512i {
    #[expect(unsafe_code, reason = "there is no safe cast between the two types")]
    // SAFETY: both are 64 bytes without any bit pattern that is not allowed.
    unsafe {
        std::mem::transmute(x)
    }
}

/// The same register, seen as pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn pairs(x: __m512i) -> __m512bh {
    #[expect(unsafe_code, reason = "there is no safe cast between the two types")]
    // SAFETY: both are 64 bytes without any bit pattern that is not allowed.
    unsafe {
        std::mem::transmute(x)
    }
}

//! Packs rows of queries, keys and values in pairs of bf16.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_ps, _mm512_cvtne2ps_pbh, _mm512_fmadd_ps, _mm512_fmsub_ps,
    _mm512_mul_ps, _mm512_or_si512, _mm512_permutex2var_ps, _mm512_permutexvar_epi16,
    _mm512_reduce_add_ps, _mm512_set_epi16, _mm512_set_epi32, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps,
};

use super::{
    LANES, Pair, Preparation, ROWS,
    registers::{bits, load, store_bits},
};

/// See [`Preparation`]; `out` has half as many pairs as `x` has numbers.
pub(super) fn prepare(x: &[f32], turn: [&[f32]; 2], how: Preparation<'_>, out: &mut [Pair]) {
    #[expect(unsafe_code, reason = "needs instructions that not every processor has")]
    // SAFETY: `Head::begin` makes room for pairs only where `is_supported`, and this is called
    // with that room only.
    unsafe {
        prepare_avx512(x, turn, how, out);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[expect(clippy::cast_precision_loss, reason = "the width of a head is small")]
fn prepare_avx512(x: &[f32], [cos, sin]: [&[f32]; 2], how: Preparation<'_>, out: &mut [Pair]) {
    let (registers, rest) = x.as_chunks::<LANES>();
    let mut squares = [_mm512_setzero_ps(); 4];
    for x in registers.chunks(4) {
        for (sum, x) in squares.iter_mut().zip(x) {
            *sum = _mm512_fmadd_ps(load(x), load(x), *sum);
        }
    }
    let squares = [_mm512_add_ps(squares[0], squares[1]), _mm512_add_ps(squares[2], squares[3])];
    let squares = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1]))
        + rest.iter().map(|x| x * x).sum::<f32>();
    let factor = how.factor / (squares / x.len() as f32 + how.eps).sqrt();

    let factors = _mm512_set1_ps(factor);
    let scaled = |x, weight| _mm512_mul_ps(_mm512_mul_ps(load(x), factors), load(weight));
    let (outs, outs_rest) = out.as_chunks_mut::<LANES>();
    let turns = cos.as_chunks::<LANES>().0.iter().zip(sin.as_chunks::<LANES>().0);
    let numbers = registers.as_chunks::<2>().0.iter();
    let numbers = numbers.zip(how.weight.as_chunks::<LANES>().0.as_chunks::<2>().0);
    for ((out, (x, weight)), (cos, sin)) in outs.iter_mut().zip(numbers).zip(turns) {
        let (low, high) = (scaled(&x[0], &weight[0]), scaled(&x[1], &weight[1]));
        let (even, odd) = deinterleaved(low, high);
        let (cos, sin) = (load(cos), load(sin));
        let first = _mm512_fmsub_ps(even, cos, _mm512_mul_ps(odd, sin));
        let second = _mm512_fmadd_ps(even, sin, _mm512_mul_ps(odd, cos));
        store_bits(out, rounded_pairs(first, second));
    }
    let done = x.len() - 2 * outs_rest.len();
    let (x, weight) = (x[done..].as_chunks::<2>().0, how.weight[done..].as_chunks::<2>().0);
    let turns = cos[done >> 1..].iter().zip(&sin[done >> 1..]);
    for ((out, (x, weight)), (cos, sin)) in
        outs_rest.iter_mut().zip(x.iter().zip(weight)).zip(turns)
    {
        let (x0, x1) = (x[0] * factor * weight[0], x[1] * factor * weight[1]);
        *out = pair_of(x0 * cos - x1 * sin, x0 * sin + x1 * cos);
    }
}

/// Packs two tokens' values in pairs: `tiles[tile · stride][dim]`.
pub(super) fn pack_values(
    first: &[f32],
    second: &[f32],
    tiles: &mut [[Pair; ROWS]],
    stride: usize,
) {
    #[expect(unsafe_code, reason = "needs instructions that not every processor has")]
    // SAFETY: `Head::begin` makes room for pairs only where `is_supported`, and this is called
    // with that room only.
    unsafe {
        pack_values_avx512(first, second, tiles, stride);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_values_avx512(first: &[f32], second: &[f32], tiles: &mut [[Pair; ROWS]], stride: usize) {
    let (firsts, first_rest) = first.as_chunks::<LANES>();
    let (seconds, second_rest) = second.as_chunks::<LANES>();
    let mut place = 0;
    for (first, second) in firsts.iter().zip(seconds) {
        let mut packed = [0; LANES];
        store_bits(&mut packed, rounded_pairs(load(first), load(second)));
        for half in packed.as_chunks::<ROWS>().0 {
            tiles[place] = *half;
            place += stride;
        }
    }
    if !first_rest.is_empty() {
        let numbers = first_rest.iter().zip(second_rest);
        tiles[place].iter_mut().zip(numbers).for_each(|(out, (a, b))| *out = pair_of(*a, *b));
    }
}

/// The numbers at even places of both registers, and those at odd places.
#[inline]
#[target_feature(enable = "avx512f")]
fn deinterleaved(low: __m512, high: __m512) -> (__m512, __m512) {
    let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    (_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high))
}

/// Pairs of corresponding numbers, rounded to the nearest bf16; NaN stays NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn rounded_pairs(first: __m512, second: __m512) -> __m512i {
    // The conversion leaves the first numbers in the low half.
    let in_turn = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0,
    );
    _mm512_permutexvar_epi16(in_turn, bits(_mm512_cvtne2ps_pbh(second, first)))
}

/// Both numbers rounded to the nearest bf16, ties to even.
#[inline(always)]
fn pair_of(first: f32, second: f32) -> Pair {
    rounded(first) >> 16 | (rounded(second) & 0xffff_0000)
}

/// The bits of `x`; the upper half is `x` rounded to bf16. NaN stays NaN.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let up = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if x.is_nan() { bits | 0x0040_0000 } else { up }
}

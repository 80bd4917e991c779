//! The steps of a Q4_K product on processors with AVX-512 VNNI.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm512_add_epi32,
    _mm512_and_si512, _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtph_ps,
    _mm512_cvtps_epi32, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_si512,
    _mm512_max_epi32, _mm512_mul_ps, _mm512_or_si512, _mm512_reduce_add_epi32,
    _mm512_reduce_max_epi32, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_srli_epi32,
};

use half::f16;

use super::{FOURS, Four, PANEL, PanelBlock, RowBlock, SUB_BLOCK, SUPER_BLOCK};

/// Outputs of one 512-bit register of 32-bit sums.
const LANES: usize = PANEL.div_euclid(2);
/// How far ahead of its use a weight is asked for: one block.
const AHEAD_BYTES: usize = size_of::<PanelBlock>();

/// Defines safe functions that run `$body` with instructions that not every processor has.
macro_rules! with_instructions {
    ($($(#[$doc:meta])* $features:literal $name:ident($($arg:ident: $type:ty),*) $body:expr;)*) => {$(
        $(#[$doc])*
        pub(super) fn $name($($arg: $type),*) {
            #[target_feature(enable = $features)]
            fn inner($($arg: $type),*) {
                $body
            }
            #[expect(unsafe_code, reason = "needs instructions that not every processor has")]
            // SAFETY: a matrix is multiplied with instructions that `Instructions::available` has
            // found on this machine, and those are the ones that `inner` is built with.
            unsafe {
                inner($($arg),*);
            }
        }
    )*};
}

with_instructions! {
    /// [`quantize_row_512`] from anywhere.
    "avx512f,avx512bw,avx512vnni" quantize_row_avx512(
        x: &[f32], packed: &mut [RowBlock]
    ) quantize_row_512(x, packed);
    /// Adds the product of one row with a panel of outputs whose nibbles are still packed.
    "avx512f,avx512bw,avx512vnni" add_row_avx512(
        panel: &[PanelBlock], x: &[RowBlock], sums: &mut [f32; PANEL]
    ) add_row_512(panel, x, sums);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add_row_512(panel: &[PanelBlock], x: &[RowBlock], out: &mut [f32; PANEL]) {
    let mut sums = [_mm512_setzero_ps(); 2];
    for (panel, x) in panel.iter().zip(x) {
        prefetch(&panel.six_bits);
        let zero = [_mm512_setzero_ps(); 2];
        let mut totals = Totals { products: zero, mins: zero };
        totals.add_four::<0>(panel, x);
        totals.add_four::<1>(panel, x);
        let (d, dmin) = (widen(&panel.d), widen(&panel.dmin));
        for half in 0..2 {
            sums[half] = _mm512_fmadd_ps(d[half], totals.products[half], sums[half]);
            sums[half] = _mm512_fnmadd_ps(dmin[half], totals.mins[half], sums[half]);
        }
    }
    add(out, sums);
}

/// Sums over a super-block, without its two factors, for each half of a panel.
#[derive(Clone, Copy)]
struct Totals {
    products: [__m512; 2],
    mins: [__m512; 2],
}

impl Totals {
    /// Adds four sub-blocks: the first four (`WORD` 0) or the last four (1).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn add_four<const WORD: usize>(&mut self, panel: &PanelBlock, x: &RowBlock) {
        let low_nibbles = _mm512_set1_epi32(0x0f0f_0f0f);
        let high_nibbles = _mm512_set1_epi32(i32::from_ne_bytes([0xf0; 4]));
        let (mut scales, mut mins) = six_bits::<WORD>(&panel.six_bits);
        for pair in [2 * WORD, 2 * WORD + 1] {
            let weights = &panel.nibbles[pair];
            prefetch(weights);
            let mut low = [_mm512_setzero_si512(); 2];
            let mut high = low;
            for four in 0..FOURS {
                let nibbles = halves(&weights[four]);
                let x_low = broadcast(x.values[2 * pair][four]);
                let x_high = broadcast(x.values[2 * pair + 1][four]);
                for half in 0..2 {
                    let weights = _mm512_and_si512(nibbles[half], low_nibbles);
                    low[half] = _mm512_dpbusd_epi32(low[half], weights, x_low);
                    // Not moved down: these counts are sixteen times too large.
                    let weights = _mm512_and_si512(nibbles[half], high_nibbles);
                    high[half] = _mm512_dpbusd_epi32(high[half], weights, x_high);
                }
            }
            for (counts, sub, factor) in [(low, 2 * pair, 1.0), (high, 2 * pair + 1, 0.0625)] {
                let scale = _mm512_set1_ps(factor * x.scales[sub]);
                let sum = _mm512_set1_ps(x.sums[sub]);
                for half in 0..2 {
                    let count = _mm512_mul_ps(_mm512_cvtepi32_ps(counts[half]), scale);
                    let factor = take_byte(&mut scales[half]);
                    self.products[half] = _mm512_fmadd_ps(count, factor, self.products[half]);
                    let min = take_byte(&mut mins[half]);
                    self.mins[half] = _mm512_fmadd_ps(min, sum, self.mins[half]);
                }
            }
        }
    }
}

/// The lowest byte of each lane as a number; the others move down.
#[inline]
#[target_feature(enable = "avx512f")]
fn take_byte(words: &mut __m512i) -> __m512 {
    let byte = _mm512_and_si512(*words, _mm512_set1_epi32(0xff));
    *words = _mm512_srli_epi32::<8>(*words);
    _mm512_cvtepi32_ps(byte)
}

/// Scales and minimums of the first (`WORD` 0) or the last (1) four sub-blocks, for each half of a
/// panel: a sub-block's in the same byte of each lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn six_bits<const WORD: usize>(packed: &[[Four<u8>; PANEL]; 3]) -> ([__m512i; 2], [__m512i; 2]) {
    let (mut scales, mut mins) = (halves(&packed[0]), halves(&packed[1]));
    let (six, four) = (_mm512_set1_epi32(0x3f3f_3f3f), _mm512_set1_epi32(0x0f0f_0f0f));
    let two = _mm512_set1_epi32(0x3030_3030);
    if WORD == 0 {
        return (scales.map(|x| and(x, six)), mins.map(|x| and(x, six)));
    }
    let rest = halves(&packed[2]);
    for half in 0..2 {
        let (scale, min) = (rest[half], _mm512_srli_epi32::<4>(rest[half]));
        let high = and(_mm512_srli_epi32::<2>(scales[half]), two);
        scales[half] = _mm512_or_si512(and(scale, four), high);
        let high = and(_mm512_srli_epi32::<2>(mins[half]), two);
        mins[half] = _mm512_or_si512(and(min, four), high);
    }
    (scales, mins)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn and(a: __m512i, b: __m512i) -> __m512i {
    _mm512_and_si512(a, b)
}

/// Asks for the weights that come [`AHEAD_BYTES`] later.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch<const N: usize>(fours: &[[Four<u8>; PANEL]; N]) {
    for four in fours {
        let ahead = four.as_ptr().wrapping_byte_add(AHEAD_BYTES).cast::<i8>();
        _mm_prefetch::<_MM_HINT_T0>(ahead);
        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64));
    }
}

/// Four activations in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(four: Four<i8>) -> __m512i {
    _mm512_set1_epi32(i32::from_le_bytes(four.map(i8::cast_unsigned)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add(out: &mut [f32; PANEL], sums: [__m512; 2]) {
    for (out, sums) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
        let sums: [f32; LANES] = bytemuck::cast(sums);
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    }
}

/// Four neighbours of each output of a panel: those of its first 16 outputs, and of the others.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::ops::simd) fn halves(weights: &[Four<u8>; PANEL]) -> [__m512i; 2] {
    let start = weights.as_ptr();
    #[expect(unsafe_code, reason = "unaligned loads")]
    // SAFETY: the array holds the two times 64 bytes that are read.
    unsafe {
        [_mm512_loadu_si512(start.cast()), _mm512_loadu_si512(start.add(LANES).cast())]
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn widen(numbers: &[f16; PANEL]) -> [__m512; 2] {
    let start = numbers.as_ptr();
    #[expect(unsafe_code, reason = "unaligned loads")]
    // SAFETY: the array holds the two times 16 numbers of 2 bytes that are read.
    let (low, high) =
        unsafe { (_mm256_loadu_si256(start.cast()), _mm256_loadu_si256(start.add(LANES).cast())) };
    [_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)]
}

/// Quantizes a row, block by block: the largest magnitude becomes 127. A block with NaN gets the scale
/// NaN, so that it stays visible in the product.
#[target_feature(enable = "avx512f")]
#[expect(clippy::cast_precision_loss, reason = "a sum of 32 such numbers is exact in f32")]
fn quantize_row_512(x: &[f32], packed: &mut [RowBlock]) {
    for (x, packed) in x.as_chunks::<SUPER_BLOCK>().0.iter().zip(packed) {
        for (sub_block, x) in x.as_chunks::<SUB_BLOCK>().0.iter().enumerate() {
            let x: [[f32; LANES]; 2] = bytemuck::cast(*x);
            // Magnitudes as integers are ordered like the numbers, and NaN is the largest.
            let bits = x.map(|x| and(bytemuck::cast(x), _mm512_set1_epi32(i32::MAX)));
            let bits = _mm512_reduce_max_epi32(_mm512_max_epi32(bits[0], bits[1]));
            let max = f32::from_bits(bits.cast_unsigned());
            let inverse = _mm512_set1_ps(if max > 0.0 { 127.0 / max } else { 0.0 });
            let rounded = x.map(|x| _mm512_cvtps_epi32(_mm512_mul_ps(bytemuck::cast(x), inverse)));
            let sum = _mm512_reduce_add_epi32(_mm512_add_epi32(rounded[0], rounded[1]));
            packed.values[sub_block] = bytemuck::cast(rounded.map(|x| _mm512_cvtepi32_epi8(x)));
            let scale = max / 127.0;
            packed.scales[sub_block] = scale;
            packed.sums[sub_block] = scale * sum as f32;
        }
    }
}

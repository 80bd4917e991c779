//! The steps of a Q4_K product on processors with AVX-512 VNNI, and on those with AVX2.

use std::arch::x86_64::{
    __m256, __m256i, __m512, __m512i, _MM_HINT_T0, _mm_prefetch, _mm256_add_epi16,
    _mm256_cvtepi32_ps, _mm256_fmadd_ps, _mm256_fnmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_set1_epi16, _mm256_set1_epi32,
    _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm512_and_si512, _mm512_cvtepi32_ps,
    _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_or_si512, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_srli_epi32,
};

use half::f16;

use super::{FOURS, Four, PANEL, PanelBlock, RowBlock, SUB_BLOCKS, Unpacked, plain};

/// Outputs of one 512-bit register of 32-bit sums.
const LANES: usize = PANEL.div_euclid(2);
/// Outputs of one 256-bit register.
const HALF_LANES: usize = PANEL.div_euclid(4);
/// How far ahead of its use a weight is asked for.
const AHEAD_BYTES: usize = 8192;

/// Defines safe functions that run `$body` with instructions that not every processor has.
macro_rules! with_instructions {
    ($($(#[$doc:meta])* $features:literal $name:ident$(<const $r:ident>)?
        ($($arg:ident: $type:ty),*) $body:expr;)*) => {$(
        $(#[$doc])*
        pub(super) fn $name$(<const $r: usize>)?($($arg: $type),*) {
            #[target_feature(enable = $features)]
            fn inner$(<const $r: usize>)?($($arg: $type),*) {
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
    /// [`plain::quantize_row`] in wide registers.
    "avx512f,avx512bw,avx512vnni" quantize_row_avx512<const R>(
        x: &[f32], packed: &mut [RowBlock<R>], i: usize
    ) plain::quantize_row(x, packed, i);
    /// [`plain::quantize_row`] in wide registers.
    "avx2,fma" quantize_row_avx2<const R>(
        x: &[f32], packed: &mut [RowBlock<R>], i: usize
    ) plain::quantize_row(x, packed, i);
    /// [`plain::unpack`] in wide registers.
    "avx512f,avx512bw,avx512vnni,f16c" unpack_avx512(
        block: &PanelBlock, unpacked: &mut Unpacked
    ) plain::unpack(block, unpacked);
    /// [`plain::unpack`] in wide registers.
    "avx2,fma" unpack_avx2(
        block: &PanelBlock, unpacked: &mut Unpacked
    ) plain::unpack(block, unpacked);
    /// Adds the product of a tile of rows with a panel of outputs.
    "avx512f,avx512bw,avx512vnni" add_product_avx512<const R>(
        panel: &[Unpacked], x: &[RowBlock<R>], sums: &mut [[f32; PANEL]; R]
    ) add_tile_512(panel, x, sums);
    /// Adds the product of a tile of rows with a panel of outputs.
    "avx2,fma" add_product_avx2<const R>(
        panel: &[Unpacked], x: &[RowBlock<R>], sums: &mut [[f32; PANEL]; R]
    ) add_tile_256(panel, x, sums);
    /// Adds the product of one row with a panel of outputs whose nibbles are still packed.
    "avx512f,avx512bw,avx512vnni" add_row_avx512<const R>(
        panel: &[PanelBlock], x: &[RowBlock<R>], sums: &mut [f32; PANEL]
    ) add_row_512(panel, x, sums);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[expect(clippy::needless_range_loop, reason = "only indices are unrolled into registers")]
fn add_tile_512<const R: usize>(
    panel: &[Unpacked],
    x: &[RowBlock<R>],
    out: &mut [[f32; PANEL]; R],
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for (panel, x) in panel.iter().zip(x) {
        for sub in 0..SUB_BLOCKS {
            let mut counts = [[_mm512_setzero_si512(); 2]; R];
            for four in 0..FOURS {
                let weights = halves(&panel.weights[sub][four]);
                for row in 0..R {
                    let x = broadcast(x.values[sub][row][four]);
                    counts[row][0] = _mm512_dpbusd_epi32(counts[row][0], weights[0], x);
                    counts[row][1] = _mm512_dpbusd_epi32(counts[row][1], weights[1], x);
                }
            }
            let (scales, mins) = (numbers(&panel.scales[sub]), numbers(&panel.mins[sub]));
            for row in 0..R {
                let scale = _mm512_set1_ps(x.scales[sub][row]);
                let sum = _mm512_set1_ps(x.sums[sub][row]);
                for half in 0..2 {
                    let count = _mm512_mul_ps(_mm512_cvtepi32_ps(counts[row][half]), scale);
                    let total = _mm512_fnmadd_ps(mins[half], sum, sums[row][half]);
                    sums[row][half] = _mm512_fmadd_ps(count, scales[half], total);
                }
            }
        }
    }
    for row in 0..R {
        add(&mut out[row], sums[row]);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add_row_512<const R: usize>(panel: &[PanelBlock], x: &[RowBlock<R>], out: &mut [f32; PANEL]) {
    let mut sums = [_mm512_setzero_ps(); 2];
    for (panel, x) in panel.iter().zip(x) {
        prefetch(&panel.six_bits);
        let zero = [_mm512_setzero_ps(); 2];
        let mut totals = Totals { products: zero, mins: zero };
        totals.add_four::<0, R>(panel, x);
        totals.add_four::<1, R>(panel, x);
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
    fn add_four<const WORD: usize, const R: usize>(&mut self, panel: &PanelBlock, x: &RowBlock<R>) {
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
                let x_low = broadcast(x.values[2 * pair][0][four]);
                let x_high = broadcast(x.values[2 * pair + 1][0][four]);
                for half in 0..2 {
                    let weights = _mm512_and_si512(nibbles[half], low_nibbles);
                    low[half] = _mm512_dpbusd_epi32(low[half], weights, x_low);
                    // Not moved down: these counts are sixteen times too large.
                    let weights = _mm512_and_si512(nibbles[half], high_nibbles);
                    high[half] = _mm512_dpbusd_epi32(high[half], weights, x_high);
                }
            }
            for (counts, sub, factor) in [(low, 2 * pair, 1.0), (high, 2 * pair + 1, 0.0625)] {
                let scale = _mm512_set1_ps(factor * x.scales[sub][0]);
                let sum = _mm512_set1_ps(x.sums[sub][0]);
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

#[target_feature(enable = "avx2,fma")]
fn add_tile_256<const R: usize>(
    panel: &[Unpacked],
    x: &[RowBlock<R>],
    out: &mut [[f32; PANEL]; R],
) {
    for quarter in 0..4 {
        let sums = quarter_sums(panel, x, quarter);
        for (out, sums) in out.iter_mut().zip(sums) {
            let out = &mut out[quarter * HALF_LANES..][..HALF_LANES];
            let sums: [f32; HALF_LANES] = bytemuck::cast(sums);
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
    }
}

/// The product of a tile of rows with a quarter of a panel of outputs.
#[inline]
#[target_feature(enable = "avx2,fma")]
#[expect(clippy::needless_range_loop, reason = "only indices are unrolled into registers")]
fn quarter_sums<const R: usize>(
    panel: &[Unpacked],
    x: &[RowBlock<R>],
    quarter: usize,
) -> [__m256; R] {
    let ones = _mm256_set1_epi16(1);
    let mut sums = [_mm256_setzero_ps(); R];
    for (panel, x) in panel.iter().zip(x) {
        for sub in 0..SUB_BLOCKS {
            // Eight times two products of at most 15 · 127 stay within 16 bits.
            let mut counts = [_mm256_setzero_si256(); R];
            for four in 0..FOURS {
                let weights = quarter_of(&panel.weights[sub][four], quarter);
                for row in 0..R {
                    let x = x.values[sub][row][four].map(i8::cast_unsigned);
                    let x = _mm256_set1_epi32(i32::from_le_bytes(x));
                    let products = _mm256_maddubs_epi16(weights, x);
                    counts[row] = _mm256_add_epi16(counts[row], products);
                }
            }
            let scales = quarter_numbers(&panel.scales[sub], quarter);
            let mins = quarter_numbers(&panel.mins[sub], quarter);
            for row in 0..R {
                let count = _mm256_cvtepi32_ps(_mm256_madd_epi16(counts[row], ones));
                let count = _mm256_mul_ps(count, _mm256_set1_ps(x.scales[sub][row]));
                let sum = _mm256_set1_ps(x.sums[sub][row]);
                let total = _mm256_fnmadd_ps(mins, sum, sums[row]);
                sums[row] = _mm256_fmadd_ps(count, scales, total);
            }
        }
    }
    sums
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

#[inline]
#[target_feature(enable = "avx512f")]
fn halves(weights: &[Four<u8>; PANEL]) -> [__m512i; 2] {
    let start = weights.as_ptr();
    #[expect(unsafe_code, reason = "unaligned loads")]
    // SAFETY: the array holds the two times 64 bytes that are read.
    unsafe {
        [_mm512_loadu_si512(start.cast()), _mm512_loadu_si512(start.add(LANES).cast())]
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn numbers(numbers: &[f32; PANEL]) -> [__m512; 2] {
    let start = numbers.as_ptr();
    #[expect(unsafe_code, reason = "unaligned loads")]
    // SAFETY: the array holds the two times 16 numbers that are read.
    unsafe {
        [_mm512_loadu_ps(start), _mm512_loadu_ps(start.add(LANES))]
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

#[inline]
#[target_feature(enable = "avx2")]
fn quarter_of(weights: &[Four<u8>; PANEL], quarter: usize) -> __m256i {
    let weights = &weights.as_chunks::<HALF_LANES>().0[quarter];
    #[expect(unsafe_code, reason = "an unaligned load")]
    // SAFETY: the array holds the 32 bytes that are read.
    unsafe {
        _mm256_loadu_si256(weights.as_ptr().cast())
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn quarter_numbers(numbers: &[f32; PANEL], quarter: usize) -> __m256 {
    let numbers = &numbers.as_chunks::<HALF_LANES>().0[quarter];
    #[expect(unsafe_code, reason = "an unaligned load")]
    // SAFETY: the array holds the 8 numbers that are read.
    unsafe {
        _mm256_loadu_ps(numbers.as_ptr())
    }
}

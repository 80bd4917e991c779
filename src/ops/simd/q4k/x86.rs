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
const AHEAD_BYTES: usize = 4096;

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
                    for half in 0..2 {
                        counts[row][half] =
                            _mm512_dpbusd_epi32(counts[row][half], weights[half], x);
                    }
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
#[expect(clippy::needless_range_loop, reason = "only indices are unrolled into registers")]
fn add_row_512<const R: usize>(panel: &[PanelBlock], x: &[RowBlock<R>], out: &mut [f32; PANEL]) {
    let low_nibbles = _mm512_set1_epi32(0x0f0f_0f0f);
    let high_nibbles = _mm512_set1_epi32(i32::from_ne_bytes([0xf0; 4]));
    let byte = _mm512_set1_epi32(0xff);
    let mut sums = [_mm512_setzero_ps(); 2];
    for (panel, x) in panel.iter().zip(x) {
        let (scales, mins) = six_bits(&panel.six_bits);
        let mut products = [_mm512_setzero_ps(); 2];
        let mut minimums = [_mm512_setzero_ps(); 2];
        for sub in (0..SUB_BLOCKS).step_by(2) {
            let pair = &panel.nibbles[sub.div_euclid(2)];
            prefetch(pair);
            let mut counts = [[_mm512_setzero_si512(); 2]; 2];
            for four in 0..FOURS {
                let nibbles = halves(&pair[four]);
                let low = broadcast(x.values[sub][0][four]);
                let high = broadcast(x.values[sub + 1][0][four]);
                for half in 0..2 {
                    let weights = _mm512_and_si512(nibbles[half], low_nibbles);
                    counts[0][half] = _mm512_dpbusd_epi32(counts[0][half], weights, low);
                    // Not moved down: these counts are sixteen times too large.
                    let weights = _mm512_and_si512(nibbles[half], high_nibbles);
                    counts[1][half] = _mm512_dpbusd_epi32(counts[1][half], weights, high);
                }
            }
            for (i, factor) in [1.0, 0.0625].into_iter().enumerate() {
                let scale = _mm512_set1_ps(factor * x.scales[sub + i][0]);
                let sum = _mm512_set1_ps(x.sums[sub + i][0]);
                let (word, place) = ((sub + i).div_euclid(4), (sub + i) % 4);
                for half in 0..2 {
                    let six = |words: __m512i| {
                        let moved = match place {
                            0 => words,
                            1 => _mm512_srli_epi32::<8>(words),
                            2 => _mm512_srli_epi32::<16>(words),
                            _ => _mm512_srli_epi32::<24>(words),
                        };
                        _mm512_cvtepi32_ps(_mm512_and_si512(moved, byte))
                    };
                    let count = _mm512_mul_ps(_mm512_cvtepi32_ps(counts[i][half]), scale);
                    let (scales, mins) = (six(scales[word][half]), six(mins[word][half]));
                    products[half] = _mm512_fmadd_ps(count, scales, products[half]);
                    minimums[half] = _mm512_fmadd_ps(mins, sum, minimums[half]);
                }
            }
        }
        let (d, dmin) = (widen(&panel.d), widen(&panel.dmin));
        for half in 0..2 {
            sums[half] = _mm512_fmadd_ps(d[half], products[half], sums[half]);
            sums[half] = _mm512_fnmadd_ps(dmin[half], minimums[half], sums[half]);
        }
    }
    add(out, sums);
}

/// A panel's scales and minimums as bytes: `[four sub-blocks][half of the panel]`, a sub-block's in
/// the same byte of each lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn six_bits(packed: &[[Four<u8>; PANEL]; 3]) -> ([[__m512i; 2]; 2], [[__m512i; 2]; 2]) {
    let [first, second, rest] = [halves(&packed[0]), halves(&packed[1]), halves(&packed[2])];
    let six = _mm512_set1_epi32(0x3f3f_3f3f);
    let four = _mm512_set1_epi32(0x0f0f_0f0f);
    let two = _mm512_set1_epi32(0x3030_3030);
    let mut scales = [[_mm512_setzero_si512(); 2]; 2];
    let mut mins = scales;
    for half in 0..2 {
        let high = |x| _mm512_and_si512(_mm512_srli_epi32::<2>(x), two);
        let low = _mm512_and_si512(rest[half], four);
        scales[0][half] = _mm512_and_si512(first[half], six);
        scales[1][half] = _mm512_or_si512(low, high(first[half]));
        let low = _mm512_and_si512(_mm512_srli_epi32::<4>(rest[half]), four);
        mins[0][half] = _mm512_and_si512(second[half], six);
        mins[1][half] = _mm512_or_si512(low, high(second[half]));
    }
    (scales, mins)
}

/// Asks for the weights that come [`AHEAD_BYTES`] later.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(pair: &[[Four<u8>; PANEL]; FOURS]) {
    for four in pair.as_chunks::<1>().0 {
        let ahead = four.as_ptr().wrapping_byte_add(AHEAD_BYTES).cast::<i8>();
        _mm_prefetch::<_MM_HINT_T0>(ahead);
        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64));
    }
}

#[target_feature(enable = "avx2,fma")]
#[expect(clippy::needless_range_loop, reason = "only indices are unrolled into registers")]
fn add_tile_256<const R: usize>(
    panel: &[Unpacked],
    x: &[RowBlock<R>],
    out: &mut [[f32; PANEL]; R],
) {
    let ones = _mm256_set1_epi16(1);
    for quarter in 0..4 {
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
        for row in 0..R {
            let out = &mut out[row][quarter * HALF_LANES..][..HALF_LANES];
            let sums: [f32; HALF_LANES] = bytemuck::cast(sums[row]);
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
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

//! The product of a tile with AVX2, and with AVX-VNNI.

use std::arch::x86_64::{
    __m256, __m256i, _mm256_abs_epi8, _mm256_add_epi16, _mm256_add_epi32, _mm256_castps_si256,
    _mm256_castsi256_ps, _mm256_cvtepi32_ps, _mm256_dpbusd_avx_epi32, _mm256_fmadd_ps,
    _mm256_fnmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_setzero_si256, _mm256_sign_epi8, _mm256_sub_epi8, _mm256_sub_epi32, _mm256_xor_si256,
};

use super::{
    FOURS, PANEL, PanelRows, Unpacked,
    activations::{RowBlock, Sums},
    format::Word,
    x86::{HALF_FOURS, HALF_LANES, sum_of, with_instructions, word},
};

with_instructions! {
    /// Adds the product of a tile of rows with a panel of outputs.
    "avx2,fma,avxvnni" add_tile_vnni_256<R, G, M>(
        panel: &[Unpacked], x: (&[RowBlock<R>], &[Sums<R>]), out: &mut PanelRows<R>
    ) {
        for quarter in 0..4 {
            quarter_vnni::<R, G, M>(panel, x, quarter, out);
        }
    }
    /// [`add_tile_256`] of weights of four bits, which are `u − zero`.
    "avx2,fma" add_nibbles_tile_256<R, M>(
        panel: &[Unpacked], x: (&[RowBlock<R>], &[Sums<R>]), zero: u8, out: &mut PanelRows<R>
    ) {
        for quarter in 0..4 {
            quarter_of_few_bits::<R, M, FOURS>(panel, x, (quarter, zero), out);
        }
    }
    /// [`add_tile_256`] of weights of five bits, which are `u − zero`.
    "avx2,fma" add_five_bits_tile_256<R, M>(
        panel: &[Unpacked], x: (&[RowBlock<R>], &[Sums<R>]), zero: u8, out: &mut PanelRows<R>
    ) {
        for quarter in 0..4 {
            quarter_of_few_bits::<R, M, HALF_FOURS>(panel, x, (quarter, zero), out);
        }
    }
    /// Adds the product of a tile of rows with a panel of outputs.
    "avx2,fma" add_tile_256<R, G, M>(
        panel: &[Unpacked], x: (&[RowBlock<R>], &[Sums<R>]), out: &mut PanelRows<R>
    ) {
        for quarter in 0..4 {
            quarter_256::<R, G, M>(panel, x, quarter, out);
        }
    }
}

/// Defines the product of a tile of rows with a quarter of a panel. `$dot(sums, weights, x)` adds
/// four products to each sum; `$prepare` is applied to weights first, and `$signed` says that they
/// are signed after it, so that sums start from zero.
macro_rules! quarter {
    ($name:ident, $features:literal, $signed:literal, $prepare:ident, $dot:ident) => {
        #[inline]
        #[target_feature(enable = $features)]
        fn $name<const R: usize, const G: usize, const M: usize>(
            panel: &[Unpacked],
            x: (&[RowBlock<R>], &[Sums<R>]),
            quarter: usize,
            out: &mut PanelRows<R>,
        ) {
            let mut sums = [_mm256_setzero_ps(); R];
            for (panel, (x, parts)) in panel.iter().zip(x.0.iter().zip(x.1)) {
                for group in 0..G {
                    let mut counts = [_mm256_setzero_si256(); R];
                    for row in 0..R {
                        let all = _mm256_set1_epi32(x.starts[row]);
                        let second = _mm256_set1_epi32(parts.second_starts[row]);
                        counts[row] = match (G, group) {
                            _ if $signed => counts[row],
                            (1, _) => all,
                            (_, 0) => _mm256_sub_epi32(all, second),
                            _ => second,
                        };
                    }
                    for four in 0..const { FOURS.div_euclid(G) } {
                        let four = group * HALF_FOURS + four;
                        let weights = $prepare(quarter_of(&panel.weights[four], quarter));
                        for row in 0..R {
                            let x = _mm256_set1_epi32(word(x.values[row][four]));
                            counts[row] = $dot(counts[row], weights, x);
                        }
                    }
                    let scales = quarter_numbers(&panel.scales[group], quarter);
                    add_scaled(&mut sums, &counts, x, scales);
                }
                subtract_mins::<R, M>(&mut sums, panel, parts, quarter);
            }
            add_quarter(out, sums, quarter);
        }
    };
}

quarter!(quarter_vnni, "avx2,fma,avxvnni", false, as_they_are, dot_vnni);
quarter!(quarter_256, "avx2,fma", true, signed, dot_signed);

/// Weights of a few bits: products of `TOGETHER` fours fit into 16 bits (at most `2 · 8 · 15 · 127` or
/// `2 · 4 · 31 · 127`), so that half of the instructions are left.
#[inline]
#[target_feature(enable = "avx2,fma")]
#[expect(clippy::needless_range_loop, reason = "only indices are unrolled into registers")]
fn quarter_of_few_bits<const R: usize, const M: usize, const TOGETHER: usize>(
    panel: &[Unpacked],
    x: (&[RowBlock<R>], &[Sums<R>]),
    (quarter, zero): (usize, u8),
    out: &mut PanelRows<R>,
) {
    let (zero, shift) = (_mm256_set1_epi8(zero.cast_signed()), 128 - i32::from(zero));
    let ones = _mm256_set1_epi16(1);
    let mut sums = [_mm256_setzero_ps(); R];
    for (panel, (x, parts)) in panel.iter().zip(x.0.iter().zip(x.1)) {
        let mut counts = [_mm256_setzero_si256(); R];
        for row in 0..R {
            // −128 times the sum of activations is there: so many times as are left of it.
            counts[row] = _mm256_set1_epi32((x.starts[row] >> 7) * shift);
        }
        for first in (0..FOURS).step_by(TOGETHER) {
            let mut pairs = [_mm256_setzero_si256(); R];
            for four in first..first + TOGETHER {
                let weights = _mm256_sub_epi8(quarter_of(&panel.weights[four], quarter), zero);
                for row in 0..R {
                    let x = _mm256_set1_epi32(word(x.values[row][four]));
                    let products = _mm256_maddubs_epi16(weights, x);
                    pairs[row] = _mm256_add_epi16(pairs[row], products);
                }
            }
            for row in 0..R {
                let fours = _mm256_madd_epi16(pairs[row], ones);
                counts[row] = _mm256_add_epi32(counts[row], fours);
            }
        }
        let scales = quarter_numbers(&panel.scales[0], quarter);
        add_scaled(&mut sums, &counts, x, scales);
        subtract_mins::<R, M>(&mut sums, panel, parts, quarter);
    }
    add_quarter(out, sums, quarter);
}

/// Adds counts times their rows' powers of two and the outputs' scales.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_scaled<const R: usize>(
    sums: &mut [__m256; R],
    counts: &[__m256i; R],
    x: &RowBlock<R>,
    scales: __m256,
) {
    for row in 0..R {
        let exponent = _mm256_set1_epi32(x.exponents[row]);
        let count = _mm256_castps_si256(_mm256_cvtepi32_ps(counts[row]));
        let count = _mm256_castsi256_ps(_mm256_add_epi32(count, exponent));
        sums[row] = _mm256_fmadd_ps(count, scales, sums[row]);
    }
}

/// Subtracts a block's minimums times the sums of their activations.
#[inline]
#[target_feature(enable = "avx2,fma")]
#[expect(clippy::needless_range_loop, reason = "only indices are unrolled into registers")]
fn subtract_mins<const R: usize, const M: usize>(
    sums: &mut [__m256; R],
    panel: &Unpacked,
    parts: &Sums<R>,
    quarter: usize,
) {
    for group in 0..M {
        let mins = quarter_numbers(&panel.mins[group], quarter);
        for row in 0..R {
            let sum = _mm256_set1_ps(sum_of::<R, M>(parts, row, group));
            sums[row] = _mm256_fnmadd_ps(mins, sum, sums[row]);
        }
    }
}

/// Adds to a quarter of the output.
#[inline]
#[target_feature(enable = "avx2")]
fn add_quarter<const R: usize>(out: &mut PanelRows<R>, sums: [__m256; R], quarter: usize) {
    for (out, sums) in out.iter_mut().zip(sums) {
        let out = &mut out[quarter * HALF_LANES..][..HALF_LANES];
        let sums: [f32; HALF_LANES] = bytemuck::cast(sums);
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn as_they_are(weights: __m256i) -> __m256i {
    weights
}

/// Unsigned bytes as signed ones, 128 less.
#[inline]
#[target_feature(enable = "avx2")]
fn signed(weights: __m256i) -> __m256i {
    _mm256_xor_si256(weights, _mm256_set1_epi8(i8::MIN))
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn dot_vnni(sums: __m256i, weights: __m256i, x: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(sums, weights, x)
}

/// The instruction multiplies unsigned by signed bytes: `|w| · ±x`. Two products of at most
/// 128 · 127 stay within 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn dot_signed(sums: __m256i, weights: __m256i, x: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn quarter_of(weights: &[Word; PANEL], quarter: usize) -> __m256i {
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

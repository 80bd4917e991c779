//! The product of Q4_K super-blocks with one row of activations that is quantized to 8 bits in
//! blocks of 32, with AVX-512 VNNI.
//!
//! A super-block is ggml's: 256 weights of 4 bits in eight sub-blocks, `w = d · scale · q − dmin ·
//! min` with a 6-bit scale and minimum for each sub-block. With activations `x = s · v`, the product
//! of a sub-block is `d · scale · s · Σ q · v − dmin · min · s · Σ v`. The nibbles are multiplied as
//! they are: one token reads each weight once, so that unpacking them first would not pay.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_and_si512, _mm512_cvtepi32_ps,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_mul_ps, _mm512_or_si512,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_srli_epi32,
};

use rayon::prelude::*;

use super::{
    BLOCK, BlockFormat, FOURS, PANEL, SUPER_BLOCK,
    activations::BLOCKS,
    format::Word,
    tasks,
    unpack::Halves,
    x86::{add, halves, largest_512, round_512, wide_halves, with_instructions, word},
};

/// How far ahead of its use a weight is asked for: one block.
const AHEAD_BYTES: usize = size_of::<StoredQ4K>();

/// One super-block of each output of a panel. Aligned, so that no load straddles two cache lines.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct StoredQ4K {
    /// What the scales are multiplied with.
    d: Halves,
    /// What the minimums are multiplied with.
    dmin: Halves,
    /// ggml's twelve bytes of scales and minimums: `[four][output][4]`.
    six_bits: [[Word; PANEL]; 3],
    /// `[pair of sub-blocks][four][output][4]`: low nibbles are the first sub-block's.
    nibbles: [[[Word; PANEL]; FOURS]; BLOCKS.div_euclid(2)],
}

const _: () = assert!(size_of::<StoredQ4K>() == PANEL * BlockFormat::Q4K.bytes());

/// One super-block of the activations.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowBlock {
    values: [[[i8; 4]; FOURS]; BLOCKS],
    scales: [f32; BLOCKS],
    /// The sum of the sub-block's activations, as they were rounded.
    sums: [f32; BLOCKS],
}

/// One matrix, `[panel][super-block]`, and where its product goes.
pub(super) struct RowProduct<'a> {
    pub(super) blocks: &'a [StoredQ4K],
    pub(super) bias: Option<&'a [f32]>,
    pub(super) out: &'a mut [f32],
}

/// `out[j] = Σₖ x[k] · weight[j][k] + bias[j]` of each matrix: the row is quantized once, and the
/// threads share all panels out at once.
pub(super) fn multiply_row(x: &[f32], products: Vec<RowProduct<'_>>) {
    let zero =
        RowBlock { values: [[[0; 4]; FOURS]; BLOCKS], scales: [0.0; BLOCKS], sums: [0.0; BLOCKS] };
    let depth = x.len().div_euclid(SUPER_BLOCK);
    let mut row = vec![zero; depth];
    quantize_row_512(x, &mut row);
    let panels: usize = products.iter().map(|product| product.out.len().div_ceil(PANEL)).sum();
    let tasks = tasks();
    let group = panels.div_ceil(tasks.min(panels).max(1));
    let pieces = products.into_iter().flat_map(|RowProduct { blocks, bias, out }| {
        let blocks = blocks.chunks(group * depth);
        blocks.zip(out.chunks_mut(group * PANEL)).enumerate().map(move |(i, (blocks, out))| {
            let bias = bias.map(|bias| &bias[i * group * PANEL..]);
            RowProduct { blocks, bias, out }
        })
    });
    let pieces: Vec<RowProduct<'_>> = pieces.collect();
    pieces.into_par_iter().with_max_len(1).for_each(|RowProduct { blocks, bias, out }| {
        let panels = blocks.chunks_exact(depth).zip(out.chunks_mut(PANEL));
        for (i, (panel, out)) in panels.enumerate() {
            let mut sums = [0.0; PANEL];
            add_row_512(panel, &row, &mut sums);
            match bias {
                Some(bias) => {
                    let out = out.iter_mut().zip(sums).zip(&bias[i * PANEL..]);
                    out.for_each(|((y, x), b)| *y = x + b);
                }
                None => out.iter_mut().zip(sums).for_each(|(y, x)| *y = x),
            }
        }
    });
}

with_instructions! {
    /// Quantizes a row, block by block: the largest magnitude becomes 127. A block with NaN gets the
    /// scale NaN, so that it stays visible in the product.
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni" quantize_row_512(
        x: &[f32], packed: &mut [RowBlock]
    ) {
        for (x, packed) in x.as_chunks::<SUPER_BLOCK>().0.iter().zip(packed) {
            for (i, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
                let max = f32::from_bits(largest_512(x));
                let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
                let (values, [first, second]) = round_512(x, inverse);
                #[expect(clippy::cast_precision_loss, reason = "a sum of 32 bytes is exact in f32")]
                let sum = (first + second) as f32;
                packed.values[i] = bytemuck::cast(values);
                packed.scales[i] = max / 127.0;
                packed.sums[i] = packed.scales[i] * sum;
            }
        }
    }
    /// Adds the product of one row with a panel of outputs whose nibbles are still packed.
    "avx512f,avx512bw,avx512vnni" add_row_512(
        panel: &[StoredQ4K], x: &[RowBlock], out: &mut [f32; PANEL]
    ) {
        let mut sums = [_mm512_setzero_ps(); 2];
        for (panel, x) in panel.iter().zip(x) {
            prefetch(&panel.six_bits);
            let zero = [_mm512_setzero_ps(); 2];
            let mut totals = Totals { products: zero, mins: zero };
            totals.add_four::<0>(panel, x);
            totals.add_four::<1>(panel, x);
            let (d, dmin) = (wide_halves(&panel.d), wide_halves(&panel.dmin));
            for half in 0..2 {
                sums[half] = _mm512_fmadd_ps(d[half], totals.products[half], sums[half]);
                sums[half] = _mm512_fnmadd_ps(dmin[half], totals.mins[half], sums[half]);
            }
        }
        add(out, sums);
    }
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
    fn add_four<const WORD: usize>(&mut self, panel: &StoredQ4K, x: &RowBlock) {
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
                let x_low = _mm512_set1_epi32(word(x.values[2 * pair][four]));
                let x_high = _mm512_set1_epi32(word(x.values[2 * pair + 1][four]));
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
fn six_bits<const WORD: usize>(packed: &[[Word; PANEL]; 3]) -> ([__m512i; 2], [__m512i; 2]) {
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
fn prefetch<const N: usize>(fours: &[[Word; PANEL]; N]) {
    for four in fours {
        let ahead = four.as_ptr().wrapping_byte_add(AHEAD_BYTES).cast::<i8>();
        _mm_prefetch::<_MM_HINT_T0>(ahead);
        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64));
    }
}

//! Products of 8-bit blocks (Q8_0) with activations that are quantized the same way, on processors
//! with AVX-512 VNNI.
//!
//! `y = Σ_blocks scale_w · scale_x · Σ_k w · x` with 8-bit `w` and `x`. The instruction multiplies
//! unsigned by signed numbers, so that weights are kept as `w + 128` and the sum starts from
//! `−128 · Σ x`.

use half::f16;

use super::tiles::{Grid, par_tiles};

/// Numbers that share one scale.
pub(crate) const BLOCK: usize = 32;
/// Bytes of a Q8_0 block: an f16 scale and 32 numbers.
pub(crate) const BLOCK_BYTES: usize = 2 + BLOCK;
/// Outputs of a panel: two registers of 32-bit sums.
const PANEL: usize = 32;
/// Blocks that are multiplied at a time: their weights stay in the first-level cache.
const DEPTH: usize = 16;
/// Rows of the activations that are multiplied at a time.
const ROWS: usize = 384;
/// Rows of a register tile.
const TILE_ROWS: usize = 6;
const TASKS_PER_THREAD: usize = 4;

/// A Q8_0 matrix `[out, width]`, interleaved for the registers.
#[derive(Debug)]
pub(crate) struct PackedInt8 {
    /// `[panel][width / 4][output][4]`, each number plus 128.
    weights: Vec<[u8; 4]>,
    /// `[panel][block][output]`.
    scales: Vec<f16>,
    out: usize,
    blocks: usize,
}

/// Activations in blocks of 8 bits.
struct Activations {
    /// `[row][width / 4][4]`.
    values: Vec<[i8; 4]>,
    /// `[row][block]`.
    scales: Vec<f32>,
    /// `[row][block]`: −128 times the block's sum.
    starts: Vec<i32>,
}

impl PackedInt8 {
    /// From the blocks of a Q8_0 matrix; `None` where this machine lacks the instructions.
    pub(crate) fn new(bytes: &[u8], out: usize, width: usize) -> Option<Self> {
        if !is_supported() || out == 0 || width == 0 || !width.is_multiple_of(BLOCK) {
            return None;
        }
        let blocks = width.div_euclid(BLOCK);
        if bytes.len() != out * blocks * BLOCK_BYTES {
            return None;
        }
        let padded = out.next_multiple_of(PANEL);
        let mut weights = vec![[128_u8; 4]; padded * width.div_euclid(4)];
        let mut scales = vec![f16::ZERO; padded * blocks];
        for (i, block) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            let (row, block_of_row) = (i.div_euclid(blocks), i % blocks);
            let (panel, lane) = (row.div_euclid(PANEL), row % PANEL);
            let (scale, numbers) = block.split_at(2);
            let place = panel * blocks + block_of_row;
            scales[place * PANEL + lane] = f16::from_le_bytes([scale[0], scale[1]]);
            let packed = weights[place * BLOCK.div_euclid(4) * PANEL + lane..].iter_mut();
            for (packed, four) in packed.step_by(PANEL).zip(numbers.chunks_exact(4)) {
                // Adding 128 to a signed byte flips its highest bit.
                *packed = [four[0] ^ 128, four[1] ^ 128, four[2] ^ 128, four[3] ^ 128];
            }
        }
        Some(Self { weights, scales, out, blocks })
    }

    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.out, self.blocks * BLOCK)
    }

    /// The numbers of row `row`.
    pub(crate) fn row(&self, row: usize) -> impl Iterator<Item = f32> {
        let (panel, lane) = (row.div_euclid(PANEL), row % PANEL);
        let fours = BLOCK.div_euclid(4);
        (panel * self.blocks..(panel + 1) * self.blocks).flat_map(move |place| {
            let scale = self.scales[place * PANEL + lane].to_f32();
            let packed = self.weights[place * fours * PANEL + lane..].iter().step_by(PANEL);
            let numbers = packed.take(fours).flatten();
            numbers.map(move |x| scale * (f32::from(*x) - 128.0))
        })
    }

    /// `out[i][j] = Σₖ x[i][k] · weight[j][k] + bias[j]`. `x: [rows, width]`, `out: [rows, out]`.
    pub(crate) fn multiply(&self, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        let rows = out.len().checked_div(self.out).unwrap_or(0);
        let tasks = TASKS_PER_THREAD * rayon::current_num_threads();
        let x = Activations::new(x, self.blocks);
        let row_blocks = rows.div_ceil(ROWS).max(1);
        let tile_rows = rows.div_ceil(row_blocks).next_multiple_of(TILE_ROWS);
        let panels = self.out.div_ceil(PANEL);
        let groups = tasks.div_ceil(row_blocks).min(panels);
        let tile_cols = panels.div_ceil(groups) * PANEL;
        let grid = Grid { rows, cols: self.out, tile_rows, tile_cols };
        par_tiles(
            out,
            grid,
            || (),
            |(), mut tile| {
                for i in 0..tile.rows.len() {
                    let cols = tile.cols.clone();
                    match bias {
                        Some(bias) => tile.row(i).copy_from_slice(&bias[cols]),
                        None => tile.row(i).fill(0.0),
                    }
                }
                for from in (0..self.blocks).step_by(DEPTH) {
                    let depth = DEPTH.min(self.blocks - from);
                    for first in tile.cols.clone().step_by(PANEL) {
                        let panel = self.panel(first, from, depth);
                        let mut row = 0;
                        while row < tile.rows.len() {
                            let left = tile.rows.len() - row;
                            let x = x.rows(tile.rows.start + row, [from, depth, self.blocks]);
                            let column = first - tile.cols.start;
                            let mut out = Out { tile: &mut tile, row, column };
                            row += match left {
                                1 => multiply_tile::<1>(&panel, &x, &mut out),
                                2 | 3 => multiply_tile::<2>(&panel, &x, &mut out),
                                4 | 5 => multiply_tile::<4>(&panel, &x, &mut out),
                                _ => multiply_tile::<TILE_ROWS>(&panel, &x, &mut out),
                            };
                        }
                    }
                }
            },
        );
    }

    /// `depth` blocks of the panel that starts at output `first`.
    fn panel(&self, first: usize, from: usize, depth: usize) -> Panel<'_> {
        let place = first.div_euclid(PANEL) * self.blocks + from;
        let fours = BLOCK.div_euclid(4);
        Panel {
            weights: &self.weights[place * fours * PANEL..][..depth * fours * PANEL],
            scales: &self.scales[place * PANEL..][..depth * PANEL],
        }
    }
}

struct Panel<'a> {
    weights: &'a [[u8; 4]],
    scales: &'a [f16],
}

/// Rows of the activations from some row on, and from some block on.
struct Rows<'a> {
    values: &'a [[i8; 4]],
    scales: &'a [f32],
    starts: &'a [i32],
    /// Blocks from one row to the next.
    stride: usize,
}

struct Out<'a, 't> {
    tile: &'a mut super::tiles::Tile<'t>,
    row: usize,
    column: usize,
}

impl Activations {
    fn new(x: &[f32], blocks: usize) -> Self {
        use rayon::prelude::*;
        let rows = x.len().checked_div(blocks * BLOCK).unwrap_or(0);
        let mut values = vec![[0_i8; 4]; x.len().div_euclid(4)];
        let mut scales = vec![0.0; rows * blocks];
        let mut starts = vec![0; rows * blocks];
        let by_row =
            values.par_chunks_mut(blocks * BLOCK.div_euclid(4)).zip(x.par_chunks(blocks * BLOCK));
        let numbers = scales.par_chunks_mut(blocks).zip(starts.par_chunks_mut(blocks));
        by_row.zip(numbers).with_min_len(8).for_each(|((values, x), (scales, starts))| {
            quantize_row(x, values.as_flattened_mut(), scales, starts);
        });
        Self { values, scales, starts }
    }

    fn rows(&self, row: usize, [from, _, blocks]: [usize; 3]) -> Rows<'_> {
        let place = row * blocks + from;
        Rows {
            values: &self.values[place * BLOCK.div_euclid(4)..],
            scales: &self.scales[place..],
            starts: &self.starts[place..],
            stride: blocks,
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni")
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn is_supported() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
use x86::{multiply_tile, quantize_row};

#[cfg(not(target_arch = "x86_64"))]
fn quantize_row(_: &[f32], _: &mut [i8], _: &mut [f32], _: &mut [i32]) {
    unreachable!("a packed matrix exists only where the instructions do");
}

#[cfg(not(target_arch = "x86_64"))]
fn multiply_tile<const R: usize>(_: &Panel<'_>, _: &Rows<'_>, _: &mut Out<'_, '_>) -> usize {
    unreachable!("a packed matrix exists only where the instructions do");
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512, __m512i, _mm256_loadu_si256, _mm512_cvtepi32_ps, _mm512_cvtph_ps,
        _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi32,
        _mm512_set1_ps, _mm512_setzero_ps,
    };

    use half::f16;

    use super::{BLOCK, Out, PANEL, Panel, Rows};

    const FOURS: usize = BLOCK / 4;
    const LANES: usize = PANEL / 2;

    /// Quantizes one row, block by block: the largest magnitude becomes 127. A block with NaN gets
    /// the scale NaN, so that it stays visible in the product.
    pub(super) fn quantize_row(
        x: &[f32],
        values: &mut [i8],
        scales: &mut [f32],
        starts: &mut [i32],
    ) {
        #[expect(unsafe_code, reason = "needs instructions that not every processor has")]
        // SAFETY: `PackedInt8::new` makes a matrix only where `is_supported`.
        unsafe {
            quantize_row_avx512(x, values, scales, starts);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    #[expect(clippy::cast_possible_truncation, reason = "rounded numbers between −127 and 127")]
    fn quantize_row_avx512(x: &[f32], values: &mut [i8], scales: &mut [f32], starts: &mut [i32]) {
        let blocks = x.as_chunks::<BLOCK>().0.iter().zip(values.as_chunks_mut::<BLOCK>().0);
        for ((x, values), (scale, start)) in blocks.zip(scales.iter_mut().zip(starts)) {
            // Magnitudes as integers are ordered like the numbers, and NaN is the largest.
            let bits = x.iter().fold(0, |max: u32, x| max.max(x.abs().to_bits()));
            let max = f32::from_bits(bits);
            *scale = max / 127.0;
            let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
            let mut sum = 0;
            for (value, x) in values.iter_mut().zip(x) {
                let rounded = (x * inverse).round_ties_even() as i32;
                sum += rounded;
                *value = rounded as i8;
            }
            *start = -128 * sum;
        }
    }

    /// Adds the product of `R` rows with a panel to the output; returns `R`.
    pub(super) fn multiply_tile<const R: usize>(
        panel: &Panel<'_>,
        x: &Rows<'_>,
        out: &mut Out<'_, '_>,
    ) -> usize {
        #[expect(unsafe_code, reason = "needs instructions that not every processor has")]
        // SAFETY: `PackedInt8::new` makes a matrix only where `is_supported`.
        let sums = unsafe { tile_avx512::<R>(panel, x) };
        for (i, sums) in sums.iter().enumerate() {
            let row = &mut out.tile.row(out.row + i)[out.column..];
            row.iter_mut().zip(sums).for_each(|(out, sum)| *out += *sum);
        }
        R
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn tile_avx512<const R: usize>(panel: &Panel<'_>, x: &Rows<'_>) -> [[f32; PANEL]; R] {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let blocks = panel.weights.as_chunks::<{ FOURS * PANEL }>().0;
        let scales = panel.scales.as_chunks::<PANEL>().0;
        for (block, (weights, scales)) in blocks.iter().zip(scales).enumerate() {
            let mut counts = [[_mm512_set1_epi32(0); 2]; R];
            let mut values = [&[[0_i8; 4]; FOURS]; R];
            for row in 0..R {
                let place = row * x.stride + block;
                counts[row] = [_mm512_set1_epi32(x.starts[place]); 2];
                values[row] =
                    x.values[place * FOURS..].first_chunk().expect("a block of every row");
            }
            let weights = weights.as_chunks::<LANES>().0;
            for four in 0..FOURS {
                let low = load(&weights[2 * four]);
                let high = load(&weights[2 * four + 1]);
                for row in 0..R {
                    let x = _mm512_set1_epi32(bytemuck::cast(values[row][four]));
                    counts[row][0] = _mm512_dpbusd_epi32(counts[row][0], low, x);
                    counts[row][1] = _mm512_dpbusd_epi32(counts[row][1], high, x);
                }
            }
            let scales = scales.as_chunks::<LANES>().0;
            let scales = [widen(&scales[0]), widen(&scales[1])];
            for row in 0..R {
                let scale_x = _mm512_set1_ps(x.scales[row * x.stride + block]);
                for i in 0..2 {
                    let scale = _mm512_mul_ps(scales[i], scale_x);
                    sums[row][i] =
                        _mm512_fmadd_ps(_mm512_cvtepi32_ps(counts[row][i]), scale, sums[row][i]);
                }
            }
        }
        sums.map(|sums| bytemuck::cast(sums))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(weights: &[[u8; 4]; LANES]) -> __m512i {
        #[expect(unsafe_code, reason = "an unaligned load")]
        // SAFETY: the array holds the 64 bytes that are read.
        unsafe {
            _mm512_loadu_si512(weights.as_ptr().cast())
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn widen(scales: &[f16; LANES]) -> __m512 {
        #[expect(unsafe_code, reason = "an unaligned load")]
        // SAFETY: the array holds the 32 bytes that are read.
        let scales = unsafe { _mm256_loadu_si256(scales.as_ptr().cast()) };
        _mm512_cvtph_ps(scales)
    }
}

//! Products of 8-bit blocks (Q8_0) with activations that are quantized the same way, on processors
//! with AVX-512 VNNI.
//!
//! `y = Σ_blocks scale_w · scale_x · Σ_k w · x` with 8-bit `w` and `x`. The instruction multiplies
//! unsigned by signed numbers, so that weights are kept as `w + 128` and the sum starts from
//! `−128 · Σ x`.

use half::f16;
use rayon::prelude::*;

use super::{
    hugepage,
    tiles::{Grid, par_tiles},
};

/// Numbers that share one scale.
const BLOCK: usize = 32;
/// Bytes of a Q8_0 block: an f16 scale and 32 numbers.
const BLOCK_BYTES: usize = 2 + BLOCK;
/// The instruction adds the products of four neighbours.
const FOURS: usize = BLOCK.div_euclid(4);
/// Outputs of a panel: two registers of 32-bit sums.
const PANEL: usize = 32;
const LANES: usize = PANEL.div_euclid(2);
/// Blocks that are multiplied at a time: their weights stay in the first-level cache.
const DEPTH: usize = 16;
/// Rows of the activations that are multiplied at a time.
const ROWS: usize = 240;
/// Rows of a register tile.
const TILE_ROWS: usize = 6;
/// Pieces of work for each thread, so that none waits long for the last.
const TASKS_PER_THREAD: usize = 4;

/// A Q8_0 matrix `[out, width]`, interleaved for the registers: `[panel][block]`.
#[derive(Debug)]
pub(crate) struct PackedInt8 {
    blocks: Vec<PanelBlock>,
    out: usize,
    /// Blocks of one row.
    depth: usize,
}

/// One block of each output of a panel. Aligned, so that no load straddles two cache lines.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct PanelBlock {
    /// `[four][output][4]`, each number plus 128.
    weights: [[[[u8; 4]; LANES]; 2]; FOURS],
    scales: [[f16; LANES]; 2],
}

/// One block of each row of a tile of activations.
#[derive(Debug, Clone, Copy)]
struct RowBlock<const R: usize> {
    values: [[[i8; 4]; FOURS]; R],
    scales: [f32; R],
    /// −128 times the block's sum.
    starts: [i32; R],
}

impl PackedInt8 {
    /// From the blocks of a Q8_0 matrix; `None` where this machine lacks the instructions.
    pub(crate) fn new(bytes: &[u8], out: usize, width: usize) -> Option<Self> {
        if !is_supported() || out == 0 || width == 0 || !width.is_multiple_of(BLOCK) {
            return None;
        }
        let depth = width.div_euclid(BLOCK);
        if bytes.len() != out * depth * BLOCK_BYTES {
            return None;
        }
        let zero = PanelBlock {
            weights: [[[[128; 4]; LANES]; 2]; FOURS],
            scales: [[f16::ZERO; LANES]; 2],
        };
        let mut blocks = hugepage::filled(zero, out.div_ceil(PANEL) * depth);
        for (i, block) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            let (row, place) = (i.div_euclid(depth), i % depth);
            let (half, lane) = ((row % PANEL).div_euclid(LANES), row % LANES);
            let packed = &mut blocks[row.div_euclid(PANEL) * depth + place];
            let (scale, numbers) = block.split_at(2);
            packed.scales[half][lane] = f16::from_le_bytes([scale[0], scale[1]]);
            for (packed, four) in packed.weights.iter_mut().zip(numbers.as_chunks::<4>().0) {
                // Adding 128 to a signed byte flips its highest bit.
                packed[half][lane] = four.map(|x| x ^ 128);
            }
        }
        Some(Self { blocks, out, depth })
    }

    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.out, self.depth * BLOCK)
    }

    /// The numbers of row `row`.
    pub(crate) fn row(&self, row: usize) -> impl Iterator<Item = f32> {
        let (half, lane) = ((row % PANEL).div_euclid(LANES), row % LANES);
        let blocks = &self.blocks[row.div_euclid(PANEL) * self.depth..][..self.depth];
        blocks.iter().flat_map(move |block| {
            let scale = block.scales[half][lane].to_f32();
            let numbers = block.weights.iter().flat_map(move |four| four[half][lane]);
            numbers.map(move |x| scale * (f32::from(x) - 128.0))
        })
    }

    /// `out[i][j] = Σₖ x[i][k] · weight[j][k] + bias[j]`. `x: [rows, width]`, `out: [rows, out]`.
    pub(crate) fn multiply(&self, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        if out.len() == self.out {
            self.multiply_tiles::<1>(x, bias, out);
        } else {
            self.multiply_tiles::<TILE_ROWS>(x, bias, out);
        }
    }

    fn multiply_tiles<const R: usize>(&self, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        let rows = out.len().div_euclid(self.out);
        let tasks = TASKS_PER_THREAD * rayon::current_num_threads();
        let x = quantize::<R>(x, self.depth);
        let row_blocks = rows.div_ceil(ROWS).max(1);
        let tile_rows = rows.div_ceil(row_blocks).next_multiple_of(R);
        let panels = self.out.div_ceil(PANEL);
        let groups = tasks.div_ceil(row_blocks).min(panels);
        let tile_cols = panels.div_ceil(groups) * PANEL;
        let grid = Grid { rows, cols: self.out, tile_rows, tile_cols };
        par_tiles(out, grid, Vec::new, |sums, mut tile| {
            for first in (0..tile.cols.len()).step_by(PANEL) {
                let panel = tile.cols.start + first;
                self.panel_sums(&x, [panel, tile.rows.start, tile.rows.len()], sums);
                for (i, sums) in sums.iter().enumerate().take(tile.rows.len()) {
                    let out = tile.row(i)[first..].iter_mut().zip(sums);
                    match bias {
                        Some(bias) => out.zip(&bias[panel..]).for_each(|((y, x), b)| *y = x + b),
                        None => out.for_each(|(y, x)| *y = *x),
                    }
                }
            }
        });
    }

    /// The products of `rows` rows from `row` on with the panel that starts at output `first`.
    ///
    /// They are summed here and not in the output, whose rows can be so far apart that they evict
    /// each other from the caches.
    fn panel_sums<const R: usize>(
        &self,
        x: &[RowBlock<R>],
        [first, row, rows]: [usize; 3],
        sums: &mut Vec<[f32; PANEL]>,
    ) {
        sums.clear();
        sums.resize(rows.next_multiple_of(R), [0.0; PANEL]);
        let panel = &self.blocks[first.div_euclid(PANEL) * self.depth..][..self.depth];
        let x = &x[row.div_euclid(R) * self.depth..];
        for from in (0..self.depth).step_by(DEPTH) {
            let to = self.depth.min(from + DEPTH);
            for (sums, x) in sums.as_chunks_mut().0.iter_mut().zip(x.chunks_exact(self.depth)) {
                add_product::<R>(&panel[from..to], &x[from..to], sums);
            }
        }
    }
}

/// Activations in tiles of `R` rows: `[tile][block]`.
fn quantize<const R: usize>(x: &[f32], depth: usize) -> Vec<RowBlock<R>> {
    let width = depth * BLOCK;
    let zero = RowBlock { values: [[[0; 4]; FOURS]; R], scales: [0.0; R], starts: [0; R] };
    let tiles = x.len().div_ceil(R * width);
    let mut packed = vec![zero; tiles * depth];
    packed.par_chunks_mut(depth).zip(x.par_chunks(R * width)).for_each(|(packed, x)| {
        for (i, row) in x.chunks_exact(width).enumerate() {
            quantize_row(row, packed, i);
        }
    });
    packed
}

#[cfg(target_arch = "x86_64")]
fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni")
}

#[cfg(not(target_arch = "x86_64"))]
fn is_supported() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
use x86::{add_product, quantize_row};

#[cfg(not(target_arch = "x86_64"))]
fn quantize_row<const R: usize>(_: &[f32], _: &mut [RowBlock<R>], _: usize) {
    unreachable!("a packed matrix exists only where the instructions do");
}

#[cfg(not(target_arch = "x86_64"))]
fn add_product<const R: usize>(_: &[PanelBlock], _: &[RowBlock<R>], _: &mut [[f32; PANEL]; R]) {
    unreachable!("a packed matrix exists only where the instructions do");
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512, __m512i, _mm256_loadu_si256, _mm512_cvtepi32_ps, _mm512_cvtph_ps,
        _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi32,
        _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    };

    use half::f16;

    use super::{BLOCK, FOURS, LANES, PANEL, PanelBlock, RowBlock};

    /// Quantizes row `i` of a tile, block by block: the largest magnitude becomes 127. A block with
    /// NaN gets the scale NaN, so that it stays visible in the product.
    pub(super) fn quantize_row<const R: usize>(x: &[f32], packed: &mut [RowBlock<R>], i: usize) {
        #[expect(unsafe_code, reason = "needs instructions that not every processor has")]
        // SAFETY: `PackedInt8::new` makes a matrix only where `is_supported`.
        unsafe {
            quantize_row_avx512(x, packed, i);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    #[expect(clippy::cast_possible_truncation, reason = "rounded numbers between −127 and 127")]
    fn quantize_row_avx512<const R: usize>(x: &[f32], packed: &mut [RowBlock<R>], i: usize) {
        for (x, packed) in x.as_chunks::<BLOCK>().0.iter().zip(packed) {
            // Magnitudes as integers are ordered like the numbers, and NaN is the largest.
            let bits = x.iter().fold(0, |max: u32, x| max.max(x.abs().to_bits()));
            let max = f32::from_bits(bits);
            let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
            let mut values = [0_i8; BLOCK];
            let mut sum = 0;
            for (value, x) in values.iter_mut().zip(x) {
                let rounded = (x * inverse).round_ties_even() as i32;
                sum += rounded;
                *value = rounded as i8;
            }
            packed.scales[i] = max / 127.0;
            packed.starts[i] = -128 * sum;
            packed.values[i].as_flattened_mut().copy_from_slice(&values);
        }
    }

    /// Adds the product of a tile of rows with a panel of outputs.
    pub(super) fn add_product<const R: usize>(
        panel: &[PanelBlock],
        x: &[RowBlock<R>],
        sums: &mut [[f32; PANEL]; R],
    ) {
        #[expect(unsafe_code, reason = "needs instructions that not every processor has")]
        // SAFETY: `PackedInt8::new` makes a matrix only where `is_supported`.
        unsafe {
            add_product_avx512(panel, x, sums);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[expect(clippy::needless_range_loop, reason = "only indices are unrolled into registers")]
    fn add_product_avx512<const R: usize>(
        panel: &[PanelBlock],
        x: &[RowBlock<R>],
        out: &mut [[f32; PANEL]; R],
    ) {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for (panel, x) in panel.iter().zip(x) {
            let mut counts = [[_mm512_setzero_si512(); 2]; R];
            for row in 0..R {
                counts[row] = [_mm512_set1_epi32(x.starts[row]); 2];
            }
            for four in 0..FOURS {
                let weights = [load(&panel.weights[four][0]), load(&panel.weights[four][1])];
                for row in 0..R {
                    let x = _mm512_set1_epi32(i32::from_le_bytes(
                        x.values[row][four].map(i8::cast_unsigned),
                    ));
                    counts[row][0] = _mm512_dpbusd_epi32(counts[row][0], weights[0], x);
                    counts[row][1] = _mm512_dpbusd_epi32(counts[row][1], weights[1], x);
                }
            }
            let scales = [widen(&panel.scales[0]), widen(&panel.scales[1])];
            for row in 0..R {
                let scale = _mm512_set1_ps(x.scales[row]);
                for half in 0..2 {
                    let count = _mm512_cvtepi32_ps(counts[row][half]);
                    let scale = _mm512_mul_ps(scales[half], scale);
                    sums[row][half] = _mm512_fmadd_ps(count, scale, sums[row][half]);
                }
            }
        }
        for row in 0..R {
            let (low, high) = out[row].split_at_mut(LANES);
            add(low, sums[row][0]);
            add(high, sums[row][1]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(out: &mut [f32], sums: __m512) {
        let sums: [f32; LANES] = bytemuck::cast(sums);
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(out: usize, width: usize) -> Option<(PackedInt8, Vec<f32>)> {
        let number = |i: usize| u8::try_from(i * 73 % 256).unwrap();
        let mut bytes = Vec::new();
        for block in 0..out * width.div_euclid(BLOCK) {
            let scale = f16::from_f32(0.01 + f32::from(number(block)) / 2e4);
            bytes.extend(scale.to_le_bytes());
            bytes.extend((0..BLOCK).map(|i| number(block * 7 + i)));
        }
        let packed = PackedInt8::new(&bytes, out, width)?;
        let numbers = bytes.chunks_exact(BLOCK_BYTES).flat_map(|block| {
            let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
            block[2..].iter().map(move |x| scale * f32::from(x.cast_signed()))
        });
        Some((packed, numbers.collect()))
    }

    #[test]
    fn a_packed_matrix_keeps_its_numbers() {
        let Some((packed, numbers)) = packed(41, 96) else { return };
        let rows: Vec<f32> = (0..41).flat_map(|row| packed.row(row)).collect();
        assert_eq!(rows, numbers);
    }

    #[test]
    fn the_product_is_that_of_the_quantized_activations() {
        for (rows, width, out) in
            [(1, 32, 1), (1, 1600, 70), (5, 64, 33), (13, 576, 20), (400, 32, 40)]
        {
            let Some((packed, weight)) = packed(out, width) else { return };
            let x: Vec<f32> = (0..rows * width)
                .map(|i| f32::from(u8::try_from(i * 31 % 255).unwrap()) - 127.0)
                .collect();
            // The largest magnitude of every block is made 127, so that quantizing is exact.
            let x: Vec<f32> = x.chunks(BLOCK).flat_map(|x| [&[127.0], &x[1..]].concat()).collect();
            let bias: Vec<f32> = (0..out).map(|i| f32::from(u8::try_from(i).unwrap())).collect();
            let mut y = vec![f32::NAN; rows * out];
            packed.multiply(&x, Some(&bias), &mut y);
            for (i, y) in y.iter().enumerate() {
                let (row, column) = (i.div_euclid(out), i % out);
                let pairs = x[row * width..].iter().zip(&weight[column * width..][..width]);
                let sum: f64 = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                let exact = sum + f64::from(bias[column]);
                let error = (f64::from(*y) - exact).abs();
                assert!(error < 1e-2, "{rows}×{width}×{out} at {i}: {y}, expected {exact}");
            }
        }
    }

    #[test]
    fn nan_in_the_activations_stays() {
        let Some((packed, _)) = packed(40, 64) else { return };
        let mut x = vec![1.0; 3 * 64];
        x[64 + 40] = f32::NAN;
        let mut y = vec![0.0; 3 * 40];
        packed.multiply(&x, None, &mut y);
        assert!(y[40..80].iter().all(|y| y.is_nan()), "{y:?}");
        assert!(y[..40].iter().chain(&y[80..]).all(|y| y.is_finite()), "{y:?}");
    }
}

//! Products of Q4_K super-blocks with activations that are quantized to 8 bits in blocks of 32.
//!
//! A super-block is ggml's: 256 weights of 4 bits in eight sub-blocks, `w = d · scale · q − dmin ·
//! min` with a 6-bit scale and minimum for each sub-block. With activations `x = s · v`, the product
//! of a sub-block is `d · scale · s · Σ q · v − dmin · min · s · Σ v`.
//!
//! The bytes are ggml's, only interleaved over 32 outputs, so that registers run along the outputs
//! and a matrix is read from its first byte to its last. One row of activations is multiplied with
//! the nibbles as they are; for many rows they are unpacked once, into the first-level cache.

mod plain;
#[cfg(target_arch = "x86_64")]
mod x86;

use half::f16;
use rayon::prelude::*;

use super::{
    hugepage,
    tiles::{Grid, par_tiles},
};

/// Weights of a super-block.
pub(crate) const SUPER_BLOCK: usize = 256;
/// Weights that share a scale and a minimum, and activations that share a scale.
const SUB_BLOCK: usize = 32;
const SUB_BLOCKS: usize = SUPER_BLOCK.div_euclid(SUB_BLOCK);
/// Two f16 numbers, eight scales and minimums of 6 bits, 256 weights of 4.
const SUPER_BLOCK_BYTES: usize = 4 + 12 + SUPER_BLOCK.div_euclid(2);
/// Four neighbours of a sub-block: what 8-bit instructions add to one 32-bit sum.
const FOURS: usize = SUB_BLOCK.div_euclid(4);
/// Outputs of a panel.
const PANEL: usize = 32;
/// Super-blocks that are unpacked at a time: they stay in the first-level cache.
const DEPTH: usize = 2;
/// Rows of the activations that are multiplied at a time.
const ROWS: usize = 240;
/// Rows of a register tile.
const TILE_ROWS: usize = 6;
/// Pieces of work for each thread, so that none waits long for the last.
const TASKS_PER_THREAD: usize = 4;

/// Four neighbouring weights or activations (two times four where they are nibbles).
type Four<T> = [T; 4];

/// The instructions that a matrix is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Plain,
}

impl Instructions {
    /// All that this machine has, the fastest first.
    pub(crate) fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni");
            found.extend(avx512.then_some(Self::Avx512Vnni));
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            found.extend(avx2.then_some(Self::Avx2));
        }
        found.push(Self::Plain);
        found
    }
}

/// A Q4_K matrix `[out, width]`, interleaved for the registers: `[panel][super-block]`.
#[derive(Debug)]
pub(crate) struct PackedQ4K {
    blocks: Vec<PanelBlock>,
    out: usize,
    /// Super-blocks of one row.
    depth: usize,
    instructions: Instructions,
}

/// One super-block of each output of a panel. Aligned, so that no load straddles two cache lines.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct PanelBlock {
    /// What the scales are multiplied with.
    d: [f16; PANEL],
    /// What the minimums are multiplied with.
    dmin: [f16; PANEL],
    /// ggml's twelve bytes of scales and minimums: `[four][output][4]`.
    six_bits: [[Four<u8>; PANEL]; 3],
    /// `[pair of sub-blocks][four][output][4]`: low nibbles are the first sub-block's.
    nibbles: [[[Four<u8>; PANEL]; FOURS]; SUB_BLOCKS.div_euclid(2)],
}

/// [`PanelBlock`] with a byte for each weight and with its scales multiplied out.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Unpacked {
    /// `[sub-block][four][output][4]`.
    weights: [[[Four<u8>; PANEL]; FOURS]; SUB_BLOCKS],
    scales: [[f32; PANEL]; SUB_BLOCKS],
    mins: [[f32; PANEL]; SUB_BLOCKS],
}

/// One super-block of each row of a tile of activations.
#[derive(Debug, Clone, Copy)]
struct RowBlock<const R: usize> {
    values: [[[Four<i8>; FOURS]; R]; SUB_BLOCKS],
    scales: [[f32; R]; SUB_BLOCKS],
    /// The sum of the sub-block's activations, as they were rounded.
    sums: [[f32; R]; SUB_BLOCKS],
}

const EMPTY: Unpacked = Unpacked {
    weights: [[[[0; 4]; PANEL]; FOURS]; SUB_BLOCKS],
    scales: [[0.0; PANEL]; SUB_BLOCKS],
    mins: [[0.0; PANEL]; SUB_BLOCKS],
};

/// Buffers of one thread, reused from panel to panel.
struct Scratch {
    unpacked: Vec<Unpacked>,
    sums: Vec<[f32; PANEL]>,
}

impl PackedQ4K {
    /// From the bytes of a Q4_K matrix; `None` where they are not those of `[out, width]`.
    pub(crate) fn new(bytes: &[u8], out: usize, width: usize) -> Option<Self> {
        let instructions = Instructions::available().into_iter().next()?;
        Self::with_instructions(bytes, [out, width], instructions)
    }

    fn with_instructions(
        bytes: &[u8],
        [out, width]: [usize; 2],
        instructions: Instructions,
    ) -> Option<Self> {
        let depth = width.div_euclid(SUPER_BLOCK);
        let whole = out > 0 && depth > 0 && width.is_multiple_of(SUPER_BLOCK);
        if !whole || bytes.len() != out * depth * SUPER_BLOCK_BYTES {
            return None;
        }
        let zero = PanelBlock {
            d: [f16::ZERO; PANEL],
            dmin: [f16::ZERO; PANEL],
            six_bits: [[[0; 4]; PANEL]; 3],
            nibbles: [[[[0; 4]; PANEL]; FOURS]; SUB_BLOCKS.div_euclid(2)],
        };
        let mut blocks = hugepage::filled(zero, out.div_ceil(PANEL) * depth);
        let rows = bytes.par_chunks(PANEL * depth * SUPER_BLOCK_BYTES);
        blocks.par_chunks_mut(depth).zip(rows).for_each(|(panel, rows)| {
            for (output, row) in rows.chunks_exact(depth * SUPER_BLOCK_BYTES).enumerate() {
                for (block, bytes) in panel.iter_mut().zip(row.as_chunks().0) {
                    block.insert(output, bytes);
                }
            }
        });
        Some(Self { blocks, out, depth, instructions })
    }

    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.out, self.depth * SUPER_BLOCK)
    }

    /// The numbers of row `row`.
    pub(crate) fn row(&self, row: usize) -> Vec<f32> {
        let mut unpacked = EMPTY;
        let output = row % PANEL;
        let blocks = &self.blocks[row.div_euclid(PANEL) * self.depth..][..self.depth];
        let mut numbers = Vec::with_capacity(self.depth * SUPER_BLOCK);
        for block in blocks {
            plain::unpack(block, &mut unpacked);
            for sub_block in 0..SUB_BLOCKS {
                let (scale, min) = (unpacked.scales[sub_block], unpacked.mins[sub_block]);
                let weights = unpacked.weights[sub_block].iter().flat_map(|four| four[output]);
                numbers.extend(weights.map(|q| scale[output] * f32::from(q) - min[output]));
            }
        }
        numbers
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
        let x = self.quantize::<R>(x);
        let tasks = TASKS_PER_THREAD * rayon::current_num_threads();
        let row_blocks = rows.div_ceil(ROWS).max(1);
        let tile_rows = rows.div_ceil(row_blocks).next_multiple_of(R);
        let panels = self.out.div_ceil(PANEL);
        let groups = tasks.div_ceil(row_blocks).min(panels);
        let tile_cols = panels.div_ceil(groups) * PANEL;
        let grid = Grid { rows, cols: self.out, tile_rows, tile_cols };
        let scratch = || Scratch { unpacked: Vec::new(), sums: Vec::new() };
        par_tiles(out, grid, scratch, |scratch, mut tile| {
            for first in (0..tile.cols.len()).step_by(PANEL) {
                let panel = tile.cols.start + first;
                self.panel_sums(&x, [panel, tile.rows.start, tile.rows.len()], scratch);
                for (i, sums) in scratch.sums.iter().enumerate().take(tile.rows.len()) {
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
    fn panel_sums<const R: usize>(
        &self,
        x: &[RowBlock<R>],
        [first, row, rows]: [usize; 3],
        scratch: &mut Scratch,
    ) {
        let Scratch { unpacked, sums } = scratch;
        sums.clear();
        sums.resize(rows.next_multiple_of(R), [0.0; PANEL]);
        let panel = &self.blocks[first.div_euclid(PANEL) * self.depth..][..self.depth];
        let x = &x[row.div_euclid(R) * self.depth..];
        #[cfg(target_arch = "x86_64")]
        if self.instructions == Instructions::Avx512Vnni && R == 1 && rows == 1 {
            x86::add_row_avx512(panel, x, &mut sums[0]);
            return;
        }
        unpacked.resize(DEPTH, EMPTY);
        for from in (0..self.depth).step_by(DEPTH) {
            let to = self.depth.min(from + DEPTH);
            let unpacked = &mut unpacked[..to - from];
            for (block, unpacked) in panel[from..to].iter().zip(unpacked.iter_mut()) {
                self.unpack(block, unpacked);
            }
            for (sums, x) in sums.as_chunks_mut().0.iter_mut().zip(x.chunks_exact(self.depth)) {
                self.add_product::<R>(unpacked, &x[from..to], sums);
            }
        }
    }

    fn unpack(&self, block: &PanelBlock, unpacked: &mut Unpacked) {
        match self.instructions {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Vnni => x86::unpack_avx512(block, unpacked),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => x86::unpack_avx2(block, unpacked),
            Instructions::Plain => plain::unpack(block, unpacked),
        }
    }

    /// Adds the product of a tile of rows with a panel of outputs.
    fn add_product<const R: usize>(
        &self,
        panel: &[Unpacked],
        x: &[RowBlock<R>],
        sums: &mut [[f32; PANEL]; R],
    ) {
        match self.instructions {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Vnni => x86::add_product_avx512(panel, x, sums),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => x86::add_product_avx2(panel, x, sums),
            Instructions::Plain => plain::add_product(panel, x, sums),
        }
    }

    /// Activations in tiles of `R` rows: `[tile][super-block]`.
    fn quantize<const R: usize>(&self, x: &[f32]) -> Vec<RowBlock<R>> {
        let width = self.depth * SUPER_BLOCK;
        let zero = RowBlock {
            values: [[[[0; 4]; FOURS]; R]; SUB_BLOCKS],
            scales: [[0.0; R]; SUB_BLOCKS],
            sums: [[0.0; R]; SUB_BLOCKS],
        };
        let tiles = x.len().div_ceil(R * width);
        let mut packed = vec![zero; tiles * self.depth];
        packed.par_chunks_mut(self.depth).zip(x.par_chunks(R * width)).for_each(|(packed, x)| {
            for (i, row) in x.chunks_exact(width).enumerate() {
                match self.instructions {
                    #[cfg(target_arch = "x86_64")]
                    Instructions::Avx512Vnni => x86::quantize_row_avx512(row, packed, i),
                    #[cfg(target_arch = "x86_64")]
                    Instructions::Avx2 => x86::quantize_row_avx2(row, packed, i),
                    Instructions::Plain => plain::quantize_row(row, packed, i),
                }
            }
        });
        packed
    }
}

impl PanelBlock {
    /// Puts one output's super-block in its place.
    fn insert(&mut self, output: usize, bytes: &[u8; SUPER_BLOCK_BYTES]) {
        let (numbers, nibbles) = bytes.split_at(16);
        let numbers: &[Four<u8>] = numbers.as_chunks().0;
        let [low, high, min_low, min_high] = numbers[0];
        self.d[output] = f16::from_le_bytes([low, high]);
        self.dmin[output] = f16::from_le_bytes([min_low, min_high]);
        for (place, four) in self.six_bits.iter_mut().zip(&numbers[1..]) {
            place[output] = *four;
        }
        let fours: &[Four<u8>] = nibbles.as_chunks().0;
        for (place, four) in self.nibbles.as_flattened_mut().iter_mut().zip(fours) {
            place[output] = *four;
        }
    }
}

#[cfg(test)]
mod tests;

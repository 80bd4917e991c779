//! Products of matrices in ggml's block formats with activations that are quantized to 8 bits.
//!
//! A matrix stays in its stored bytes, only interleaved over 32 outputs, so that registers run along
//! the outputs and a panel is read from its first byte to its last. For a product, a few blocks of a
//! panel at a time are unpacked into the first-level cache, every format to the same bytes: weights
//! `u` with `w = scale · (u − 128) − min`. One kernel multiplies them with all rows:
//! `y = Σ_blocks scale · x_scale · (Σ u · v − 128 · Σ v) − min · x_scale · Σ v`.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod format;
mod instructions;
mod kernel;
mod plain;
#[cfg(target_arch = "x86_64")]
mod q4k_row;
#[cfg(target_arch = "x86_64")]
mod six_rows;
mod store;
#[cfg(test)]
mod tests;
mod unpack;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::{borrow::Cow, ops::Range};

pub use self::format::BlockFormat;
use self::{
    activations::{Activations, Rounding},
    format::Word,
    instructions::Instructions,
    kernel::Kernel,
    store::StoreRow,
};
pub(crate) use self::{
    activations::{DenseRows, Rows},
    store::{AsItIs, Finish},
};
use super::{
    Arch, hugepage,
    prefetch::into_second_level,
    tiles::{Grid, Tile, par_tiles, tasks},
};

/// Activations that share a power of two; every format has a scale for each 32 weights or finer.
const BLOCK: usize = 32;
const HALF: usize = BLOCK.div_euclid(2);
/// Four neighbours of a block: what 8-bit instructions add to one 32-bit sum.
const FOURS: usize = BLOCK.div_euclid(4);
/// Outputs of a panel: two registers of 32-bit sums.
const PANEL: usize = 32;
/// Weights of a super-block, in formats that have them.
const SUPER_BLOCK: usize = 256;
/// Blocks that are multiplied at a time: their weights stay in the first-level cache.
const DEPTH: usize = 16;
/// Rows of the activations that are multiplied at a time.
const ROWS: usize = 384;
/// Panels that are multiplied with the same [`DEPTH`] blocks of those rows before the next ones: the
/// activations, and the sums of so many panels, stay in the second-level cache.
const GROUP: usize = 6;
/// Rows of a register tile.
const TILE_ROWS: usize = 6;
/// Work on several rows is cut into so many times the usual number of pieces.
const FINER: usize = 2;

/// Sums of a tile of rows.
type PanelRows<const R: usize> = [[f32; PANEL]; R];

/// 32 weights of each output of a panel, one byte each.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Unpacked {
    /// `[four][output][4]`.
    weights: [[Word; PANEL]; FOURS],
    /// Of all weights, or of each half.
    scales: [[f32; PANEL]; 2],
    /// As many as the format has. The second may be the [factor](Self::min_factor) of stored ones.
    mins: [[f32; PANEL]; 2],
    /// What sums of pairs start from.
    starts: [i32; PANEL],
    /// Of the leading four blocks of a super-block that is multiplied in pairs: two of its minimums as
    /// they are stored.
    stored_mins: [[i16; 2]; PANEL],
}

impl Unpacked {
    /// What the [stored minimums](Self::stored_mins) of a super-block are multiplied with, in its first
    /// block. It lies where the second minimums would, which no such format has, so that all that is
    /// unpacked at a time stays in the first-level cache.
    #[cfg(target_arch = "x86_64")]
    fn min_factor(&mut self) -> &mut [f32; PANEL] {
        &mut self.mins[1]
    }

    /// Where [`Self::min_factor`] is.
    #[cfg(target_arch = "x86_64")]
    const MIN_FACTOR: usize = std::mem::offset_of!(Self, mins) + size_of::<[f32; PANEL]>();

    /// The weights of one output.
    fn row(&self, format: BlockFormat, output: usize) -> impl Iterator<Item = f32> {
        let (scales, mins) = format.groups();
        self.weights.iter().enumerate().flat_map(move |(four, weights)| {
            let half = four.div_euclid(FOURS.div_euclid(2));
            let scale = self.scales[half * (scales - 1)][output];
            let min = if mins == 0 { 0.0 } else { self.mins[half * (mins - 1)][output] };
            weights[output].map(|u| scale * (f32::from(u) - 128.0) - min)
        })
    }
}

const EMPTY: Unpacked = Unpacked {
    weights: [[[0; 4]; PANEL]; FOURS],
    scales: [[0.0; PANEL]; 2],
    mins: [[0.0; PANEL]; 2],
    starts: [0; PANEL],
    stored_mins: [[0; 2]; PANEL],
};

/// 64 bytes, aligned so that no load of a panel straddles two cache lines.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A quantized matrix `[out, width]`, interleaved for the registers: `[panel][block]`.
#[derive(Debug)]
pub struct PackedBlocks {
    lines: Vec<Line>,
    kernel: Kernel,
    out: usize,
    /// Stored blocks of one row.
    depth: usize,
}

impl PackedBlocks {
    /// From the blocks of a matrix `[out, width]`; `None` where they are not that many.
    pub(crate) fn new(format: BlockFormat, bytes: &[u8], [out, width]: [usize; 2]) -> Option<Self> {
        let instructions = Instructions::available().into_iter().next()?;
        Self::with_instructions(format, bytes, [out, width], instructions)
    }

    fn with_instructions(
        format: BlockFormat,
        bytes: &[u8],
        [out, width]: [usize; 2],
        instructions: Instructions,
    ) -> Option<Self> {
        let depth = width.div_euclid(format.numbers());
        let row_bytes = depth * format.bytes();
        if bytes.len() != out * row_bytes {
            return None;
        }
        let rows = |rows: Range<usize>| {
            Cow::Borrowed(&bytes[rows.start * row_bytes..rows.end * row_bytes])
        };
        Self::of_rows((format, [out, width]), instructions, rows)
    }

    /// From the blocks `rows(range)` of the rows in `range`, asked for panel by panel, on all
    /// threads; `None` where rows are not whole blocks, or there are none.
    pub(crate) fn from_rows<'a>(
        matrix: (BlockFormat, [usize; 2]),
        rows: impl Fn(Range<usize>) -> Cow<'a, [u8]> + Sync,
    ) -> Option<Self> {
        Self::of_rows(matrix, Instructions::available().into_iter().next()?, rows)
    }

    fn of_rows<'a>(
        (format, [out, width]): (BlockFormat, [usize; 2]),
        instructions: Instructions,
        rows: impl Fn(Range<usize>) -> Cow<'a, [u8]> + Sync,
    ) -> Option<Self> {
        let depth = width.div_euclid(format.numbers());
        if out == 0 || depth == 0 || !width.is_multiple_of(format.numbers()) {
            return None;
        }
        let panel_lines = (PANEL * depth * format.bytes()).div_euclid(size_of::<Line>());
        let len = out.div_ceil(PANEL) * panel_lines;
        let lines = hugepage::par_written(Line([0; 64]), len, panel_lines, |panel, lines| {
            let first = panel * PANEL;
            let rows = rows(first..out.min(first + PANEL));
            let lines = lines.next(panel_lines);
            format::interleave(format, &rows, depth, bytemuck::cast_slice_mut(lines));
        });
        Some(Self { lines, kernel: Kernel::new(format, instructions), out, depth })
    }

    /// Rows and columns.
    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.out, self.depth * self.kernel.format.numbers())
    }

    /// Bytes of a block of each output of a panel.
    fn block_bytes(&self) -> usize {
        PANEL * self.kernel.format.bytes()
    }

    /// The blocks of a panel.
    fn panel(&self, panel: usize) -> &[u8] {
        let bytes = self.depth * self.block_bytes();
        &bytemuck::cast_slice(&self.lines)[panel * bytes..][..bytes]
    }

    /// The numbers of row `row`.
    pub(crate) fn row(&self, row: usize) -> Vec<f32> {
        let Kernel { format, instructions, .. } = self.kernel;
        let output = row % PANEL;
        let mut unpacked = vec![EMPTY; format.numbers().div_euclid(BLOCK)];
        let mut numbers = Vec::with_capacity(self.dims().1);
        let panel = self.panel(row.div_euclid(PANEL));
        for block in panel.chunks_exact(self.block_bytes()) {
            instructions.unpack(format, block, &mut unpacked);
            unpacked.iter().for_each(|block| numbers.extend(block.row(format, output)));
        }
        numbers
    }

    /// `out[i][j] = Σₖ x[i][k] · weight[j][k] + bias[j]`. `x: [rows, width]`, `out: [rows, out]`.
    pub(crate) fn multiply(&self, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if out.len() == self.out && self.shares_rows() {
            return Self::multiply_row_by_each(x, vec![(self, bias, out)]);
        }
        if out.len() == self.out {
            self.multiply_rows::<1>(x, bias, out);
        } else {
            self.multiply_rows::<TILE_ROWS>(x, bias, out);
        }
    }

    /// Whether one row can be multiplied by this matrix and others of the same width at once.
    #[must_use]
    pub fn shares_rows(&self) -> bool {
        self.kernel.takes_nibbles()
    }

    /// [`Self::multiply`] of one row by matrices of its width that [share rows](Self::shares_rows),
    /// each with its bias and output.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn multiply_row_by_each(x: &[f32], products: Vec<RowProduct<'_>>) {
        let products = products.into_iter().map(|(matrix, bias, out)| {
            let blocks = bytemuck::cast_slice(&matrix.lines);
            q4k_row::RowProduct { blocks, bias, out }
        });
        q4k_row::multiply_row(x, products.collect());
    }

    fn multiply_rows<const R: usize>(&self, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        let width = self.dims().1;
        let (depth, rows) = (width.div_euclid(BLOCK), DenseRows { x, width });
        let x =
            Activations::<R>::new(&rows, depth, self.kernel.needs::<R>(), self.kernel.rounding());
        self.multiply_activations(&x, bias, out, &AsItIs);
    }

    /// Rounds `rows` for products with `matrices` of that width: once for all that want it alike.
    pub(crate) fn round(matrices: &[&Self], rows: &impl Rows) -> Option<RoundedRows> {
        let first = matrices.first()?;
        let width = first.dims().1;
        if !matrices.iter().all(|matrix| matrix.dims().1 == width) {
            return None;
        }
        let (depth, count) = (width.div_euclid(BLOCK), rows.count());
        let mut activations: Vec<(Rounding, Activations<TILE_ROWS>)> = Vec::new();
        for matrix in matrices {
            let rounding = matrix.kernel.rounding();
            if activations.iter().all(|(known, _)| *known != rounding) {
                let alike = matrices.iter().filter(|matrix| matrix.kernel.rounding() == rounding);
                let needs = alike.map(|matrix| matrix.kernel.needs::<TILE_ROWS>()).collect();
                let rounded = Activations::new(rows, depth, needs, rounding);
                activations.push((rounding, rounded));
            }
        }
        Some(RoundedRows { activations, count, width })
    }

    /// [`Self::multiply`] of rows that were [rounded](Self::round) for this matrix, with `finish`
    /// applied to the output.
    pub(crate) fn multiply_rounded(
        &self,
        x: &RoundedRows,
        bias: Option<&[f32]>,
        out: &mut [f32],
        finish: &impl Finish,
    ) {
        assert_eq!((x.width, out.len()), (self.dims().1, x.count * self.out));
        let wanted = self.kernel.rounding();
        let found = x.activations.iter().find(|(rounding, _)| *rounding == wanted);
        #[expect(clippy::expect_used, reason = "rows are rounded for the matrices they meet")]
        let (_, activations) = found.expect("rows were rounded for this matrix");
        self.multiply_activations(activations, bias, out, finish);
    }

    fn multiply_activations<const R: usize>(
        &self,
        x: &Activations<R>,
        bias: Option<&[f32]>,
        out: &mut [f32],
        finish: &impl Finish,
    ) {
        match self.kernel.format.groups() {
            (1, 0) => self.multiply_tiles::<R, 1, 0>(x, bias, out, finish),
            (1, 1) => self.multiply_tiles::<R, 1, 1>(x, bias, out, finish),
            (1, _) => self.multiply_tiles::<R, 1, 2>(x, bias, out, finish),
            _ => self.multiply_tiles::<R, 2, 0>(x, bias, out, finish),
        }
    }

    fn multiply_tiles<const R: usize, const G: usize, const M: usize>(
        &self,
        x: &Activations<R>,
        bias: Option<&[f32]>,
        out: &mut [f32],
        finish: &impl Finish,
    ) {
        let rows = out.len().div_euclid(self.out);
        let tasks = if R == 1 { tasks() } else { FINER * tasks() };
        let row_blocks = rows.div_ceil(ROWS).max(1);
        let tile_rows = rows.div_ceil(row_blocks).next_multiple_of(R);
        let panels = self.out.div_ceil(PANEL);
        let groups = tasks.div_ceil(row_blocks).min(panels);
        let tile_cols = panels.div_ceil(groups) * PANEL;
        let grid = Grid { rows, cols: self.out, tile_rows, tile_cols };
        let scratch = || Scratch { unpacked: Vec::new(), sums: Vec::new(), arch: Arch::new() };
        par_tiles(out, grid, scratch, |scratch, mut tile| {
            let panels = tile.cols.start.div_euclid(PANEL)..tile.cols.end.div_ceil(PANEL);
            // One tile of rows gains nothing from groups, and reads a panel from end to end.
            let size = if tile.rows.len() > R { GROUP } else { 1 };
            for first in panels.clone().step_by(size) {
                let group = first..panels.end.min(first + size);
                self.group_sums::<R, G, M>(x, group, &tile, scratch);
                store(&mut tile, first * PANEL, (scratch, R), &x.scales, bias, finish);
            }
        });
    }

    /// The products of the tile's rows with some panels: `[panel][row]`.
    ///
    /// They are summed here and not in the output, whose rows can be so far apart that they evict
    /// each other from the caches.
    fn group_sums<const R: usize, const G: usize, const M: usize>(
        &self,
        x: &Activations<R>,
        panels: Range<usize>,
        tile: &Tile<'_>,
        scratch: &mut Scratch,
    ) {
        let Scratch { unpacked, sums, .. } = scratch;
        let rows = tile.rows.len().next_multiple_of(R);
        sums.clear();
        sums.resize(panels.len() * rows, [0.0; PANEL]);
        let stored_blocks = self.kernel.format.numbers().div_euclid(BLOCK);
        let depth = self.depth * stored_blocks;
        let (first, x) = (tile.rows.start.div_euclid(R), x.tiles());
        #[cfg(target_arch = "x86_64")]
        if R == 1 && self.kernel.takes_bytes() {
            let x = x.blocks(first, 0..depth).cast().blocks;
            for (panel, sums) in panels.clone().zip(sums.iter_mut()) {
                x86::add_q8_0_row_512(self.panel(panel), x, std::array::from_mut(sums));
            }
            return;
        }
        unpacked.resize(DEPTH, EMPTY);
        let block_bytes = self.block_bytes();
        for from in (0..depth).step_by(DEPTH) {
            let to = depth.min(from + DEPTH);
            let unpacked = &mut unpacked[..to - from];
            let stored = from.div_euclid(stored_blocks)..to.div_euclid(stored_blocks);
            for (panel, sums) in panels.clone().zip(sums.chunks_exact_mut(rows)) {
                let chunk =
                    &self.panel(panel)[stored.start * block_bytes..stored.end * block_bytes];
                let stored_ones = chunk.chunks_exact(block_bytes);
                for (block, unpacked) in stored_ones.zip(unpacked.chunks_exact_mut(stored_blocks)) {
                    self.kernel.unpack(block, unpacked);
                }
                // A share of the next weights is asked for with each tile of rows.
                let share = chunk.len().div_ceil(rows.div_euclid(R)).next_multiple_of(64);
                let mut next = self.next_chunk(&panels, panel, &stored).chunks(share);
                for (i, sums) in sums.as_chunks_mut().0.iter_mut().enumerate() {
                    next.next().map(into_second_level);
                    let x = x.blocks(first + i, from..to);
                    self.kernel.add_tile::<R, G, M>((chunk, unpacked), x, sums);
                }
            }
        }
    }

    /// The blocks that come after `stored` of `panel`: those of the next panel, or the next ones of
    /// the first.
    fn next_chunk(&self, panels: &Range<usize>, panel: usize, stored: &Range<usize>) -> &[u8] {
        let (panel, stored) = if panel + 1 < panels.end {
            (panel + 1, stored.clone())
        } else {
            (panels.start, stored.end..self.depth.min(stored.end + stored.len()))
        };
        let block_bytes = self.block_bytes();
        &self.panel(panel)[stored.start * block_bytes..stored.end * block_bytes]
    }
}

/// Writes the sums of some panels to the output, whole rows of them one after the other: rows can be
/// so far apart that what is written of one evicts what was written of others.
fn store(
    tile: &mut Tile<'_>,
    first: usize,
    (scratch, tile_rows): (&Scratch, usize),
    scales: &[f32],
    bias: Option<&[f32]>,
    finish: &impl Finish,
) {
    let (from, start) = (first - tile.cols.start, tile.rows.start);
    let rows = tile.rows.len().next_multiple_of(tile_rows);
    let cols = scratch.sums.len().div_euclid(rows) * PANEL;
    for i in 0..tile.rows.len() {
        let row = &mut tile.row(i)[from..];
        let len = row.len().min(cols);
        let out = &mut row[..len];
        let bias = bias.map(|bias| &bias[first..][..len]);
        let sums = &scratch.sums[i..];
        scratch.arch.dispatch(StoreRow { out, sums, rows, scale: scales[start + i], bias });
        finish.apply(start + i, first, out);
    }
}

/// Rows of activations in 8 bits.
#[derive(Debug)]
pub(crate) struct RoundedRows {
    activations: Vec<(Rounding, Activations<TILE_ROWS>)>,
    count: usize,
    width: usize,
}

impl RoundedRows {
    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }
}

/// A matrix, its bias and its output.
#[cfg(target_arch = "x86_64")]
pub(crate) type RowProduct<'a> = (&'a PackedBlocks, Option<&'a [f32]>, &'a mut [f32]);

/// Buffers of one thread, reused from panel to panel.
struct Scratch {
    unpacked: Vec<Unpacked>,
    sums: Vec<[f32; PANEL]>,
    arch: Arch,
}

//! A weight matrix packed for the registers of this machine, and its product with activations.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use pulp::{Simd, WithSimd};

use super::{
    simd::{
        Arch, hugepage,
        prefetch::into_second_level,
        product::{self, TileShape},
        tiles::{self, Grid, Tile, par_tiles},
        transpose::{Square, transpose},
    },
    source::{Kept, MatrixBytes, Numbers},
};

/// Columns of the activations that are multiplied at a time: a panel of weights of this depth stays
/// in the first-level cache.
const DEPTH: usize = 192;
/// Numbers of 16 bits in a cache line.
const LINE: usize = 32;
/// How many numbers ahead of their use weights of 16 bits are asked for: between two parts the
/// processor does not foresee them.
const AHEAD: usize = 64 * LINE;
/// Rows of the activations that are multiplied at a time: a block of them stays in the second.
const ROWS: usize = 384;
/// Columns of the output that are summed at a time.
const COLUMNS_MAX: usize = 1536;

/// `[out, width]` in panels of as many rows as a register tile has columns: `[panel][k][row]`.
#[derive(Debug)]
pub struct PackedMatrix {
    panels: Panels,
    out: usize,
    width: usize,
    shape: TileShape,
    arch: Arch,
    is_narrow: bool,
}

#[derive(Debug)]
enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    /// Each number times the scale.
    Float8(Vec<u8>, Float8, f32),
}

/// The two kinds of numbers of eight bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float8 {
    /// Four bits of exponent with bias 7, three of fraction; all ones is NaN, there is no infinity.
    E4M3,
    /// Five bits of exponent with bias 15, two of fraction: the upper half of an f16.
    E5M2,
}

impl Float8 {
    /// `wide[i] = scale · x[i]`, exact but for the rounding of the product to f32.
    #[inline(always)]
    pub(super) fn widen(self, x: &[u8], scale: f32, wide: &mut [f32]) {
        // The bits in the places of an f32's, whose exponent has another bias.
        let (shift, bias, odd) = match self {
            Self::E4M3 => (20, 2_f32.powi(120), 0x7f),
            Self::E5M2 => (21, 2_f32.powi(112), 0x7c),
        };
        for (wide, x) in wide.iter_mut().zip(x) {
            let (sign, magnitude) = (u32::from(x & 0x80) << 24, u32::from(x & 0x7f));
            let number = f32::from_bits(magnitude << shift | sign) * bias * scale;
            let is_infinity = magnitude == 0x7c && odd == 0x7c;
            let other = if is_infinity { f32::INFINITY.copysign(number) * scale } else { f32::NAN };
            *wide = if magnitude >= odd { other } else { number };
        }
    }
}

impl PackedMatrix {
    /// Packs `weight: [out, width]` in its own type.
    ///
    /// # Errors
    /// A type that is not f32, bf16 or f16, or another rank.
    pub(super) fn new(weight: &Tensor, arch: Arch) -> Result<Self> {
        let (out, width) = weight.dims2()?;
        let shape = TileShape::of(arch);
        let weight = weight.contiguous()?;
        let (storage, layout) = weight.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("a matrix to pack is not contiguous: {layout:?}");
        };
        let panels = match &*storage {
            Storage::Cpu(CpuStorage::F32(x)) => {
                Panels::F32(pack_slice(&x[start..end], width, shape))
            }
            Storage::Cpu(CpuStorage::BF16(x)) => {
                Panels::Bf16(pack_slice(&x[start..end], width, shape))
            }
            Storage::Cpu(CpuStorage::F16(x)) => {
                Panels::F16(pack_slice(&x[start..end], width, shape))
            }
            _ => bail!("a matrix to pack is not f32, bf16 or f16 in host memory"),
        };
        Ok(Self { is_narrow: !matches!(panels, Panels::F32(_)), panels, out, width, shape, arch })
    }

    /// Packs a file's numbers in the type that they are `kept` in; `None` for blocks.
    ///
    /// Halves that stay as they are stored do not count as [narrow](Self::is_narrow): nobody asked for
    /// fewer bits, and their products are those of the same numbers in single precision.
    pub(super) fn of_file(matrix: &MatrixBytes<'_>, kept: Kept, arch: Arch) -> Option<Self> {
        let ([out, width], shape) = (matrix.dims(), TileShape::of(arch));
        let dims = [out, width];
        let (as_stored, numbers) = (kept.is_as_stored(), matrix.numbers());
        let wide = |row, columns, out: &mut [f32]| {
            numbers.widen(matrix.part_of_row(row, columns), out);
        };
        let panels = match (kept, numbers) {
            (_, Numbers::Blocks(_)) => return None,
            (Kept::Bf16, Numbers::Bf16) => {
                Panels::Bf16(pack(dims, shape, halves(matrix, bf16::from_le_bytes)))
            }
            (Kept::F16, Numbers::F16) => {
                Panels::F16(pack(dims, shape, halves(matrix, f16::from_le_bytes)))
            }
            (Kept::Bf16, _) => Panels::Bf16(pack(dims, shape, |row, columns, out| {
                let mut part = [0.0; PART];
                let part = &mut part[..out.len()];
                wide(row, columns, part);
                out.convert_from_f32_slice(part);
            })),
            (Kept::F16, _) => Panels::F16(pack(dims, shape, |row, columns, out| {
                let mut part = [0.0; PART];
                let part = &mut part[..out.len()];
                wide(row, columns, part);
                out.convert_from_f32_slice(part);
            })),
            (_, Numbers::Bf16) if as_stored => {
                Panels::Bf16(pack(dims, shape, halves(matrix, bf16::from_le_bytes)))
            }
            (_, Numbers::F16) if as_stored => {
                Panels::F16(pack(dims, shape, halves(matrix, f16::from_le_bytes)))
            }
            (_, Numbers::Float8(kind, scale)) if as_stored => {
                let panels = pack(dims, shape, |row, columns, out| {
                    out.copy_from_slice(matrix.part_of_row(row, columns));
                });
                Panels::Float8(panels, kind, scale)
            }
            _ => Panels::F32(pack(dims, shape, wide)),
        };
        let is_narrow = match panels {
            Panels::F32(_) => false,
            Panels::Bf16(_) | Panels::F16(_) => !as_stored,
            Panels::Float8(..) => true,
        };
        Some(Self { panels, out, width, shape, arch, is_narrow })
    }

    /// Whether `weight` can be packed.
    pub(super) fn supports(weight: &Tensor) -> bool {
        weight.device().is_cpu() && matches!(weight.dtype(), DType::F32 | DType::BF16 | DType::F16)
    }

    /// Whether the numbers were to be kept in fewer bits than float32.
    pub(super) fn is_narrow(&self) -> bool {
        self.is_narrow
    }

    pub(super) fn dims(&self) -> (usize, usize) {
        (self.out, self.width)
    }

    /// The numbers of row `row`.
    pub(super) fn row(&self, row: usize) -> Vec<f32> {
        let first = row - row % self.shape.columns();
        let mut wide = Vec::new();
        let panel = self.panel(first, 0, self.width, &mut wide);
        panel.iter().skip(row - first).step_by(self.panel_columns(first)).copied().collect()
    }

    /// The matrix as it was, in float32.
    ///
    /// # Errors
    /// A failure to make the tensor.
    pub(super) fn unpacked(&self) -> Result<Tensor> {
        let mut weight = vec![0.0; self.out * self.width];
        let mut wide = Vec::new();
        for first in (0..self.out).step_by(self.shape.columns()) {
            let panel = self.panel(first, 0, self.width, &mut wide);
            let columns = self.panel_columns(first);
            for (i, row) in
                weight[first * self.width..].chunks_exact_mut(self.width).enumerate().take(columns)
            {
                row.iter_mut().zip(panel.chunks_exact(columns)).for_each(|(x, k)| *x = k[i]);
            }
        }
        Tensor::from_vec(weight, (self.out, self.width), &Device::Cpu)
    }

    /// `out[i][j] = Σₖ x[i][k] · weight[j][k] + bias[j]`. `x: [rows, width]`, `out: [rows, out]`.
    pub(super) fn multiply(&self, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        let rows = out.len().checked_div(self.out).unwrap_or(0);
        let tasks = tiles::tasks();
        let blocks = rows.div_ceil(ROWS).max(1);
        let tile_rows = rows.div_ceil(blocks).next_multiple_of(self.shape.rows);
        let panels = self.out.div_ceil(self.shape.columns()).max(1);
        let groups = tasks.div_ceil(blocks).max(self.out.div_ceil(COLUMNS_MAX)).min(panels);
        let tile_cols = panels.div_ceil(groups) * self.shape.columns();
        let grid = Grid { rows, cols: self.out, tile_rows, tile_cols };
        par_tiles(out, grid, Scratch::default, |scratch, tile| {
            self.arch.dispatch(Block { matrix: self, x, bias, tile, scratch });
        });
    }

    /// Columns that the panel that starts at row `first` is packed with.
    fn panel_columns(&self, first: usize) -> usize {
        self.shape.vectors(self.out - first) * self.shape.lanes
    }

    /// Depths `from..from + depth` of the panel that starts at row `first`, widened if need be.
    #[inline(always)]
    fn panel<'a>(
        &'a self,
        first: usize,
        from: usize,
        depth: usize,
        wide: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        let columns = self.panel_columns(first);
        let start = first * self.width + from * columns;
        let range = start..start + depth * columns;
        if !matches!(self.panels, Panels::F32(_)) {
            wide.resize(depth * columns, 0.0);
        }
        match &self.panels {
            Panels::F32(x) => return &x[range],
            Panels::F16(x) => x[range].convert_to_f32_slice(wide),
            Panels::Float8(x, kind, scale) => kind.widen(&x[range], *scale, wide),
            Panels::Bf16(x) => {
                let ahead = x[x.len().min(range.start + AHEAD)..].chunks(LINE).map(Some);
                let ahead = ahead.chain(std::iter::repeat(None));
                let lines = wide.chunks_mut(LINE).zip(x[range].chunks(LINE));
                for ((wide, x), ahead) in lines.zip(ahead) {
                    if let Some(ahead) = ahead {
                        into_second_level(ahead);
                    }
                    for (wide, x) in wide.iter_mut().zip(x) {
                        *wide = f32::from_bits(u32::from(x.to_bits()) << 16);
                    }
                }
            }
        }
        wide
    }
}

/// Depths that are packed at a time: such a part of a panel stays in the first-level cache.
const PART: usize = 64;

/// Packs a matrix `[out, width]`, of whose rows `read(row, columns, numbers)` reads parts of at most
/// [`PART`] columns.
fn pack<T: Default + Send + Sync + Square<N>, const N: usize>(
    [out, width]: [usize; 2],
    shape: TileShape,
    read: impl Fn(usize, Range<usize>, &mut [T]) + Sync,
) -> Vec<T> {
    let (zero, full) = (T::default(), shape.columns());
    let len = out.next_multiple_of(shape.lanes) * width;
    hugepage::par_written(zero, len, full * width, |panel, numbers| {
        let mut parts = vec![[zero; PART]; numbers.len().div_euclid(width)];
        let first = panel * full;
        for from in (0..width).step_by(PART) {
            let depth = PART.min(width - from);
            for (row, part) in (first..out).zip(&mut parts) {
                read(row, from..from + depth, &mut part[..depth]);
            }
            transpose(&parts, depth, numbers.next(depth * parts.len()));
        }
    })
}

fn pack_slice<T: Default + Send + Sync + Square<N>, const N: usize>(
    weight: &[T],
    width: usize,
    shape: TileShape,
) -> Vec<T> {
    let out = weight.len().checked_div(width).unwrap_or(0);
    pack([out, width], shape, |row, columns, numbers| {
        numbers.copy_from_slice(&weight[row * width..][columns]);
    })
}

/// Reads halves that stay what they are.
fn halves<T>(
    matrix: &MatrixBytes<'_>,
    number: impl Fn([u8; 2]) -> T + Sync,
) -> impl Fn(usize, Range<usize>, &mut [T]) + Sync {
    move |row, columns, out| {
        let bytes = matrix.part_of_row(row, columns).as_chunks().0;
        out.iter_mut().zip(bytes).for_each(|(x, bytes)| *x = number(*bytes));
    }
}

#[derive(Default)]
struct Scratch {
    /// Activations: `[tile of rows][k][row]`.
    a: Vec<f32>,
    /// A panel in float32.
    wide: Vec<f32>,
    /// The tile's sums: `[panel][row][column]`. They are not summed in the output, whose rows can
    /// be so far apart that they evict each other from the caches.
    sums: Vec<f32>,
}

/// One tile of the output.
struct Block<'a, 't> {
    matrix: &'a PackedMatrix,
    x: &'a [f32],
    bias: Option<&'a [f32]>,
    tile: Tile<'t>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Block<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (out, width) = self.matrix.dims();
        let shape = self.matrix.shape;
        let (rows, columns) = (self.tile.rows.len(), shape.columns());
        self.scratch.sums.clear();
        self.scratch.sums.resize(rows * self.tile.cols.len().next_multiple_of(columns), 0.0);
        for from in (0..width).step_by(DEPTH) {
            let depth = DEPTH.min(width - from);
            self.pack_activations::<S>(from, depth);
            let Scratch { a, wide, sums } = &mut *self.scratch;
            let panels = self.tile.cols.clone().step_by(columns);
            for (first, sums) in panels.zip(sums.chunks_exact_mut(rows * columns)) {
                let b = self.matrix.panel(first, from, depth, wide);
                match shape.vectors(out - first) {
                    1 => panel_rows::<S, 1>(simd, a, b, depth, sums),
                    2 => panel_rows::<S, 2>(simd, a, b, depth, sums),
                    _ => panel_rows::<S, 3>(simd, a, b, depth, sums),
                }
            }
        }
        self.store();
    }
}

impl Block<'_, '_> {
    /// Copies the sums to the output and adds the bias.
    fn store(&mut self) {
        let (rows, columns) = (self.tile.rows.len(), self.matrix.shape.columns());
        for (panel, sums) in self.scratch.sums.chunks_exact(rows * columns).enumerate() {
            let first = panel * columns;
            let place = self.tile.cols.start + first;
            let stride = self.matrix.panel_columns(place);
            for (i, sums) in sums.chunks_exact(stride).enumerate().take(rows) {
                let out = self.tile.row(i)[first..].iter_mut().zip(sums);
                match self.bias {
                    Some(bias) => out.zip(&bias[place..]).for_each(|((y, x), b)| *y = x + b),
                    None => out.for_each(|(y, x)| *y = *x),
                }
            }
        }
    }

    /// Packs the block's activations, register tile after register tile: `[tile][k][row]`.
    #[inline(always)]
    fn pack_activations<S: Simd>(&mut self, from: usize, depth: usize) {
        let width = self.matrix.width;
        let rows = self.tile.rows.clone();
        self.scratch.a.clear();
        let mut first = rows.start;
        while first < rows.end {
            let count = tile_rows::<S>(rows.end - first);
            let start = self.scratch.a.len();
            self.scratch.a.resize(start + depth * count, 0.0);
            for i in 0..count.min(rows.end - first) {
                let x = &self.x[(first + i) * width + from..][..depth];
                let packed = self.scratch.a[start + i..].iter_mut().step_by(count);
                packed.zip(x).for_each(|(packed, x)| *packed = *x);
            }
            first += count;
        }
    }
}

/// Rows of the next register tile when `left` rows are left.
#[inline(always)]
fn tile_rows<S: Simd>(left: usize) -> usize {
    if left == 1 { 1 } else { product::rows_of::<S>() }
}

/// Adds the product of the packed activations with one panel to `sums: [row][column]`.
#[inline(always)]
fn panel_rows<S: Simd, const V: usize>(
    simd: S,
    a: &[f32],
    b: &[f32],
    depth: usize,
    sums: &mut [f32],
) {
    let columns = V * S::F32_LANES;
    let (mut a, mut sums) = (a, sums);
    while !a.is_empty() {
        let count = product::rows_of::<S>().min(a.len().div_euclid(depth));
        let (tile, rest) = a.split_at(count * depth);
        if count == 1 {
            add_product::<S, 1, V>(simd, tile, b, sums);
        } else if const { product::rows_of::<S>() == 8 } {
            add_product::<S, 8, V>(simd, tile, b, sums);
        } else {
            add_product::<S, 4, V>(simd, tile, b, sums);
        }
        a = rest;
        sums = sums.get_mut(count * columns..).unwrap_or_default();
    }
}

#[inline(always)]
fn add_product<S: Simd, const R: usize, const V: usize>(
    simd: S,
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
) {
    let sums = product::tile::<S, R, V>(simd, a, b);
    for (sums, out) in sums.into_iter().zip(out.chunks_exact_mut(V * S::F32_LANES)) {
        product::update_row(simd, sums, out, product::Add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_multiplies() {
        for arch in super::super::simd::all_archs() {
            for (rows, width, out) in
                [(1, 1, 1), (3, 5, 7), (8, 192, 48), (13, 200, 97), (9, 385, 20)]
            {
                let number =
                    |i: usize| f32::from(u8::try_from(i * 37 % 251).unwrap()) / 100.0 - 1.0;
                let x: Vec<f32> = (0..rows * width).map(number).collect();
                let weight: Vec<f32> = (0..out * width).map(|i| number(i * 3 + 1)).collect();
                let bias: Vec<f32> = (0..out).map(|i| number(i + 5)).collect();
                let tensor = Tensor::from_vec(weight.clone(), (out, width), &Device::Cpu).unwrap();
                let packed = PackedMatrix::new(&tensor, arch).unwrap();
                assert_eq!(
                    packed.unpacked().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                    weight
                );
                let mut y = vec![f32::NAN; rows * out];
                packed.multiply(&x, Some(&bias), &mut y);
                for (i, y) in y.iter().enumerate() {
                    let (row, col) = (i.div_euclid(out), i % out);
                    let pairs =
                        x[row * width..][..width].iter().zip(&weight[col * width..][..width]);
                    let exact: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    let exact = exact + f64::from(bias[col]);
                    let error = (f64::from(*y) - exact).abs();
                    assert!(
                        error < 1e-4,
                        "{arch:?} {rows}×{width}×{out} at {i}: {y}, expected {exact}"
                    );
                }
            }
        }
    }

    #[test]
    fn numbers_of_eight_bits_keep_their_values() {
        let e4m3 = |byte: u8| {
            let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7) / 8.0);
            let magnitude = match (exponent, byte & 7) {
                (15, 7) => f32::NAN,
                (0, _) => fraction * 2_f32.powi(-6),
                _ => (1.0 + fraction) * 2_f32.powi(exponent - 7),
            };
            if byte < 128 { magnitude } else { -magnitude }
        };
        let e5m2 = |byte: u8| f16::from_le_bytes([0, byte]).to_f32();
        let bytes: Vec<u8> = (0..=255).collect();
        for arch in super::super::simd::all_archs() {
            let cases = [(Float8::E4M3, &e4m3 as &dyn Fn(u8) -> f32), (Float8::E5M2, &e5m2)];
            for (kind, value) in cases {
                let numbers = Numbers::Float8(kind, 0.5);
                let packed = |dims| {
                    let matrix = MatrixBytes::new(numbers, vec![&bytes], dims).unwrap();
                    PackedMatrix::of_file(&matrix, Kept::Stored, arch).unwrap()
                };
                for matrix in [[256, 1], [8, 32], [1, 256], [64, 4]].map(packed) {
                    let all = (0..matrix.out).flat_map(|row| matrix.row(row));
                    let expected = bytes.iter().map(|byte| 0.5 * value(*byte));
                    let same =
                        |(x, y): (f32, f32)| x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan();
                    assert!(all.zip(expected).all(same), "{kind:?} {:?}", matrix.dims());
                }
            }
        }
    }
}

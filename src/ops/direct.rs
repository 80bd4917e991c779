//! Convolution without an unrolled copy of the input: the rows a piece of work reads are copied
//! once with their padding, and every tap of the kernel reads them at its own shift.

use candle_core::{Device, Result, Tensor, bail};
use pulp::{Simd, WithSimd};

use super::{
    conv::Conv2dShape,
    cpu::Floats,
    simd::{
        Arch, hugepage,
        product::{self, TileShape, VECTORS},
        tiles::{self, Grid, Tile, par_tiles},
    },
};

/// Input numbers that one piece of work copies, about half of a second-level cache.
const INPUT_LEN: usize = 100_000;
/// Rows of pixels longer than this are worked on in parts of [`PART`].
const WIDTH_MAX: usize = 1024;
const PART: usize = 480;

/// Weights as `[tile of outputs][input][ky][kx][output]`.
#[derive(Debug)]
pub(super) struct PackedKernel {
    weights: Vec<f32>,
    /// `[out, in, kh, kw]`.
    dims: [usize; 4],
    arch: Arch,
    shape: TileShape,
}

impl PackedKernel {
    /// `weight: [out, in, kh, kw]`, float32 in host memory.
    ///
    /// # Errors
    /// Another type or rank.
    pub(super) fn new(weight: &Tensor, arch: Arch) -> Result<Self> {
        let (out, input, kh, kw) = weight.dims4()?;
        let shape = TileShape::of(arch);
        let weight = weight.contiguous()?;
        let floats = Floats::new(&weight);
        let weight = floats.contiguous()?;
        let depth = input * kh * kw;
        let mut weights = Vec::with_capacity(out * depth);
        let mut tile = Vec::new();
        for first in (0..out).step_by(shape.rows) {
            let rows = tile_rows(out - first, shape.rows);
            product::pack_rows(&mut tile, depth, rows, out - first, |i| {
                &weight[(first + i) * depth..][..depth]
            });
            weights.extend_from_slice(&tile);
        }
        Ok(Self { weights, dims: [out, input, kh, kw], arch, shape })
    }

    /// The weights as they were.
    ///
    /// # Errors
    /// A failure to make the tensor.
    pub(super) fn unpacked(&self) -> Result<Tensor> {
        let [out, input, kh, kw] = self.dims;
        let depth = input * kh * kw;
        let mut weight = vec![0.0; out * depth];
        for (i, row) in weight.chunks_exact_mut(depth).enumerate() {
            let first = i - i % self.shape.rows;
            let rows = tile_rows(out - first, self.shape.rows);
            let packed = self.weights[first * depth + i - first..].iter().step_by(rows);
            row.iter_mut().zip(packed).for_each(|(x, packed)| *x = *packed);
        }
        Tensor::from_vec(weight, &self.dims, &Device::Cpu)
    }

    /// `x: [b, in, h, w]` → `[b, out, h', w']`.
    ///
    /// # Errors
    /// Another number of channels, or an input smaller than the kernel.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        conv: Conv2dShape,
    ) -> Result<Tensor> {
        let (b, channels, h, w) = x.dims4()?;
        let [out, input, kh, kw] = self.dims;
        let p = conv.padding;
        let (padded_h, padded_w) = (h + p.top + p.bottom, w + p.left + p.right);
        if channels != input || padded_h < kh || padded_w < kw {
            bail!("conv2d: x {:?} and weight {:?} do not fit", x.dims(), self.dims);
        }
        let out_h = 1 + (padded_h - kh).div_euclid(conv.stride);
        let out_w = 1 + (padded_w - kw).div_euclid(conv.stride);
        let x = x.contiguous()?;
        let bias = bias.map(Tensor::contiguous).transpose()?;
        let (x_floats, bias) = (Floats::new(&x), bias.as_ref().map(Floats::new));
        let mut plan = Plan {
            kernel: self,
            x: x_floats.contiguous()?,
            bias: bias.as_ref().map(Floats::contiguous).transpose()?,
            conv,
            input: [h, w],
            output: [out_h, out_w],
        };
        if kh * kw == 1 && conv.stride == 1 && (padded_h, padded_w) == (h, w) {
            // Pixels do not see each other: one long row.
            (plan.input, plan.output) = ([1, h * w], [1, out_h * out_w]);
        }
        let mut y = hugepage::zeros(b * out * out_h * out_w);
        plan.run(&mut y);
        drop(x_floats);
        Tensor::from_vec(y, (b, out, out_h, out_w), x.device())
    }
}

fn tile_rows(left: usize, full: usize) -> usize {
    if left == 1 { 1 } else { full }
}

/// One convolution of one batch of pictures.
#[derive(Clone, Copy)]
struct Plan<'a> {
    kernel: &'a PackedKernel,
    x: &'a [f32],
    bias: Option<&'a [f32]>,
    conv: Conv2dShape,
    /// `[h, w]`.
    input: [usize; 2],
    /// `[h', w']`.
    output: [usize; 2],
}

impl Plan<'_> {
    fn run(&self, y: &mut [f32]) {
        let [out_h, out_w] = self.output;
        let [out, input, kh, _] = self.kernel.dims;
        let pixels = out_h * out_w;
        let batch = y.len().checked_div(out * pixels).unwrap_or(0).max(1);
        let tasks = tiles::tasks();
        let tile_cols = if out_w > WIDTH_MAX {
            PART
        } else {
            let row_len = input * self.conv.stride * self.conv.stride * (out_w + kh);
            let rows = INPUT_LEN.div_euclid(row_len.max(1)).saturating_sub(kh - 1).max(1);
            rows.min((batch * out_h).div_ceil(tasks)).max(1) * out_w
        };
        let grid = Grid { rows: out, cols: pixels, tile_rows: out.max(1), tile_cols };
        par_tiles(y, grid, Vec::new, |copy, mut tile| {
            let pixels = tile.cols.clone();
            let mut first = pixels.start;
            while first < pixels.end {
                let block = Block::new(self, first, pixels.end);
                block.copy_input(self, tile.batch, copy);
                let (plan, offset) = (*self, first - pixels.start);
                let tile = &mut tile;
                self.kernel.arch.dispatch(Work { plan, block, copy, tile, offset });
                first += block.rows * block.width;
            }
        });
    }
}

/// Output pixels that are worked on together: some whole rows, or a part of one.
#[derive(Clone, Copy)]
struct Block {
    y: usize,
    x: usize,
    rows: usize,
    width: usize,
    /// Rows and columns of the copied input, of each of the stride's phases.
    copy_rows: usize,
    copy_width: usize,
}

impl Block {
    /// The longest block that starts at output pixel `first` and ends before `end`.
    fn new(plan: &Plan<'_>, first: usize, end: usize) -> Self {
        let [_, _, kh, kw] = plan.kernel.dims;
        let out_w = plan.output[1];
        let (y, x) = (first.div_euclid(out_w), first % out_w);
        let whole_rows = (end - first).div_euclid(out_w);
        let (rows, width) = if x == 0 && whole_rows > 0 {
            (whole_rows, out_w)
        } else {
            (1, (end - first).min(out_w - x))
        };
        let stride = plan.conv.stride;
        let copy_rows = rows + (kh - 1).div_euclid(stride);
        let copy_width = width + (kw - 1).div_euclid(stride);
        Self { y, x, rows, width, copy_rows, copy_width }
    }

    /// Copied numbers of one input channel.
    fn plane_len(&self, stride: usize) -> usize {
        stride * stride * self.copy_rows * self.copy_width
    }

    /// Copies the input as `[channel][row phase][column phase][row][column]`, padding included.
    fn copy_input(&self, plan: &Plan<'_>, batch: usize, copy: &mut Vec<f32>) {
        let (stride, padding) = (plan.conv.stride, plan.conv.padding);
        let [h, w] = plan.input;
        let channels = plan.kernel.dims[1];
        let slack = plan.kernel.shape.columns();
        copy.resize(channels * self.plane_len(stride) + slack, 0.0);
        let rows = copy.chunks_exact_mut(self.copy_width);
        for (i, copy) in rows.take(channels * stride * stride * self.copy_rows).enumerate() {
            let (i, row) = (i.div_euclid(self.copy_rows), i % self.copy_rows);
            let (channel, phase) = (i.div_euclid(stride * stride), i % (stride * stride));
            let (phase_y, phase_x) = (phase.div_euclid(stride), phase % stride);
            let x = &plan.x[(batch * channels + channel) * h * w..][..h * w];
            let y = ((self.y + row) * stride + phase_y).checked_sub(padding.top);
            match y.filter(|y| *y < h) {
                Some(y) => {
                    let first = self.x * stride + phase_x;
                    copy_row(copy, &x[y * w..][..w], first, padding.left, stride);
                }
                None => copy.fill(0.0),
            }
        }
    }

    /// Where each tap of the kernel starts within a channel's copied numbers.
    fn taps(&self, [_, _, kh, kw]: [usize; 4], stride: usize) -> Vec<usize> {
        let tap = |ky: usize, kx: usize| {
            let phase = (ky % stride) * stride + kx % stride;
            let row = phase * self.copy_rows + ky.div_euclid(stride);
            row * self.copy_width + kx.div_euclid(stride)
        };
        (0..kh).flat_map(|ky| (0..kw).map(move |kx| tap(ky, kx))).collect()
    }
}

/// `copy[j] = x[first + j · stride − left]`, 0 outside `x`.
fn copy_row(copy: &mut [f32], x: &[f32], first: usize, left: usize, stride: usize) {
    let from = left.saturating_sub(first).div_ceil(stride).min(copy.len());
    let to = (left + x.len()).saturating_sub(first).div_ceil(stride).clamp(from, copy.len());
    copy[..from].fill(0.0);
    copy[to..].fill(0.0);
    if from == to {
        return;
    }
    let x = &x[first + from * stride - left..];
    if stride == 1 {
        copy[from..to].copy_from_slice(&x[..to - from]);
    } else {
        copy[from..to].iter_mut().zip(x.iter().step_by(stride)).for_each(|(copy, x)| *copy = *x);
    }
}

struct Work<'a, 't> {
    plan: Plan<'a>,
    block: Block,
    copy: &'a [f32],
    tile: &'a mut Tile<'t>,
    /// The block's first pixel in the tile.
    offset: usize,
}

impl WithSimd for Work<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let [out, input, kh, kw] = self.plan.kernel.dims;
        let depth = input * kh * kw;
        let taps = self.block.taps(self.plan.kernel.dims, self.plan.conv.stride);
        let full = product::rows_of::<S>();
        for first in (0..out).step_by(full) {
            let rows = tile_rows(out - first, full);
            let weights = &self.plan.kernel.weights[first * depth..][..rows * depth];
            if rows == 1 {
                self.output_rows::<S, 1>(simd, weights, &taps, first);
            } else if const { product::rows_of::<S>() == 8 } {
                self.output_rows::<S, 8>(simd, weights, &taps, first);
            } else {
                self.output_rows::<S, 4>(simd, weights, &taps, first);
            }
        }
    }
}

impl Work<'_, '_> {
    /// All pixels of `R` output channels. Pixels run on from row to row of the copied input; those
    /// between two rows are computed and dropped.
    #[inline(always)]
    fn output_rows<S: Simd, const R: usize>(
        &mut self,
        simd: S,
        weights: &[f32],
        taps: &[usize],
        first: usize,
    ) {
        let end = (self.block.rows - 1) * self.block.copy_width + self.block.width;
        for start in (0..end).step_by(VECTORS * S::F32_LANES) {
            match (end - start).div_ceil(S::F32_LANES) {
                1 => self.tile::<S, R, 1>(simd, weights, taps, [first, start]),
                2 => self.tile::<S, R, 2>(simd, weights, taps, [first, start]),
                _ => self.tile::<S, R, VECTORS>(simd, weights, taps, [first, start]),
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const V: usize>(
        &mut self,
        simd: S,
        weights: &[f32],
        taps: &[usize],
        [first, start]: [usize; 2],
    ) {
        let plane_len = self.block.plane_len(self.plan.conv.stride);
        let copy = (self.copy, plane_len);
        let sums = product::tapped_tile::<S, R, V>(simd, weights, copy, taps, start);
        let rows = self.tile.rows.len() - first;
        for (i, sums) in sums.into_iter().enumerate().take(rows) {
            let bias = self.plan.bias.map_or(0.0, |bias| bias[first + i]);
            let bias = simd.splat_f32s(bias);
            let out = &mut self.tile.row(first + i)[self.offset..];
            let mut biased = sums;
            for sum in &mut biased {
                *sum = simd.add_f32s(*sum, bias);
            }
            self.block.store(simd, biased, start, out);
        }
    }
}

impl Block {
    /// Writes the pixels from `start` on (counted in the copied input) that are part of the output.
    #[inline(always)]
    fn store<S: Simd, const V: usize>(
        &self,
        simd: S,
        sums: [S::f32s; V],
        start: usize,
        out: &mut [f32],
    ) {
        let len = V * S::F32_LANES;
        let (row, column) = (start.div_euclid(self.copy_width), start % self.copy_width);
        if column + len <= self.width {
            let out = &mut out[row * self.width + column..][..len];
            return product::update_row(simd, sums, out, product::Store);
        }
        let mut lanes = [[simd.splat_f32s(0.0); V]; 1];
        lanes[0] = sums;
        let lanes: &[f32] = bytemuck::cast_slice(&lanes[0]);
        let mut done = 0;
        for row in row..self.rows {
            let column = (start + done) - row * self.copy_width;
            let valid = self.width.saturating_sub(column).min(len - done);
            let out = &mut out[row * self.width..][..self.width];
            if valid > 0 {
                out[column..column + valid].copy_from_slice(&lanes[done..done + valid]);
            }
            done += self.copy_width - column;
            if done >= len {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        conv::{Padding, conv2d_plain},
        simd::all_archs,
    };

    #[test]
    fn every_instruction_set_convolves() {
        let padding = Padding { top: 0, bottom: 1, left: 2, right: 1 };
        let cases = [
            ([1, 1, 1, 1], [1, 1, 1, 1], 1, Padding::default()),
            ([2, 3, 9, 11], [5, 3, 3, 3], 1, Padding::all(1)),
            ([1, 4, 10, 7], [9, 4, 3, 3], 2, padding),
            ([1, 2, 5, 1030], [3, 2, 3, 3], 1, Padding::all(1)),
            ([1, 2, 4, 1100], [8, 2, 3, 2], 2, padding),
            ([2, 20, 13, 17], [17, 20, 1, 1], 1, Padding::default()),
            ([1, 2, 8, 8], [3, 2, 1, 1], 3, Padding::default()),
            ([1, 3, 12, 12], [4, 3, 5, 4], 3, Padding::all(2)),
            ([1, 40, 70, 50], [8, 40, 3, 3], 1, Padding::all(1)),
        ];
        for arch in all_archs() {
            for (x, weight, stride, padding) in cases {
                let random =
                    |shape: &[usize]| Tensor::randn(0.0_f32, 1.0, shape, &Device::Cpu).unwrap();
                // Weights of a layer that keeps the size of its numbers.
                let depth: usize = weight[1..].iter().product();
                let scale = (depth as f64).sqrt().recip();
                let (x, bias) = (random(&x), random(&weight[..1]));
                let weight = (random(&weight) * scale).unwrap();
                let packed = PackedKernel::new(&weight, arch).unwrap();
                let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(values(&packed.unpacked().unwrap()), values(&weight));
                let conv = Conv2dShape { stride, padding };
                let y = packed.forward(&x, Some(&bias), conv).unwrap();
                let expected = conv2d_plain(&x, &weight, Some(&bias), conv).unwrap();
                assert_eq!(y.dims(), expected.dims());
                let worst =
                    values(&y).into_iter().zip(values(&expected)).map(|(a, b)| (a - b).abs());
                let worst = worst.max_by(f32::total_cmp).unwrap(); // NaN is the largest
                assert!(
                    worst < 2e-5,
                    "{arch:?} {:?} {:?} {conv:?}: {worst:e}",
                    x.dims(),
                    weight.dims()
                );
            }
        }
    }
}

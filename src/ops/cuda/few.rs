//! Products of up to eight rows with weights as they are stored, which reading the weights bounds:
//! `kernels/few_bytes.cuh`, `kernels/few.cuh`.
//!
//! One setting for each format and kind of shape, as measured on an H200 with 3584 → 1024, 3584, 4608,
//! 37888, 152064 and 18944 → 3584.

use candle_core::{DType, Device, Result, Tensor};

use super::{
    ffi::{Limits, Output, launch, launch_early, limits},
    launch::{Args, Launch},
    linear::Format,
};

/// The most rows.
pub(super) const FEW_ROWS: usize = 8;
/// Rows that the kernels with rows of bytes take at a time.
const BYTES_ROWS: usize = 4;
/// Depth of a piece of weights.
const PIECE: usize = 256;
/// Outputs of a tile.
const TILE: usize = 16;
const WARP: usize = 32;
/// Depths from which more warps share a block's outputs.
const DEEP: usize = 8192;
/// Units of weights up to which half of a multiprocessor takes a block's share, so that the next kernel has
/// room to start.
const SMALL_UNITS: usize = 32;
/// Warps of a small block, and the fewest for which the kernels with rows of bytes pay.
const SMALL_WARPS: usize = 8;
const WARPS_MIN: usize = 4;

/// A matrix `[outs, depth]` where it lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weights {
    pub(super) address: u64,
    pub(super) format: Format,
    pub(super) outs: usize,
    pub(super) depth: usize,
    pub(super) scale: f64,
    /// Whether no kernel wrote it, so that it may be read before those queued before have ended.
    pub(super) is_constant: bool,
}

impl Weights {
    /// As `kernels/few_bytes.cuh` numbers formats.
    pub(super) fn number(&self) -> usize {
        match self.format {
            Format::Q4K => 0,
            Format::Q6K => 1,
            _ => 2,
        }
    }
}

/// `x · weightᵀ + bias` of up to [`FEW_ROWS`] rows `x: [.., depth]` in bf16, in one piece from a multiple
/// of 16 bytes on; `bias: [outs]`. `None` where no kernel of this file fits.
pub(super) fn product(
    x: &Tensor,
    weights: &Weights,
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let Weights { outs, depth, .. } = *weights;
    let rows = x.elem_count().checked_div(depth).unwrap_or(0);
    let limits = limits(x.device())?;
    let (shape, early) = match by_bytes(weights, rows, limits) {
        Some(shape) => (Some(shape), weights.is_constant && limits.is_hopper),
        None => (by_floats(weights, rows, limits), false),
    };
    let Some(shape) = shape else { return Ok(None) };
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = outs;
    }
    let out = Output::new(x.device(), &dims, DType::BF16)?;
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let mut args = Args::default();
    args.tensor(Some(x))?.address(weights.address).tensor(bias.as_ref())?;
    args.address(out.address()).counts([rows, depth, outs]).number(weights.scale);
    start(x.device(), &shape.launch(args), early)?;
    out.into_tensor().map(Some)
}

fn start(device: &Device, start: &Launch, early: bool) -> Result<()> {
    if early { launch_early(device, start) } else { launch(device, start) }
}

/// A kernel with its blocks, their warps and shared memory.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    kernel: String,
    blocks: usize,
    warps: usize,
    shared_bytes: usize,
}

impl Shape {
    fn launch(self, args: Args) -> Launch {
        Launch {
            kernel: self.kernel,
            grid: [self.blocks, 1, 1],
            threads: WARP * self.warps,
            shared_bytes: self.shared_bytes,
            args,
        }
    }
}

/// How a format lies for the kernels with rows of bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bytes {
    /// Pieces of a unit of weights.
    unit: usize,
    /// Bytes that hold a piece of a row.
    pub(super) x_bytes: usize,
    /// Bytes of a warp's ring of units.
    ring: usize,
    /// The most warps of a block.
    warps: usize,
}

impl Bytes {
    pub(super) fn of(format: Format, one: bool, depth: usize) -> Option<Self> {
        let (unit, x_bytes, ring, warps) = match format {
            Format::Q4K => (1, 576, 0, if one { 20 } else { 12 }),
            Format::Q6K => (2, 640, 2 * 16 * 27 * 16, if one && depth > DEEP { 12 } else { 8 }),
            Format::Q8_0 => (1, 576, if one { 3 } else { 2 } * 16 * 17 * 16, 16),
            Format::Q5K | Format::F8E4M3 | Format::Bf16 => return None,
        };
        Some(Self { unit, x_bytes, ring, warps })
    }

    /// Whether `blocks` may share the matrix.
    pub(super) fn take(self, weights: &Weights, blocks: usize, limits: Limits) -> bool {
        weights.depth > 0
            && weights.depth.is_multiple_of(self.unit * PIECE)
            && weights.address.is_multiple_of(16)
            && (self.ring == 0 || limits.is_hopper)
            && blocks > 0
            && u32::try_from((blocks + 1) * weights.outs).is_ok()
    }

    /// Units of weights of the largest share.
    fn units(self, weights: &Weights, blocks: usize) -> usize {
        let tiles = weights.outs.div_ceil(blocks).div_ceil(TILE);
        tiles * weights.depth.div_euclid(self.unit * PIECE)
    }

    /// Shared memory of a block of so many warps, with tiles of so many outputs.
    fn shared(
        self,
        weights: &Weights,
        held: usize,
        blocks: usize,
        [warps, tile]: [usize; 2],
    ) -> usize {
        let units = weights.depth.div_euclid(self.unit * PIECE);
        let sums = held * sums_bytes([weights.outs, blocks], [tile, units], warps);
        let rings = if self.ring == 0 { 0 } else { 128 + warps * (64 + self.ring) };
        held * weights.depth.div_euclid(PIECE) * self.x_bytes + sums + rings
    }
}

/// Shared memory of the sums that warps leave of the largest share of outputs that blocks share, in tiles of so
/// many outputs and units of weights.
pub(super) fn sums_bytes(
    [outs, blocks]: [usize; 2],
    [tile, units]: [usize; 2],
    warps: usize,
) -> usize {
    let of_share = |outs: usize| {
        let tiles = outs.div_ceil(tile);
        let per_warp = (tiles * units).div_ceil(warps).max(1);
        let sharers = (units + per_warp).saturating_sub(2).div_euclid(per_warp) + 1;
        tiles * sharers * TILE * size_of::<f32>()
    };
    // Blocks have as many outputs, or one less.
    let most = outs.div_ceil(blocks);
    of_share(most).max(of_share(most.saturating_sub(1)))
}

/// `kernels/few_bytes.cuh`.
fn by_bytes(weights: &Weights, rows: usize, limits: Limits) -> Option<Shape> {
    let one = rows == 1;
    let bytes = Bytes::of(weights.format, one, weights.depth)?;
    let blocks = limits.multiprocessors.min(weights.outs);
    if !(1..=BYTES_ROWS).contains(&rows) || !bytes.take(weights, blocks, limits) {
        return None;
    }
    let held = if one { 1 } else { BYTES_ROWS };
    let is_small = one && bytes.units(weights, blocks) <= SMALL_UNITS;
    let most = if is_small { bytes.warps.min(SMALL_WARPS) } else { bytes.warps };
    let shared = |warps: &usize| bytes.shared(weights, held, blocks, [*warps, TILE]);
    let warps = (WARPS_MIN..=most).rev().find(|warps| shared(warps) <= limits.shared_bytes)?;
    let kernel = format!("few_bytes_{held}_{}", weights.format.name());
    Some(Shape { kernel, blocks, warps, shared_bytes: shared(&warps) })
}

/// A matrix and its bias `[outs]`.
pub(super) type Biased<'a> = (Weights, Option<&'a Tensor>);

/// [`product`] of one row by each of two or three matrices, by one kernel; `None` where it does not fit
/// them.
pub(super) fn product_each(x: &Tensor, matrices: &[Biased<'_>]) -> Result<Option<Vec<Tensor>>> {
    let limits = limits(x.device())?;
    let Some((shape, shares)) = shape_of_each(matrices, limits) else { return Ok(None) };
    let early = limits.is_hopper && matrices.iter().all(|(weights, _)| weights.is_constant);
    let mut args = Args::default();
    let depth = x.elem_count();
    args.tensor(Some(x))?.count(depth);
    let (mut outs, mut biases) = (Vec::new(), Vec::new());
    for ((weights, bias), blocks) in matrices.iter().zip(shares) {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = weights.outs;
        }
        let out = Output::new(x.device(), &dims, DType::BF16)?;
        let bias = bias.map(Tensor::contiguous).transpose()?;
        args.address(weights.address).tensor(bias.as_ref())?.address(out.address());
        args.counts([weights.outs, weights.number(), blocks]);
        outs.push(out);
        biases.push(bias);
    }
    for _ in matrices.len()..EACH {
        args.address(0).address(0).address(0).counts([0, 0, 0]);
    }
    start(x.device(), &shape.launch(args), early)?;
    outs.into_iter().map(Output::into_tensor).collect::<Result<_>>().map(Some)
}

/// The most matrices of one launch, and its most warps.
const EACH: usize = 3;
const EACH_WARPS: usize = 16;

/// How one row is multiplied by up to three matrices at once.
pub(super) struct Split {
    /// Of each matrix.
    pub(super) blocks: Vec<usize>,
    pub(super) warps: usize,
    pub(super) shared_bytes: usize,
}

impl Split {
    /// Shares out multiprocessors by bytes; `pairs`: an output is two rows of weights. `None` where the kernels
    /// with rows of bytes do not take the matrices.
    pub(super) fn of(matrices: &[&Weights], pairs: bool, limits: Limits) -> Option<Self> {
        Self::new(matrices, if pairs { TILE >> 1 } else { TILE }, limits, false)
    }

    /// `spare`: small products leave room for the next kernel.
    fn new(matrices: &[&Weights], tile: usize, limits: Limits, spare: bool) -> Option<Self> {
        let depth = matrices.first()?.depth;
        let row_bytes = |weights: &Weights| {
            let (numbers, bytes) = weights.format.block();
            weights.depth.div_euclid(numbers) * bytes * weights.outs
        };
        let total: usize = matrices.iter().map(|weights| row_bytes(weights)).sum();
        let (mut before, mut end, mut parts) = (0, 0, Vec::new());
        for weights in matrices {
            before += row_bytes(weights);
            // By bytes, rounded, at least one.
            let blocks = (before * limits.multiprocessors + (total >> 1)).checked_div(total)?;
            let blocks = blocks.saturating_sub(end).max(1).min(weights.outs);
            end += blocks;
            let bytes = Bytes::of(weights.format, true, depth)?;
            let fits = weights.depth == depth && (weights.scale - 1.0).abs() < f64::EPSILON;
            if !fits || !bytes.take(weights, blocks, limits) {
                return None;
            }
            parts.push((weights, bytes, blocks));
        }
        let most = parts.iter().map(|(_, bytes, _)| bytes.warps).min()?.min(EACH_WARPS);
        let is_small = spare
            && parts.iter().all(|(weights, bytes, n)| bytes.units(weights, *n) <= SMALL_UNITS);
        let most = if is_small { most.min(SMALL_WARPS) } else { most };
        let shared = |warps: &usize| {
            let each = parts
                .iter()
                .map(|(weights, bytes, n)| bytes.shared(weights, 1, *n, [*warps, tile]));
            each.max().unwrap_or(0)
        };
        let room = limits.shared_bytes.saturating_sub(SCRATCH_BYTES);
        let warps = (WARPS_MIN..=most).rev().find(|warps| shared(warps) <= room)?;
        let blocks = parts.iter().map(|(_, _, blocks)| *blocks).collect();
        Some(Self { blocks, warps, shared_bytes: shared(&warps) })
    }
}

/// Room in shared memory that a kernel may want beside the product's: a number a warp.
pub(super) const SCRATCH_BYTES: usize = 128;

/// The launch and the blocks of each matrix.
fn shape_of_each(matrices: &[Biased<'_>], limits: Limits) -> Option<(Shape, Vec<usize>)> {
    if !(2..=EACH).contains(&matrices.len()) {
        return None;
    }
    let weights: Vec<&Weights> = matrices.iter().map(|(weights, _)| weights).collect();
    let Split { blocks, warps, shared_bytes } = Split::new(&weights, TILE, limits, true)?;
    let kernel = "few_bytes_each".to_owned();
    Some((Shape { kernel, blocks: blocks.iter().sum(), warps, shared_bytes }, blocks))
}

/// `kernels/few.cuh`.
fn by_floats(weights: &Weights, rows: usize, limits: Limits) -> Option<Shape> {
    let Weights { address, format, outs, depth, .. } = *weights;
    let one = rows == 1 && matches!(format, Format::Q5K | Format::F8E4M3 | Format::Bf16);
    // Pieces of 16 bytes that hold a piece of a row.
    let pieces = match format {
        Format::Q4K => 9,
        Format::Q5K => 11,
        Format::Q6K => 14,
        Format::Q8_0 => 17,
        Format::F8E4M3 => 16,
        Format::Bf16 => 32,
    };
    let (tiles, stages) = if format == Format::Q4K { (2, 3) } else { (1, 2) };
    let tile = tiles * TILE;
    let fits = (1..=FEW_ROWS).contains(&rows)
        && depth > 0
        && depth.is_multiple_of(PIECE)
        && address.is_multiple_of(16)
        && outs >= tile;
    if !fits {
        return None;
    }
    let (x_bytes, columns) = if one { (512, 1) } else { (8 * 528, 8) };
    let warp_bytes = stages * (16 * tile * pieces + x_bytes) + tile * columns * 4;
    let wanted = match format {
        _ if depth <= DEEP => 4,
        Format::F8E4M3 | Format::Bf16 => 5,
        _ => 8,
    };
    let warps = wanted.min(depth.div_euclid(PIECE));
    let warps = warps.min(limits.shared_bytes.div_euclid(warp_bytes));
    let kernel = format!("few_{}_{}", if one { "one" } else { "rows" }, format.name());
    let blocks = outs.div_ceil(tile);
    (warps > 0).then(|| Shape { kernel, blocks, warps, shared_bytes: warps * warp_bytes })
}

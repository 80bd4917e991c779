//! Activations in 8 bits.
//!
//! A row has one scale in float32, and each block of 32 a power of two beside it: applying it is an
//! addition to the exponent, which costs the units that multiply nothing. A step is at most twice
//! the one that the block alone would get. The row's scale is the best of eight, so that the mean
//! square of the steps is at most 2.3 times that of a scale for each block.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use rayon::prelude::*;

use super::{BLOCK, FOURS, HALF, SUPER_BLOCK, hugepage, instructions::Instructions};

/// Blocks of a super-block.
pub(super) const BLOCKS: usize = SUPER_BLOCK.div_euclid(BLOCK);

/// Rows of a tile that are multiplied as usual where the others are multiplied in pairs.
pub(super) const PLAIN_ROWS: usize = 3;

/// What rows are rounded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rounding {
    pub(super) instructions: Instructions,
    /// The largest magnitude. Below [`Self::WHOLE`], rows from [`PLAIN_ROWS`] on are for pairs.
    pub(super) limit: u8,
    /// What is to be added to all weights.
    pub(super) shift: i32,
}

/// What is to be known of rows besides.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Needs {
    pub(super) sums: bool,
    /// The width is one of whole super-blocks.
    pub(super) super_sums: bool,
}

impl FromIterator<Self> for Needs {
    /// What any needs.
    fn from_iter<I: IntoIterator<Item = Self>>(needs: I) -> Self {
        needs.into_iter().fold(Self::default(), |all, needs| Self {
            sums: all.sums || needs.sums,
            super_sums: all.super_sums || needs.super_sums,
        })
    }
}

impl Rounding {
    /// The range of a signed byte.
    pub(super) const WHOLE: u8 = 127;

    fn is_paired(self, row: usize) -> bool {
        self.limit < Self::WHOLE && row >= PLAIN_ROWS
    }
}

/// Blocks of each row of a tile of activations.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RowBlock<const R: usize> {
    pub(super) values: [[[i8; 4]; FOURS]; R],
    /// What the row's sums start from: −128 times the block's sum, and the shift of all weights. For
    /// pairs, see [`pair_start`].
    pub(super) starts: [i32; R],
    /// The block's power of two, to be added to the exponent of a number: its bits.
    pub(super) exponents: [i32; R],
}

/// What only some formats of weights need to know of a block.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Sums<const R: usize> {
    /// −128 times the sum of the second half.
    pub(super) second_starts: [i32; R],
    /// The block's sum, times its power of two.
    pub(super) all: [f32; R],
    /// The sum of the second half, times the block's power of two.
    pub(super) second: [f32; R],
}

/// The sums of a super-block's blocks in 16 bits.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct SuperSums<const R: usize> {
    pub(super) pairs: [[[i16; 2]; BLOCKS.div_euclid(2)]; R],
    /// Their power of two, as that of a block.
    pub(super) exponents: [i32; R],
}

#[expect(unsafe_code, reason = "one buffer serves tiles of different shapes")]
// SAFETY: arrays of numbers of one and of four bytes, the smaller ones in whole fours, so that there
// is no padding; any bits are a value.
unsafe impl<const R: usize> bytemuck::Zeroable for RowBlock<R> {}
#[expect(unsafe_code, reason = "one buffer serves tiles of different shapes")]
// SAFETY: as above.
unsafe impl<const R: usize> bytemuck::Pod for RowBlock<R> {}
#[expect(unsafe_code, reason = "one buffer serves tiles of different shapes")]
// SAFETY: numbers of four bytes only.
unsafe impl<const R: usize> bytemuck::Zeroable for Sums<R> {}
#[expect(unsafe_code, reason = "one buffer serves tiles of different shapes")]
// SAFETY: as above.
unsafe impl<const R: usize> bytemuck::Pod for Sums<R> {}
#[expect(unsafe_code, reason = "one buffer serves tiles of different shapes")]
// SAFETY: eight numbers of two bytes for each of four.
unsafe impl<const R: usize> bytemuck::Zeroable for SuperSums<R> {}
#[expect(unsafe_code, reason = "one buffer serves tiles of different shapes")]
// SAFETY: as above.
unsafe impl<const R: usize> bytemuck::Pod for SuperSums<R> {}

/// Some blocks of a tile, and what is known of them where it is needed.
#[derive(Debug, Clone, Copy)]
pub(super) struct TileBlocks<'a, const R: usize> {
    pub(super) blocks: &'a [RowBlock<R>],
    pub(super) sums: &'a [Sums<R>],
    pub(super) super_sums: &'a [SuperSums<R>],
}

impl<'a, const R: usize> TileBlocks<'a, R> {
    /// The same tile, whose number of rows is known.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for x86 only"))]
    pub(super) fn cast<const S: usize>(self) -> TileBlocks<'a, S> {
        TileBlocks {
            blocks: bytemuck::cast_slice(self.blocks),
            sums: bytemuck::cast_slice(self.sums),
            super_sums: bytemuck::cast_slice(self.super_sums),
        }
    }
}

/// Activations `[rows, width]` in tiles of `R` rows: `[tile][block]`.
#[derive(Debug)]
pub(super) struct Activations<const R: usize> {
    buffer: Buffer,
    layout: Layout<R>,
    /// What the sums of each row are multiplied with in the end.
    pub(super) scales: Vec<f32>,
}

/// Where the parts of all tiles lie in a buffer of float32 numbers: blocks, their sums, and those of
/// super-blocks.
#[derive(Debug, Clone, Copy)]
struct Layout<const R: usize> {
    tiles: usize,
    /// Blocks of a row.
    depth: usize,
}

impl<const R: usize> Layout<R> {
    /// Super-blocks of a row. Room for one is there in any case.
    fn supers(self) -> usize {
        self.depth.div_euclid(BLOCKS).max(1)
    }

    /// Numbers of each part.
    fn lens(self) -> [usize; 3] {
        let len =
            |count: usize, bytes: usize| self.tiles * count * bytes.div_euclid(size_of::<f32>());
        [
            len(self.depth, size_of::<RowBlock<R>>()),
            len(self.depth, size_of::<Sums<R>>()),
            len(self.supers(), size_of::<SuperSums<R>>()),
        ]
    }

    /// The parts of a buffer, to be read.
    fn parts(self, buffer: &[f32]) -> TileBlocks<'_, R> {
        let [blocks, sums, super_sums] = self.lens();
        let (blocks, rest) = buffer.split_at(blocks);
        let (sums, rest) = rest.split_at(sums);
        TileBlocks {
            blocks: bytemuck::cast_slice(blocks),
            sums: bytemuck::cast_slice(sums),
            super_sums: bytemuck::cast_slice(&rest[..super_sums]),
        }
    }

    /// The parts of a buffer, to be written, in those of each tile.
    fn tiles_mut(self, buffer: &mut [f32]) -> impl IndexedParallelIterator<Item = TileMut<'_, R>> {
        let [blocks, sums, super_sums] = self.lens();
        let (blocks, rest) = buffer.split_at_mut(blocks);
        let (sums, rest) = rest.split_at_mut(sums);
        let blocks = bytemuck::cast_slice_mut(blocks).par_chunks_mut(self.depth);
        let sums = bytemuck::cast_slice_mut(sums).par_chunks_mut(self.depth);
        let super_sums = bytemuck::cast_slice_mut(&mut rest[..super_sums]);
        let tiles = blocks.zip(sums).zip(super_sums.par_chunks_mut(self.supers()));
        tiles.map(|((blocks, sums), super_sums)| TileMut { blocks, sums, super_sums })
    }
}

/// All blocks of a tile, to be written.
struct TileMut<'a, const R: usize> {
    blocks: &'a mut [RowBlock<R>],
    sums: &'a mut [Sums<R>],
    super_sums: &'a mut [SuperSums<R>],
}

/// Rows of activations, as they lie in memory or computed when they are rounded.
pub(crate) trait Rows: Sync {
    /// How many there are.
    fn count(&self) -> usize;
    /// Row `i`; `scratch` is room to compute it in.
    fn row<'a>(&'a self, i: usize, scratch: &'a mut Vec<f32>) -> &'a [f32];
}

/// Rows of `width` numbers, one after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DenseRows<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) width: usize,
}

impl Rows for DenseRows<'_> {
    fn count(&self) -> usize {
        self.x.len().checked_div(self.width).unwrap_or(0)
    }

    fn row<'a>(&'a self, i: usize, _: &'a mut Vec<f32>) -> &'a [f32] {
        &self.x[i * self.width..][..self.width]
    }
}

impl<const R: usize> Activations<R> {
    /// Rounds rows of `depth` blocks.
    pub(super) fn new(rows: &impl Rows, depth: usize, needs: Needs, rounding: Rounding) -> Self {
        let count = rows.count();
        let layout = Layout { tiles: count.div_ceil(R), depth };
        let mut buffer = Buffer::take(layout.lens().iter().sum());
        let mut scales = vec![0.0; layout.tiles * R];
        let tiles = layout.tiles_mut(&mut buffer.0).zip(scales.par_chunks_mut(R)).enumerate();
        let scratch = || (Vec::new(), Vec::new());
        tiles.for_each_init(scratch, |(largest, computed), (tile, (parts, scales))| {
            let TileMut { blocks, sums, super_sums } = parts;
            for (i, (row, scale)) in (tile * R..count).zip(scales).enumerate() {
                largest.resize(depth, 0.0);
                let mut row = Row::<R> {
                    x: rows.row(row, computed),
                    largest,
                    blocks,
                    sums: if needs.sums { sums } else { &mut [] },
                    super_sums: if needs.super_sums { super_sums } else { &mut [] },
                    i,
                    rounding,
                };
                *scale = rounding.instructions.quantize_row(&mut row);
            }
        });
        Self { buffer, layout, scales }
    }

    /// All tiles. What was not [needed](Needs) is what was left there before.
    pub(super) fn tiles(&self) -> Tiles<'_, R> {
        Tiles { blocks: self.layout.parts(&self.buffer.0), layout: self.layout }
    }
}

/// Tiles of rows, one after the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles<'a, const R: usize> {
    blocks: TileBlocks<'a, R>,
    layout: Layout<R>,
}

impl<'a, const R: usize> Tiles<'a, R> {
    /// The blocks in `range` of a tile.
    #[inline]
    pub(super) fn blocks(&self, tile: usize, range: Range<usize>) -> TileBlocks<'a, R> {
        let super_range = range.start.div_euclid(BLOCKS)..range.end.div_euclid(BLOCKS);
        let TileBlocks { blocks, sums, super_sums } = self.blocks;
        let (depth, supers) = (self.layout.depth, self.layout.supers());
        TileBlocks {
            blocks: &blocks[tile * depth..][range.clone()],
            sums: &sums[tile * depth..][range],
            super_sums: &super_sums[tile * supers..][super_range],
        }
    }
}

/// Memory that is kept from product to product: the system takes as long to hand out a page as a
/// product needs to fill it. Rows that a tile lacks keep what was there; nobody reads their sums.
#[derive(Debug)]
struct Buffer(Vec<f32>);

/// What is not in use. One product at a time needs one.
static UNUSED: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

impl Buffer {
    /// At least `len` numbers of any value.
    fn take(len: usize) -> Self {
        let mut unused = UNUSED.lock().unwrap_or_else(PoisonError::into_inner);
        let found = unused.iter().position(|buffer| buffer.len() >= len);
        let found = found.map(|i| unused.swap_remove(i));
        drop(unused);
        Self(found.unwrap_or_else(|| hugepage::zeros(len)))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        const KEPT_MAX: usize = 2;
        let mut unused = UNUSED.lock().unwrap_or_else(PoisonError::into_inner);
        if unused.len() == KEPT_MAX {
            unused.sort_by_key(Vec::len);
            unused.remove(0);
        }
        unused.push(std::mem::take(&mut self.0));
    }
}

/// One row and where it goes.
pub(super) struct Row<'a, const R: usize> {
    x: &'a [f32],
    /// Room for the largest magnitude of each block.
    largest: &'a mut [f32],
    blocks: &'a mut [RowBlock<R>],
    /// Empty where no format needs them.
    sums: &'a mut [Sums<R>],
    /// Likewise.
    super_sums: &'a mut [SuperSums<R>],
    /// Its place in the tile.
    i: usize,
    rounding: Rounding,
}

/// The powers of two of a row's blocks are between `2^-SPAN` and 2.
const SPAN: u32 = 30;
/// Rows without a larger magnitude count as zero: their scale would leave float32.
const SMALLEST: f32 = 1e-25;
/// What the exponent of float32 is counted from.
const BIAS: u32 = 127;
const MANTISSA_BITS: u32 = 23;

impl<const R: usize> Row<'_, R> {
    /// Quantizes the row and returns what its sums are to be multiplied with. NaN and infinity in a
    /// row make that NaN, so that they stay visible in the product.
    #[inline(always)]
    pub(super) fn quantize(&mut self, steps: impl Steps) -> f32 {
        let all = f32::from_bits(steps.all_largest(self.x, self.largest));
        let scale = if !all.is_finite() {
            f32::NAN
        } else if all < SMALLEST {
            0.0
        } else {
            let unit = best_unit(self.largest, all);
            self.round(unit, steps);
            return unit / f32::from(self.rounding.limit)
                * f32::from_bits((BIAS - SPAN) << MANTISSA_BITS);
        };
        for block in &mut *self.blocks {
            block.values[self.i] = [[0; 4]; FOURS];
            (block.starts[self.i], block.exponents[self.i]) = (0, 0);
        }
        for sums in &mut *self.sums {
            sums.second_starts[self.i] = 0;
            (sums.all[self.i], sums.second[self.i]) = (0.0, 0.0);
        }
        self.super_sums.iter_mut().for_each(|sums| sums.set(self.i, &[0.0; BLOCKS]));
        scale
    }

    /// Rounds to multiples of `unit / limit` times a power of two for each block.
    #[inline(always)]
    #[expect(clippy::cast_precision_loss, reason = "sums of numbers of 8 bits are exact in f32")]
    fn round(&mut self, unit: f32, steps: impl Steps) {
        let (i, inverse) = (self.i, unit.recip());
        let (limit, paired) = (f32::from(self.rounding.limit), self.rounding.is_paired(i));
        let (mut sums, mut super_sums) = (self.sums.iter_mut(), self.super_sums.iter_mut());
        let (mut eight, shift) = ([0.0; BLOCKS], self.rounding.shift);
        let x = self.x.as_chunks::<BLOCK>().0.iter().zip(self.largest.iter());
        for (place, ((x, largest), block)) in x.zip(self.blocks.iter_mut()).enumerate() {
            let power = power_above(largest * inverse);
            let factor = limit * inverse / power;
            let (values, halves) = steps.round(x, factor);
            let to = &mut block.values[i];
            to.as_flattened_mut().copy_from_slice(&values);
            let all = halves[0] + halves[1];
            block.starts[i] = shift * all + if paired { pair_start(to) } else { -128 * all };
            block.exponents[i] = exponent_of(power);
            eight[place % BLOCKS] = all as f32 * power;
            if place % BLOCKS == BLOCKS - 1
                && let Some(sums) = super_sums.next()
            {
                sums.set(i, &eight);
            }
            let Some(sums) = sums.next() else { continue };
            sums.second_starts[i] = -128 * halves[1];
            let power = power * f32::from_bits((BIAS + SPAN) << MANTISSA_BITS);
            sums.all[i] = all as f32 * power;
            sums.second[i] = halves[1] as f32 * power;
        }
    }
}

impl<const R: usize> SuperSums<R> {
    /// Rounds the sums of row `i` to multiples of a power of two. Sums of blocks whose powers are not
    /// further apart than 8 stay what they are.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "rounded numbers of 16 bits")]
    fn set(&mut self, i: usize, sums: &[f32; BLOCKS]) {
        let largest = sums.iter().fold(0.0_f32, |max, sum| max.max(sum.abs()));
        let power = power_above(largest / f32::from(i16::MAX));
        for (pair, sums) in self.pairs[i].iter_mut().zip(sums.as_chunks::<2>().0) {
            *pair = sums.map(|sum| (sum / power).round_ties_even() as i16);
        }
        self.exponents[i] = exponent_of(power);
    }
}

/// What is added to a number's bits to multiply it by `power` times `2^SPAN`.
#[inline(always)]
#[expect(clippy::cast_possible_wrap, reason = "an exponent below 2^31")]
fn exponent_of(power: f32) -> i32 {
    (power.to_bits() - ((BIAS - SPAN) << MANTISSA_BITS)) as i32
}

/// What the sums of a row that is multiplied in pairs start from, `−Σ x (x' + 128)`; turns the signs
/// of the `x`, as [`super::six_rows`] wants them.
#[inline(always)]
fn pair_start(values: &mut [[i8; 4]; FOURS]) -> i32 {
    let mut sums = [0; 4];
    for [first, second] in values.as_chunks_mut::<2>().0 {
        for (sum, (x, next)) in sums.iter_mut().zip(first.iter_mut().zip(second)) {
            *sum -= i32::from(*x) * (i32::from(*next) + 128);
            *x ^= i8::MIN;
        }
    }
    sums.iter().sum()
}

/// Numbers between −127 and 127, and the sum of each half.
pub(super) type Rounded = ([i8; BLOCK], [i32; 2]);

/// What is done with each block.
pub(super) trait Steps: Copy {
    /// The bits of the largest magnitude, where NaN is the largest of all.
    fn largest(self, x: &[f32; BLOCK]) -> u32;
    /// Writes the largest magnitude of each block; returns the bits of the largest of all.
    #[inline(always)]
    fn all_largest(self, x: &[f32], largest: &mut [f32]) -> u32 {
        let mut all = 0;
        for (largest, x) in largest.iter_mut().zip(x.as_chunks::<BLOCK>().0) {
            let bits = self.largest(x);
            *largest = f32::from_bits(bits);
            all = bits.max(all);
        }
        all
    }
    /// Each number times `factor`, rounded.
    fn round(self, x: &[f32; BLOCK], factor: f32) -> Rounded;
}

/// The steps without any processor's own instructions.
#[derive(Clone, Copy)]
pub(super) struct PlainSteps;

impl Steps for PlainSteps {
    #[inline(always)]
    fn largest(self, x: &[f32; BLOCK]) -> u32 {
        // Magnitudes as integers are ordered like the numbers.
        let mut lanes = [0; 8];
        for x in x.as_chunks::<8>().0 {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *lane = x.abs().to_bits().max(*lane);
            }
        }
        lanes.into_iter().fold(0, u32::max)
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "rounded numbers between −127 and 127")]
    fn round(self, x: &[f32; BLOCK], factor: f32) -> Rounded {
        let (mut values, mut halves) = ([0_i8; BLOCK], [0; 2]);
        let parts = values.as_chunks_mut::<HALF>().0.iter_mut().zip(x.as_chunks::<HALF>().0);
        for ((values, x), sum) in parts.zip(&mut halves) {
            for (value, x) in values.iter_mut().zip(x) {
                let rounded = (x * factor).round_ties_even() as i32;
                *sum += rounded;
                *value = rounded as i8;
            }
        }
        (values, halves)
    }
}

/// The smallest power of two that is not below `x`, and at least `2^-SPAN`.
#[inline(always)]
fn power_above(x: f32) -> f32 {
    let fraction = (1 << MANTISSA_BITS) - 1;
    let power = f32::from_bits((x.to_bits() + fraction) & !fraction);
    power.max(f32::from_bits((BIAS - SPAN) << MANTISSA_BITS))
}

/// Of the eighths of an octave below `all`, the one that gives the least sum of squared steps.
#[inline(always)]
fn best_unit(largest: &[f32], all: f32) -> f32 {
    /// `2^(-i / 8)`.
    const EIGHTHS: [f32; 8] = [
        1.0,
        0.917_004,
        0.840_896_4,
        0.771_105_4,
        0.707_106_77,
        0.648_419_8,
        0.594_603_54,
        0.545_253_9,
    ];
    let (mut best, mut least) = (all, f32::INFINITY);
    for eighth in EIGHTHS {
        let unit = all * eighth;
        let inverse = unit.recip();
        let mut squares = [0.0_f32; 16];
        let (whole, rest) = largest.as_chunks::<16>();
        for largest in whole {
            for (sum, largest) in squares.iter_mut().zip(largest) {
                let power = power_above(largest * inverse);
                *sum += power * power;
            }
        }
        for (sum, largest) in squares.iter_mut().zip(rest) {
            let power = power_above(largest * inverse);
            *sum += power * power;
        }
        let sum = squares.iter().sum::<f32>() * eighth * eighth;
        if sum < least {
            (best, least) = (unit, sum);
        }
    }
    best
}

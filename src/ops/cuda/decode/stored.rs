//! Matrices as the kernels of a token's pass find them in memory.

use candle_core::{DType, Tensor};

use super::super::{
    few::Weights,
    ffi::address,
    launch::Args,
    linear::{Format, StoredMatrix},
};
use crate::ops::PackedLinear;

/// Rows of weights that a block owns at a time.
pub(super) const TILE_ROWS: usize = 16;

/// A matrix as it is stored, as the kernels of a token's pass read it.
pub(super) struct Stored {
    pub(super) bytes: u64,
    pub(super) format: Format,
    pub(super) outs: usize,
    pub(super) depth: usize,
    pub(super) bias: Option<u64>,
}

impl Stored {
    pub(super) fn of(linear: &PackedLinear) -> Option<Self> {
        let (matrix, bias) = linear.stored_matrix()?;
        Self::new(&matrix, bias)
    }

    pub(super) fn new(matrix: &StoredMatrix, bias: Option<&Tensor>) -> Option<Self> {
        let (outs, depth) = matrix.dims();
        let format = matrix.format();
        let (bytes, scale) = (matrix.weights().ok()?.address, matrix.scale());
        let suits_bias = bias.is_none_or(|bias| {
            bias.dtype() == DType::BF16 && bias.is_contiguous() && bias.dims() == [outs]
        });
        let bias = bias.map(address).transpose().ok()?;
        let fits = format != Format::F8E4M3
            && (scale - 1.0).abs() < f64::EPSILON
            && bytes.is_multiple_of(16)
            && depth.is_multiple_of(format.block().0);
        (fits && suits_bias).then_some(Self { bytes, format, outs, depth, bias })
    }

    /// Numbers of a step of the depth, and bytes of its place in a ring.
    pub(super) fn step(&self) -> (usize, usize) {
        let (numbers, chunks) = match self.format {
            Format::Q4K => (512, 18),
            Format::Q8_0 => (256, 18),
            Format::Q5K => (256, 11),
            Format::Q6K => (256, 14),
            Format::Bf16 | Format::F8E4M3 => (128, 16),
        };
        (numbers, chunks * 16 * TILE_ROWS)
    }

    /// As `kernels/decode.cuh` numbers formats.
    fn number(&self) -> usize {
        match self.format {
            Format::Q8_0 => 0,
            Format::Q4K => 1,
            Format::Q5K => 2,
            Format::Q6K => 3,
            Format::Bf16 | Format::F8E4M3 => 4,
        }
    }

    /// All its bytes.
    pub(super) fn size(&self) -> usize {
        self.outs * self.row_bytes()
    }

    pub(super) fn row_bytes(&self) -> usize {
        let (numbers, bytes) = self.format.block();
        self.depth.checked_div(numbers).unwrap_or(0) * bytes
    }

    /// For the kernels of `kernels/decode_bytes.cuh`, with outputs of `rows` rows of weights each.
    pub(super) fn weights(&self, rows: usize) -> Weights {
        Weights {
            address: self.bytes,
            format: self.format,
            outs: self.outs.div_euclid(rows),
            depth: self.depth,
            scale: 1.0,
            is_constant: true,
        }
    }

    pub(super) fn push(&self, args: &mut Args) {
        args.address(self.bytes).counts([self.number(), self.outs]);
    }
}

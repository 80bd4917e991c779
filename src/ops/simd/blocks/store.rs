//! What becomes of a product's sums on the way to the output.

use pulp::{Simd, WithSimd};

use super::PANEL;
use crate::ops::simd::lanes::{self, Lanewise};

/// Something that is done to the output while it lies in the first-level cache.
pub(crate) trait Finish: Sync {
    /// Changes a part of row `row` of the output, from column `first` on.
    fn apply(&self, row: usize, first: usize, out: &mut [f32]);
}

/// Nothing is done.
pub(crate) struct AsItIs;

impl Finish for AsItIs {
    fn apply(&self, _: usize, _: usize, _: &mut [f32]) {}
}

/// One row of some panels: `out = sums · scale + bias`.
pub(super) struct StoreRow<'a> {
    pub(super) out: &'a mut [f32],
    /// The row's sums in the first panel; those in the next one come `rows` later.
    pub(super) sums: &'a [[f32; PANEL]],
    pub(super) rows: usize,
    pub(super) scale: f32,
    pub(super) bias: Option<&'a [f32]>,
}

impl WithSimd for StoreRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { out, sums, rows, scale, bias } = self;
        for (panel, out) in out.chunks_mut(PANEL).enumerate() {
            let sums = &sums[panel * rows][..out.len()];
            match bias {
                None => lanes::zip(simd, out, [sums], Scaled { scale }),
                Some(bias) => {
                    let bias = &bias[panel * PANEL..][..out.len()];
                    lanes::zip(simd, out, [sums, bias], ScaledBias { scale });
                }
            }
        }
    }
}

/// `x · scale`.
#[derive(Clone, Copy)]
struct Scaled {
    scale: f32,
}
/// `x · scale + bias`, rounded in between.
#[derive(Clone, Copy)]
struct ScaledBias {
    scale: f32,
}

impl Lanewise<1> for Scaled {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x]: [S::f32s; 1]) -> S::f32s {
        simd.mul_f32s(x, simd.splat_f32s(self.scale))
    }
}

impl Lanewise<2> for ScaledBias {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x, bias]: [S::f32s; 2]) -> S::f32s {
        simd.add_f32s(simd.mul_f32s(x, simd.splat_f32s(self.scale)), bias)
    }
}

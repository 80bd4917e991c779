//! First-block cache: steps that leave out what changes little from one to the next.
//!
//! What the first block adds to the tokens that are denoised tells how much the step differs from the
//! last one that was computed. Where it differs by less than a threshold, the other blocks are left
//! out, and what they added then is added again. The idea is that of
//! [ParaAttention](https://github.com/chengzeyi/ParaAttention/blob/main/doc/fastest_flux.md) and of
//! [TeaCache](https://arxiv.org/abs/2411.19108). It is off unless asked for: the picture changes.

use candle_core::{DType, Tensor};
use serde::Serialize;

use crate::error::{Error, Result};

/// Steps that may be left out one after the other.
const IN_A_ROW_MAX: usize = 3;
/// The share of the steps, at their beginning, that are always computed: one in so many.
const LEADING: usize = 4;

/// Whether steps may be left out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepCache {
    threshold: f64,
}

impl StepCache {
    /// Leaves a step out where the first block's change differs by less than `threshold` of itself
    /// from that of the last computed step.
    ///
    /// # Errors
    /// A threshold below 0, or none.
    pub fn new(threshold: f64) -> Result<Self> {
        if threshold.is_finite() && threshold >= 0.0 {
            return Ok(Self { threshold });
        }
        Err(Error::field("cache threshold", threshold, "a finite number from 0"))
    }

    /// The threshold.
    #[must_use]
    pub fn threshold(self) -> f64 {
        self.threshold
    }

    /// Whether step `step` of `steps` may be left out: never one of the first quarter, where the
    /// picture takes shape, and never the last.
    #[must_use]
    pub fn allows(self, step: usize, steps: usize) -> bool {
        step >= steps.div_ceil(LEADING) && step + 1 < steps
    }
}

/// What one branch of a run keeps of the last step that was computed.
#[derive(Debug)]
pub struct BlockCache {
    threshold: f64,
    allowed: bool,
    /// What the first block added, and what the others added: each `[1, n, dim]`.
    kept: Option<[Tensor; 2]>,
    in_a_row: usize,
    reused: usize,
}

impl BlockCache {
    /// Nothing is kept yet.
    #[must_use]
    pub fn new(settings: StepCache) -> Self {
        let threshold = settings.threshold;
        Self { threshold, allowed: false, kept: None, in_a_row: 0, reused: 0 }
    }

    /// Whether the next step may be left out.
    pub fn allow(&mut self, allowed: bool) {
        self.allowed = allowed;
    }

    /// Steps that were left out so far.
    #[must_use]
    pub fn reused(&self) -> usize {
        self.reused
    }

    /// What the other blocks add, where what the first one `added` says that it is known.
    pub(super) fn reuse(&mut self, added: &Tensor) -> Result<Option<Tensor>> {
        let Some([first, rest]) = self.kept.as_ref().filter(|_| self.allowed) else {
            return Ok(None);
        };
        let same = change(added, first)? < self.threshold; // never for NaN
        if self.in_a_row == IN_A_ROW_MAX || !same {
            return Ok(None);
        }
        self.in_a_row += 1;
        self.reused += 1;
        Ok(Some(rest.clone()))
    }

    /// Keeps a step that was computed.
    pub(super) fn keep(&mut self, added: Tensor, rest: Tensor) {
        self.in_a_row = 0;
        self.kept = Some([added, rest]);
    }
}

/// How far `a` is from `b`, as a share of `b`. The one number that a pass reads back from a device.
fn change(a: &Tensor, b: &Tensor) -> Result<f64> {
    let size = |x: &Tensor| x.to_dtype(DType::F32)?.abs()?.mean_all();
    let share = (size(&(a - b)?)? / size(b)?)?;
    Ok(f64::from(share.to_scalar::<f32>()?))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn tensor(value: f32) -> Tensor {
        Tensor::new(&[[[value, -value]]], &Device::Cpu).unwrap()
    }

    #[test]
    fn steps_are_left_out_only_where_they_may_be() {
        let settings = StepCache::new(0.1).unwrap();
        let allowed: Vec<usize> = (0..9).filter(|step| settings.allows(*step, 9)).collect();
        assert_eq!(allowed, [3, 4, 5, 6, 7]);
        assert!(!settings.allows(0, 1) && !settings.allows(1, 2));
        for threshold in [-0.1, f64::NAN, f64::INFINITY] {
            assert!(StepCache::new(threshold).is_err(), "{threshold}");
        }
    }

    #[test]
    fn what_is_kept_is_reused_while_the_first_block_agrees() {
        let mut cache = BlockCache::new(StepCache::new(0.1).unwrap());
        let reuse =
            |cache: &mut BlockCache, value: f32| cache.reuse(&tensor(value)).unwrap().is_some();
        cache.allow(true);
        assert!(!reuse(&mut cache, 1.0), "nothing is kept");
        cache.keep(tensor(1.0), tensor(5.0));
        assert!(!reuse(&mut cache, 1.2) && !reuse(&mut cache, 0.9) && !reuse(&mut cache, f32::NAN));
        assert!(reuse(&mut cache, 1.05) && reuse(&mut cache, 0.95) && reuse(&mut cache, 1.0));
        assert!(!reuse(&mut cache, 1.0), "three in a row are enough");
        cache.keep(tensor(0.0), tensor(5.0));
        assert!(!reuse(&mut cache, 0.0), "no share of nothing");
        cache.keep(tensor(1.0), tensor(5.0));
        cache.allow(false);
        assert!(!reuse(&mut cache, 1.0), "this step is computed");
        assert_eq!(cache.reused(), 3);
    }
}

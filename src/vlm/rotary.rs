//! Rotary angles computed on the host and kept as cosines and sines on the device.

use candle_core::{DType, Device, Tensor};

use crate::{error::Result, ops};

/// `1 / theta^(2i / dim)` for `i < dim / 2`.
pub(super) fn inverse_frequencies(theta: f64, dim: usize) -> Vec<f32> {
    #[expect(clippy::cast_precision_loss, reason = "a head is narrow")]
    let exponent = |i: usize| i as f32 / dim as f32;
    #[expect(clippy::cast_possible_truncation, reason = "the reference computes in f32")]
    let frequency = |i: usize| 1.0 / (theta.powf(f64::from(exponent(i))) as f32);
    (0..dim).step_by(2).map(frequency).collect()
}

/// Cosines and sines `[n, half]` of the angles of `n` tokens.
#[derive(Debug)]
pub(super) struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Angles {
    /// From `n · half` angles in radians, token by token.
    pub(super) fn new(table: &[f32], half: usize, dtype: DType, device: &Device) -> Result<Self> {
        let side = |of: fn(f32) -> f32| -> Result<Tensor> {
            let values: Vec<f32> = table.iter().map(|angle| of(*angle)).collect();
            let count = values.len().checked_div(half).unwrap_or(0);
            Ok(Tensor::from_vec(values, (count, half), device)?.to_dtype(dtype)?)
        };
        Ok(Self { cos: side(f32::cos)?, sin: side(f32::sin)? })
    }

    /// `x: [b, n, h, 2 · half]` → the same shape.
    pub(super) fn rotate(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::rotate_halves(x, &self.cos, &self.sin)
    }
}

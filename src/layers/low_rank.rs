//! Low-rank changes of a linear layer, beside its weights rather than merged into them.

use candle_core::{Result as TensorResult, Tensor};

use super::Linear;
use crate::{
    error::Result,
    ops,
    weights::{Storage, Weights, lora::Change},
};

/// `scale · up · down · x`, to be added to what a [`Linear`] makes of `x`.
///
/// The layer's own matrix may be quantized; these two are kept in the type of the computation.
#[derive(Debug, Clone)]
pub struct LowRank {
    down: Linear,
    up: Linear,
    scale: f64,
}

impl LowRank {
    /// Reads `down: [rank, width_in]` and `up: [width_out, rank]`, by these names below `weights`.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn load(
        weights: &Weights,
        [down, up]: [&str; 2],
        [width_out, width_in]: [usize; 2],
        rank: usize,
        scale: f64,
    ) -> Result<Self> {
        let weights = weights.with_storage(Storage::Compute);
        Ok(Self {
            down: Linear::load_without_bias(&weights.pp(down), width_in, rank)?,
            up: Linear::load_without_bias(&weights.pp(up), rank, width_out)?,
            scale,
        })
    }

    /// From factors that a LoRA file holds.
    pub(super) fn new(change: Change) -> Self {
        let linear = |matrix| Linear { matrix, changes: Vec::new() };
        Self { down: linear(change.down), up: linear(change.up), scale: change.scale }
    }

    /// `[.., width_in]` → `[.., width_out]`.
    ///
    /// # Errors
    /// Another width, or a failure of the device.
    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let inner = (self.down.forward(x)? * self.scale)?; // (.., rank)
        self.up.forward(&inner)
    }
}

impl Linear {
    /// [`Linear::forward_changed`] of one `x` by several layers; see [`ops::forward_each`].
    ///
    /// # Errors
    /// Another width, or a failure of the device.
    pub fn forward_each<const N: usize>(
        layers: [(&Self, Option<&LowRank>); N],
        x: &Tensor,
    ) -> TensorResult<[Tensor; N]> {
        let mut results = ops::forward_each(layers.map(|(layer, _)| &layer.matrix), x)?;
        for (y, (layer, change)) in results.iter_mut().zip(layers) {
            for change in layer.changes.iter().chain(change) {
                *y = ops::add(y, &change.forward(x)?)?;
            }
        }
        Ok(results)
    }

    /// [`Linear::forward`], and `change` of it where there is one.
    ///
    /// # Errors
    /// Another width, or a failure of the device.
    pub fn forward_changed(&self, x: &Tensor, change: Option<&LowRank>) -> TensorResult<Tensor> {
        let y = self.forward(x)?;
        match change {
            Some(change) => ops::add(&y, &change.forward(x)?),
            None => Ok(y),
        }
    }
}

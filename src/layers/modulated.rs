//! Linear layers between the norm and the gate of a modulated residual branch.

use candle_core::{Result as TensorResult, Tensor};

use super::Linear;
use crate::ops::{self, ModulatedTokens};

impl Linear {
    /// [`Linear::forward`] by each of `linears` of the modulated norm of `x: [b, n, width_in]`.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failure of the device.
    pub fn modulated_each<const N: usize>(
        linears: [&Self; N],
        x: &Tensor,
        runs: &[ModulatedTokens<'_>],
        eps: f64,
    ) -> TensorResult<[Tensor; N]> {
        if linears.iter().all(|linear| linear.changes.is_empty()) {
            return ops::modulated_linear_each(linears.map(|linear| &linear.matrix), x, runs, eps);
        }
        let normed = ops::modulated_layer_norm_each(x, runs, eps)?;
        let results = Self::forward_each(linears.map(|linear| (linear, None)), &normed)?;
        ops::recycle(normed)?;
        Ok(results)
    }

    /// GELU, in its tanh approximation, of [`Self::forward`] of the modulated norm of `x`.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failure of the device.
    pub fn modulated_gelu(
        &self,
        x: &Tensor,
        runs: &[ModulatedTokens<'_>],
        eps: f64,
    ) -> TensorResult<Tensor> {
        if self.changes.is_empty() {
            return ops::modulated_linear_gelu(&self.matrix, x, runs, eps);
        }
        let [inner] = Self::modulated_each([self], x, runs, eps)?;
        ops::gelu_tanh_owned(inner)
    }

    /// `residual + gate · forward(x)`, with the gate of each run.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failure of the device.
    pub fn gated_add(
        &self,
        x: &Tensor,
        residual: &Tensor,
        runs: &[ModulatedTokens<'_>],
    ) -> TensorResult<Tensor> {
        if self.changes.is_empty() {
            return ops::linear_gated_add(&self.matrix, x, residual, runs);
        }
        let added = self.forward(x)?;
        let sum = ops::gated_add_each(residual, &added, runs)?;
        ops::recycle(added)?;
        Ok(sum)
    }
}

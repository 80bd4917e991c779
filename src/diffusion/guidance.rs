//! Classifier-free guidance with two predictions.

use candle_core::Tensor;

use crate::{error::Result, ops};

/// `negative + scale · (positive − negative)`, scaled in each token to the length of `positive`; see
/// [`ops::rescaled_guidance`].
///
/// # Shapes
/// `positive, negative: [b, n, c]`; returns the same.
///
/// # Errors
/// Shapes that differ, or a failure of the device.
pub fn rescaled_guidance(positive: &Tensor, negative: &Tensor, scale: f64) -> Result<Tensor> {
    Ok(ops::rescaled_guidance(positive, negative, scale)?)
}

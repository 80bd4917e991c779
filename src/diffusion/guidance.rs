//! Classifier-free guidance with two predictions.

use candle_core::{D, Tensor};

use crate::error::Result;

/// `negative + scale · (positive − negative)`, scaled in each token to the length of `positive`.
///
/// Reference: <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py#L843-L847>.
///
/// # Shapes
/// `positive, negative: [b, n, c]`; returns the same.
///
/// # Errors
/// Shapes that differ, or a failure of the device.
pub fn rescaled_guidance(positive: &Tensor, negative: &Tensor, scale: f64) -> Result<Tensor> {
    let combined = (negative + ((positive - negative)? * scale)?)?;
    let ratio = (length(positive)? / length(&combined)?)?;
    Ok(combined.broadcast_mul(&ratio)?)
}

/// The Euclidean length of each token: `[b, n, c]` → `[b, n, 1]`.
fn length(x: &Tensor) -> Result<Tensor> {
    Ok(x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)
}

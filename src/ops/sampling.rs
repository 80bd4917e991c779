//! Guidance and the Euler step of a sampler.

use candle_core::{D, Result, Tensor};

use super::cuda;

/// `latents + step · v`, where `v` is the positive prediction or, with a negative one and its scale,
/// [`rescaled_guidance`]. All `[b, n, c]` in float32.
///
/// # Errors
/// Shapes that differ, or a failure of the device.
pub fn guided_step(
    latents: &Tensor,
    positive: &Tensor,
    negative: Option<(&Tensor, f64)>,
    step: f64,
) -> Result<Tensor> {
    if let Some(latents) = cuda::guided_step(latents, positive, negative, step)? {
        return Ok(latents);
    }
    match negative {
        None => latents + (positive * step)?,
        Some((negative, scale)) => {
            latents + (rescaled_guidance(positive, negative, scale)? * step)?
        }
    }
}

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
    combined.broadcast_mul(&ratio)
}

/// The Euclidean length of each token: `[b, n, c]` → `[b, n, 1]`.
fn length(x: &Tensor) -> Result<Tensor> {
    x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()
}

//! Normalisations and the modulation that surrounds them.

use candle_core::{D, Result, Tensor};

use super::{
    cpu::is_fast,
    cuda,
    rows::{self, Modulation},
};

/// `x / sqrt(mean(x²) + eps) · weight` over the last axis. `weight: [dim]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if is_fast(&[x, weight]) && weight.dims() == [x.dim(D::Minus1)?] {
        return rows::rms_norm(x, weight, eps);
    }
    if let Some(y) = cuda::rms_norm(x, weight, eps)? {
        return Ok(y);
    }
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean_square + eps)?.sqrt()?)?.broadcast_mul(weight)
}

/// `(x − mean) / sqrt(variance + eps)` over the last axis, without weight and bias.
///
/// # Errors
/// A failure of the device.
pub fn layer_norm(x: &Tensor, eps: f64) -> Result<Tensor> {
    if is_fast(&[x]) && x.rank() > 0 {
        return rows::layer_norm(x, None, eps);
    }
    if let Some(y) = cuda::layer_norm(x, None, eps)? {
        return Ok(y);
    }
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)
}

/// `layer_norm(x) · (1 + scale) + shift`. `x: [b, n, dim]`; `scale, shift: [1, 1, dim]`,
/// `[b, 1, dim]` or `[b, n, dim]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn modulated_layer_norm(
    x: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    if is_fast(&[x, scale, shift])
        && let Some(modulation) = Modulation::new(x, scale, Some(shift))?
    {
        return rows::layer_norm(x, Some(&modulation), eps);
    }
    if let Some(y) = cuda::layer_norm(x, Some([scale, shift]), eps)? {
        return Ok(y);
    }
    layer_norm(x, eps)?.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)
}

/// `residual + gate · x`. `residual, x: [b, n, dim]`; `gate: [1, 1, dim]`, `[b, 1, dim]` or
/// `[b, n, dim]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn gated_add(residual: &Tensor, x: &Tensor, gate: &Tensor) -> Result<Tensor> {
    if is_fast(&[residual, x, gate])
        && residual.dims() == x.dims()
        && let Some(gate) = Modulation::new(x, gate, None)?
    {
        return rows::gated_add(residual, x, &gate);
    }
    if let Some(y) = cuda::gated_add(residual, x, gate)? {
        return Ok(y);
    }
    residual.add(&x.broadcast_mul(gate)?)
}

/// [`gated_add`], and [`modulated_layer_norm`] of the sum: the end of one half of a block and the
/// beginning of the next. Returns the sum and the norm.
///
/// # Errors
/// Shapes that do not fit.
pub fn gated_add_norm(
    residual: &Tensor,
    x: &Tensor,
    gate: &Tensor,
    [scale, shift]: [&Tensor; 2],
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    if let Some(both) = cuda::gated_add_norm(residual, x, gate, [scale, shift], eps)? {
        return Ok(both);
    }
    let sum = gated_add(residual, x, gate)?;
    let normed = modulated_layer_norm(&sum, scale, shift, eps)?;
    Ok((sum, normed))
}

/// `x / max(‖x‖₂, 1e-12) · sqrt(channels) · gamma` over the channels of a picture.
/// `x: [b, c, h, w]`, `gamma: [c]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn channel_rms_norm(x: &Tensor, gamma: &Tensor) -> Result<Tensor> {
    if is_fast(&[x, gamma]) && x.rank() == 4 && gamma.dims() == [x.dim(1)?] {
        return rows::channel_rms_norm(x, gamma, false);
    }
    if let Some(y) = cuda::channel_rms_norm(x, gamma, false)? {
        return Ok(y);
    }
    let channels = x.dim(1)?;
    #[expect(clippy::cast_precision_loss, reason = "a number of channels is small")]
    let root = (channels as f64).sqrt();
    let norm = x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?;
    let gamma = (gamma.reshape((1, channels, 1, 1))? * root)?; // (1, c, 1, 1)
    x.broadcast_div(&norm)?.broadcast_mul(&gamma)
}

/// [`channel_rms_norm`] followed by [`silu`](super::silu()), in one pass over the picture.
///
/// # Errors
/// Shapes that do not fit.
pub fn channel_rms_norm_silu(x: &Tensor, gamma: &Tensor) -> Result<Tensor> {
    if is_fast(&[x, gamma]) && x.rank() == 4 && gamma.dims() == [x.dim(1)?] {
        return rows::channel_rms_norm(x, gamma, true);
    }
    if let Some(y) = cuda::channel_rms_norm(x, gamma, true)? {
        return Ok(y);
    }
    channel_rms_norm(x, gamma)?.silu()
}

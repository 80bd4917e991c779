//! Rotary position embeddings.

use candle_core::{D, Result, Tensor};

/// Rotates neighbouring pairs `(x₀, x₁), (x₂, x₃), …`.
///
/// # Shapes
/// `x: [b, n, h, d]`, `cos, sin: [n, d / 2]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn rotate_pairs(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, n, h, d) = x.dims4()?;
    let half = cos.dim(1)?;
    let pairs = x.reshape((b, n, h, half, 2))?;
    let (even, odd) = (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?);
    let (cos, sin) = (cos.reshape((1, n, 1, half))?, sin.reshape((1, n, 1, half))?);
    let rotated_even = (even.broadcast_mul(&cos)? - odd.broadcast_mul(&sin)?)?;
    let rotated_odd = (even.broadcast_mul(&sin)? + odd.broadcast_mul(&cos)?)?;
    Tensor::stack(&[rotated_even, rotated_odd], 4)?.reshape((b, n, h, d))
}

/// Rotates `x[i]` with `x[i + d / 2]`.
///
/// # Shapes
/// `x: [b, n, h, d]`, `cos, sin: [n, d / 2]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn rotate_halves(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (_, n, _, _) = x.dims4()?;
    let half = cos.dim(1)?;
    let (first, second) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
    let (cos, sin) = (cos.reshape((1, n, 1, half))?, sin.reshape((1, n, 1, half))?);
    let a = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let b = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Tensor::cat(&[a, b], D::Minus1)
}

//! What is done to whole tensors between the models' operations. A GPU has kernels for it here that are compiled with the
//! program; candle's own are compiled by the driver when they are first used, which takes seconds.

use candle_core::{D, DType, Result, Tensor};

use super::cuda;

/// How two tensors become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combination {
    /// `a + b`
    Sum = 0,
    /// `a − b`
    Difference = 1,
    /// `a · b`
    Product = 2,
    /// `a / b`
    Quotient = 3,
}

/// `a` and `b`, number by number; `b` has the shape of `a` or repeats along it.
///
/// # Errors
/// Other shapes, or a failure of the device.
pub fn combine(a: &Tensor, b: &Tensor, combination: Combination) -> Result<Tensor> {
    if let Some(y) = cuda::combine(a, b, combination)? {
        return Ok(y);
    }
    match combination {
        Combination::Sum => a.broadcast_add(b),
        Combination::Difference => a.broadcast_sub(b),
        Combination::Product => a.broadcast_mul(b),
        Combination::Quotient => a.broadcast_div(b),
    }
}

/// `a + b`; `b` has the shape of `a` or repeats along it.
///
/// # Errors
/// Other shapes, or a failure of the device.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    combine(a, b, Combination::Sum)
}

/// Numbers of `x`, none less than `low` and none greater than `high`; NaN stays NaN.
///
/// # Errors
/// A failure of the device.
pub fn clamp(x: &Tensor, low: f64, high: f64) -> Result<Tensor> {
    match cuda::clamp(x, [low, high])? {
        Some(y) => Ok(y),
        None => x.clamp(low, high),
    }
}

/// The rows `numbers: [n]` of `x: [rows, width]`, `[n, width]`.
///
/// # Errors
/// A number beyond the rows, where the device tells, or a failure of the device.
pub fn take_rows(x: &Tensor, numbers: &Tensor) -> Result<Tensor> {
    match cuda::take_rows(x, numbers)? {
        Some(y) => Ok(y),
        None => x.index_select(numbers, 0), // (n, width)
    }
}

/// How large each row is: the sum of the absolute numbers of `x: [.., width]` along its last axis, in float32,
/// `[rows]`. It is finite only if all of a row is.
///
/// # Errors
/// A failure of the device.
pub fn row_sizes(x: &Tensor) -> Result<Tensor> {
    match cuda::row_sizes(x)? {
        Some(sizes) => Ok(sizes),
        None => x.to_dtype(DType::F32)?.abs()?.sum(D::Minus1)?.flatten_all(),
    }
}

/// `x` with its numbers one after the other.
///
/// # Errors
/// A failure of the device.
pub fn laid_out(x: &Tensor) -> Result<Tensor> {
    if x.is_contiguous() {
        return Ok(x.clone());
    }
    match cuda::laid_out(x)? {
        Some(y) => Ok(y),
        None => x.contiguous(),
    }
}

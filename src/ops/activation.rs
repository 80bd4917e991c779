//! Element-wise activations.

use candle_core::{Result, Tensor};

/// GELU in its tanh approximation (`torch.nn.functional.gelu(x, approximate="tanh")`).
///
/// # Errors
/// A tensor of a type without this operation.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    x.gelu()
}

/// GELU with the error function.
///
/// # Errors
/// A tensor of a type without this operation.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    x.gelu_erf()
}

/// `x · sigmoid(x)`.
///
/// # Errors
/// A tensor of a type without this operation.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    x.silu()
}

/// `silu(gate) · up`, the middle of a SwiGLU MLP. Shapes are equal.
///
/// # Errors
/// Unequal shapes.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()?.mul(up)
}

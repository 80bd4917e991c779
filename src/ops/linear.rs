//! Products with a weight matrix, in the type the matrix is kept in.

use std::sync::Arc;

use candle_core::{
    DType, Module, Result, Tensor,
    quantized::{GgmlDType, QMatMul, QTensor},
};

/// A weight matrix `[out, in]` as it is kept in memory.
#[derive(Debug, Clone)]
pub enum LinearWeight {
    /// Plain numbers: f32, bf16 or f16; widened to the activations' type when used.
    Dense(Tensor),
    /// Blocks of quantized numbers.
    Quantized(Arc<QTensor>),
}

impl LinearWeight {
    /// `weight` quantized to Q8_0, where its rows are a multiple of the block; plain otherwise.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn q8_0(weight: &Tensor) -> Result<Self> {
        if !weight.dim(1)?.is_multiple_of(GgmlDType::Q8_0.block_size()) {
            return Ok(Self::Dense(weight.clone()));
        }
        let weight = weight.to_dtype(DType::F32)?;
        Ok(Self::Quantized(Arc::new(QTensor::quantize(&weight, GgmlDType::Q8_0)?)))
    }
}

/// A linear layer's weights, laid out once for the device they run on.
#[derive(Debug, Clone)]
pub struct PackedLinear {
    weight: Kernel,
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum Kernel {
    Dense(Tensor),
    Quantized(QMatMul),
}

impl PackedLinear {
    /// `weight: [out, in]`, `bias: [out]`.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn new(weight: LinearWeight, bias: Option<Tensor>) -> Result<Self> {
        let weight = match weight {
            LinearWeight::Dense(weight) => Kernel::Dense(weight),
            LinearWeight::Quantized(weight) => Kernel::Quantized(QMatMul::from_arc(weight)?),
        };
        Ok(Self { weight, bias })
    }

    /// `x · weightᵀ + bias`: `[.., in]` → `[.., out]`.
    ///
    /// # Errors
    /// Another width, or a failure of the device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = match &self.weight {
            Kernel::Dense(weight) => dense(x, weight)?,
            Kernel::Quantized(weight) => weight.forward(&x.contiguous()?)?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

fn dense(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let weight = weight.to_dtype(x.dtype())?;
    let (out, width) = weight.dims2()?;
    let mut dims = x.dims().to_vec();
    let rows = x.elem_count().checked_div(width).unwrap_or(0);
    let y = x.reshape((rows, width))?.matmul(&weight.t()?)?; // (rows, out)
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    y.reshape(dims) // (.., out)
}

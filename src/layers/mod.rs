//! Operations together with the weights they read from a checkpoint.

mod low_rank;
mod modulated;

use candle_core::{Result as TensorResult, Tensor};

pub use low_rank::LowRank;

use crate::{
    error::Result,
    ops::{
        self, Conv2dShape, NormedConv2d, PackedConv2d, PackedLinear, Picture, ResidualConv2d,
        cuda::StoredMatrix,
    },
    weights::Weights,
};

/// `x · weightᵀ + bias`, and the low-rank changes that `weights` carries for it.
#[derive(Debug, Clone)]
pub struct Linear {
    matrix: PackedLinear,
    changes: Vec<LowRank>,
}

impl Linear {
    /// Reads `weight: [width_out, width_in]` and `bias: [width_out]` below `weights`.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn load(weights: &Weights, width_in: usize, width_out: usize) -> Result<Self> {
        let bias = weights.tensor("bias", &[width_out])?;
        Self::with_bias(weights, [width_out, width_in], Some(bias))
    }

    /// Reads `weight: [width_out, width_in]` below `weights`; there is no bias.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn load_without_bias(weights: &Weights, width_in: usize, width_out: usize) -> Result<Self> {
        Self::with_bias(weights, [width_out, width_in], None)
    }

    fn with_bias(weights: &Weights, shape: [usize; 2], bias: Option<Tensor>) -> Result<Self> {
        let matrix = match weights.stored_matrix("weight", shape)? {
            Some(matrix) => PackedLinear::stored(matrix, bias),
            None => PackedLinear::new(weights.linear_weight("weight", shape)?, bias)?,
        };
        let changes = weights.take_changes().into_iter().map(LowRank::new).collect();
        Ok(Self { matrix, changes })
    }

    /// From a matrix that is multiplied where it lies; `bias: [width_out]`.
    #[must_use]
    pub fn stored(matrix: StoredMatrix, bias: Option<Tensor>) -> Self {
        Self { matrix: PackedLinear::stored(matrix, bias), changes: Vec::new() }
    }

    /// The matrix and its bias, where nothing changes them.
    #[must_use]
    pub fn alone(&self) -> Option<&PackedLinear> {
        self.changes.is_empty().then_some(&self.matrix)
    }

    /// Layers that read the same rows as one, which gives their outputs side by side, and each of them alone, which
    /// then takes no memory of its own; the first is `None` where that is not done, as on a CPU, or where a layer
    /// carries changes.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn joined<const N: usize>(layers: [Self; N]) -> TensorResult<(Option<Self>, [Self; N])> {
        if !layers.iter().all(|layer| layer.changes.is_empty()) {
            return Ok((None, layers));
        }
        let unchanged = |matrix| Self { matrix, changes: Vec::new() };
        Ok(match PackedLinear::joined(layers.each_ref().map(|layer| &layer.matrix))? {
            Some((all, each)) => (Some(unchanged(all)), each.map(unchanged)),
            None => (None, layers),
        })
    }

    /// Whether the matrix is kept in fewer bits than float32.
    #[must_use]
    pub fn is_narrow(&self) -> bool {
        self.matrix.is_narrow()
    }

    /// `[.., width_in]` → `[.., width_out]`.
    ///
    /// # Errors
    /// Another width, or a failure of the device.
    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let mut y = self.matrix.forward(x)?;
        for change in &self.changes {
            y = ops::add(&y, &change.forward(x)?)?;
        }
        Ok(y)
    }
}

impl Linear {
    /// [`Self::forward`] and [`gelu_tanh`](ops::gelu_tanh()) after it.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_gelu_tanh(&self, x: &Tensor) -> TensorResult<Tensor> {
        match self.changes.is_empty() {
            true => self.matrix.forward_gelu_tanh(x),
            false => ops::gelu_tanh_owned(self.forward(x)?),
        }
    }
}

/// RMS norm over the last axis.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Reads `weight: [dim]` below `weights`.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn load(weights: &Weights, dim: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: weights.tensor("weight", &[dim])?, eps })
    }

    /// From `weight: [dim]`.
    #[must_use]
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps }
    }

    /// `[.., dim]` → the same shape.
    ///
    /// # Errors
    /// Another width, or a failure of the device.
    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        ops::rms_norm(x, &self.weight, self.eps)
    }

    /// `[dim]`, for operations that the norm is a part of.
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

/// RMS norm over the channels of a picture.
#[derive(Debug, Clone)]
pub struct ChannelRmsNorm(Tensor);

impl ChannelRmsNorm {
    /// Reads `gamma` below `weights`: `channels` numbers with any trailing axes of length one.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn load(weights: &Weights, channels: usize, trailing_axes: usize) -> Result<Self> {
        let mut shape = vec![channels];
        shape.resize(1 + trailing_axes, 1);
        Ok(Self(weights.tensor("gamma", &shape)?.flatten_all()?))
    }

    /// `[b, c, h, w]` → the same shape.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn forward(&self, x: &Picture) -> TensorResult<Picture> {
        x.rms_norm(&self.0)
    }

    /// [`Self::forward`] and SiLU after it, in one pass.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn forward_silu(&self, x: &Picture) -> TensorResult<Picture> {
        x.rms_norm_silu(&self.0)
    }
}

/// A convolution over pictures.
#[derive(Debug, Clone)]
pub struct Conv2d(PackedConv2d);

impl Conv2d {
    /// From tensors that are already two-dimensional: `weight: [out, in, kh, kw]`, `bias: [out]`.
    ///
    /// # Errors
    /// A weight of another rank.
    pub fn new(weight: &Tensor, bias: &Tensor, shape: Conv2dShape) -> Result<Self> {
        Ok(Self(PackedConv2d::new(weight, Some(bias), shape)?))
    }

    /// `[b, in, h, w]` → `[b, out, h', w']`.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn forward(&self, x: &Picture) -> TensorResult<Picture> {
        self.0.apply(x)
    }

    /// [`Self::forward`] of the picture in which each pixel became 2 × 2.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn forward_enlarged(&self, x: Picture) -> TensorResult<Picture> {
        self.0.apply_enlarged(x)
    }

    /// This convolution with `norm` of its result and SiLU after it.
    ///
    /// # Errors
    /// A norm of another number of channels, or a failure of the device.
    pub fn normed(self, norm: ChannelRmsNorm) -> TensorResult<NormedConv2d> {
        NormedConv2d::new(self.0, norm.0)
    }

    /// This convolution with what `shortcut` makes of a second picture, or that picture itself, added
    /// to its result.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn beside(self, shortcut: Option<Self>) -> TensorResult<ResidualConv2d> {
        ResidualConv2d::new(self.0, shortcut.map(|shortcut| shortcut.0))
    }
}

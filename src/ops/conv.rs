//! Two-dimensional convolution and nearest-neighbour enlargement.

use candle_core::{Result, Tensor};

/// Zeros added around a picture, in pixels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Padding {
    /// Above.
    pub top: usize,
    /// Below.
    pub bottom: usize,
    /// To the left.
    pub left: usize,
    /// To the right.
    pub right: usize,
}

impl Padding {
    /// The same on all four sides.
    #[must_use]
    pub const fn all(px: usize) -> Self {
        Self { top: px, bottom: px, left: px, right: px }
    }
}

/// Stride and padding of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2dShape {
    /// Step between outputs, in pixels.
    pub stride: usize,
    /// Zeros around the input.
    pub padding: Padding,
}

/// A convolution's weights, laid out once for the device they run on.
#[derive(Debug, Clone)]
pub struct PackedConv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    shape: Conv2dShape,
}

impl PackedConv2d {
    /// `weight: [out, in, kh, kw]`, `bias: [out]`.
    ///
    /// # Errors
    /// Weights of another rank.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, shape: Conv2dShape) -> Result<Self> {
        let (out, ..) = weight.dims4()?;
        let bias = bias.map(|b| b.reshape((1, out, 1, 1))).transpose()?;
        Ok(Self { weight: weight.contiguous()?, bias, shape })
    }

    /// `x: [b, in, h, w]` → `[b, out, h', w']`.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let p = self.shape.padding;
        let x = x.pad_with_zeros(2, p.top, p.bottom)?.pad_with_zeros(3, p.left, p.right)?;
        let y = x.contiguous()?.conv2d(&self.weight, 0, self.shape.stride, 1, 1)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// Each pixel becomes 2 × 2: `[b, c, h, w]` → `[b, c, 2h, 2w]`.
///
/// # Errors
/// A tensor of another rank.
pub fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    x.upsample_nearest2d(2 * h, 2 * w)
}

//! Two-dimensional convolution and nearest-neighbour enlargement.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    cpu::{Floats, is_fast},
    cuda::{Pixels, StoredKernel},
    direct::PackedKernel,
    simd::{Arch, hugepage},
};

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
    kernel: Kernel,
    bias: Option<Tensor>,
    shape: Conv2dShape,
}

#[derive(Debug, Clone)]
enum Kernel {
    Packed(Arc<PackedKernel>),
    Cuda(Box<StoredKernel>),
    Plain(Tensor),
}

impl PackedConv2d {
    /// `weight: [out, in, kh, kw]`, `bias: [out]`.
    ///
    /// # Errors
    /// Weights of another rank, a bias of another length, or a stride of zero.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, shape: Conv2dShape) -> Result<Self> {
        let (out, ..) = weight.dims4()?;
        if let Some(bias) = bias.filter(|bias| bias.dims() != [out]) {
            bail!("conv2d: weight {:?} and bias {:?} do not fit", weight.dims(), bias.dims());
        }
        if shape.stride == 0 || weight.elem_count() == 0 {
            bail!("conv2d: stride {} and weight {:?} do not fit", shape.stride, weight.dims());
        }
        let kernel = if is_fast(&[weight]) {
            Kernel::Packed(Arc::new(PackedKernel::new(weight, Arch::new())?))
        } else if let Some(kernel) = StoredKernel::new(weight, bias)? {
            Kernel::Cuda(Box::new(kernel))
        } else {
            Kernel::Plain(weight.contiguous()?)
        };
        Ok(Self { kernel, bias: bias.cloned(), shape })
    }

    /// `x: [b, in, h, w]` → `[b, out, h', w']`.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        match &self.kernel {
            Kernel::Packed(kernel) if is_fast(&[x]) && bias.is_none_or(|bias| is_fast(&[bias])) => {
                kernel.forward(x, bias, self.shape)
            }
            Kernel::Packed(kernel) => conv2d_plain(x, &kernel.unpacked()?, bias, self.shape),
            Kernel::Cuda(kernel) => match Pixels::of_planes(x)? {
                Some(pixels) => kernel.forward(&pixels, (self.shape, false), None)?.to_planes(),
                None => conv2d_plain(x, &kernel.unpacked()?, bias, self.shape),
            },
            Kernel::Plain(weight) => conv2d_plain(x, weight, bias, self.shape),
        }
    }

    /// The weights as a GPU's kernels read them, where they do.
    pub(super) fn stored(&self) -> Option<&StoredKernel> {
        match &self.kernel {
            Kernel::Cuda(kernel) => Some(kernel),
            Kernel::Packed(_) | Kernel::Plain(_) => None,
        }
    }

    pub(super) fn shape(&self) -> Conv2dShape {
        self.shape
    }
}

/// The convolution by way of candle's own, with the padding stored: the twin of the faster one.
pub(super) fn conv2d_plain(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    shape: Conv2dShape,
) -> Result<Tensor> {
    if x.dtype() == DType::BF16 && x.device().is_cpu() {
        // Candle's convolution on the CPU knows no bf16.
        let wide = |x: &Tensor| x.to_dtype(DType::F32);
        let bias = bias.map(wide).transpose()?;
        let y = conv2d_plain(&wide(x)?, &wide(weight)?, bias.as_ref(), shape)?;
        return y.to_dtype(DType::BF16);
    }
    let p = shape.padding;
    let x = x.pad_with_zeros(2, p.top, p.bottom)?.pad_with_zeros(3, p.left, p.right)?;
    let y = x.contiguous()?.conv2d(weight, 0, shape.stride, 1, 1)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, bias.elem_count(), 1, 1))?), // (1, out, 1, 1)
        None => Ok(y),
    }
}

/// Each pixel becomes 2 × 2: `[b, c, h, w]` → `[b, c, 2h, 2w]`.
///
/// # Errors
/// A tensor of another rank.
pub fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    if !is_fast(&[x]) || x.elem_count() == 0 {
        return x.upsample_nearest2d(2 * h, 2 * w);
    }
    let x = x.contiguous()?;
    let floats = Floats::new(&x);
    let input = floats.contiguous()?;
    let mut out = hugepage::zeros(4 * input.len());
    out.par_chunks_mut(4 * w).zip(input.par_chunks(w)).for_each(|(out, x)| {
        let (first, second) = out.split_at_mut(2 * w);
        for (pair, x) in first.chunks_exact_mut(2).zip(x) {
            pair.fill(*x);
        }
        second.copy_from_slice(first);
    });
    drop(floats);
    Tensor::from_vec(out, (b, c, 2 * h, 2 * w), x.device())
}

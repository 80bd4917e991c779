//! What encoder and decoder are made of.
//!
//! The model is built for video: its convolutions are three-dimensional and look back in time. A
//! single picture has nothing before it, so all but the last time slice of each kernel meet zeros,
//! and the convolution equals a two-dimensional one with that slice.

use candle_core::{Result as TensorResult, Tensor};

use crate::{
    error::Result,
    layers::{ChannelRmsNorm, Conv2d},
    ops::{
        self, Conv2dShape, LinearWeight, Mask, NormedConv2d, PackedLinear, Padding, Picture,
        ResidualConv2d,
    },
    progress::CancelToken,
    weights::Weights,
};

/// Side of the kernels that look at neighbours.
const SIDE: usize = 3;
const SAME: Conv2dShape = Conv2dShape { stride: 1, padding: Padding::all(1) };
const POINTWISE: Conv2dShape = Conv2dShape { stride: 1, padding: Padding::all(0) };
/// Halves a side: one row and one column of zeros after the last.
const HALVE: Conv2dShape =
    Conv2dShape { stride: 2, padding: Padding { top: 0, bottom: 1, left: 0, right: 1 } };

/// The number of channels that go in and come out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Channels {
    pub(super) input: usize,
    pub(super) output: usize,
}

/// The last time slice of a kernel `[out, in, time, h, w]`: `[out, in, h, w]`.
pub(super) fn last_time_slice(kernel: &Tensor) -> TensorResult<Tensor> {
    let time = kernel.dim(2)?;
    ops::laid_out(&kernel.narrow(2, time - 1, 1)?.squeeze(2)?) // (out, in, h, w)
}

/// A causal 3 × 3 × 3 convolution on a single picture.
pub(super) fn causal_conv(weights: &Weights, channels: Channels) -> Result<Conv2d> {
    let Channels { input, output } = channels;
    let kernel = weights.tensor("weight", &[output, input, SIDE, SIDE, SIDE])?;
    let bias = weights.tensor("bias", &[output])?;
    Conv2d::new(&last_time_slice(&kernel)?, &bias, SAME)
}

/// A 1 × 1 × 1 convolution on a single picture, of which the first `kept` outputs are computed.
pub(super) fn pointwise_conv(weights: &Weights, channels: Channels, kept: usize) -> Result<Conv2d> {
    let Channels { input, output } = channels;
    let kernel = weights.tensor("weight", &[output, input, 1, 1, 1])?;
    let bias = weights.tensor("bias", &[output])?;
    let kernel = last_time_slice(&kernel)?.narrow(0, 0, kept)?.contiguous()?;
    Conv2d::new(&kernel, &bias.narrow(0, 0, kept)?.contiguous()?, POINTWISE)
}

/// A plain 3 × 3 convolution after an enlargement, or one that halves the sides.
fn plain_conv(weights: &Weights, channels: Channels, shape: Conv2dShape) -> Result<Conv2d> {
    let Channels { input, output } = channels;
    let kernel = weights.tensor("weight", &[output, input, SIDE, SIDE])?;
    Conv2d::new(&kernel, &weights.tensor("bias", &[output])?, shape)
}

/// Two convolutions beside a shortcut.
#[derive(Debug, Clone)]
pub(super) struct ResidualBlock {
    norm1: ChannelRmsNorm,
    /// With the norm before the second one.
    conv1: NormedConv2d,
    conv2: ResidualConv2d,
}

impl ResidualBlock {
    pub(super) fn load(weights: &Weights, channels: Channels) -> Result<Self> {
        let Channels { input, output } = channels;
        let shortcut = match input == output {
            true => None,
            false => Some(pointwise_conv(&weights.pp("conv_shortcut"), channels, output)?),
        };
        let conv1 = causal_conv(&weights.pp("conv1"), channels)?;
        let conv2 = causal_conv(&weights.pp("conv2"), Channels { input: output, output })?;
        Ok(Self {
            norm1: norm(&weights.pp("norm1"), input)?,
            conv1: conv1.normed(norm(&weights.pp("norm2"), output)?)?,
            conv2: conv2.beside(shortcut)?,
        })
    }

    /// `[b, input, h, w]` → `[b, output, h, w]`.
    fn forward(&self, x: Picture) -> TensorResult<Picture> {
        self.conv2.apply(self.conv1.apply(self.norm1.forward_silu(&x)?)?, x)
    }
}

/// The norm before a causal convolution.
pub(super) fn norm(weights: &Weights, channels: usize) -> Result<ChannelRmsNorm> {
    const TRAILING_AXES: usize = 3;
    ChannelRmsNorm::load(weights, channels, TRAILING_AXES)
}

/// Attention between all pixels, with one head.
#[derive(Debug, Clone)]
pub(super) struct AttentionBlock {
    norm: ChannelRmsNorm,
    to_qkv: PackedLinear,
    proj: PackedLinear,
}

impl AttentionBlock {
    fn load(weights: &Weights, dim: usize) -> Result<Self> {
        const TRAILING_AXES: usize = 2;
        let linear = |name: &str, out: usize| -> Result<PackedLinear> {
            let weights = weights.pp(name);
            let weight = weights.tensor("weight", &[out, dim, 1, 1])?.reshape((out, dim))?; // (out, in)
            Ok(PackedLinear::new(
                LinearWeight::Dense(weight),
                Some(weights.tensor("bias", &[out])?),
            )?)
        };
        Ok(Self {
            norm: ChannelRmsNorm::load(&weights.pp("norm"), dim, TRAILING_AXES)?,
            to_qkv: linear("to_qkv", 3 * dim)?,
            proj: linear("proj", dim)?,
        })
    }

    /// `[b, c, h, w]` → the same shape.
    fn forward(&self, x: Picture) -> TensorResult<Picture> {
        let tokens = self.norm.forward(&x)?.into_tokens()?; // (b, h·w, c)
        let (b, pixels, c) = tokens.dims3()?;
        let qkv = self.to_qkv.forward(&tokens)?.reshape((b, pixels, 3, c))?; // (b, h·w, 3, c)
        drop(tokens);
        let part = |i: usize| ops::laid_out(&qkv.narrow(2, i, 1)?); // (b, h·w, 1 head, c)
        #[expect(clippy::cast_precision_loss, reason = "a number of channels is small")]
        let scale = (c as f32).sqrt().recip();
        let attended = ops::attention(&part(0)?, &part(1)?, &part(2)?, scale, Mask::None)?;
        x.add_tokens(&self.proj.forward(&attended.squeeze(2)?)?)
    }
}

/// What lies between encoder and decoder on either side: the only part that sees the whole picture.
#[derive(Debug, Clone)]
pub(super) struct MidBlock {
    before: ResidualBlock,
    attention: AttentionBlock,
    after: ResidualBlock,
}

impl MidBlock {
    pub(super) fn load(weights: &Weights, dim: usize) -> Result<Self> {
        let channels = Channels { input: dim, output: dim };
        let resnets = weights.pp("resnets");
        Ok(Self {
            before: ResidualBlock::load(&resnets.pp(0), channels)?,
            attention: AttentionBlock::load(&weights.pp("attentions").pp(0), dim)?,
            after: ResidualBlock::load(&resnets.pp(1), channels)?,
        })
    }

    pub(super) fn forward(&self, x: Picture, cancel: &CancelToken) -> Result<Picture> {
        let x = self.before.forward(x)?;
        cancel.check()?;
        let x = self.attention.forward(x)?;
        cancel.check()?;
        Ok(self.after.forward(x)?)
    }
}

/// One step of the local parts of encoder and decoder, where a pixel sees its neighbours only.
#[derive(Debug, Clone)]
pub(super) enum LocalLayer {
    /// A convolution.
    Conv(Conv2d),
    /// A residual block.
    Residual(ResidualBlock),
    /// A convolution that halves the sides.
    Halve(Conv2d),
    /// Each pixel becomes four, then a convolution.
    Enlarge(Conv2d),
    /// Norm, activation and the last convolution.
    Head(Head),
}

impl LocalLayer {
    /// The step to half the sides.
    pub(super) fn halve(weights: &Weights, dim: usize) -> Result<Self> {
        let channels = Channels { input: dim, output: dim };
        Ok(Self::Halve(plain_conv(&weights.pp("resample.1"), channels, HALVE)?))
    }

    /// The step to twice the sides and half the channels.
    #[expect(clippy::integer_division, reason = "the config's check asks for even channels")]
    pub(super) fn enlarge(weights: &Weights, dim: usize) -> Result<Self> {
        let channels = Channels { input: dim, output: dim / 2 };
        Ok(Self::Enlarge(plain_conv(&weights.pp("resample.1"), channels, SAME)?))
    }

    fn forward(&self, x: Picture) -> TensorResult<Picture> {
        match self {
            Self::Conv(conv) | Self::Halve(conv) => conv.forward(&x),
            Self::Residual(block) => block.forward(x),
            Self::Enlarge(conv) => conv.forward_enlarged(x),
            Self::Head(head) => head.forward(&x),
        }
    }
}

/// How far, in pixels, a pixel behind `layers` sees to each side, when a pixel before them is
/// `pixel_px` wide.
#[expect(clippy::integer_division, reason = "sides are powers of two")]
pub(super) fn sight_px(layers: &[LocalLayer], pixel_px: usize) -> usize {
    const CONVOLUTIONS_OF_RESIDUAL: usize = 2;
    let (_, sight) = layers.iter().fold((pixel_px, 0), |(px, sight), layer| match layer {
        LocalLayer::Conv(_) | LocalLayer::Head(_) => (px, sight + px),
        LocalLayer::Residual(_) => (px, sight + CONVOLUTIONS_OF_RESIDUAL * px),
        LocalLayer::Halve(_) => (2 * px, sight + px),
        LocalLayer::Enlarge(_) => (px / 2, sight + px / 2),
    });
    sight
}

/// Applies `layers` one after the other.
pub(super) fn run(layers: &[LocalLayer], x: Picture, cancel: &CancelToken) -> Result<Picture> {
    layers.iter().try_fold(x, |x, layer| {
        cancel.check()?;
        Ok(layer.forward(x)?)
    })
}

/// Norm, activation and the last convolution.
#[derive(Debug, Clone)]
pub(super) struct Head {
    norm: ChannelRmsNorm,
    conv: Conv2d,
}

impl Head {
    /// Reads `norm_out` and `conv_out` below `weights`.
    pub(super) fn load(weights: &Weights, channels: Channels) -> Result<Self> {
        Ok(Self {
            norm: norm(&weights.pp("norm_out"), channels.input)?,
            conv: causal_conv(&weights.pp("conv_out"), channels)?,
        })
    }

    pub(super) fn forward(&self, x: &Picture) -> TensorResult<Picture> {
        self.conv.forward(&self.norm.forward_silu(x)?)
    }
}

#[cfg(test)]
#[expect(clippy::integer_division, reason = "the three indices of a kernel's tap")]
mod tests {
    use candle_core::Device;

    use super::*;

    /// A causal three-dimensional convolution by its definition: `x: [in, time, h, w]` has two zero
    /// frames before its first and a zero around its sides; returns `[out, time, h, w]`.
    fn causal_conv3d(x: &Tensor, kernel: &Tensor) -> Vec<f32> {
        let (c, t, h, w) = x.dims4().unwrap();
        let out = kernel.dim(0).unwrap();
        let xs: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
        let ks: Vec<f32> = kernel.flatten_all().unwrap().to_vec1().unwrap();
        // Places are counted from the first zero before the input.
        let at = |i: usize, time: usize, y: usize, x: usize| match time
            .checked_sub(2)
            .zip(y.checked_sub(1))
            .zip(x.checked_sub(1))
        {
            Some(((time, y), x)) if time < t && y < h && x < w => {
                xs[((i * t + time) * h + y) * w + x]
            }
            _ => 0.0,
        };
        let taps: Vec<[usize; 4]> = (0..c)
            .flat_map(|i| (0..27).map(move |tap| [i, tap / 9, tap / 3 % 3, tap % 3]))
            .collect();
        let places = (0..out).flat_map(|o| (0..t).map(move |time| (o, time)));
        let places = places
            .flat_map(|(o, time)| (0..h).flat_map(move |y| (0..w).map(move |x| (o, time, y, x))));
        places
            .map(|(o, time, y, x)| {
                let kernel = &ks[o * taps.len()..];
                let tap = |(k, [i, dt, dy, dx]): (&f32, &[usize; 4])| {
                    k * at(*i, time + dt, y + dy, x + dx)
                };
                kernel.iter().zip(&taps).map(tap).sum()
            })
            .collect()
    }

    #[test]
    fn the_last_time_slice_equals_the_whole_kernel_on_a_single_picture() {
        let random = |shape: &[usize]| Tensor::randn(0.0_f32, 1.0, shape, &Device::Cpu).unwrap();
        let (x, kernel) = (random(&[4, 1, 5, 6]), random(&[3, 4, 3, 3, 3]));
        let bias = Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap();
        let conv = Conv2d::new(&last_time_slice(&kernel).unwrap(), &bias, SAME).unwrap();
        let convolved = |frame: Tensor| -> Vec<f32> {
            let frame = Picture::new(frame.squeeze(1).unwrap().unsqueeze(0).unwrap()).unwrap();
            let flat = conv.forward(&frame).unwrap().into_planes().unwrap();
            flat.flatten_all().unwrap().to_vec1().unwrap()
        };
        let flat = convolved(x.clone());
        let whole = causal_conv3d(&x, &kernel);
        assert_eq!(flat.len(), whole.len());
        for (a, b) in flat.iter().zip(&whole) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
        // Only for a single picture: the first of two frames is equal, the second is not.
        let two = Tensor::cat(&[&x, &random(&[4, 1, 5, 6])], 1).unwrap();
        let frames = causal_conv3d(&two, &kernel);
        assert!(frames[..30].iter().zip(&flat).all(|(a, b)| (a - b).abs() < 1e-4));
        let second = convolved(two.narrow(1, 1, 1).unwrap());
        assert!(frames[30..60].iter().zip(&second).any(|(a, b)| (a - b).abs() > 0.1));
    }
}

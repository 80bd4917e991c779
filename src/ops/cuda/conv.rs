//! Convolutions: `kernels/conv.cu` and `kernels/conv_hopper.cu`.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{
    ffi::{self, Output, launch},
    launch::{Args, Launch},
    pictures::Pixels,
    rows::TOGETHER,
    takes,
    tensors::aligned,
};
use crate::ops::{self, Conv2dShape};

/// The side of what a block computes, in pixels, and of the largest kernel.
const SIDE: usize = 16;
const TAPS: usize = 3;

/// A convolution's weights as the kernels read them.
#[derive(Debug, Clone)]
pub(in crate::ops) struct StoredKernel {
    /// `[kw, kh, out, in]`, outputs and inputs up to a multiple of 8, zeros there.
    weight: Tensor,
    /// `[out]` in float32, filled up likewise.
    bias: Option<Tensor>,
    /// Of the norm over the channels of the result, which SiLU follows: `[out]` like the bias.
    gamma: Option<Tensor>,
    /// `[out, in, kh, kw]`.
    dims: [usize; 4],
}

/// A second picture that a convolution multiplies by a matrix and adds to its result.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Shortcut<'a> {
    pub(in crate::ops) picture: &'a Pixels,
    /// Of a kernel of 1 × 1; its bias is not read.
    pub(in crate::ops) kernel: &'a StoredKernel,
}

impl StoredKernel {
    /// `weight: [out, in, kh, kw]` and `bias: [out]` in bf16; `None` where no kernel fits.
    pub(in crate::ops) fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Self>> {
        let (out, channels, kh, kw) = weight.dims4()?;
        let fits = takes(&[weight]) && bias.is_none_or(|bias| takes(&[bias]));
        if !fits || weight.elem_count() == 0 || kh > TAPS || kw > TAPS {
            return Ok(None);
        }
        let weight = ops::laid_out(&weight.permute((3, 2, 0, 1))?)?; // (kw, kh, out, in)
        let weight = weight.pad_with_zeros(2, 0, stored(out) - out)?;
        let weight = aligned(&weight.pad_with_zeros(3, 0, stored(channels) - channels)?)?;
        let bias = bias.map(wide).transpose()?;
        Ok(Some(Self { weight, bias, gamma: None, dims: [out, channels, kh, kw] }))
    }

    /// This kernel with the norm of its result over the channels, of `gamma: [out]`, and SiLU after it, where
    /// [`Self::can_norm`].
    pub(in crate::ops) fn with_norm(&self, gamma: &Tensor) -> Result<Self> {
        let [out, ..] = self.dims;
        if gamma.dims() != [out] {
            bail!("channel norm: {:?} does not fit {out} channels", gamma.dims());
        }
        Ok(Self { gamma: Some(wide(gamma)?), ..self.clone() })
    }

    /// Whether a block on the device of `x` has all outputs of a pixel, so that it can norm them.
    pub(in crate::ops) fn can_norm(&self, x: &Pixels) -> bool {
        let [out, ..] = self.dims;
        stored(out) <= Variant::of(stored(out), x.data.device()).outs
    }

    /// The matrix that changes no number of this one's result.
    pub(in crate::ops) fn identity(&self) -> Result<Option<Self>> {
        let [channels, ..] = self.dims;
        let one = Tensor::eye(channels, DType::F32, &Device::Cpu)?.to_dtype(DType::BF16)?;
        let one = one.to_device(self.weight.device())?.reshape((channels, channels, 1, 1))?; // (out, in, 1, 1)
        Self::new(&one, None)
    }

    /// This kernel with the bias of `other` added to its own.
    pub(in crate::ops) fn with_bias_of(&self, other: &Self) -> Result<Self> {
        let bias = match (&self.bias, &other.bias) {
            (Some(one), Some(two)) => Some(ops::add(one, two)?),
            (one, two) => one.as_ref().or(two.as_ref()).cloned(),
        };
        Ok(Self { bias, ..self.clone() })
    }

    /// `[out, in, kh, kw]`.
    pub(in crate::ops) fn unpacked(&self) -> Result<Tensor> {
        let [out, channels, ..] = self.dims;
        let weight = self.weight.narrow(2, 0, out)?.narrow(3, 0, channels)?;
        weight.permute((2, 3, 1, 0))?.contiguous() // (out, in, kh, kw)
    }

    /// The convolution of `x`, of which each pixel counts as 2 × 2 if `enlarge`, and what `shortcut`
    /// adds to it.
    pub(in crate::ops) fn forward(
        &self,
        x: &Pixels,
        (shape, enlarge): (Conv2dShape, bool),
        shortcut: Option<Shortcut<'_>>,
    ) -> Result<Pixels> {
        let [out, channels, kh, kw] = self.dims;
        let [b, found, h, w] = x.dims()?;
        let Conv2dShape { stride, padding } = shape;
        let scale = 1 + usize::from(enlarge);
        let tall = scale * h + padding.top + padding.bottom;
        let wide = scale * w + padding.left + padding.right;
        if found != channels || tall < kh || wide < kw {
            bail!("conv2d: {:?} does not fit weights {:?}", [b, found, h, w], self.dims);
        }
        let steps = |size: usize, kernel: usize| {
            (size - kernel).checked_div(stride).map_or(0, |steps| steps + 1)
        };
        let (out_h, out_w) = (steps(tall, kh), steps(wide, kw));
        let mut shortcut_channels = 0;
        if let Some(Shortcut { picture, kernel }) = shortcut {
            shortcut_channels = picture.channels;
            let fits = kernel.dims == [out, shortcut_channels, 1, 1];
            if !fits || picture.dims()? != [b, shortcut_channels, out_h, out_w] {
                let found = (picture.dims()?, kernel.dims);
                bail!("conv2d: shortcut {found:?} does not fit {:?}", [b, out, out_h, out_w]);
            }
        }
        let device = x.data.device();
        let y = Output::new(device, &[b, out_h, out_w, stored(out)], DType::BF16)?;
        let mut args = Args::default();
        args.tensor(Some(&x.data))?.tensor(Some(&self.weight))?;
        args.tensor(shortcut.map(|shortcut| &shortcut.picture.data))?;
        args.tensor(shortcut.map(|shortcut| &shortcut.kernel.weight))?;
        args.tensor(self.bias.as_ref())?.tensor(self.gamma.as_ref())?.address(y.address());
        args.counts([b, stored(channels), stored(shortcut_channels), stored(out)]);
        args.counts([h, w, out_h, out_w, kh, kw, stride, padding.top, padding.left]);
        args.flag(enlarge).count(out);
        let variant = Variant::of(stored(out), device);
        if self.gamma.is_some() && !self.can_norm(x) {
            bail!("conv2d: a block has {} of {out} outputs, too few to norm them", variant.outs);
        }
        let tiles = b * out_h.div_ceil(SIDE) * out_w.div_ceil(SIDE);
        launch(device, &variant.launch(tiles * stored(out).div_ceil(variant.outs), device, args)?)?;
        Ok(Pixels { data: y.into_tensor()?, channels: out })
    }
}

/// Channels as they lie in memory.
fn stored(channels: usize) -> usize {
    channels.next_multiple_of(TOGETHER)
}

/// `[out]` in float32 and filled up.
fn wide(numbers: &Tensor) -> Result<Tensor> {
    let out = numbers.dim(0)?;
    numbers.to_dtype(DType::F32)?.pad_with_zeros(0, 0, stored(out) - out)
}

/// A kernel, by the outputs of its blocks.
#[derive(Debug, Clone, Copy)]
struct Variant {
    outs: usize,
    hopper: bool,
}

impl Variant {
    fn of(outs: usize, device: &Device) -> Self {
        /// Fewer outputs leave most of a block of Hopper's idle.
        const HOPPER_OUTS: usize = 64;
        if outs >= HOPPER_OUTS && super::hopper_is_used(device) {
            let outs = if outs.is_multiple_of(192) { 192 } else { 96 };
            return Self { outs, hopper: true };
        }
        let filled = |block: usize| outs.next_multiple_of(block);
        let outs = match outs {
            ..=16 => 16,
            _ if filled(96) <= filled(64) => 96,
            _ => 64,
        };
        Self { outs, hopper: false }
    }

    fn launch(self, tiles: usize, device: &Device, args: Args) -> Result<Launch> {
        let Self { outs, hopper } = self;
        if tiles > 1 << 30 {
            bail!("conv2d: {tiles} tiles are too many");
        }
        if !hopper {
            return Ok(Launch {
                kernel: format!("conv2d_{outs}"),
                grid: [tiles, 1, 1],
                threads: 256,
                shared_bytes: general_bytes(outs),
                args,
            });
        }
        Ok(Launch {
            kernel: format!("conv2d_hopper_{outs}"),
            grid: [tiles.min(ffi::limits(device)?.multiprocessors), 1, 1],
            threads: 384,
            shared_bytes: hopper_bytes(outs),
            args,
        })
    }
}

/// Two slabs of 32 channels, each with the weights of three taps.
fn general_bytes(outs: usize) -> usize {
    const ROW_BYTES: usize = 32 * 2;
    2 * ((SIDE + 2) * SIDE + TAPS * outs) * ROW_BYTES
}

/// Rings of slabs and of taps of 64 channels, and two barriers a tap and one a slab.
fn hopper_bytes(outs: usize) -> usize {
    const ROW_BYTES: usize = 64 * 2;
    const BARRIER_BYTES: usize = 8;
    let (slabs, taps) = if outs == 192 { (2, 6) } else { (3, 8) };
    let slab = ((SIDE + 2) * (SIDE + 2) * ROW_BYTES).next_multiple_of(1024);
    slabs * slab + taps * outs * ROW_BYTES + (2 * taps + slabs) * BARRIER_BYTES
}

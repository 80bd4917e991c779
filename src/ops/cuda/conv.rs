//! Convolution: `kernels/conv.cu`.

use candle_core::{DType, Result, Tensor, bail};

use super::{
    ffi::{Output, launch},
    launch::{Args, Launch},
    linear::PRODUCT_SHARED_BYTES,
    takes,
};
use crate::ops::Conv2dShape;

const TILE: usize = 128;
const THREADS: usize = 256;
/// Channels are filled up to a multiple of a tile's depth.
const CHANNELS: usize = 64;

/// A convolution's weights as the kernel reads them.
#[derive(Debug, Clone)]
pub(in crate::ops) struct StoredKernel {
    /// `[out, taps, channels up to 64]`.
    weight: Tensor,
    /// `[out, in, kh, kw]`.
    dims: [usize; 4],
}

impl StoredKernel {
    /// `weight: [out, in, kh, kw]` in bf16; `None` where no kernel fits.
    pub(in crate::ops) fn new(weight: &Tensor) -> Result<Option<Self>> {
        let (out, channels, kh, kw) = weight.dims4()?;
        if !takes(&[weight]) || weight.elem_count() == 0 {
            return Ok(None);
        }
        let taps = weight.reshape((out, channels, kh * kw))?.transpose(1, 2)?; // (out, taps, in)
        let missing = channels.next_multiple_of(CHANNELS) - channels;
        let weight = taps.pad_with_zeros(2, 0, missing)?.contiguous()?;
        Ok(Some(Self { weight, dims: [out, channels, kh, kw] }))
    }

    /// `x: [b, in, h, w]` → `[b, out, h', w']`, or `None` where no kernel fits.
    pub(in crate::ops) fn forward(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        shape: Conv2dShape,
    ) -> Result<Option<Tensor>> {
        let [out, channels, kh, kw] = self.dims;
        let (b, found, h, w) = x.dims4()?;
        let padding = shape.padding;
        let (tall, wide) = (h + padding.top + padding.bottom, w + padding.left + padding.right);
        if found != channels || tall < kh || wide < kw {
            bail!("conv2d: {:?} does not fit weights {:?}", x.dims(), self.dims);
        }
        /// Places within a picture and along the depth are 32-bit numbers in the kernel.
        const PLACES_MAX: usize = 1 << 30;
        let depth = channels.next_multiple_of(CHANNELS) * kh * kw;
        if tall * wide > PLACES_MAX || depth > PLACES_MAX {
            return Ok(None);
        }
        if !takes(&[x]) || !bias.is_none_or(|bias| takes(&[bias])) || x.elem_count() == 0 {
            return Ok(None);
        }
        let outputs = |size: usize, kernel: usize| {
            (size - kernel).checked_div(shape.stride).map_or(0, |steps| steps + 1)
        };
        let (out_h, out_w) = (outputs(tall, kh), outputs(wide, kw));
        let (x, bias) = (x.contiguous()?, bias.map(Tensor::contiguous).transpose()?);
        let y = Output::new(x.device(), &[b, out, out_h, out_w], DType::BF16)?;
        let mut args = Args::default();
        args.tensor(Some(&x))?.tensor(Some(&self.weight))?.tensor(bias.as_ref())?;
        args.address(y.address()).counts([channels, channels.next_multiple_of(CHANNELS), out]);
        args.counts([h, w, out_h, out_w, kh, kw, shape.stride, padding.top, padding.left]);
        launch(
            x.device(),
            &Launch {
                kernel: "conv2d".to_owned(),
                grid: [out.div_ceil(TILE), (out_h * out_w).div_ceil(TILE), b],
                threads: THREADS,
                shared_bytes: PRODUCT_SHARED_BYTES,
                args,
            },
        )?;
        y.into_tensor().map(Some)
    }
}

//! Pictures with the channels of a pixel side by side: `kernels/pictures.cu`.

use candle_core::{DType, Result, Tensor, bail};

use super::{
    are_near,
    ffi::{Output, launch},
    launch::{Args, Launch},
    rows::TOGETHER,
    takes,
    tensors::aligned,
};
use crate::ops;

const THREADS: usize = 256;
/// Pixels of a picture that may be enlarged: places within one are 32-bit numbers in the kernels.
const PIXELS_MAX: usize = 1 << 28;

/// A picture as convolutions read it.
#[derive(Debug, Clone)]
pub(in crate::ops) struct Pixels {
    /// `[b, h, w, stored]` in bf16: channels up to a multiple of 8, zeros there.
    pub(super) data: Tensor,
    pub(super) channels: usize,
}

impl Pixels {
    /// `[b, c, h, w]` laid out anew; `None` where kernels do not run on it.
    pub(in crate::ops) fn of_planes(planes: &Tensor) -> Result<Option<Self>> {
        let (b, channels, h, w) = planes.dims4()?;
        if !takes(&[planes]) || planes.elem_count() == 0 || h * w > PIXELS_MAX {
            return Ok(None);
        }
        let planes = planes.contiguous()?;
        let stored = channels.next_multiple_of(TOGETHER);
        let out = Output::new(planes.device(), &[b, h, w, stored], DType::BF16)?;
        transpose("pixels_of_planes", &planes, &out, [b, channels, h * w])?;
        Ok(Some(Self { data: out.into_tensor()?, channels }))
    }

    /// `[b, c, h, w]`.
    pub(in crate::ops) fn to_planes(&self) -> Result<Tensor> {
        let [b, channels, h, w] = self.dims()?;
        let out = Output::new(self.data.device(), &[b, channels, h, w], DType::BF16)?;
        transpose("planes_of_pixels", &self.data, &out, [b, channels, h * w])?;
        out.into_tensor()
    }

    /// `b`, channels, height and width.
    pub(in crate::ops) fn dims(&self) -> Result<[usize; 4]> {
        let (b, h, w, _) = self.data.dims4()?;
        Ok([b, self.channels, h, w])
    }

    /// `[b, h · w, c]`.
    pub(in crate::ops) fn tokens(&self) -> Result<Tensor> {
        let [b, channels, h, w] = self.dims()?;
        ops::laid_out(&self.data.narrow(3, 0, channels)?)?.reshape((b, h * w, channels)) // (b, h·w, c)
    }

    /// The picture of `[b, h · w, c]` with this one's sides added to this one.
    pub(in crate::ops) fn add_tokens(&self, tokens: &Tensor) -> Result<Self> {
        let [b, channels, h, w] = self.dims()?;
        let tokens = tokens.reshape((b, h, w, channels))?; // (b, h, w, c)
        let missing = channels.next_multiple_of(TOGETHER) - channels;
        let data = ops::add(&self.data, &tokens.pad_with_zeros(3, 0, missing)?)?;
        Ok(Self { data, channels })
    }

    /// [`crate::ops::channel_rms_norm`], with SiLU after it if `silu`; `None` where there is no kernel
    /// for the type of `gamma: [c]`.
    pub(in crate::ops) fn rms_norm(&self, gamma: &Tensor, silu: bool) -> Result<Option<Self>> {
        /// Pieces of 16 bytes that a lane keeps; lanes that may share a pixel.
        const HELD: usize = 3;
        const LANES_MAX: usize = 32;
        if !are_near(&[gamma]) || !matches!(gamma.dtype(), DType::BF16 | DType::F32) {
            return Ok(None);
        }
        let [b, channels, h, w] = self.dims()?;
        if gamma.dims() != [channels] {
            bail!("channel norm: {:?} does not fit {channels} channels", gamma.dims());
        }
        let stored = channels.next_multiple_of(TOGETHER);
        let gamma = aligned(&gamma.pad_with_zeros(0, 0, stored - channels)?)?;
        let lanes = stored.div_ceil(TOGETHER * HELD).next_power_of_two().min(LANES_MAX);
        let out = Output::new(self.data.device(), self.data.dims(), DType::BF16)?;
        let mut args = Args::default();
        args.tensor(Some(&self.data))?.tensor(Some(&gamma))?.flag(gamma.dtype() == DType::F32);
        args.address(out.address()).counts([channels, stored, b * h * w, lanes]).flag(silu);
        launch(
            self.data.device(),
            &Launch {
                kernel: "pixel_norm".to_owned(),
                grid: [(b * h * w * lanes).div_ceil(THREADS), 1, 1],
                threads: THREADS,
                shared_bytes: 0,
                args,
            },
        )?;
        Ok(Some(Self { data: out.into_tensor()?, channels }))
    }
}

fn transpose(kernel: &str, from: &Tensor, to: &Output, sizes: [usize; 3]) -> Result<()> {
    let [b, channels, pixels] = sizes;
    let mut args = Args::default();
    args.tensor(Some(from))?.address(to.address()).counts([channels, pixels]);
    let grid = [pixels.div_ceil(THREADS), channels.div_ceil(TOGETHER), b];
    let kernel = kernel.to_owned();
    launch(from.device(), &Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args })
}

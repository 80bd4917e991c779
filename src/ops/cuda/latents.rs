//! What stands at the ends of the transformer: `kernels/latents.cu`.

use candle_core::{DType, Result, Tensor};

use super::{
    are_near,
    ffi::{Output, launch},
    launch::{Args, Launch},
};
use crate::ops::timestep::Sinusoids;

const THREADS: usize = 256;
/// Side of a patch.
const PATCH: usize = 2;

/// [`crate::ops::timestep_embedding`], or `None` where there is no kernel for the types.
pub(in crate::ops) fn timestep_embedding(
    timesteps: &Tensor,
    shape: Sinusoids,
    dtype: DType,
) -> Result<Option<Tensor>> {
    let n = timesteps.dims1()?;
    if timesteps.dtype() != DType::F32 || dtype != DType::BF16 || n == 0 || !are_near(&[timesteps])
    {
        return Ok(None);
    }
    let timesteps = timesteps.contiguous()?;
    let out = Output::new(timesteps.device(), &[n, shape.width], dtype)?;
    let mut args = Args::default();
    args.tensor(Some(&timesteps))?.address(out.address()).counts([n, shape.width]);
    args.flag(shape.flip_sin_to_cos).number(-shape.max_period.ln()).number(shape.divisor());
    args.number(shape.scale);
    start("timestep_embedding", &timesteps, n * (shape.width >> 1), args)?;
    out.into_tensor().map(Some)
}

/// [`crate::ops::pack_patches`], or `None` where there is no kernel for the type.
pub(in crate::ops) fn pack_patches(x: &Tensor) -> Result<Option<Tensor>> {
    let (b, c, h, w) = x.dims4()?;
    let (height, width) = (h.div_ceil(PATCH), w.div_ceil(PATCH));
    moved("pack", x, [b, c, height, width], &[b, height * width, c * PATCH * PATCH])
}

/// [`crate::ops::unpack_patches`], or `None` where there is no kernel for the type.
pub(in crate::ops) fn unpack_patches(
    tokens: &Tensor,
    (height, width): (usize, usize),
) -> Result<Option<Tensor>> {
    let (b, _, dim) = tokens.dims3()?;
    let c = dim.div_ceil(PATCH * PATCH);
    moved("unpack", tokens, [b, c, height, width], &[b, c, height * PATCH, width * PATCH])
}

/// Moves every patch of `[b, c, height, width]` of them.
fn moved(kernel: &str, x: &Tensor, patches: [usize; 4], dims: &[usize]) -> Result<Option<Tensor>> {
    let name = match x.dtype() {
        DType::BF16 => "bf16",
        DType::F32 => "f32",
        _ => return Ok(None),
    };
    let count: usize = patches.iter().product();
    if count == 0 || !are_near(&[x]) {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let out = Output::new(x.device(), dims, x.dtype())?;
    let mut args = Args::default();
    args.tensor(Some(&x))?.address(out.address()).counts(patches);
    start(&format!("{kernel}_patches_{name}"), &x, count, args)?;
    out.into_tensor().map(Some)
}

fn start(kernel: &str, x: &Tensor, count: usize, args: Args) -> Result<()> {
    let grid = [count.div_ceil(THREADS), 1, 1];
    let kernel = kernel.to_owned();
    launch(x.device(), &Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args })
}

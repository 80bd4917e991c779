//! Between pictures of channels and tokens of squares.

use candle_core::{Result, Tensor, bail};

use super::cuda;

/// Side of a token's square.
const PATCH: usize = 2;

/// Each square of 2 × 2 pixels becomes a token, its numbers in the order of channel, row, column.
///
/// # Shapes
/// `[b, c, 2·height, 2·width]` → `[b, height·width, 4·c]`.
///
/// # Errors
/// Odd sides, or a failure of the device.
#[expect(clippy::integer_division, reason = "checked to be a multiple")]
pub fn pack_patches(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    if h % PATCH != 0 || w % PATCH != 0 {
        bail!("patches: sides {w} × {h} are not even");
    }
    if let Some(tokens) = cuda::pack_patches(x)? {
        return Ok(tokens);
    }
    let patches = x.reshape((b, c, h / PATCH, PATCH, w / PATCH, PATCH))?;
    let patches = patches.permute((0, 2, 4, 1, 3, 5))?; // (b, height, width, c, ph, pw)
    patches.reshape((b, (h / PATCH) * (w / PATCH), c * PATCH * PATCH)) // (b, n, c·ph·pw)
}

/// The inverse of [`pack_patches`].
///
/// # Shapes
/// `[b, height·width, 4·c]` → `[b, c, 2·height, 2·width]`.
///
/// # Errors
/// Another number of tokens, a width that is no multiple of 4, or a failure of the device.
#[expect(clippy::integer_division, reason = "checked to be a multiple")]
pub fn unpack_patches(tokens: &Tensor, (height, width): (usize, usize)) -> Result<Tensor> {
    let (b, n, dim) = tokens.dims3()?;
    if n != height * width || dim % (PATCH * PATCH) != 0 {
        bail!("patches: {:?} tokens do not fit {width} × {height} of them", tokens.dims());
    }
    if let Some(x) = cuda::unpack_patches(tokens, (height, width))? {
        return Ok(x);
    }
    let c = dim / (PATCH * PATCH);
    let patches = tokens.reshape((b, height, width, c, PATCH, PATCH))?;
    let patches = patches.permute((0, 3, 1, 4, 2, 5))?; // (b, c, height, ph, width, pw)
    patches.reshape((b, c, height * PATCH, width * PATCH)) // (b, c, h, w)
}

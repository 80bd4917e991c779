//! Between the autoencoder's latents and the transformer's tokens.

use candle_core::Tensor;

use super::config::PATCH;
use crate::{
    error::{Error, Result},
    ops,
};

/// A picture's size in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Rows of tokens.
    pub height: usize,
    /// Columns of tokens.
    pub width: usize,
}

impl Grid {
    /// Tokens of the picture.
    #[must_use]
    pub fn tokens(self) -> usize {
        self.height * self.width
    }
}

/// Latents to tokens: each square of 2 × 2 latent pixels becomes one token.
///
/// # Shapes
/// `[b, c, 2·height, 2·width]` → `[b, height·width, 4·c]`, and the grid.
///
/// # Errors
/// A side that is odd or zero.
#[expect(clippy::integer_division, reason = "checked to be a multiple")]
pub fn tokens_from_latents(latents: &Tensor) -> Result<(Tensor, Grid)> {
    let (_, _, h, w) = latents.dims4()?;
    if h == 0 || w == 0 || h % PATCH != 0 || w % PATCH != 0 {
        return Err(Error::field("latents", format!("{w} × {h}"), "even sides"));
    }
    let grid = Grid { height: h / PATCH, width: w / PATCH };
    Ok((ops::pack_patches(latents)?, grid))
}

/// Tokens to latents, the inverse of [`tokens_from_latents`].
///
/// # Shapes
/// `[b, height·width, 4·c]` → `[b, c, 2·height, 2·width]`.
///
/// # Errors
/// Another number of tokens than `grid` has, or a width that is not a multiple of 4.
pub fn latents_from_tokens(tokens: &Tensor, grid: Grid) -> Result<Tensor> {
    let (_, n, dim) = tokens.dims3()?;
    if n != grid.tokens() || dim % (PATCH * PATCH) != 0 {
        let expected = format!("{} tokens of a multiple of {}", grid.tokens(), PATCH * PATCH);
        return Err(Error::field("tokens", format!("{n} of {dim}"), expected));
    }
    Ok(ops::unpack_patches(tokens, (grid.height, grid.width))?)
}

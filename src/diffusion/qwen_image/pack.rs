//! Between the autoencoder's latents and the transformer's tokens.

use candle_core::Tensor;

use super::config::PATCH;
use crate::error::{Error, Result};

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
    let (b, c, h, w) = latents.dims4()?;
    if h == 0 || w == 0 || h % PATCH != 0 || w % PATCH != 0 {
        return Err(Error::field("latents", format!("{w} × {h}"), "even sides"));
    }
    let grid = Grid { height: h / PATCH, width: w / PATCH };
    let patches = latents.reshape((b, c, grid.height, PATCH, grid.width, PATCH))?;
    let patches = patches.permute((0, 2, 4, 1, 3, 5))?; // (b, height, width, c, ph, pw)
    let tokens = patches.reshape((b, grid.tokens(), c * PATCH * PATCH))?; // (b, n, c·ph·pw)
    Ok((tokens, grid))
}

/// Tokens to latents, the inverse of [`tokens_from_latents`].
///
/// # Shapes
/// `[b, height·width, 4·c]` → `[b, c, 2·height, 2·width]`.
///
/// # Errors
/// Another number of tokens than `grid` has, or a width that is not a multiple of 4.
#[expect(clippy::integer_division, reason = "checked to be a multiple")]
pub fn latents_from_tokens(tokens: &Tensor, grid: Grid) -> Result<Tensor> {
    let (b, n, dim) = tokens.dims3()?;
    if n != grid.tokens() || dim % (PATCH * PATCH) != 0 {
        let expected = format!("{} tokens of a multiple of {}", grid.tokens(), PATCH * PATCH);
        return Err(Error::field("tokens", format!("{n} of {dim}"), expected));
    }
    let c = dim / (PATCH * PATCH);
    let patches = tokens.reshape((b, grid.height, grid.width, c, PATCH, PATCH))?;
    let patches = patches.permute((0, 3, 1, 4, 2, 5))?; // (b, c, height, ph, width, pw)
    Ok(patches.reshape((b, c, grid.height * PATCH, grid.width * PATCH))?) // (b, c, h, w)
}

//! Rotary positions: pictures are centred on the origin, text follows on the diagonal.

use candle_core::{Device, Tensor};

use super::{config::Config, pack::Grid};
use crate::error::{Error, Result};

const THETA: f64 = 10_000.0;
/// Positions of the reference's table on each side of zero.
const POSITIONS_MAX: usize = 4096;

/// Cosines and sines of one stream's tokens, `[n, head_dim / 2]` in float32.
#[derive(Debug, Clone)]
pub(super) struct Rotation {
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
}

/// The rotations of all pictures' tokens, in their order.
///
/// The frame axis counts the pictures from 0. Rows and columns of each picture are centred: a side
/// of `s` runs from `-(s - s/2)` to `s/2 - 1`. Text goes on where the largest half side ends, with
/// the same position on all three axes.
///
/// Reference: `QwenEmbedRope` with `scale_rope` at
/// <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/transformers/transformer_qwenimage.py#L204-L334>.
///
/// # Errors
/// A failure of the device.
pub(super) fn image_rotation(config: &Config, grids: &[Grid], device: &Device) -> Result<Rotation> {
    let images = grids.iter().enumerate().flat_map(|(index, grid)| {
        let (rows, columns) = (centred(grid.height), centred(grid.width));
        rows.flat_map(move |row| columns.clone().map(move |column| [position(index), row, column]))
    });
    rotation(config, images, device)
}

/// The rotations of `text_tokens` text tokens beside pictures of these sizes: see [`image_rotation`].
///
/// # Errors
/// More positions than the reference's table has, or a failure of the device.
pub(super) fn text_rotation(
    config: &Config,
    grids: &[Grid],
    text_tokens: usize,
    device: &Device,
) -> Result<Rotation> {
    let text_start = grids.iter().map(|grid| half(grid.height).max(half(grid.width))).max();
    let text_start = text_start.unwrap_or(0);
    if text_start + text_tokens > POSITIONS_MAX || grids.len() > POSITIONS_MAX {
        return Err(Error::field(
            "prompt",
            format!("{text_tokens} tokens"),
            format!(
                "at most {} beside pictures of this size",
                POSITIONS_MAX.saturating_sub(text_start)
            ),
        ));
    }
    let texts = (text_start..text_start + text_tokens).map(|at| [position(at); 3]);
    rotation(config, texts, device)
}

#[expect(clippy::integer_division, reason = "the smaller half of an odd side")]
fn half(side: usize) -> usize {
    side / 2
}

/// The positions of a side's tokens, centred on zero.
fn centred(side: usize) -> impl Iterator<Item = f32> + Clone {
    let before = side - half(side);
    (0..side).map(move |i| position(i) - position(before))
}

/// Positions are small whole numbers, which float32 holds exactly.
#[expect(clippy::cast_precision_loss, reason = "positions are below 2^24")]
fn position(index: usize) -> f32 {
    index as f32
}

fn rotation(
    config: &Config,
    positions: impl Iterator<Item = [f32; 3]>,
    device: &Device,
) -> Result<Rotation> {
    let frequencies = config.rope_axes.map(frequencies);
    let angles: Vec<f32> = positions
        .flat_map(|at| {
            frequencies.iter().zip(at).flat_map(|(axis, at)| axis.iter().map(move |f| at * f))
        })
        .collect();
    #[expect(clippy::integer_division, reason = "the axes are even")]
    let pairs = config.head_dim / 2;
    let tokens = angles.len().checked_div(pairs).unwrap_or(0);
    let table = |f: fn(f32) -> f32| {
        Tensor::from_vec(
            angles.iter().map(|&angle| f(angle)).collect::<Vec<_>>(),
            (tokens, pairs),
            device,
        )
    };
    Ok(Rotation { cos: table(f32::cos)?, sin: table(f32::sin)? })
}

/// Turns per position of each pair of an axis, each operation rounded to float32 as in the
/// reference: an angle of 4096 turns shows the last bit.
#[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is what is asked for")]
fn frequencies(axis: usize) -> Vec<f32> {
    let exponent = |i: usize| f64::from((i as f64 / axis as f64) as f32);
    (0..axis).step_by(2).map(|i| 1.0 / THETA.powf(exponent(i)) as f32).collect()
}

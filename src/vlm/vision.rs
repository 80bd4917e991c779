//! The vision tower: patches to tokens of the language model's width.
//!
//! Follows `Qwen2_5_VisionTransformerPretrainedModel` in
//! <https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py>.

use candle_core::{DType, Device, Tensor};

use super::{
    config::VisionConfig,
    positions::small,
    preprocess::{PatchGrid, Patches, reading_order},
    rotary::{Angles, inverse_frequencies},
};
use crate::{
    error::Result,
    layers::{Linear, RmsNorm},
    ops::{self, LinearWeight, Mask, PackedLinear},
    progress::CancelToken,
    weights::Weights,
};

/// Added to the mean square in all norms of the tower.
const EPS: f64 = 1e-6;

/// The vision tower with its weights.
#[derive(Debug)]
pub(super) struct VisionTower {
    config: VisionConfig,
    patch_embed: PackedLinear,
    blocks: Vec<Block>,
    merger: Merger,
    frequencies: Vec<f32>,
    dtype: DType,
    device: Device,
}

impl VisionTower {
    /// Reads the tower below `weights`; its tokens are `width_out` wide.
    pub(super) fn load(config: &VisionConfig, weights: &Weights, width_out: usize) -> Result<Self> {
        let (width, patch) = (config.hidden_size, config.patch_size);
        let shape = [width, config.channels, config.temporal_patch_size, patch, patch];
        // A convolution whose stride is its kernel is a linear layer over whole patches.
        let kernel = weights.tensor("patch_embed.proj.weight", &shape)?;
        let kernel = kernel.reshape((width, config.patch_dim()))?; // (out, c · t · y · x)
        let blocks = weights.pp("blocks");
        let blocks: Result<Vec<Block>> = (0..config.depth)
            .map(|index| {
                let full = config.full_attention_blocks.contains(&index);
                Block::load(config, &blocks.pp(index), full)
            })
            .collect();
        Ok(Self {
            patch_embed: PackedLinear::new(LinearWeight::Dense(kernel), None)?,
            blocks: blocks?,
            merger: Merger::load(config, &weights.pp("merger"), width_out)?,
            frequencies: inverse_frequencies(config.rope_theta, half(config.head_dim)),
            dtype: weights.precision().compute,
            device: weights.precision().device.clone(),
            config: config.clone(),
        })
    }

    /// Tokens of all pictures `[1, tokens, width_out]`, in reading order, one picture after the
    /// other.
    pub(super) fn forward(&self, patches: &Patches, cancel: &CancelToken) -> Result<Tensor> {
        let windows =
            Windows::new(&patches.grids, self.config.merge_size, self.config.window_tokens());
        let order = Tensor::new(windows.order.as_slice(), &self.device)?;
        let x = patches.pixel_values.to_device(&self.device)?.to_dtype(self.dtype)?;
        let x = self.patch_embed.forward(&x)?; // (patches, hidden)
        let x = ops::take_rows(&self.by_token(&x)?, &order)?; // (tokens, merge · merge · hidden)
        let count = windows.order.len() * self.config.merge_unit();
        let mut x = x.reshape((1, count, self.config.hidden_size))?;
        let angles = self.angles(&patches.grids, &windows)?;
        let pictures = picture_starts(&patches.grids);
        for block in &self.blocks {
            cancel.check()?;
            let segments = if block.full_attention { &pictures } else { &windows.starts };
            x = block.forward(&x, &angles, segments)?;
        }
        let tokens = self.merger.forward(&x)?; // (tokens, width_out)
        let back = Tensor::new(inverse(&windows.order).as_slice(), &self.device)?;
        Ok(ops::take_rows(&tokens, &back)?.unsqueeze(0)?)
    }

    /// `(patches, hidden)` → `(tokens, merge · merge · hidden)`.
    fn by_token(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.reshape(((), self.config.merge_unit() * self.config.hidden_size))?)
    }

    /// Rotary angles of all patches in window order: rows turn the first half of the frequencies,
    /// columns the second.
    fn angles(&self, grids: &[PatchGrid], windows: &Windows) -> Result<Angles> {
        let merge = self.config.merge_size;
        let places: Vec<(usize, usize)> =
            grids.iter().flat_map(|grid| grid.places(merge)).collect();
        let unit = self.config.merge_unit();
        let mut table = Vec::with_capacity(places.len() * half(self.config.head_dim));
        for token in &windows.order {
            let first = *token as usize * unit;
            for (row, column) in &places[first..first + unit] {
                table.extend(self.frequencies.iter().map(|f| angle(*row, *f)));
                table.extend(self.frequencies.iter().map(|f| angle(*column, *f)));
            }
        }
        Angles::new(&table, half(self.config.head_dim), self.dtype, &self.device)
    }
}

fn angle(position: usize, frequency: f32) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "positions are below 2^24")]
    let position = position as f32;
    position * frequency
}

#[expect(clippy::integer_division, reason = "head widths are even")]
fn half(width: usize) -> usize {
    width / 2
}

/// Where each picture's patches start, and the total at the end.
fn picture_starts(grids: &[PatchGrid]) -> Vec<usize> {
    let mut starts = vec![0];
    let mut end = 0;
    for grid in grids {
        end += grid.patches();
        starts.push(end);
    }
    starts
}

/// Tokens regrouped so that each attention window is one run.
#[derive(Debug, PartialEq, Eq)]
struct Windows {
    /// For each place in the new order, the token that goes there.
    order: Vec<u32>,
    /// Where each window's patches start, and the total at the end.
    starts: Vec<usize>,
}

impl Windows {
    fn new(grids: &[PatchGrid], merge: usize, window: usize) -> Self {
        let mut order = Vec::new();
        let mut starts = vec![0];
        let mut first_token = 0;
        for grid in grids {
            let tokens = grid.merged(merge);
            let corners = reading_order(
                (0..tokens.height).step_by(window),
                (0..tokens.width).step_by(window),
            );
            for (top, left) in corners {
                let rows = top..tokens.height.min(top + window);
                let columns = left..tokens.width.min(left + window);
                let token = |(row, column)| small(first_token + row * tokens.width + column);
                order.extend(reading_order(rows, columns).map(token));
                starts.push(order.len() * merge * merge);
            }
            first_token += tokens.patches();
        }
        Self { order, starts }
    }
}

/// The permutation that undoes `order`.
fn inverse(order: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; order.len()];
    for (place, token) in order.iter().enumerate() {
        inverse[*token as usize] = small(place);
    }
    inverse
}

#[derive(Debug)]
struct Block {
    norm1: RmsNorm,
    qkv: Linear,
    proj: Linear,
    norm2: RmsNorm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    heads: usize,
    head_dim: usize,
    full_attention: bool,
}

impl Block {
    fn load(config: &VisionConfig, weights: &Weights, full_attention: bool) -> Result<Self> {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let (attn, mlp) = (weights.pp("attn"), weights.pp("mlp"));
        Ok(Self {
            norm1: RmsNorm::load(&weights.pp("norm1"), width, EPS)?,
            qkv: Linear::load(&attn.pp("qkv"), width, 3 * width)?,
            proj: Linear::load(&attn.pp("proj"), width, width)?,
            norm2: RmsNorm::load(&weights.pp("norm2"), width, EPS)?,
            gate_proj: Linear::load(&mlp.pp("gate_proj"), width, inner)?,
            up_proj: Linear::load(&mlp.pp("up_proj"), width, inner)?,
            down_proj: Linear::load(&mlp.pp("down_proj"), inner, width)?,
            heads: config.heads,
            head_dim: config.head_dim,
            full_attention,
        })
    }

    /// `x: [1, n, hidden]`; tokens attend within `segments`.
    fn forward(&self, x: &Tensor, angles: &Angles, segments: &[usize]) -> Result<Tensor> {
        let x = ops::add(x, &self.attend(&self.norm1.forward(x)?, angles, segments)?)?;
        let normed = self.norm2.forward(&x)?;
        let inner =
            ops::swiglu(&self.gate_proj.forward(&normed)?, &self.up_proj.forward(&normed)?)?;
        Ok(ops::add(&x, &self.down_proj.forward(&inner)?)?)
    }

    fn attend(&self, x: &Tensor, angles: &Angles, segments: &[usize]) -> Result<Tensor> {
        let (b, n, width) = x.dims3()?;
        let qkv = self.qkv.forward(x)?; // (b, n, 3 · h · d)
        let part = |index: usize| -> Result<Tensor> {
            let part = ops::laid_out(&qkv.narrow(2, index * width, width)?)?;
            Ok(part.reshape((b, n, self.heads, self.head_dim))?) // (b, n, h, d)
        };
        let (q, k) = (angles.rotate(&part(0)?)?, angles.rotate(&part(1)?)?);
        #[expect(clippy::cast_precision_loss, reason = "a head is narrow")]
        let scale = (self.head_dim as f32).sqrt().recip();
        let y = ops::attention(&q, &k, &part(2)?, scale, Mask::Segments(segments))?;
        Ok(self.proj.forward(&y.reshape((b, n, width))?)?) // (b, n, hidden)
    }
}

/// Makes one token of each square of patches.
#[derive(Debug)]
struct Merger {
    ln_q: RmsNorm,
    up: Linear,
    down: Linear,
    width: usize,
}

impl Merger {
    fn load(config: &VisionConfig, weights: &Weights, width_out: usize) -> Result<Self> {
        let width = config.hidden_size * config.merge_unit();
        let mlp = weights.pp("mlp");
        Ok(Self {
            ln_q: RmsNorm::load(&weights.pp("ln_q"), config.hidden_size, EPS)?,
            up: Linear::load(&mlp.pp(0), width, width)?,
            down: Linear::load(&mlp.pp(2), width, width_out)?,
            width,
        })
    }

    /// `[1, patches, hidden]` → `[tokens, width_out]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.ln_q.forward(x)?.reshape(((), self.width))?; // (tokens, merge · merge · hidden)
        Ok(self.down.forward(&ops::gelu_erf(&self.up.forward(&x)?)?)?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn windows_hold_every_token_once(
            sides in prop::collection::vec((1_usize..12, 1_usize..12), 1..4),
            merge in 1_usize..4,
            window in 1_usize..6,
        ) {
            let grids: Vec<PatchGrid> = sides
                .iter()
                .map(|(h, w)| PatchGrid { height: h * merge, width: w * merge })
                .collect();
            let windows = Windows::new(&grids, merge, window);
            let back = inverse(&windows.order);
            let tokens: usize = sides.iter().map(|(h, w)| h * w).sum();
            prop_assert_eq!(windows.order.len(), tokens);
            for (token, place) in back.iter().enumerate() {
                prop_assert_eq!(windows.order[*place as usize] as usize, token);
            }
            let largest = window * window * merge * merge;
            for pair in windows.starts.windows(2) {
                prop_assert!((1..=largest).contains(&(pair[1] - pair[0])));
            }
            let pictures = picture_starts(&grids);
            prop_assert_eq!(windows.starts.last(), pictures.last());
        }
    }

    #[test]
    fn windows_are_cut_off_at_the_edges() {
        let grid = PatchGrid { height: 6, width: 10 };
        let windows = Windows::new(&[grid], 2, 2);
        assert_eq!(windows.order, [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]);
        assert_eq!(windows.starts, [0, 16, 32, 40, 48, 56, 60]);
    }
}

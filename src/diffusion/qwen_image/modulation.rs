//! What the timestep does to the blocks: shift, scale and gate, computed for several steps at once.

use candle_core::{DType, Device, Result as TensorResult, Tensor};

use super::config::Config;
use crate::{
    error::Result,
    layers::Linear,
    ops::{self, Sinusoids},
    weights::Weights,
};

/// What a timestep becomes. The model sees timesteps on a scale of 1 and multiplies them again.
///
/// Reference: <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/transformers/transformer_qwenimage.py#L43-L89>.
const SINUSOIDS: Sinusoids = Sinusoids {
    width: 256,
    flip_sin_to_cos: true,
    downscale_freq_shift: 0.0,
    scale: 1000.0,
    max_period: 10_000.0,
};

/// Shift, scale and gate of one half of a block, each `[1, 1, dim]`.
#[derive(Debug, Clone)]
pub(super) struct Modulation {
    pub(super) shift: Tensor,
    pub(super) scale: Tensor,
    pub(super) gate: Tensor,
}

/// The modulation of a block's two halves.
#[derive(Debug, Clone)]
pub(super) struct BlockModulation {
    pub(super) attention: Modulation,
    pub(super) mlp: Modulation,
}

/// One block's modulation of every kind of token.
#[derive(Debug, Clone)]
pub(super) struct BlockContext {
    /// The picture that is denoised.
    pub(super) target: BlockModulation,
    /// The references, where they are modulated as free of noise; otherwise they follow `target`.
    pub(super) reference: Option<BlockModulation>,
    pub(super) text: BlockModulation,
}

/// Everything in the transformer that depends on the step only.
#[derive(Debug, Clone)]
pub struct StepContext {
    pub(super) blocks: Vec<BlockContext>,
    /// Scale and shift before the last projection, each `[1, 1, dim]`.
    pub(super) scale_out: Tensor,
    pub(super) shift_out: Tensor,
}

/// A timestep's embedding.
#[derive(Debug, Clone)]
pub(super) struct TimeEmbedding {
    linear_1: Linear,
    linear_2: Linear,
}

impl TimeEmbedding {
    pub(super) fn load(weights: &Weights, dim: usize) -> Result<Self> {
        Ok(Self {
            linear_1: Linear::load(&weights.pp("linear_1"), SINUSOIDS.width, dim)?,
            linear_2: Linear::load(&weights.pp("linear_2"), dim, dim)?,
        })
    }

    /// `timesteps` from 0 to 1 → `[timesteps, dim]`.
    pub(super) fn forward(
        &self,
        timesteps: &[f32],
        dtype: DType,
        device: &Device,
    ) -> TensorResult<Tensor> {
        let timesteps = Tensor::from_slice(timesteps, timesteps.len(), device)?;
        let sinusoids = ops::timestep_embedding(&timesteps, SINUSOIDS, dtype)?; // (timesteps, 256)
        self.linear_2.forward(&ops::silu(&self.linear_1.forward(&sinusoids)?)?)
    }
}

/// The projections of the time embedding that one block owns.
#[derive(Debug, Clone)]
pub(super) struct BlockProjections {
    image: Linear,
    text: Linear,
}

/// Shift, scale and gate for attention and for the MLP.
const PARTS: usize = 6;

impl BlockProjections {
    pub(super) fn load(weights: &Weights, config: &Config) -> Result<Self> {
        let load =
            |name: &str| Linear::load(&weights.pp(name).pp(1), config.dim(), PARTS * config.dim());
        Ok(Self { image: load("img_mod")?, text: load("txt_mod")? })
    }

    /// `embedding: [steps (+ 1), dim]` after its activation; the last row is for the references
    /// when there is one more row than `steps`. Returns one context for each step.
    pub(super) fn forward(
        &self,
        embedding: &Tensor,
        steps: usize,
    ) -> TensorResult<Vec<BlockContext>> {
        let image = self.image.forward(embedding)?; // (steps (+ 1), 6·dim)
        let text = self.text.forward(&embedding.narrow(0, 0, steps)?)?; // (steps, 6·dim)
        let reference = match image.dim(0)? > steps {
            true => Some(split(&image, steps)?),
            false => None,
        };
        let context = |step: usize| {
            let (target, text) = (split(&image, step)?, split(&text, step)?);
            Ok(BlockContext { target, text, reference: reference.clone() })
        };
        (0..steps).map(context).collect()
    }
}

/// Row `row` of `[rows, 6·dim]` as the modulation it holds.
fn split(rows: &Tensor, row: usize) -> TensorResult<BlockModulation> {
    let parts = rows.narrow(0, row, 1)?.unsqueeze(1)?.chunk(PARTS, 2)?; // 6 × (1, 1, dim)
    let part = |i: usize| parts[i].contiguous();
    let half = |start: usize| {
        let (shift, scale, gate) = (part(start)?, part(start + 1)?, part(start + 2)?);
        TensorResult::Ok(Modulation { shift, scale, gate })
    };
    Ok(BlockModulation { attention: half(0)?, mlp: half(3)? })
}

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

/// Everything in the transformer that depends on the step only. All of its vectors lie side by side, so that
/// a step's can be put in place of another's at once.
#[derive(Debug, Clone)]
pub struct StepContext {
    pub(super) blocks: Vec<BlockContext>,
    /// Scale and shift before the last projection, each `[1, 1, dim]`.
    pub(super) scale_out: Tensor,
    pub(super) shift_out: Tensor,
    /// `[1, layers · 12 · dim + 2 · dim]`: for each block the target's vectors and the text's, then those before
    /// the last projection. All of the above but the references' are views of it.
    own: Tensor,
    /// `[1, layers · 6 · dim]`: the references' vectors, where they are modulated as free of noise.
    reference: Option<Tensor>,
}

impl StepContext {
    /// From vectors that lie as in `own` and `reference`.
    fn of(own: Tensor, reference: Option<Tensor>, layers: usize) -> TensorResult<Self> {
        let vectors = 2 * PARTS * layers + 2;
        let dim = own.dim(1)?.checked_div(vectors).unwrap_or(0);
        let vector = |of: &Tensor, i: usize| {
            of.narrow(1, i * dim, dim)?.unsqueeze(1) // (1, 1, dim)
        };
        let modulation = |of: &Tensor, first: usize| {
            let half = |first: usize| {
                let [shift, scale, gate] = [first, first + 1, first + 2].map(|i| vector(of, i));
                TensorResult::Ok(Modulation { shift: shift?, scale: scale?, gate: gate? })
            };
            TensorResult::Ok(BlockModulation { attention: half(first)?, mlp: half(first + 3)? })
        };
        let block = |index: usize| {
            let first = 2 * PARTS * index;
            let reference = reference.as_ref().map(|of| modulation(of, PARTS * index));
            TensorResult::Ok(BlockContext {
                target: modulation(&own, first)?,
                text: modulation(&own, first + PARTS)?,
                reference: reference.transpose()?,
            })
        };
        Ok(Self {
            blocks: (0..layers).map(block).collect::<TensorResult<_>>()?,
            scale_out: vector(&own, vectors - 2)?,
            shift_out: vector(&own, vectors - 1)?,
            own,
            reference,
        })
    }

    /// A place for a step's vectors, filled with this one's.
    pub(super) fn place(&self) -> TensorResult<Self> {
        let reference = self.reference.as_ref().map(Tensor::force_contiguous).transpose()?;
        Self::of(self.own.force_contiguous()?, reference, self.blocks.len())
    }

    /// Puts another step's vectors in the place of these.
    pub(super) fn take(&self, other: &Self) -> TensorResult<()> {
        self.own.slice_set(&other.own, 0, 0)?;
        if let (Some(place), Some(other)) = (&self.reference, &other.reference) {
            place.slice_set(other, 0, 0)?;
        }
        Ok(())
    }
}

/// Room for the vectors of several steps, which is filled block by block.
#[derive(Debug)]
pub(super) struct StepContexts {
    /// `[steps, layers · 12 · dim + 2 · dim]`, as in [`StepContext`].
    own: Tensor,
    /// `[1, layers · 6 · dim]`
    reference: Option<Tensor>,
    layers: usize,
    dim: usize,
}

impl StepContexts {
    /// For the `[steps, 2·dim]` that the last projection's norm is modulated with.
    pub(super) fn new(config: &Config, out: &Tensor) -> TensorResult<Self> {
        let (layers, dim) = (config.layers, config.dim());
        let (dtype, device) = (out.dtype(), out.device());
        let width = (2 * PARTS * layers + 2) * dim;
        let own = Tensor::zeros((out.dim(0)?, width), dtype, device)?;
        own.slice_set(&out.contiguous()?, 1, width - 2 * dim)?;
        let reference = match config.zero_cond_t {
            true => Some(Tensor::zeros((1, PARTS * layers * dim), dtype, device)?),
            false => None,
        };
        Ok(Self { own, reference, layers, dim })
    }

    /// Adds what block `index` makes of `embedding: [steps (+ 1), dim]` after its activation; the last row is
    /// for the references where they are modulated as free of noise.
    pub(super) fn add(
        &self,
        index: usize,
        projections: &BlockProjections,
        embedding: &Tensor,
    ) -> TensorResult<()> {
        let steps = self.own.dim(0)?;
        let image = projections.image.forward(embedding)?; // (steps (+ 1), 6·dim)
        let text = projections.text.forward(&embedding.narrow(0, 0, steps)?)?; // (steps, 6·dim)
        let first = 2 * PARTS * index * self.dim;
        self.own.slice_set(&image.narrow(0, 0, steps)?, 1, first)?;
        self.own.slice_set(&text, 1, first + PARTS * self.dim)?;
        if let Some(reference) = &self.reference {
            let row = image.narrow(0, steps, 1)?; // (1, 6·dim)
            reference.slice_set(&row, 1, PARTS * index * self.dim)?;
        }
        Ok(())
    }

    /// One context for each step.
    pub(super) fn steps(&self) -> TensorResult<Vec<StepContext>> {
        let steps = 0..self.own.dim(0)?;
        let own = steps.map(|step| self.own.narrow(0, step, 1));
        own.map(|own| StepContext::of(own?, self.reference.clone(), self.layers)).collect()
    }
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
}

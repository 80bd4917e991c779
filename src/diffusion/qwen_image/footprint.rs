//! What the transformer takes in memory, told from its config and its files' headers.

use std::sync::Arc;

use super::{
    batch::GuidancePass,
    config::Config,
    model::{KEPT_BYTES_MAX, Residency, checkpoint, ends_storage},
};
use crate::{
    error::Result,
    weights::{Checkpoint, ModelFiles, Precision, TensorEntry},
};

/// Bytes of the transformer's weights by the place they have in it.
#[derive(Debug, Clone)]
pub struct Footprint {
    config: Config,
    precision: Precision,
    /// Outside the blocks.
    outside: u64,
    /// Of each block, without its projections.
    blocks: Vec<u64>,
    /// Of each block's projections of the time embedding.
    projections: Vec<u64>,
    /// What the file holds, to be counted again in other types.
    entries: Arc<Vec<(Place, TensorEntry)>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Outside,
    Block(usize),
    Projections(usize),
}

/// The tokens of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenCounts {
    /// Of the picture that is denoised.
    pub target: usize,
    /// Of all references.
    pub references: usize,
    /// Of the longer prompt.
    pub text: usize,
    /// Predictions of a step: one, or two with guidance.
    pub branches: usize,
}

impl Footprint {
    /// Reads config and header of `transformer/`.
    ///
    /// # Errors
    /// As [`Transformer::open`](super::Transformer::open), but for single tensors.
    pub fn read(files: &ModelFiles, precision: &Precision) -> Result<Self> {
        let config = Config::load(files)?;
        let entries = Arc::new(entries(&checkpoint(files)?));
        Ok(Self::of(config, entries, precision))
    }

    fn of(config: Config, entries: Arc<Vec<(Place, TensorEntry)>>, precision: &Precision) -> Self {
        let mut footprint = Self {
            outside: 0,
            blocks: vec![0; config.layers],
            projections: vec![0; config.layers],
            precision: precision.clone(),
            entries,
            config,
        };
        let ends = Precision { storage: ends_storage(precision.storage), ..precision.clone() };
        for (place, entry) in footprint.entries.iter() {
            let mut precision = precision;
            let bytes = match place {
                Place::Outside => {
                    precision = &ends;
                    Some(&mut footprint.outside)
                }
                Place::Block(index) => footprint.blocks.get_mut(*index),
                Place::Projections(index) => footprint.projections.get_mut(*index),
            };
            if let Some(bytes) = bytes {
                *bytes += entry.kept_bytes(precision);
            }
        }
        footprint
    }

    /// The same model with its matrices in other types.
    #[must_use]
    pub fn as_kept(&self, precision: &Precision) -> Self {
        Self::of(self.config.clone(), Arc::clone(&self.entries), precision)
    }

    /// The model's dimensions.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes that stay in memory while the transformer does not compute.
    #[must_use]
    pub fn resting(&self, residency: Residency) -> u64 {
        match residency {
            Residency::Resident => {
                self.outside
                    + self.blocks.iter().sum::<u64>()
                    + self.projections.iter().sum::<u64>()
            }
            Residency::Streamed { blocks } => {
                self.outside + self.blocks.iter().take(blocks).sum::<u64>()
            }
        }
    }

    /// Bytes outside the blocks, which are in memory as long as the model is open.
    #[must_use]
    pub fn outside(&self) -> u64 {
        self.outside
    }

    /// The most bytes of weights while the transformer computes: what stays, and two parts that
    /// are not to stay, the one in use and the one that is read ahead.
    #[must_use]
    pub fn working(&self, residency: Residency) -> u64 {
        let Residency::Streamed { blocks } = residency else { return self.resting(residency) };
        let two = |parts: &[u64]| -> u64 {
            let pairs = parts.windows(2).map(|pair| pair.iter().sum());
            pairs.max().or(parts.first().copied()).unwrap_or(0)
        };
        let streamed = self.blocks.get(blocks..).unwrap_or_default();
        self.resting(residency) + two(streamed).max(two(&self.projections))
    }

    /// The most bytes that reading a block takes besides what is kept of it.
    #[must_use]
    pub fn loading(&self) -> u64 {
        let bytes = self.entries.iter().map(|(_, entry)| entry.loading_bytes(&self.precision));
        bytes.max().unwrap_or(0).max(self.joining())
    }

    /// Bytes of queries', keys' and values' matrices on a GPU, where they are copied into one.
    fn joining(&self) -> u64 {
        const JOINED: u64 = 3;
        if !self.precision.device.is_cuda() {
            return 0;
        }
        let square = [self.config.dim(); 2];
        let alike = self.entries.iter().filter(|(_, entry)| entry.shape == square);
        let bytes = alike.map(|(_, entry)| entry.kept_bytes(&self.precision));
        JOINED * bytes.max().unwrap_or(0)
    }

    /// The most bytes that a product with one matrix takes besides its operands and its result.
    fn widening(&self) -> u64 {
        let bytes = self.entries.iter().map(|(_, entry)| entry.widening_bytes(&self.precision));
        bytes.max().unwrap_or(0)
    }

    /// The most bytes of activations in one step on so many threads.
    #[must_use]
    pub fn activations(&self, tokens: TokenCounts, pass: GuidancePass, threads: usize) -> u64 {
        let number = self.precision.compute.size_in_bytes() as u64;
        let TokenCounts { target, references, text, branches } = tokens;
        let (image, text) = ((target + references) as u64, text as u64);
        let all = image + text;
        let dim = self.config.dim() as u64;
        // In rows of the model's width. At the most, eleven tensors of a row for each token are alive
        // or kept to be used again (streams, queries, keys, values and their forms for attention,
        // outputs; counted, see tests/memory), and the hidden layer
        // of the image's MLP of four rows, which its product quantizes beside it. Each branch of
        // guidance has streams of its own: a batch of them has everything for each, in turn they
        // share all but the streams. While the tokens attend, each thread holds one head's
        // keys and values.
        let (batch, others) = match pass {
            GuidancePass::OneBatch => (branches as u64, 0),
            GuidancePass::InTurn => (1, branches.saturating_sub(1) as u64),
        };
        let row = dim * number;
        let scratch = 2 * threads as u64 * all * self.config.head_dim as u64 * 4;
        let rows = (11 * batch + others) * all * row + batch * (4 * image * row + image * dim * 5);
        let rows = rows.max(8 * batch * all * row + scratch);
        let latents = 4 * image * self.config.latent_dim as u64 * 4;
        let conditioning = 2 * text * self.config.conditioning_dim as u64 * number;
        let rotations = 2 * all * self.config.head_dim as u64 * 4;
        rows + latents + conditioning + rotations + self.widening()
    }

    /// Bytes of the modulation of `steps` steps, as far as it is kept, and of the place on a GPU where recorded
    /// steps put theirs.
    #[must_use]
    pub fn modulation(&self, steps: usize) -> u64 {
        const TOGETHER: u64 = 8;
        let number = self.precision.compute.size_in_bytes() as u64;
        let vectors = if self.config.zero_cond_t { 18 } else { 12 };
        let step = vectors * self.config.layers as u64 * self.config.dim() as u64 * number;
        let place = u64::from(self.precision.device.is_cuda()) * step;
        (steps as u64 * step).min(KEPT_BYTES_MAX as u64 + TOGETHER * step) + place
    }
}

fn entries(checkpoint: &Checkpoint) -> Vec<(Place, TensorEntry)> {
    let place = |name: &str| -> Place {
        let block = name.strip_prefix("transformer_blocks.").and_then(|rest| rest.split_once('.'));
        match block.and_then(|(index, rest)| Some((index.parse().ok()?, rest))) {
            Some((index, rest)) if rest.contains("_mod.") => Place::Projections(index),
            Some((index, _)) => Place::Block(index),
            None => Place::Outside,
        }
    };
    checkpoint.tensors().map(|(name, entry)| (place(name), entry.clone())).collect()
}

//! What the vision-language model takes in memory, told from its config and its file's header.

use candle_core::DType;

use super::{
    VisionLanguageModel,
    config::TextConfig,
    model::{CACHE_TOKENS, EMBEDDING, HEAD},
};
use crate::weights::{Precision, Storage};

/// What a piece of work gives the model to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Patches of all pictures.
    pub patches: usize,
    /// Tokens that are read at once, those of the pictures included.
    pub prompt_tokens: usize,
    /// Tokens that are written at most; 0 where only hidden states are asked for.
    pub answer_tokens: usize,
}

impl VisionLanguageModel {
    /// Bytes of the weights in memory when they are read as `precision` says, as a reader of
    /// prompts, or with the head that it writes with.
    #[must_use]
    pub fn weight_bytes(&self, precision: &Precision, writes: bool) -> u64 {
        let weights = self.weights();
        let tied = self.head_name() == EMBEDDING;
        // Rows are picked from the embedding, so a plain one stays plain beside quantized matrices.
        let rows = match precision.storage {
            Storage::Q8_0 | Storage::Q4K if !weights.is_quantized(EMBEDDING) => {
                Precision { storage: Storage::Plain(DType::BF16), ..precision.clone() }
            }
            _ => precision.clone(),
        };
        let bytes = weights.checkpoint().tensors().map(|(name, entry)| match name {
            EMBEDDING => {
                let head = if tied && writes { entry.kept_bytes(precision) } else { 0 };
                let in_file = precision.device.is_cpu() && entry.has_rows_in_file();
                head + if in_file { 0 } else { entry.kept_bytes(&rows) }
            }
            HEAD if !writes => 0,
            _ => entry.kept_bytes(precision),
        });
        bytes.sum()
    }

    /// The most bytes that reading the weights takes besides what is kept of them.
    #[must_use]
    pub fn loading_bytes(&self, precision: &Precision) -> u64 {
        self.weights().checkpoint().loading_bytes(precision)
    }

    /// The most bytes of activations, keys and values while the model does this work, without what
    /// it leaves behind ([`Self::kept_bytes`]).
    #[must_use]
    pub fn activation_bytes(&self, load: Load) -> u64 {
        let number = self.weights().precision().compute.size_in_bytes() as u64;
        let (text, vision) = (&self.config().text, &self.config().vision);
        let (tokens, patches) = (load.prompt_tokens as u64, load.patches as u64);
        let threads = rayon::current_num_threads() as u64;
        let (width, inner) = (vision.hidden_size as u64, vision.intermediate_size as u64);
        // While the tower's MLP runs: residual, norm and three hidden layers, of which one is also
        // quantized; while it attends: residual, norm, queries, keys and values twice, the result.
        let rows = (3 * width + 3 * inner) * number + 2 * inner;
        let rows = rows.max(11 * width * number);
        let scratch = 2 * threads * patches * vision.head_dim as u64 * 4;
        let pixels = patches * vision.patch_dim() as u64 * 4;
        let tower = patches * rows + scratch + pixels;
        let (width, inner) = (text.hidden_size as u64, text.intermediate_size as u64);
        // While an MLP runs: embeddings twice, residual, norm, three hidden layers, the result.
        let rows = ((5 * width + 3 * inner) * number + 2 * inner).max(10 * width * number);
        let scratch = 2 * threads * tokens * text.head_dim as u64 * 4;
        let logits = if load.answer_tokens > 0 { 4 * text.vocab_size as u64 * 4 } else { 0 };
        let prefill = tokens * rows + scratch + logits;
        let widening = self.weights().checkpoint().widening_bytes(self.weights().precision());
        tower.max(prefill) + cache_bytes(text, load, number) + widening
    }

    /// Bytes that are kept for later: the pictures' patches and tokens, and a prompt's hidden
    /// states.
    #[must_use]
    pub fn kept_bytes(&self, load: Load) -> u64 {
        let number = self.weights().precision().compute.size_in_bytes() as u64;
        let vision = &self.config().vision;
        let width = self.config().text.hidden_size as u64;
        let patches = load.patches as u64;
        let tokens = patches.div_ceil(vision.merge_unit() as u64);
        let hidden = if load.answer_tokens > 0 { 0 } else { load.prompt_tokens as u64 };
        patches * vision.patch_dim() as u64 * 4 + (tokens + hidden) * width * number
    }
}

/// Keys and values of every layer, with the room that the cache makes.
fn cache_bytes(text: &TextConfig, load: Load, number: u64) -> u64 {
    if load.answer_tokens == 0 {
        return 0;
    }
    let room = load.answer_tokens.min(CACHE_TOKENS) + load.prompt_tokens;
    let tokens = (load.prompt_tokens + load.answer_tokens).next_multiple_of(room.max(1)) as u64;
    let width = (text.kv_heads * text.head_dim) as u64;
    2 * text.layers as u64 * tokens * width * number
}

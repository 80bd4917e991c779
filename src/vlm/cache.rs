//! Keys and values of the tokens that the language model has seen.

use candle_core::{Result, Tensor};
use candle_nn::kv_cache::KvCache;

/// The axis of the tokens in `[1, n, heads, d]`.
const TOKEN_AXIS: usize = 1;

/// One sequence's keys and values in every layer. It is filled in place, so it has no `Clone`.
#[derive(Debug)]
pub(super) struct Cache {
    layers: Vec<KvCache>,
}

impl Cache {
    /// An empty cache for `layers` layers, with room for `tokens` tokens; it grows by as many when
    /// they are used up.
    pub(super) fn new(layers: usize, tokens: usize) -> Self {
        let layer = KvCache::new(TOKEN_AXIS, tokens.max(1));
        Self { layers: vec![layer; layers] }
    }

    /// Tokens seen so far.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.layers.first().map_or(0, KvCache::current_seq_len)
    }

    /// Appends new tokens' keys and values `[1, n, kv_heads, d]` in one layer; returns those of all
    /// tokens so far, `[1, len, kv_heads, d]`.
    pub(super) fn append(
        &mut self,
        layer: usize,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        self.layers[layer].append(&key.contiguous()?, &value.contiguous()?)
    }
}

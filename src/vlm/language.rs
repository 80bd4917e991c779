//! The language model: a decoder with grouped-query attention and three-axis rotary positions.
//!
//! Follows `Qwen2_5_VLTextModel` in
//! <https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py>.

use candle_core::{DType, Device, Tensor};

use super::{
    adapter::{Call, LayerAdapter},
    cache::Cache,
    config::TextConfig,
    positions::Position,
    rotary::{Angles, inverse_frequencies},
};
use crate::{
    error::Result,
    layers::{Linear, LowRank, RmsNorm},
    ops::{
        self, LinearWeight, Mask,
        cuda::{self, DecodeLayer, DecodeModel, DecodePlan},
    },
    weights::{FileRows, Storage, Weights},
};

/// The decoder with its weights, without the head that makes logits.
#[derive(Debug)]
pub(super) struct LanguageModel {
    config: TextConfig,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    frequencies: Vec<f32>,
    dtype: DType,
    device: Device,
}

impl LanguageModel {
    /// Reads the decoder below `weights`.
    pub(super) fn load(config: &TextConfig, weights: &Weights) -> Result<Self> {
        let layers = weights.pp("layers");
        let layers: Result<Vec<Layer>> =
            (0..config.layers).map(|index| Layer::load(config, &layers.pp(index))).collect();
        Ok(Self {
            embedding: Embedding::load(config, &weights.pp("embed_tokens"))?,
            layers: layers?,
            norm: RmsNorm::load(&weights.pp("norm"), config.hidden_size, config.rms_norm_eps)?,
            frequencies: inverse_frequencies(config.rope_theta, config.head_dim),
            dtype: weights.precision().compute,
            device: weights.precision().device.clone(),
            config: config.clone(),
        })
    }

    /// With random matrices that `matrix` makes of their sizes `[out, in]`, for times.
    ///
    /// # Errors
    /// A failure of the device.
    #[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
    pub(super) fn random(
        config: &TextConfig,
        device: &Device,
        matrix: &mut dyn FnMut([usize; 2]) -> Result<cuda::StoredMatrix>,
    ) -> Result<Self> {
        let dtype = DType::BF16;
        let (width, eps) = (config.hidden_size, config.rms_norm_eps);
        let norm =
            || -> Result<RmsNorm> { Ok(RmsNorm::new(Tensor::ones(width, dtype, device)?, eps)) };
        let random = |dims: &[usize]| -> Result<Tensor> {
            Ok(Tensor::randn(0.0_f32, 1.0, dims, device)?.to_dtype(dtype)?)
        };
        let (inner, kv_width) = (config.intermediate_size, config.kv_heads * config.head_dim);
        let mut matrix =
            |shape, bias| -> Result<Linear> { Ok(Linear::stored(matrix(shape)?, bias)) };
        let mut layer = || -> Result<Layer> {
            Ok(Layer {
                input_layernorm: norm()?,
                attention: Attention {
                    q_proj: matrix([width, width], Some(random(&[width])?))?,
                    k_proj: matrix([kv_width, width], Some(random(&[kv_width])?))?,
                    v_proj: matrix([kv_width, width], Some(random(&[kv_width])?))?,
                    o_proj: matrix([width, width], None)?,
                    heads: config.heads,
                    kv_heads: config.kv_heads,
                    head_dim: config.head_dim,
                },
                post_attention_layernorm: norm()?,
                gate_proj: matrix([inner, width], None)?,
                up_proj: matrix([inner, width], None)?,
                down_proj: matrix([width, inner], None)?,
            })
        };
        let layers = (0..config.layers).map(|_| layer()).collect::<Result<_>>()?;
        let rows = random(&[config.vocab_size, width])?;
        Ok(Self {
            embedding: Embedding::Read(LinearWeight::Dense(rows)),
            layers,
            norm: norm()?,
            frequencies: inverse_frequencies(config.rope_theta, config.head_dim),
            dtype,
            device: device.clone(),
            config: config.clone(),
        })
    }

    /// Embeddings `[1, n, hidden]` of tokens, which must be below the vocabulary's size.
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let rows = match &self.embedding {
            Embedding::InFile(rows) => rows.pick(tokens)?, // (n, hidden)
            Embedding::Read(matrix) => matrix.rows(&Tensor::new(tokens, &self.device)?)?, // (n, hidden)
        };
        Ok(rows.to_dtype(self.dtype)?.unsqueeze(0)?)
    }

    /// Hidden states after the final norm `[1, n, hidden]` for the embeddings of new tokens
    /// `[1, n, hidden]`; with a cache, the tokens in it come before them. Best called [on a
    /// worker](crate::ops::on_worker), for a token is many small operations.
    ///
    /// # Errors
    /// Cancellation, an adapter of another model, or a failure of the device.
    pub(super) fn forward(
        &self,
        embeddings: &Tensor,
        positions: &[Position],
        mut cache: Option<&mut Cache>,
        call: Call<'_>,
    ) -> Result<Tensor> {
        let adapter = call.adapter.map(|adapter| adapter.check(&self.config)).transpose()?;
        let angles = self.angles(positions)?;
        let offset = cache.as_ref().map_or(0, |cache| cache.len());
        let mut x = embeddings.clone();
        for (index, layer) in self.layers.iter().enumerate() {
            call.cancel.check()?;
            let past = Past { index, offset, cache: cache.as_deref_mut() };
            x = layer.forward(&x, &angles, past, adapter.map(|layers| &layers[index]))?;
        }
        Ok(self.norm.forward(&x)?)
    }

    /// An empty cache with room for `tokens` tokens.
    pub(super) fn cache(&self, tokens: usize) -> Cache {
        Cache::new(self.layers.len(), tokens)
    }

    /// Whether there may be prepared kernels for single tokens.
    pub(super) fn may_decode(&self) -> bool {
        self.dtype == DType::BF16 && cuda::runs_on(&self.device)
    }

    /// Prepares the pass of one token over a cache that is not empty; `None` where no kernels fit.
    ///
    /// # Errors
    /// A failure of the device.
    pub(super) fn decode_plan(&self, head: &Linear, cache: &Cache) -> Result<Option<DecodePlan>> {
        let layers = self.layers.iter().zip(cache.rooms());
        let layers: Option<Vec<_>> = layers.map(|(layer, room)| layer.decoded(room)).collect();
        let (Some(layers), Some(head)) = (layers, head.alone()) else { return Ok(None) };
        let embedding = match &self.embedding {
            Embedding::InFile(_) => None,
            Embedding::Read(matrix) => Some(matrix),
        };
        let TextConfig { heads, kv_heads, head_dim, rms_norm_eps: eps, .. } = self.config;
        let (norm, heads) = (self.norm.weight(), [heads, kv_heads, head_dim]);
        Ok(DecodePlan::new(&DecodeModel { embedding, layers, norm, head, eps, heads })?)
    }

    /// Cosines and sines of a position's angles.
    pub(super) fn cosines_and_sines(&self, position: Position) -> [Vec<f32>; 2] {
        let table = self.table(&[position]);
        [f32::cos, f32::sin].map(|of| table.iter().map(|angle| of(*angle)).collect())
    }

    fn angles(&self, positions: &[Position]) -> Result<Angles> {
        let half = self.frequencies.len();
        Angles::new(&self.table(positions), half, self.dtype, &self.device)
    }

    /// Angles in sections: section `i` turns with axis `i % 3`.
    fn table(&self, positions: &[Position]) -> Vec<f32> {
        let sections = self.config.mrope_section.iter().enumerate();
        let axes: Vec<usize> =
            sections.flat_map(|(i, &len)| std::iter::repeat_n(i % 3, len)).collect();
        let mut table = Vec::with_capacity(positions.len() * axes.len());
        for position in positions {
            let angle = |(axis, frequency): (&usize, &f32)| {
                #[expect(clippy::cast_precision_loss, reason = "positions are below 2^24")]
                let at = position[*axis] as f32;
                at * frequency
            };
            table.extend(axes.iter().zip(&self.frequencies).map(angle));
        }
        table
    }
}

/// The embedding matrix, from which rows are picked.
#[derive(Debug)]
enum Embedding {
    InFile(FileRows),
    Read(LinearWeight),
}

impl Embedding {
    /// A plain one stays plain where matrices are quantized.
    fn load(config: &TextConfig, weights: &Weights) -> Result<Self> {
        let shape = [config.vocab_size, config.hidden_size];
        if let Some(rows) = weights.file_rows("weight", shape)? {
            return Ok(Self::InFile(rows));
        }
        let storage = match weights.precision().storage {
            Storage::Q8_0 | Storage::Q4K if !weights.is_quantized("weight") => {
                Storage::Plain(DType::BF16)
            }
            other => other,
        };
        Ok(Self::Read(weights.with_storage(storage).linear_weight("weight", shape)?))
    }
}

/// What a layer knows of earlier tokens.
struct Past<'a> {
    index: usize,
    offset: usize,
    cache: Option<&'a mut Cache>,
}

#[derive(Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    attention: Attention,
    post_attention_layernorm: RmsNorm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Layer {
    fn load(config: &TextConfig, weights: &Weights) -> Result<Self> {
        let (width, inner, eps) =
            (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
        let mlp = weights.pp("mlp");
        Ok(Self {
            input_layernorm: RmsNorm::load(&weights.pp("input_layernorm"), width, eps)?,
            attention: Attention::load(config, &weights.pp("self_attn"))?,
            post_attention_layernorm: RmsNorm::load(
                &weights.pp("post_attention_layernorm"),
                width,
                eps,
            )?,
            gate_proj: Linear::load_without_bias(&mlp.pp("gate_proj"), width, inner)?,
            up_proj: Linear::load_without_bias(&mlp.pp("up_proj"), width, inner)?,
            down_proj: Linear::load_without_bias(&mlp.pp("down_proj"), inner, width)?,
        })
    }

    /// The layer for a pass of one token; `None` where a file changes one of its matrices.
    fn decoded<'a>(&'a self, cache: [&'a Tensor; 2]) -> Option<DecodeLayer<'a>> {
        let attention = &self.attention;
        Some(DecodeLayer {
            norm: self.input_layernorm.weight(),
            qkv: [attention.q_proj.alone()?, attention.k_proj.alone()?, attention.v_proj.alone()?],
            out: attention.o_proj.alone()?,
            mlp_norm: self.post_attention_layernorm.weight(),
            gate_up: [self.gate_proj.alone()?, self.up_proj.alone()?],
            down: self.down_proj.alone()?,
            cache,
        })
    }

    /// `x: [1, n, hidden]` → the same shape.
    fn forward(
        &self,
        x: &Tensor,
        angles: &Angles,
        past: Past<'_>,
        adapter: Option<&LayerAdapter>,
    ) -> Result<Tensor> {
        let normed = self.input_layernorm.forward(x)?;
        let x = ops::add(x, &self.attention.forward(&normed, angles, past, adapter)?)?;
        let normed = self.post_attention_layernorm.forward(&x)?;
        let layers = [
            (&self.gate_proj, change(adapter, |a| &a.gate_proj)),
            (&self.up_proj, change(adapter, |a| &a.up_proj)),
        ];
        let [gate, up] = Linear::forward_each(layers, &normed)?;
        let inner = ops::swiglu(&gate, &up)?;
        let down = self.down_proj.forward_changed(&inner, change(adapter, |a| &a.down_proj))?;
        Ok(ops::add(&x, &down)?)
    }
}

/// An adapter's change of one matrix, where there is one.
fn change(
    adapter: Option<&LayerAdapter>,
    of: impl Fn(&LayerAdapter) -> &Option<LowRank>,
) -> Option<&LowRank> {
    of(adapter?).as_ref()
}

#[derive(Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn load(config: &TextConfig, weights: &Weights) -> Result<Self> {
        let (width, kv_width) = (config.hidden_size, config.kv_heads * config.head_dim);
        Ok(Self {
            q_proj: Linear::load(&weights.pp("q_proj"), width, width)?,
            k_proj: Linear::load(&weights.pp("k_proj"), width, kv_width)?,
            v_proj: Linear::load(&weights.pp("v_proj"), width, kv_width)?,
            o_proj: Linear::load_without_bias(&weights.pp("o_proj"), width, width)?,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        })
    }

    /// `x: [1, n, hidden]` → the same shape.
    fn forward(
        &self,
        x: &Tensor,
        angles: &Angles,
        past: Past<'_>,
        adapter: Option<&LayerAdapter>,
    ) -> Result<Tensor> {
        let (b, n, width) = x.dims3()?;
        let split = |x: Tensor, heads| x.reshape((b, n, heads, self.head_dim)); // (b, n, h, d)
        let layers = [
            (&self.q_proj, change(adapter, |a| &a.q_proj)),
            (&self.k_proj, change(adapter, |a| &a.k_proj)),
            (&self.v_proj, change(adapter, |a| &a.v_proj)),
        ];
        let [q, k, v] = Linear::forward_each(layers, x)?;
        let q = angles.rotate(&split(q, self.heads)?)?;
        let k = angles.rotate(&split(k, self.kv_heads)?)?;
        let v = split(v, self.kv_heads)?;
        let (k, v) = match past.cache {
            Some(cache) => cache.append(past.index, &k, &v)?,
            None => (k, v),
        };
        #[expect(clippy::cast_precision_loss, reason = "a head is narrow")]
        let scale = (self.head_dim as f32).sqrt().recip();
        let y = ops::attention(&q, &k, &v, scale, Mask::Causal { offset: past.offset })?;
        let y = y.reshape((b, n, width))?;
        Ok(self.o_proj.forward_changed(&y, change(adapter, |a| &a.o_proj))?) // (b, n, hidden)
    }
}

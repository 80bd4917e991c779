//! One joint block: image and text tokens attend to each other, modulated by the timestep.

use candle_core::{DType, Error, Result as TensorResult, Tensor};

use super::{
    config::Config,
    modulation::{BlockContext, BlockModulation, Modulation},
    rope::Rotation,
};
use crate::{
    error::Result,
    layers::{Linear, RmsNorm},
    ops::{self, JointOutput, JointShape, JointStream},
    weights::{AttentionType, Weights},
};

const EPS: f64 = 1e-6;
const MLP_RATIO: usize = 4;

/// Facts about the tokens that all blocks share.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) image: Rotation,
    pub(super) text: Rotation,
    /// Tokens of the picture that is denoised; the references follow.
    pub(super) target_tokens: usize,
    /// Text tokens of each entry of a batch, where they differ; the rest of its rows is padding.
    pub(super) text_lengths: Option<Vec<usize>>,
}

/// Both streams: `image: [b, n_image, dim]`, `text: [b, n_text, dim]`.
#[derive(Debug, Clone)]
pub(super) struct Streams {
    pub(super) image: Tensor,
    pub(super) text: Tensor,
}

/// The attention weights of one stream.
#[derive(Debug, Clone)]
struct StreamAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    norm_query: RmsNorm,
    norm_key: RmsNorm,
}

/// The names of a stream's attention weights in the checkpoint.
struct AttentionNames {
    query: &'static str,
    key: &'static str,
    value: &'static str,
    out: &'static str,
    norm_query: &'static str,
    norm_key: &'static str,
}

const IMAGE_NAMES: AttentionNames = AttentionNames {
    query: "to_q",
    key: "to_k",
    value: "to_v",
    out: "to_out.0",
    norm_query: "norm_q",
    norm_key: "norm_k",
};
const TEXT_NAMES: AttentionNames = AttentionNames {
    query: "add_q_proj",
    key: "add_k_proj",
    value: "add_v_proj",
    out: "to_add_out",
    norm_query: "norm_added_q",
    norm_key: "norm_added_k",
};

/// What one stream brings to the attention, each `[b, n, h, d]`, before norm and rotation.
struct Projections {
    query: Option<Tensor>,
    key: Tensor,
    value: Tensor,
}

#[derive(Debug, Clone)]
struct Mlp {
    up: Linear,
    down: Linear,
}

/// One joint block, without the projections of its modulation.
///
/// Reference: <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/transformers/transformer_qwenimage.py#L473-L762>.
#[derive(Debug, Clone)]
pub(super) struct Block {
    image_attention: StreamAttention,
    text_attention: StreamAttention,
    image_mlp: Mlp,
    text_mlp: Mlp,
    heads: usize,
    head_dim: usize,
    attention_in_bf16: bool,
}

impl Block {
    pub(super) fn load(weights: &Weights, config: &Config) -> Result<Self> {
        let attention = weights.pp("attn");
        let image_attention = StreamAttention::load(&attention, config, &IMAGE_NAMES)?;
        let attention_in_bf16 = weights.precision().attention == AttentionType::LikeWeights
            && image_attention.query.is_narrow();
        Ok(Self {
            image_attention,
            text_attention: StreamAttention::load(&attention, config, &TEXT_NAMES)?,
            image_mlp: Mlp::load(&weights.pp("img_mlp"), config.dim())?,
            text_mlp: Mlp::load(&weights.pp("txt_mlp"), config.dim())?,
            heads: config.heads,
            head_dim: config.head_dim,
            attention_in_bf16,
        })
    }

    /// Both streams after the block.
    pub(super) fn forward(
        &self,
        streams: &Streams,
        layout: &Layout,
        step: &BlockContext,
    ) -> TensorResult<Streams> {
        let normed = self.normed(streams, layout, step)?;
        let text = self.projections(&self.text_attention, &normed.text, true)?;
        let image = self.projections(&self.image_attention, &normed.image, true)?;
        recycle([normed.text, normed.image])?;
        let attended = self.attend(text, image, layout)?;

        let text = self.text_attention.out.forward(&required(attended.text)?)?;
        // Both may be views of one tensor, of which the text was read above.
        let attended = required(attended.image)?;
        let image = self.image_attention.out.forward(&attended)?;
        recycle([attended])?;
        Ok(Streams {
            text: self.finish_text(&streams.text, text, step)?,
            image: self.finish_image(&streams.image, image, layout, step)?,
        })
    }

    /// The picture that is denoised after the block, for the last block: neither the references
    /// nor the text are needed any more, so they are only attended to.
    pub(super) fn forward_target(
        &self,
        streams: &Streams,
        layout: &Layout,
        step: &BlockContext,
    ) -> TensorResult<Tensor> {
        let normed = self.normed(streams, layout, step)?;
        let target = |x: &Tensor| x.narrow(1, 0, layout.target_tokens);
        let text = self.projections(&self.text_attention, &normed.text, false)?;
        let mut image = self.projections(&self.image_attention, &normed.image, false)?;
        let query = self.image_attention.query.forward(&target(&normed.image)?)?;
        image.query = Some(self.heads_of(&query)?);
        recycle([normed.text, normed.image])?;
        let attended = required(self.attend(text, image, layout)?.image)?;
        let image = self.image_attention.out.forward(&attended)?;
        recycle([attended])?;
        self.finish_image(&target(&streams.image)?, image, layout, step)
    }

    /// Both streams, normalised and modulated for attention.
    fn normed(
        &self,
        streams: &Streams,
        layout: &Layout,
        step: &BlockContext,
    ) -> TensorResult<Streams> {
        let text = modulated(&streams.text, &step.text.attention)?;
        let [image] = by_kind([&streams.image], layout, step, |[x], modulation| {
            Ok([modulated(x, &modulation.attention)?])
        })?;
        Ok(Streams { image, text })
    }

    fn projections(
        &self,
        attention: &StreamAttention,
        x: &Tensor,
        with_query: bool,
    ) -> TensorResult<Projections> {
        let heads = |linear: &Linear| self.heads_of(&linear.forward(x)?);
        Ok(Projections {
            key: heads(&attention.key)?,
            value: heads(&attention.value)?,
            query: with_query.then(|| heads(&attention.query)).transpose()?,
        })
    }

    /// Each stream's queries see the keys of both streams; the output is `[b, n, dim]` each.
    fn attend(
        &self,
        text: Projections,
        image: Projections,
        layout: &Layout,
    ) -> TensorResult<JointOutput> {
        #[expect(clippy::cast_precision_loss, reason = "the width of a head is small")]
        let scale = (self.head_dim as f32).sqrt().recip();
        let shape = JointShape { scale, eps: EPS, text_lengths: layout.text_lengths.as_deref() };
        let text_stream = text.stream(&self.text_attention, &layout.text);
        let image_stream = image.stream(&self.image_attention, &layout.image);
        let attended = match self.attention_in_bf16 {
            true => ops::joint_attention_bf16(&text_stream, &image_stream, shape)?,
            false => ops::joint_attention(&text_stream, &image_stream, shape)?,
        };
        for Projections { query, key, value } in [text, image] {
            recycle(query.into_iter().chain([key, value]))?;
        }
        let flat = |x: Option<Tensor>| x.map(|x| x.flatten_from(2)).transpose(); // (b, n, h·d)
        Ok(JointOutput { text: flat(attended.text)?, image: flat(attended.image)? })
    }

    fn heads_of(&self, x: &Tensor) -> TensorResult<Tensor> {
        let (b, n, _) = x.dims3()?;
        x.reshape((b, n, self.heads, self.head_dim)) // (b, n, h, d)
    }

    /// Adds the attention's output to the text stream and applies the MLP.
    fn finish_text(
        &self,
        residual: &Tensor,
        attended: Tensor,
        step: &BlockContext,
    ) -> TensorResult<Tensor> {
        let [text, normed] = joined(residual, &attended, &step.text)?;
        recycle([attended])?;
        let inner = self.text_mlp.forward(normed)?;
        let out = in_range(ops::gated_add(&text, &inner, &step.text.mlp.gate)?)?;
        recycle([text, inner])?;
        Ok(out)
    }

    /// Adds the attention's output to the image stream and applies the MLP.
    fn finish_image(
        &self,
        residual: &Tensor,
        attended: Tensor,
        layout: &Layout,
        step: &BlockContext,
    ) -> TensorResult<Tensor> {
        let [image, normed] = by_kind([residual, &attended], layout, step, |[residual, x], m| {
            joined(residual, x, m)
        })?;
        recycle([attended])?;
        let inner = self.image_mlp.forward(normed)?;
        let [out] = by_kind([&image, &inner], layout, step, |[residual, x], modulation| {
            Ok([in_range(ops::gated_add(residual, x, &modulation.mlp.gate)?)?])
        })?;
        recycle([image, inner])?;
        Ok(out)
    }
}

/// Gives back the memory of tensors that are needed no more and that nobody else holds.
pub(super) fn recycle(tensors: impl IntoIterator<Item = Tensor>) -> TensorResult<()> {
    tensors.into_iter().try_for_each(ops::recycle)
}

/// Keeps the residual streams finite in float16, as the reference does.
fn in_range(x: Tensor) -> TensorResult<Tensor> {
    const MAX: f64 = 65_504.0;
    if x.dtype() == DType::F16 { x.clamp(-MAX, MAX) } else { Ok(x) }
}

/// Applies `f` to the image tokens that are modulated alike: all of them, or the picture that is
/// denoised and the references one after the other. `tensors: [b, n_image, dim]` each.
fn by_kind<const N: usize, const M: usize>(
    tensors: [&Tensor; N],
    layout: &Layout,
    step: &BlockContext,
    f: impl Fn([&Tensor; N], &BlockModulation) -> TensorResult<[Tensor; M]>,
) -> TensorResult<[Tensor; M]> {
    let target_tokens = layout.target_tokens;
    let reference_tokens = tensors[0].dim(1)? - target_tokens;
    let Some(reference) = step.reference.as_ref().filter(|_| reference_tokens > 0) else {
        return f(tensors, &step.target);
    };
    let part = |start: usize, len: usize, modulation: &BlockModulation| {
        let parts: Vec<Tensor> = tensors
            .iter()
            .map(|x| x.narrow(1, start, len)?.contiguous())
            .collect::<TensorResult<_>>()?;
        f(std::array::from_fn(|i| &parts[i]), modulation)
    };
    let mut all = part(0, target_tokens, &step.target)?;
    let reference = part(target_tokens, reference_tokens, reference)?;
    for (all, reference) in all.iter_mut().zip(reference) {
        *all = Tensor::cat(&[&*all, &reference], 1)?; // (b, n_image, dim)
    }
    Ok(all)
}

/// The stream with the attention's output added, and that normalised and modulated for the MLP.
fn joined(
    residual: &Tensor,
    attended: &Tensor,
    modulation: &BlockModulation,
) -> TensorResult<[Tensor; 2]> {
    let BlockModulation { attention, mlp } = modulation;
    let next = [&mlp.scale, &mlp.shift];
    let (sum, normed) = ops::gated_add_norm(residual, attended, &attention.gate, next, EPS)?;
    Ok([sum, normed])
}

fn modulated(x: &Tensor, modulation: &Modulation) -> TensorResult<Tensor> {
    ops::modulated_layer_norm(x, &modulation.scale, &modulation.shift, EPS)
}

/// The output of a stream that had queries.
fn required(attended: Option<Tensor>) -> TensorResult<Tensor> {
    attended.ok_or_else(|| Error::msg("a stream with queries has no attended values"))
}

impl Projections {
    fn stream<'a>(
        &'a self,
        attention: &'a StreamAttention,
        rotation: &'a Rotation,
    ) -> JointStream<'a> {
        JointStream {
            query: self.query.as_ref(),
            key: &self.key,
            value: &self.value,
            norm_query: attention.norm_query.weight(),
            norm_key: attention.norm_key.weight(),
            cos: &rotation.cos,
            sin: &rotation.sin,
        }
    }
}

impl StreamAttention {
    fn load(weights: &Weights, config: &Config, names: &AttentionNames) -> Result<Self> {
        let linear = |name: &str| Linear::load(&weights.pp(name), config.dim(), config.dim());
        let norm = |name: &str| RmsNorm::load(&weights.pp(name), config.head_dim, EPS);
        Ok(Self {
            query: linear(names.query)?,
            key: linear(names.key)?,
            value: linear(names.value)?,
            out: linear(names.out)?,
            norm_query: norm(names.norm_query)?,
            norm_key: norm(names.norm_key)?,
        })
    }
}

impl Mlp {
    fn load(weights: &Weights, dim: usize) -> Result<Self> {
        Ok(Self {
            up: Linear::load(&weights.pp("net.0.proj"), dim, MLP_RATIO * dim)?,
            down: Linear::load(&weights.pp("net.2"), MLP_RATIO * dim, dim)?,
        })
    }

    fn forward(&self, x: Tensor) -> TensorResult<Tensor> {
        let inner = self.up.forward_gelu_tanh(&x)?;
        ops::recycle(x)?;
        let out = self.down.forward(&inner)?;
        ops::recycle(inner)?;
        Ok(out)
    }
}

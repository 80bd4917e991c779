//! One joint block: image and text tokens attend to each other, modulated by the timestep.

mod together;

use candle_core::{DType, Error, Result as TensorResult, Tensor};

use super::{
    config::Config,
    layout::Layout,
    modulation::{BlockContext, BlockModulation, Modulation},
    rope::Rotation,
};
use crate::{
    error::Result,
    layers::{Linear, RmsNorm},
    ops::{self, JointOutput, JointShape, JointStream, ModulatedTokens},
    weights::{AttentionType, Weights},
};

const EPS: f64 = 1e-6;
const MLP_RATIO: usize = 4;

/// Both streams: `image: [b, n_image, dim]`, `text: [b, n_text, dim]`.
#[derive(Debug, Clone)]
pub(super) struct Streams {
    pub(super) image: Tensor,
    pub(super) text: Tensor,
    /// Text and image as the next block's attention begins with them, normalised and modulated, where that came
    /// with the block before.
    pub(super) normed: Option<[Tensor; 2]>,
}

/// The attention weights of one stream.
#[derive(Debug, Clone)]
struct StreamAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    /// The three as one, where a device multiplies by all at once.
    all: Option<Linear>,
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
        let weights = &weights.with_float8_products();
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

    /// Both streams after the block; `next` is of the block after it, if that wants all tokens. What came normalised
    /// with the streams is used up.
    pub(super) fn forward(
        &self,
        streams: &mut Streams,
        layout: &Layout,
        (step, next): (&BlockContext, Option<&BlockContext>),
    ) -> TensorResult<Streams> {
        let runs = Runs::of(streams, layout, step)?;
        if ops::cuda::runs_on(streams.image.device()) {
            let next = next.map(|next| Runs::of(streams, layout, next)).transpose()?;
            return self.forward_together(streams, layout, (&runs, next.as_ref()));
        }
        let (of_text, of_image) = (&self.text_attention, &self.image_attention);
        let text = self.projections(of_text, &streams.text, &runs.text.attention)?;
        let image = self.projections(of_image, &streams.image, &runs.image.attention)?;
        let attended = self.attend(text, image, layout)?;

        let attended_text = required(attended.text)?;
        let text = of_text.joined(&streams.text, &attended_text, &runs.text)?;
        // Both may be views of one tensor, of which the text was read above.
        drop(attended_text);
        let attended = required(attended.image)?;
        let image = of_image.joined(&streams.image, &attended, &runs.image)?;
        recycle([attended])?;
        Ok(Streams {
            text: in_range(self.text_mlp.forward(text, &runs.text.mlp)?)?,
            image: in_range(self.image_mlp.forward(image, &runs.image.mlp)?)?,
            normed: None,
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
        let target = leading(&streams.image, layout.target_tokens)?;
        let runs = Runs::of(streams, layout, step)?;
        let target_runs = RunsOfStream::new(&[(layout.target_tokens, &step.target)]);
        let (of_text, of_image) = (&self.text_attention, &self.image_attention);
        let text = self.seen(of_text, &streams.text, &runs.text.attention)?;
        let mut image = self.seen(of_image, &streams.image, &runs.image.attention)?;
        let query = [&of_image.query];
        let [query] = Linear::modulated_each(query, &target, &target_runs.attention, EPS)?;
        image.query = Some(self.heads_of(&query)?);
        let attended = required(self.attend(text, image, layout)?.image)?;
        let joined = of_image.joined(&target, &attended, &target_runs)?;
        recycle([attended])?;
        in_range(self.image_mlp.forward(joined, &target_runs.mlp)?)
    }

    /// Queries, keys and values of a stream's tokens.
    fn projections(
        &self,
        attention: &StreamAttention,
        x: &Tensor,
        runs: &[ModulatedTokens<'_>],
    ) -> TensorResult<Projections> {
        let linears = [&attention.query, &attention.key, &attention.value];
        self.of_each(&Linear::modulated_each(linears, x, runs, EPS)?)
    }

    /// From queries, keys and values `[b, n, dim]`.
    fn of_each(&self, [query, key, value]: &[Tensor; 3]) -> TensorResult<Projections> {
        Ok(Projections {
            query: Some(self.heads_of(query)?),
            key: self.heads_of(key)?,
            value: self.heads_of(value)?,
        })
    }

    /// Keys and values of a stream's tokens, which are attended to only.
    fn seen(
        &self,
        attention: &StreamAttention,
        x: &Tensor,
        runs: &[ModulatedTokens<'_>],
    ) -> TensorResult<Projections> {
        let linears = [&attention.key, &attention.value];
        let [key, value] = Linear::modulated_each(linears, x, runs, EPS)?;
        Ok(Projections { query: None, key: self.heads_of(&key)?, value: self.heads_of(&value)? })
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
        let shape = JointShape { scale, eps: EPS, text_lengths: layout.text_lengths.as_ref() };
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
}

/// The first `tokens` tokens of each entry of `x: [b, n, dim]`, without gaps.
fn leading(x: &Tensor, tokens: usize) -> TensorResult<Tensor> {
    let entry = |i: usize| x.narrow(0, i, 1)?.narrow(1, 0, tokens);
    match x.dim(0)? {
        1 => entry(0),
        b => Tensor::cat(&(0..b).map(entry).collect::<TensorResult<Vec<_>>>()?, 0), // (b, tokens, dim)
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

/// A stream with what its tokens attended to, `[b, n, dim]`.
struct Joined {
    sum: Tensor,
    /// Its modulated norm, where that came with it.
    normed: Option<Tensor>,
}

/// How the tokens of a stream are modulated in both halves of a block.
struct RunsOfStream<'a> {
    attention: Vec<ModulatedTokens<'a>>,
    mlp: Vec<ModulatedTokens<'a>>,
}

impl<'a> RunsOfStream<'a> {
    fn new(runs: &[(usize, &'a BlockModulation)]) -> Self {
        let half = |half: fn(&BlockModulation) -> &Modulation| {
            let run = |(tokens, modulation): &(usize, &'a BlockModulation)| {
                let Modulation { shift, scale, gate } = half(modulation);
                ModulatedTokens { tokens: *tokens, scale, shift, gate }
            };
            runs.iter().map(run).collect()
        };
        Self { attention: half(|m| &m.attention), mlp: half(|m| &m.mlp) }
    }
}

/// How the tokens of both streams are modulated.
struct Runs<'a> {
    image: RunsOfStream<'a>,
    text: RunsOfStream<'a>,
}

impl<'a> Runs<'a> {
    fn of(streams: &Streams, layout: &Layout, step: &'a BlockContext) -> TensorResult<Self> {
        let (image, text) = (streams.image.dim(1)?, streams.text.dim(1)?);
        let target = layout.target_tokens;
        let image = match &step.reference {
            Some(reference) if image > target => {
                RunsOfStream::new(&[(target, &step.target), (image - target, reference)])
            }
            _ => RunsOfStream::new(&[(image, &step.target)]),
        };
        Ok(Self { image, text: RunsOfStream::new(&[(text, &step.text)]) })
    }
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
        let each = [linear(names.query)?, linear(names.key)?, linear(names.value)?];
        let (all, [query, key, value]) = Linear::joined(each)?;
        Ok(Self {
            query,
            key,
            value,
            all,
            out: linear(names.out)?,
            norm_query: norm(names.norm_query)?,
            norm_key: norm(names.norm_key)?,
        })
    }

    fn joined(
        &self,
        residual: &Tensor,
        attended: &Tensor,
        runs: &RunsOfStream<'_>,
    ) -> TensorResult<Joined> {
        if attended.device().is_cpu() {
            let sum = self.out.gated_add(attended, residual, &runs.attention)?;
            return Ok(Joined { sum, normed: None });
        }
        // A GPU's product cannot end in the sum, but the norm can begin with it.
        let added = self.out.forward(attended)?;
        let halves = [runs.attention.as_slice(), &runs.mlp];
        let (sum, normed) = ops::gated_add_norm_each(residual, &added, halves, EPS)?;
        Ok(Joined { sum, normed: Some(normed) })
    }
}

impl Mlp {
    fn load(weights: &Weights, dim: usize) -> Result<Self> {
        Ok(Self {
            up: Linear::load(&weights.pp("net.0.proj"), dim, MLP_RATIO * dim)?,
            down: Linear::load(&weights.pp("net.2"), MLP_RATIO * dim, dim)?,
        })
    }

    /// The stream and what the MLP adds to it.
    fn forward(&self, stream: Joined, runs: &[ModulatedTokens<'_>]) -> TensorResult<Tensor> {
        let Joined { sum, normed } = stream;
        let inner = match normed {
            Some(normed) => self.up.forward_gelu_tanh(&normed)?,
            None => self.up.modulated_gelu(&sum, runs, EPS)?,
        };
        let out = self.down.gated_add(&inner, &sum, runs)?;
        recycle([inner, sum])?;
        Ok(out)
    }
}

//! A block on a GPU: what is done to the rows of both streams is one start of a kernel, and queries, keys and
//! values are one product. The numbers are those of one stream after the other.

use candle_core::{Result as TensorResult, Tensor};

use super::{Block, EPS, Mlp, Projections, Runs, StreamAttention, Streams, in_range, required};
use crate::{
    diffusion::qwen_image::layout::Layout,
    layers::Linear,
    ops::{self, GatedTokens, JointOutput, ModulatedTokens},
};

impl Block {
    /// [`Self::forward`] where kernels take the rows of both streams at once.
    pub(super) fn forward_together(
        &self,
        streams: &mut Streams,
        layout: &Layout,
        (runs, next): (&Runs<'_>, Option<&Runs<'_>>),
    ) -> TensorResult<Streams> {
        let of = [&self.text_attention, &self.image_attention];
        let normed = streams.normed.take();
        let residual = [&streams.text, &streams.image];
        let attention = [runs.text.attention.as_slice(), &runs.image.attention];
        let mlp = [runs.text.mlp.as_slice(), &runs.image.mlp];

        let [text, image] = match normed {
            Some(normed) => normed,
            None => {
                let rows = [0, 1].map(|i| (residual[i], attention[i]));
                ops::modulated_layer_norm_streams(rows, EPS)?
            }
        };
        let (text, image) = (self.projected(of[0], text)?, self.projected(of[1], image)?);
        let JointOutput { text, image } = self.attend(text, image, layout)?;
        let added = [of[0].out.forward(&required(text)?)?, of[1].out.forward(&required(image)?)?];

        let rows = [0, 1].map(|i| (gated(residual[i], &added[i], attention[i]), mlp[i]));
        let [(text, normed_text), (image, normed_image)] = ops::gated_add_norm_streams(rows, EPS)?;
        drop(added);
        let added =
            [self.text_mlp.of_normed(normed_text)?, self.image_mlp.of_normed(normed_image)?];
        let residual = [&text, &image];
        let rows = [0, 1].map(|i| gated(residual[i], &added[i], mlp[i]));
        let Some(next) = next else {
            let [text, image] = ops::gated_add_streams(rows)?;
            return Ok(Streams { text: in_range(text)?, image: in_range(image)?, normed: None });
        };
        let next = [next.text.attention.as_slice(), &next.image.attention];
        let rows = [0, 1].map(|i| (rows[i], next[i]));
        let [(text, normed_text), (image, normed_image)] = ops::gated_add_norm_streams(rows, EPS)?;
        let normed = Some([normed_text, normed_image]);
        Ok(Streams { text: in_range(text)?, image: in_range(image)?, normed })
    }

    /// Queries, keys and values of a stream's normalised tokens, `[b, n, dim]`.
    fn projected(&self, attention: &StreamAttention, normed: Tensor) -> TensorResult<Projections> {
        let StreamAttention { query, key, value, .. } = attention;
        let Some(all) = &attention.all else {
            let each = [query, key, value].map(|of| (of, None));
            return self.of_each(&Linear::forward_each(each, &normed)?);
        };
        let all = all.forward(&normed)?;
        drop(normed);
        let (b, n, _) = all.dims3()?;
        let all = all.reshape((b, n, 3, self.heads, self.head_dim))?; // (b, n, 3, h, d)
        let part = |i: usize| all.narrow(2, i, 1)?.squeeze(2); // (b, n, h, d)
        Ok(Projections { query: Some(part(0)?), key: part(1)?, value: part(2)? })
    }
}

fn gated<'a>(
    residual: &'a Tensor,
    x: &'a Tensor,
    runs: &'a [ModulatedTokens<'a>],
) -> GatedTokens<'a> {
    GatedTokens { residual, x, runs }
}

impl Mlp {
    /// What the MLP adds, of normalised tokens `[b, n, dim]`.
    fn of_normed(&self, normed: Tensor) -> TensorResult<Tensor> {
        let inner = self.up.forward_gelu_tanh(&normed)?;
        drop(normed);
        self.down.forward(&inner)
    }
}

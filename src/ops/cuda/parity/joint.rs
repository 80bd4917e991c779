//! Joint attention against its composition.

use candle_core::{DType, Result, Tensor};

use super::{Suite, rounded};
use crate::ops::{
    JointShape, JointStream, Mask, TextLengths,
    joint::{prepared_key, prepared_query},
    joint_attention,
};

/// `b`, text tokens, picture tokens, queries of the picture, heads, width of a head.
type Sizes = [usize; 6];

const CASES: &[Sizes] = &[
    [1, 5, 37, 37, 2, 64],
    [2, 33, 150, 100, 2, 128],
    [1, 130, 190, 190, 1, 128],
    [2, 64, 64, 64, 3, 64],
    [1, 1, 1, 1, 1, 128],
    [2, 7, 70, 70, 3, 16],
    [1, 20, 40, 40, 2, 32],
    // Around the tiles of the kernels, with several tiles of queries.
    [2, 4, 192, 130, 1, 128],
    [1, 192, 193, 193, 2, 128],
    [2, 193, 191, 20, 1, 128],
    [1, 191, 400, 40, 1, 128],
    [1, 0, 385, 257, 1, 128],
];

pub(super) fn check(suite: &mut Suite) {
    for sizes in CASES {
        for variant in [Variant::Plain, Variant::Lengths, Variant::NoText, Variant::Joined] {
            one(suite, *sizes, variant);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Plain,
    /// The last text tokens of each batch entry are padding, with keys and values that are no numbers.
    Lengths,
    /// The text has no queries.
    NoText,
    /// Queries, keys and values of a stream lie side by side, as one product gives them.
    Joined,
}

fn one(suite: &mut Suite, sizes: Sizes, variant: Variant) {
    let [b, n_text, n_image, queries, h, d] = sizes;
    let mut rows = |n: usize| suite.random(&[b, n, h, d]);
    let (q_text, mut k_text, mut v_text) = (rows(n_text), rows(n_text), rows(n_text));
    let (q_image, k_image, v_image) = (rows(queries), rows(n_image), rows(n_image));
    let norms: Vec<Tensor> = (0..4).map(|_| suite.random(&[d])).collect();
    let case =
        format!("b {b}, text {n_text}, image {queries} of {n_image}, h {h}, d {d}, {variant:?}");
    let (Ok([cos_text, sin_text]), Ok([cos_image, sin_image])) =
        (suite.angles(n_text, d >> 1), suite.angles(n_image, d >> 1))
    else {
        return;
    };
    let lengths: Vec<usize> = (0..b).map(|i| n_text.saturating_sub(3 * i + 1)).collect();
    if variant == Variant::Lengths {
        let spoilt = |x: &Tensor| padded(x, &lengths).unwrap_or_else(|_| x.clone());
        (k_text, v_text) = (spoilt(&k_text), spoilt(&v_text));
    }
    let inputs = [
        &q_text, &k_text, &v_text, &q_image, &k_image, &v_image, &norms[0], &norms[1], &norms[2],
        &norms[3], &cos_text, &sin_text, &cos_image, &sin_image,
    ];
    let attend = |inputs: [&Tensor; 14]| attend(inputs, variant, &lengths);
    let plain = crate::ops::cuda::not_emulated(|| plain(inputs, variant, &lengths));
    suite.compare_to("joint attention", case, (inputs, &[10, 11, 12, 13]), attend, plain);
}

/// `x: [b, n, h, d]` with NaN in the rows of each batch entry beyond its length.
fn padded(x: &Tensor, lengths: &[usize]) -> Result<Tensor> {
    let (_, n, h, d) = x.dims4()?;
    let mut entries = Vec::new();
    for (i, length) in lengths.iter().enumerate() {
        let nan = Tensor::full(f32::NAN, (1, n - length, h, d), x.device())?;
        entries.push(Tensor::cat(&[&x.narrow(0, i, 1)?.narrow(1, 0, *length)?, &nan], 1)?);
    }
    Tensor::cat(&entries, 0) // (b, n, h, d)
}

fn attend(inputs: [&Tensor; 14], variant: Variant, lengths: &[usize]) -> Result<Tensor> {
    let (mut joined, mut inputs) = (Vec::new(), inputs);
    if variant == Variant::Joined {
        joined = [side_by_side(&inputs[..3])?, side_by_side(&inputs[3..6])?].concat();
    }
    for (input, joined) in inputs.iter_mut().zip(&joined) {
        *input = joined;
    }
    let (text, image) = streams(inputs, variant);
    let lengths = (variant == Variant::Lengths).then(|| TextLengths::new(lengths.to_vec()));
    let shape = JointShape { text_lengths: lengths.as_ref(), ..SHAPE };
    let out = joint_attention(&text, &image, shape)?;
    let parts = [out.text, out.image].into_iter().flatten();
    let parts: Vec<Tensor> = parts.filter(|part| part.elem_count() > 0).collect();
    Tensor::cat(&parts, 1)
}

/// `parts: [b, n, h, d]` as views of one tensor, or keys and values alone where there are fewer queries.
fn side_by_side(parts: &[&Tensor]) -> Result<Vec<Tensor>> {
    let [q, k, v] = parts else { candle_core::bail!("queries, keys and values") };
    let h = q.dim(2)?;
    if k.dim(1)? == 0 {
        return Ok(parts.iter().map(|&part| part.clone()).collect()); // nothing to cut
    }
    let joined = |parts: &[&Tensor]| -> Result<Vec<Tensor>> {
        let all = Tensor::cat(parts, 2)?; // (b, n, parts · h, d)
        (0..parts.len()).map(|i| all.narrow(2, i * h, h)).collect() // (b, n, h, d)
    };
    if q.dim(1)? == k.dim(1)? {
        return joined(parts);
    }
    Ok([vec![(*q).clone()], joined(&[k, v])?].concat())
}

const SHAPE: JointShape<'static> = JointShape { scale: 0.11, eps: 1e-6, text_lengths: None };

/// The operations that joint attention is made of, each rounded.
fn plain(inputs: [&Tensor; 14], variant: Variant, lengths: &[usize]) -> Result<Tensor> {
    let mut narrow = inputs.map(Tensor::clone);
    for x in narrow.iter_mut().take(10) {
        *x = x.to_dtype(DType::BF16)?;
    }
    let (text, image) = streams(narrow.each_ref(), variant);
    let query: Vec<Tensor> = [&text, &image]
        .into_iter()
        .filter_map(|stream| prepared_query(stream, SHAPE).transpose())
        .collect::<Result<_>>()?;
    let query = Tensor::cat(&query, 1)?;
    let keys = [prepared_key(&text, SHAPE)?, prepared_key(&image, SHAPE)?];
    let entry = |i: usize| {
        let length = if variant == Variant::Lengths { lengths[i] } else { text.key.dim(1)? };
        let shown = |[text, image]: [&Tensor; 2]| {
            Tensor::cat(&[&text.narrow(0, i, 1)?.narrow(1, 0, length)?, &image.narrow(0, i, 1)?], 1)
        };
        let (key, value) = (shown(keys.each_ref())?, shown([text.value, image.value])?);
        rounded::attention(&query.narrow(0, i, 1)?, &key, &value, SHAPE.scale, Mask::None)
    };
    let entries = (0..query.dim(0)?).map(entry).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&entries, 0)
}

fn streams(inputs: [&Tensor; 14], variant: Variant) -> (JointStream<'_>, JointStream<'_>) {
    let [q_text, k_text, v_text, q_image, k_image, v_image, ..] = inputs;
    let stream = |query, key, value, norms: usize, angles: usize| JointStream {
        query,
        key,
        value,
        norm_query: inputs[norms],
        norm_key: inputs[norms + 1],
        cos: inputs[angles],
        sin: inputs[angles + 1],
    };
    let text_query = (variant != Variant::NoText).then_some(q_text);
    (stream(text_query, k_text, v_text, 6, 10), stream(Some(q_image), k_image, v_image, 8, 12))
}

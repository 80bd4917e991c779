//! Attention of two streams that see each other, as in the blocks of diffusion transformers: text
//! and picture keep their own projections, norms and positions, and share one softmax.

use std::{ops::Deref, sync::OnceLock};

use candle_core::{DType, Device, Error, Result, Tensor, bail};

use super::{Mask, attention, cuda, flash, rms_norm, rotate_pairs};

/// One stream's projections, before norm and rotation.
#[derive(Debug, Clone, Copy)]
pub struct JointStream<'a> {
    /// `[b, n_query, h, d]`: queries of the first `n_query ≤ n` tokens; `None` where the stream is
    /// attended to only.
    pub query: Option<&'a Tensor>,
    /// `[b, n, h, d]`.
    pub key: &'a Tensor,
    /// `[b, n, h, d]`.
    pub value: &'a Tensor,
    /// Weight of the queries' RMS norm over a head, `[d]`.
    pub norm_query: &'a Tensor,
    /// Weight of the keys' RMS norm over a head, `[d]`.
    pub norm_key: &'a Tensor,
    /// Cosines of the tokens' angles, `[n, d / 2]` in float32; pairs are neighbours, as in
    /// [`rotate_pairs`].
    pub cos: &'a Tensor,
    /// Sines of the tokens' angles, `[n, d / 2]` in float32.
    pub sin: &'a Tensor,
}

/// What both streams share.
#[derive(Debug, Clone, Copy)]
pub struct JointShape<'a> {
    /// Factor of the scores, usually `1 / sqrt(d)`.
    pub scale: f32,
    /// Epsilon of the RMS norms.
    pub eps: f64,
    /// How many text tokens of each batch entry are there, `b` numbers of at most `n_text`; the
    /// rest is padding that nobody attends to, whatever its keys and values are. `None`: all.
    pub text_lengths: Option<&'a TextLengths>,
}

/// How many text tokens each entry of a batch has: numbers of the host, which go to the device that reads
/// them once.
#[derive(Debug, Clone)]
pub struct TextLengths {
    lengths: Vec<usize>,
    near: OnceLock<Tensor>,
}

impl TextLengths {
    /// One length for each entry.
    #[must_use]
    pub fn new(lengths: Vec<usize>) -> Self {
        Self { lengths, near: OnceLock::new() }
    }

    /// The lengths where a kernel on `device` reads them, as 64-bit integers.
    pub(super) fn on(&self, device: &Device) -> Result<Tensor> {
        if let Some(near) = self.near.get().filter(|near| near.device().same_device(device)) {
            return Ok(near.clone());
        }
        let wide = self.lengths.iter().map(|length| i64::try_from(*length).map_err(Error::wrap));
        let wide = wide.collect::<Result<Vec<i64>>>()?;
        let near = Tensor::from_vec(wide, self.lengths.len(), device)?;
        // The first device is the one that computes.
        _ = self.near.set(near.clone());
        Ok(near)
    }
}

impl Deref for TextLengths {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.lengths
    }
}

/// The attended values of both streams.
#[derive(Debug, Clone)]
pub struct JointOutput {
    /// `[b, n_query, h, d]` of the text; `None` where it had no queries. Padding attends as other
    /// tokens do, and means nothing.
    pub text: Option<Tensor>,
    /// `[b, n_query, h, d]` of the picture; `None` where it had no queries.
    pub image: Option<Tensor>,
}

/// Attention over the tokens of both streams: queries and keys are normalised over each head and
/// rotated, then each query sees all keys, those of the text and those of the picture.
///
/// Norms, rotation and softmax are computed in float32; the type of the tensors is that of the
/// projections, and the norms' weights may have it or be float32.
///
/// # Errors
/// Shapes that do not fit, no queries at all, or a failure of the device.
pub fn joint_attention(
    text: &JointStream<'_>,
    image: &JointStream<'_>,
    shape: JointShape<'_>,
) -> Result<JointOutput> {
    check(text, image, shape)?;
    // Of no queries come no results.
    let none = text.query.filter(|query| query.elem_count() == 0);
    if let (Some(none), Some(_)) = (none, image.query) {
        let output = joint_attention(&JointStream { query: None, ..*text }, image, shape)?;
        return Ok(JointOutput { text: Some(none.clone()), ..output });
    }
    if let Some(output) = cuda::joint_attention(text, image, shape)? {
        return Ok(output);
    }
    joint_attention_plain(text, image, shape)
}

/// [`joint_attention`] of float32 tensors with queries, keys, values and weights rounded to bf16 for
/// their products; norms, rotation, softmax and sums stay float32. Where that is not faster, on
/// processors without the instructions and on other devices, it is [`joint_attention`].
///
/// For independent normal numbers the result's error is 3.3e-3 of its root mean square.
///
/// # Errors
/// As [`joint_attention`].
pub fn joint_attention_bf16(
    text: &JointStream<'_>,
    image: &JointStream<'_>,
    shape: JointShape<'_>,
) -> Result<JointOutput> {
    check(text, image, shape)?;
    match flash::joint::attention(text, image, shape)? {
        Some(output) => Ok(output),
        None => joint_attention(text, image, shape),
    }
}

/// [`joint_attention`] composed of the operations it is made of: the twin of the faster versions.
///
/// # Errors
/// As [`joint_attention`].
pub fn joint_attention_plain(
    text: &JointStream<'_>,
    image: &JointStream<'_>,
    shape: JointShape<'_>,
) -> Result<JointOutput> {
    let queries = [prepared_query(text, shape)?, prepared_query(image, shape)?];
    let keys = [prepared_key(text, shape)?, prepared_key(image, shape)?];
    let values = [text.value, image.value];
    let present: Vec<&Tensor> = queries.iter().flatten().collect();
    let query = Tensor::cat(&present, 1)?; // (b, queries of both, h, d)
    let attended = match shape.text_lengths {
        None => {
            let (keys, values) = (Tensor::cat(&keys, 1)?, Tensor::cat(&values, 1)?);
            attention(&query, &keys, &values, shape.scale, Mask::None)?
        }
        Some(lengths) => {
            let entry = |(i, length): (usize, &usize)| {
                let shown = |[text, image]: [&Tensor; 2]| {
                    let text = text.narrow(0, i, 1)?.narrow(1, 0, *length)?;
                    Tensor::cat(&[&text, &image.narrow(0, i, 1)?], 1) // (1, shown, h, d)
                };
                let (keys, values) = (shown([&keys[0], &keys[1]])?, shown(values)?);
                attention(&query.narrow(0, i, 1)?, &keys, &values, shape.scale, Mask::None)
            };
            let entries = lengths.iter().enumerate().map(entry).collect::<Result<Vec<_>>>()?;
            Tensor::cat(&entries, 0)? // (b, queries of both, h, d)
        }
    };
    let mut start = 0;
    let [text, image] = queries.map(|query| {
        let len = query.map(|query| query.dim(1)).transpose()?;
        let part = len.map(|len| attended.narrow(1, start, len)).transpose()?;
        start += len.unwrap_or(0);
        Result::Ok(part)
    });
    Ok(JointOutput { text: text?, image: image? })
}

pub(super) fn prepared_query(
    stream: &JointStream<'_>,
    shape: JointShape<'_>,
) -> Result<Option<Tensor>> {
    let Some(query) = stream.query else { return Ok(None) };
    let tokens = query.dim(1)?;
    let (cos, sin) = (stream.cos.narrow(0, 0, tokens)?, stream.sin.narrow(0, 0, tokens)?);
    let norm = stream.norm_query.to_dtype(query.dtype())?;
    rotated(&rms_norm(query, &norm, shape.eps)?, &cos, &sin).map(Some)
}

pub(super) fn prepared_key(stream: &JointStream<'_>, shape: JointShape<'_>) -> Result<Tensor> {
    let norm = stream.norm_key.to_dtype(stream.key.dtype())?;
    rotated(&rms_norm(stream.key, &norm, shape.eps)?, stream.cos, stream.sin)
}

/// Rotates in float32 whatever the type of `x: [b, n, h, d]` is, as the reference does.
fn rotated(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (cos, sin) = (cos.to_dtype(wide)?, sin.to_dtype(wide)?);
    rotate_pairs(&x.to_dtype(wide)?, &cos, &sin)?.to_dtype(x.dtype())
}

fn check(text: &JointStream<'_>, image: &JointStream<'_>, shape: JointShape<'_>) -> Result<()> {
    let (b, n_text, h, d) = text.key.dims4()?;
    for (name, stream) in [("text", text), ("image", image)] {
        let n = stream.key.dim(1)?;
        if stream.key.dims() != [b, n, h, d] || stream.value.dims() != [b, n, h, d] {
            let (key, value) = (stream.key.dims(), stream.value.dims());
            bail!("joint attention: {name} keys {key:?} and values {value:?} do not fit");
        }
        if let Some(query) = stream.query
            && (query.dims4()? != (b, query.dim(1)?, h, d) || query.dim(1)? > n)
        {
            let dims = query.dims();
            bail!("joint attention: {name} queries {dims:?} do not fit [{b}, {n}, {h}, {d}]");
        }
        if stream.norm_query.dims() != [d] || stream.norm_key.dims() != [d] {
            bail!("joint attention: {name} norms do not have the heads' width {d}");
        }
        if stream.cos.dims2()? != (n, d >> 1) || stream.sin.dims() != stream.cos.dims() {
            let (cos, sin) = (stream.cos.dims(), stream.sin.dims());
            bail!("joint attention: {name} cos {cos:?} and sin {sin:?} do not fit {n} tokens");
        }
    }
    if text.query.is_none() && image.query.is_none() {
        bail!("joint attention: no queries");
    }
    if let Some(lengths) = shape.text_lengths
        && (lengths.len() != b || lengths.iter().any(|length| *length > n_text))
    {
        bail!("joint attention: lengths {lengths:?} do not fit [{b}, {n_text}] text tokens");
    }
    Ok(())
}

//! Plain versions in bf16: every intermediate result is rounded, as separate operations on bf16
//! tensors would leave it. Candle's products on the CPU know no bf16, so they are written out.

use candle_core::{DType, Device, Result, Tensor};

use crate::ops::Mask;

/// `x` rounded to bf16, in float32.
pub(super) fn rounded(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::BF16)?.to_dtype(DType::F32)
}

/// `x · wᵀ + bias` with the product and the sum rounded.
pub(super) fn linear(x: &Tensor, w: &Tensor, bias: &Tensor) -> Result<Tensor> {
    rounded(&rounded(&x.matmul(&rounded(w)?.t()?)?)?.broadcast_add(bias)?)
}

/// Attention with scores, weights and sums rounded; see [`crate::ops::attention`].
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f32,
    mask: Mask<'_>,
) -> Result<Tensor> {
    let (b, n, h, d) = q.dims4()?;
    let (_, m, h_kv, _) = k.dims4()?;
    let group = h.checked_div(h_kv).unwrap_or(1);
    let heads =
        |x: &Tensor| -> Result<Tensor> { x.to_dtype(DType::F32)?.transpose(1, 2)?.contiguous() };
    let (q, k, v) = (heads(q)?, heads(k)?, heads(v)?); // (b, h, n, d), (b, h_kv, m, d) twice
    let hidden: Vec<f32> = (0..n * m)
        .map(|at| {
            let (i, j) = (at.checked_div(m).unwrap_or(0), at.checked_rem(m).unwrap_or(0));
            let seen = match mask {
                Mask::None => true,
                Mask::Causal { offset } => j <= i + offset,
                Mask::Segments(starts) => starts
                    .windows(2)
                    .any(|s| (s[0]..s[1]).contains(&i) && (s[0]..s[1]).contains(&j)),
            };
            if seen { 0.0 } else { f32::NEG_INFINITY }
        })
        .collect();
    let hidden = Tensor::from_vec(hidden, (n, m), &Device::Cpu)?;
    let mut out = Vec::with_capacity(b * h);
    for entry in 0..b {
        for head in 0..h {
            let of = |x: &Tensor, head: usize| x.get(entry)?.get(head);
            let key_head = head.checked_div(group).unwrap_or(0);
            let scores = rounded(&of(&q, head)?.matmul(&of(&k, key_head)?.t()?)?)?; // (n, m)
            let scores = (rounded(&(scores * f64::from(scale))?)? + &hidden)?;
            let weights = scores.broadcast_sub(&scores.max_keepdim(1)?)?.exp()?;
            let weights = rounded(&weights.broadcast_div(&weights.sum_keepdim(1)?)?)?;
            out.push(rounded(&weights.matmul(&of(&v, key_head)?)?)?); // (n, d)
        }
    }
    Tensor::stack(&out, 0)?.reshape((b, h, n, d))?.transpose(1, 2) // (b, n, h, d)
}

//! Scaled dot-product attention.

use candle_core::{D, DType, Device, Result, Tensor};

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask<'a> {
    /// All keys.
    None,
    /// Query `i` sees keys `0..=i + offset`; `offset` is the number of keys that were there before.
    Causal {
        /// Keys before the first query.
        offset: usize,
    },
    /// Tokens see only their own segment; the numbers are the segments' starts and the total at the
    /// end (`cu_seqlens`), so queries and keys are the same tokens.
    Segments(&'a [usize]),
}

/// Attention with `softmax(q · kᵀ · scale)` over the keys that `mask` lets through.
///
/// # Shapes
/// `q: [b, n, h, d]`, `k, v: [b, m, h_kv, d]` with `h` a multiple of `h_kv` (grouped queries:
/// head `i` of the query reads head `i / (h / h_kv)`); returns `[b, n, h, d]`.
///
/// # Errors
/// Shapes that do not fit, or a failure of the device.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32, mask: Mask<'_>) -> Result<Tensor> {
    match mask {
        Mask::Segments(starts) => {
            let mut parts = Vec::with_capacity(starts.len());
            for pair in starts.windows(2) {
                let (start, len) = (pair[0], pair[1] - pair[0]);
                let part = |x: &Tensor| x.narrow(1, start, len);
                parts.push(plain(&part(q)?, &part(k)?, &part(v)?, scale, Mask::None)?);
            }
            Tensor::cat(&parts, 1)
        }
        mask => plain(q, k, v, scale, mask),
    }
}

/// The definition, with the scores stored: what every faster path is tested against.
fn plain(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32, mask: Mask<'_>) -> Result<Tensor> {
    let (_, n, h, _) = q.dims4()?;
    let (b, m, h_kv, d) = k.dims4()?;
    #[expect(clippy::integer_division, reason = "grouped queries: h is a multiple of h_kv")]
    let group = h / h_kv;
    let repeat = |x: &Tensor| -> Result<Tensor> {
        let x = x.unsqueeze(3)?.broadcast_as((b, m, h_kv, group, d))?;
        x.reshape((b, m, h, d))?.transpose(1, 2)?.contiguous() // (b, h, m, d)
    };
    let (k, v) = (repeat(k)?, repeat(v)?);
    let q = q.transpose(1, 2)?.contiguous()?; // (b, h, n, d)
    let scores = (q.matmul(&k.transpose(2, 3)?)? * f64::from(scale))?; // (b, h, n, m)
    let scores = match mask {
        Mask::Causal { offset } => scores.broadcast_add(&causal_bias(n, m, offset, q.device())?)?,
        _ => scores,
    };
    let max = scores.max_keepdim(D::Minus1)?;
    let weights = scores.broadcast_sub(&max)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&v)?.transpose(1, 2)?.contiguous() // (b, n, h, d)
}

/// `[n, m]`: 0 where query `i` may see key `j`, minus infinity elsewhere.
fn causal_bias(n: usize, m: usize, offset: usize, device: &Device) -> Result<Tensor> {
    let bias: Vec<f32> = (0..n)
        .flat_map(|i| (0..m).map(move |j| if j <= i + offset { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    Tensor::from_vec(bias, (n, m), device)?.to_dtype(DType::F32)
}

//! Scaled dot-product attention.
//!
//! The CPU's version runs over tiles and never stores the scores. The plain version is what it is
//! tested against, and what other devices and types run, in pieces of a bounded number of scores.

use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::{cpu, cuda, flash};

/// The most scores that the plain version stores at a time: some kernels of candle's CUDA backend
/// number elements with 32 bits.
const SCORES_MAX: usize = 1 << 30;

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
    check(q, k, v, mask)?;
    if cpu::is_fast(&[q, k, v]) {
        return flash::attention(q, k, v, scale, mask);
    }
    if let Some(output) = cuda::attention(q, k, v, scale, mask)? {
        return Ok(output);
    }
    if q.dtype() == DType::BF16 && q.device().is_cpu() {
        // Candle's products on the CPU know no bf16.
        let wide = |x: &Tensor| x.to_dtype(DType::F32);
        return attention(&wide(q)?, &wide(k)?, &wide(v)?, scale, mask)?.to_dtype(DType::BF16);
    }
    attention_plain(q, k, v, scale, mask)
}

/// [`attention`] by its definition, with the scores stored: the twin of the faster version.
fn attention_plain(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f32,
    mask: Mask<'_>,
) -> Result<Tensor> {
    let Mask::Segments(starts) = mask else {
        return in_pieces(q, k, v, scale, (mask, SCORES_MAX));
    };
    let mut parts = Vec::with_capacity(starts.len());
    for pair in starts.windows(2) {
        let part = |x: &Tensor| x.narrow(1, pair[0], pair[1] - pair[0]);
        parts.push(in_pieces(&part(q)?, &part(k)?, &part(v)?, scale, (Mask::None, SCORES_MAX))?);
    }
    if parts.is_empty() { Ok(q.clone()) } else { Tensor::cat(&parts, 1) }
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask<'_>) -> Result<()> {
    let (b, n, h, d) = q.dims4()?;
    let (b_kv, m, h_kv, d_kv) = k.dims4()?;
    if v.dims() != k.dims() || b_kv != b || d_kv != d || h_kv == 0 || !h.is_multiple_of(h_kv) {
        bail!("attention: q {:?}, k {:?} and v {:?} do not fit", q.dims(), k.dims(), v.dims());
    }
    match mask {
        Mask::Segments(starts) => {
            let rising = starts.is_sorted();
            if !rising || starts.first() != Some(&0) || starts.last() != Some(&n) || n != m {
                bail!("attention: segments {starts:?} do not divide {n} queries and {m} keys");
            }
        }
        Mask::None | Mask::Causal { .. } if m == 0 && n > 0 => {
            bail!("attention: no keys for {n} queries")
        }
        Mask::None | Mask::Causal { .. } => {}
    }
    Ok(())
}

/// The queries in pieces, so that no piece has more than `scores_max` scores (or one query).
fn in_pieces(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f32,
    (mask, scores_max): (Mask<'_>, usize),
) -> Result<Tensor> {
    let (_, n, h, _) = q.dims4()?;
    let (b, m, h_kv, d) = k.dims4()?;
    let group = h.checked_div(h_kv).unwrap_or(1);
    let repeat = |x: &Tensor| -> Result<Tensor> {
        let x = x.unsqueeze(3)?.broadcast_as((b, m, h_kv, group, d))?;
        x.reshape((b, m, h, d))?.transpose(1, 2)?.contiguous() // (b, h, m, d)
    };
    let (k, v) = (repeat(k)?, repeat(v)?);
    let rows = scores_max.checked_div(b * h * m).unwrap_or(n).clamp(1, n.max(1));
    let mut pieces = Vec::with_capacity(n.div_ceil(rows));
    for first in (0..n).step_by(rows) {
        let q = q.narrow(1, first, rows.min(n - first))?;
        let mask = match mask {
            Mask::Causal { offset } => Mask::Causal { offset: offset + first },
            other => other,
        };
        pieces.push(by_definition(&q, &k, &v, scale, mask)?);
    }
    match pieces.as_slice() {
        [] => Ok(q.clone()),
        [piece] => Ok(piece.clone()),
        pieces => Tensor::cat(pieces, 1),
    }
}

/// `q: [b, n, h, d]`, `k, v: [b, h, m, d]` → `[b, n, h, d]`.
fn by_definition(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32, mask: Mask<'_>) -> Result<Tensor> {
    let q = q.transpose(1, 2)?.contiguous()?; // (b, h, n, d)
    let scores = (q.matmul(&k.transpose(2, 3)?)? * f64::from(scale))?; // (b, h, n, m)
    let scores = match mask {
        Mask::Causal { offset } => {
            let bias = causal_bias(q.dim(2)?, k.dim(2)?, offset, q.device())?;
            scores.broadcast_add(&bias.to_dtype(scores.dtype())?)?
        }
        _ => scores,
    };
    let max = scores.max_keepdim(D::Minus1)?;
    let weights = scores.broadcast_sub(&max)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    weights.matmul(v)?.transpose(1, 2)?.contiguous() // (b, n, h, d)
}

/// `[n, m]`: 0 where query `i` may see key `j`, minus infinity elsewhere.
fn causal_bias(n: usize, m: usize, offset: usize, device: &Device) -> Result<Tensor> {
    let bias: Vec<f32> = (0..n)
        .flat_map(|i| (0..m).map(move |j| if j <= i + offset { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    Tensor::from_vec(bias, (n, m), device)?.to_dtype(DType::F32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_give_what_the_whole_gives() {
        let x =
            |n: usize, h: usize| Tensor::randn(0.0_f32, 1.0, (2, n, h, 8), &Device::Cpu).unwrap();
        let (q, k, v) = (x(7, 4), x(9, 2), x(9, 2));
        for mask in [Mask::None, Mask::Causal { offset: 2 }] {
            let whole = in_pieces(&q, &k, &v, 0.3, (mask, usize::MAX)).unwrap();
            for scores_max in [1, 2 * 4 * 9, 3 * 2 * 4 * 9 + 5] {
                let pieces = in_pieces(&q, &k, &v, 0.3, (mask, scores_max)).unwrap();
                let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let pairs = values(&whole).into_iter().zip(values(&pieces));
                let worst = pairs.map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap();
                assert!(worst < 1e-6, "{mask:?} {scores_max}: {worst}");
            }
        }
    }
}
